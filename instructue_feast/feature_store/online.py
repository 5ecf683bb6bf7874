"""What our online stores have in common: their options, the rows they are given, and the times of these.

How they are read is in `readers.py`: one way for them and for Feast's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from feast import FeatureStore, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import compute_versioned_name
from feast.repo_config import FeastConfigBaseModel

from instructue_feast.feature_store.wire import Storage

# U = users
OWNER_TAG = "managed_by"
OWNER = "instructue-feast"
"""Feast objects with this tag come from this package."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


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


class VectorStorageConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """How vectors are stored: beside Feast's options in `online_store`."""

    vector_storage: Storage = "float32"
    """float16 and int8 take a half and a quarter of the space; stock Feast cannot read them as vectors."""


@runtime_checkable
class EmbeddingStore(Protocol):
    """An online store of ours; both implementations are subclasses of Feast's and read and write the same bytes."""

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: WireRows) -> int:
        """Stores rows unless something newer is there; returns how many it stored."""
        ...

    def delete_entities(self, config: RepoConfig, views: Sequence[FeatureView], ids: Sequence[str]) -> int:
        """Removes users from views; returns how many rows there were."""
        ...


def online_store(store: FeatureStore) -> Any:
    """The online store of an open Feast repo."""
    return store._get_provider().online_store


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
