"""What our online stores have in common: which column holds a view's vectors, and what is read and written of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from feast import FeatureStore, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import compute_versioned_name
from feast.types import Array, Float32

from instructue_feast.errors import ConfigError, did_you_mean
from instructue_feast.feature_store.wire import Vectors

# U = users asked for, D = numbers in a vector
OWNER_TAG = "managed_by"
OWNER = "instructue-feast"
"""Feast objects with this tag come from this package."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class VectorColumn:
    """Where the vectors of a view are: `table` is the view's name, with its version where Feast keeps versions."""

    table: str
    feature: str
    join_key: str
    dim: int


@dataclass(frozen=True, slots=True)
class StoredVectors:
    """What an online store holds for some users, in the order asked for, whatever its age.

    Attributes:
        vectors: `[U, D]` float32; zeros where nothing is stored.
        found: `[U]` bool.
        event_micros: `[U]` int64, microseconds since 1970 in UTC; `wire.UNKNOWN_TIME` where nothing is stored.
            `.view("datetime64[us]")` makes times of it, and NaT of that.
        created_micros: `[U]` int64, likewise; also `UNKNOWN_TIME` where the store does not keep it.
    """

    vectors: Vectors
    found: npt.NDArray[np.bool_]
    event_micros: npt.NDArray[np.int64]
    created_micros: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WireRows:
    """Rows of one view ready to be stored; a user at most once.

    Attributes:
        keys: Serialized entity keys.
        values: Feature -> serialized values, in the order of `keys`.
        event_micros: `[U]` int64, microseconds since 1970 in UTC.
        created_micros: `[U]` int64, or `None` where the source has no such column.
        revision: Decides between two rows of the same event time: the higher one stays. Microseconds: of the
            publication for published rows, so that a run published again wins over one computed after it; of `created`
            for all others.
        overwrite: Replace also what is newer: the publication was taken back, and what is newer with it.
    """

    keys: list[bytes]
    values: Mapping[str, list[bytes]]
    event_micros: npt.NDArray[np.int64]
    created_micros: npt.NDArray[np.int64] | None
    revision: npt.NDArray[np.int64]
    overwrite: bool = False


@runtime_checkable
class EmbeddingStore(Protocol):
    """An online store of ours; both implementations are subclasses of Feast's and read and write the same bytes."""

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: WireRows) -> int:
        """Stores rows unless something newer is there; returns how many it stored."""
        ...

    def read_columns(
        self, config: RepoConfig, columns: Sequence[VectorColumn], ids: Sequence[str]
    ) -> list[StoredVectors]:
        """Reads several columns of the same users."""
        ...

    def delete_entities(self, config: RepoConfig, views: Sequence[FeatureView], ids: Sequence[str]) -> int:
        """Removes users from views; returns how many rows there were."""
        ...


class ReadsVectors(ABC):
    """The part of the reading that does not depend on where the vectors are."""

    def read_vectors(
        self, config: RepoConfig, view: FeatureView, ids: Sequence[str], feature: str | None = None
    ) -> StoredVectors:
        """Reads one view, with one query or one pipeline; see `vector_column` and `StoredVectors`.

        Nothing is filtered by ttl here.

        Raises:
            ConfigError: The view has no such vector, or more than one join key.
            VersionMismatchError: A stored value is no vector of that size.
        """
        return self.read_columns(config, [vector_column(config, view, feature)], ids)[0]

    @abstractmethod
    def read_columns(
        self, config: RepoConfig, columns: Sequence[VectorColumn], ids: Sequence[str]
    ) -> list[StoredVectors]:
        """Reads several columns of the same users.

        The fast way for a caller that keeps its `VectorColumn`s. Columns must share their join key.

        Args:
            config: The repo's configuration.
            columns: See `vector_column`.
            ids: `U` ids, repeats allowed.

        Returns:
            For each column what is stored, whatever its age.
        """


def online_store(store: FeatureStore) -> Any:
    """The online store of an open Feast repo."""
    return store._get_provider().online_store


def vector_column(config: RepoConfig, view: FeatureView, feature: str | None = None) -> VectorColumn:
    """The column of a view's vectors: `feature`, by default the only one of type `Array(Float32)`.

    Raises:
        ConfigError: There is no such feature or more than one, its field has no `vector_length`, or the view has more
            than one join key.
    """
    vectors = {one.name: one for one in view.features if one.dtype == Array(Float32)}
    if feature is None and len(vectors) == 1:
        feature = next(iter(vectors))
    if feature is None or feature not in vectors:
        raise ConfigError(
            f"view {view.name} has no vector {feature or ''}".rstrip(), did_you_mean(feature or "", vectors)
        )
    if len(view.entity_columns) != 1:
        raise ConfigError(f"view {view.name} has {len(view.entity_columns)} join keys", "name a view with one")
    length = vectors[feature].vector_length
    if not length:
        raise ConfigError(f"feature {feature} of view {view.name} has no length", "declare `vector_length`")
    return VectorColumn(versioned_name(config, view), feature, view.entity_columns[0].name, length)


def versioned_name(config: RepoConfig, view: FeatureView) -> str:
    """A view's name as the online store knows it."""
    return str(compute_versioned_name(view, config.registry.enable_online_feature_view_versioning))


def is_ours(view: Any) -> bool:
    """Whether a Feast object comes from this package."""
    return bool(view.tags.get(OWNER_TAG) == OWNER)


def to_micros(time: datetime) -> int:
    """Microseconds since 1970; a time without a zone is in UTC, as everywhere in Feast."""
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (aware - _EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    """The reverse, in UTC."""
    return _EPOCH + timedelta(microseconds=int(micros))


def expired(view: FeatureView, time: datetime | None, now: datetime) -> bool:
    """Whether a value of one of our views has outlived the view's ttl. Other views are served as stock Feast does."""
    return bool(time and view.ttl and is_ours(view) and now - time > view.ttl)
