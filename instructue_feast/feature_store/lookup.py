"""Looking users up in the online store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
from feast import FeatureStore
from feast.errors import FeatureServiceNotFoundException

from instructue_feast.errors import ConfigError, VersionMismatchError, did_you_mean, listed
from instructue_feast.feature_store.session import open_store, quiet

# U = users, D = embedding_dim
DEFAULT_SERVICE = "user_embeddings"
_RESOLVE_SECONDS = 1.0  # on top of Feast's own registry cache, whose default is 600


@dataclass(frozen=True, slots=True)
class Lookup:
    """What the online store holds for some users; every array follows the order of the ids asked for.

    Attributes:
        vectors: Instruction -> `[U, D]` float32, unit-norm; a row of zeros where `found` is false.
        found: Instruction -> `[U]` bool: the user is known and the embedding has not outlived the view's ttl.
        as_of: Instruction -> `[U]` datetime64[us] in UTC; NaT for an unknown user.
        age: Instruction -> `[U]` timedelta64[us] since `as_of`; NaT for an unknown user.
        views: Instruction -> the feature view it came from, which names the embedding version.
    """

    vectors: dict[str, npt.NDArray[np.float32]]
    found: dict[str, npt.NDArray[np.bool_]]
    as_of: dict[str, npt.NDArray[np.datetime64]]
    age: dict[str, npt.NDArray[np.timedelta64]]
    views: dict[str, str]


@dataclass(frozen=True, slots=True)
class ServedView:
    """One instruction as the registry knows it."""

    name: str
    instruction: str
    embedding_dim: int
    ttl: timedelta
    join_key: str

    @property
    def ref(self) -> str:
        """What Feast calls its feature."""
        return f"{self.name}:{self.instruction}"


class UserEmbeddings:
    """The user embeddings a Feast repo serves.

    Follows the registry: after `feast apply` of a new publication, lookups move to the new views as soon as Feast's
    registry cache expires (`registry.cache_ttl_seconds`), or at once after `refresh`.

    Args:
        store: A Feast store, or the folder of a Feast repo.
        service: Name of the feature service.

    Raises:
        ConfigError: The folder is no Feast repo.

    Example:
        embeddings = UserEmbeddings("feature_repo")
        found = embeddings.get(["17", "42"], ["churn"])
        found.vectors["churn"]  # [2, 128] float32
    """

    def __init__(self, store: FeatureStore | Path | str, *, service: str = DEFAULT_SERVICE) -> None:
        self.store = open_store(store) if isinstance(store, str | Path) else store
        self.service = service
        self._served: dict[str, ServedView] = {}
        self._resolve_at = 0.0

    def refresh(self) -> None:
        """Reads the registry again."""
        with quiet():
            self.store.refresh_registry()
        self._resolve_at = 0.0

    def served(self) -> dict[str, ServedView]:
        """Instruction -> the view that serves it now.

        Raises:
            ConfigError: The registry has no such feature service: nothing has been published and applied.
        """
        if time.monotonic() >= self._resolve_at:
            # Feast rebuilds every object from its registry on each call, which takes longer than the lookup itself.
            self._served = self._resolve()
            self._resolve_at = time.monotonic() + _RESOLVE_SECONDS
        return self._served

    def _resolve(self) -> dict[str, ServedView]:
        registry, project = self.store.registry, self.store.project
        try:
            service = registry.get_feature_service(self.service, project, allow_cache=True)
        except FeatureServiceNotFoundException:
            names = [one.name for one in registry.list_feature_services(project, allow_cache=True)]
            raise ConfigError(
                f"the registry has no feature service {self.service!r}; there are {listed(names)}",
                "run `feast apply` and `instructue materialize` once a backfill has published, or name another service",
            ) from None
        views = [served_view(self.store, one.name) for one in service.feature_view_projections]
        return {view.instruction: view for view in views}

    def get(
        self, user_ids: Sequence[str], instructions: Sequence[str] | None = None, *, now: datetime | None = None
    ) -> Lookup:
        """Looks users up.

        Feast does not apply a view's ttl online; here an embedding older than it is not found.

        Args:
            user_ids: `U` ids, in any order, repeats allowed.
            instructions: Instruction ids; all that are served for `None`.
            now: What age and ttl are measured against; the present by default.

        Raises:
            ConfigError: An id is not a non-blank string (the message gives its position, never its value), an
                instruction is unknown, or nothing is served.
            VersionMismatchError: A stored vector has another size than its view.
        """
        ids = _checked(user_ids)
        served = self.served()
        for name in instructions or ():
            if name not in served:
                raise ConfigError(f"unknown instruction {name!r}", did_you_mean(name, served))
        wanted = served if instructions is None else {name: served[name] for name in instructions}
        stored = read_stored(self.store, wanted, ids)
        present = np.datetime64((now or datetime.now(UTC)).astimezone(UTC).replace(tzinfo=None), "us")
        lookup = Lookup({}, {}, {}, {}, {name: view.name for name, view in wanted.items()})
        for name, (vectors, found, as_of) in stored.items():
            age = present - as_of
            ttl = wanted[name].ttl
            if ttl:
                found &= age <= np.timedelta64(ttl)  # NaT compares false, and is not found anyway
                vectors[~found] = 0.0
            lookup.vectors[name], lookup.found[name] = vectors, found
            lookup.as_of[name], lookup.age[name] = as_of, age
        return lookup


Stored = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.datetime64]]


def served_view(store: FeatureStore, name: str) -> ServedView:
    """What the registry knows about one of this project's views."""
    view = store.registry.get_feature_view(name, store.project, allow_cache=True)
    feature = view.features[0]
    return ServedView(
        name=name,
        instruction=feature.name,
        embedding_dim=feature.vector_length,
        ttl=view.ttl or timedelta(0),
        join_key=view.entity_columns[0].name,
    )


def read_stored(store: FeatureStore, views: Mapping[str, ServedView], user_ids: Sequence[str]) -> dict[str, Stored]:
    """Reads vectors as they are stored, whatever their age: instruction -> vectors, found, as_of.

    Whether a user is found is told by the value: for an unknown user SQLite answers NOT_FOUND, Redis PRESENT and null.
    """
    result: dict[str, Stored] = {
        name: (
            np.zeros((len(user_ids), view.embedding_dim), dtype=np.float32),
            np.zeros(len(user_ids), dtype=np.bool_),
            np.full(len(user_ids), np.datetime64("NaT"), dtype="datetime64[us]"),
        )
        for name, view in views.items()
    }
    if not user_ids or not views:
        return result
    key = next(iter(views.values())).join_key
    response = store.get_online_features(
        features=[view.ref for view in views.values()], entity_rows=[{key: one} for one in user_ids]
    ).proto
    for name, column in zip(response.metadata.feature_names.val, response.results, strict=True):
        if name not in views:
            continue  # the join key comes back too
        vectors, found, as_of = result[name]
        for row, (value, stamp) in enumerate(zip(column.values, column.event_timestamps, strict=True)):
            numbers = value.float_list_val.val
            if not numbers:
                continue
            if len(numbers) != vectors.shape[1]:
                raise VersionMismatchError(
                    f"{views[name].name} holds a vector of {len(numbers)} numbers, not {vectors.shape[1]}",
                    "apply and materialize the current publication again",
                )
            vectors[row] = numbers
            found[row] = True
            as_of[row] = np.datetime64(stamp.seconds * 1_000_000 + stamp.nanos // 1_000, "us")
    return result


def _checked(user_ids: Sequence[str]) -> list[str]:
    if isinstance(user_ids, str | bytes):
        raise ConfigError("user ids must be a list of strings, got one string", "put it into a list")
    ids = list(user_ids)
    for position, one in enumerate(ids):
        if not isinstance(one, str):
            raise ConfigError(
                f"user id at position {position} is {type(one).__name__}, not a string",
                "pass ids as the strings the run was computed with",
            )
        if not one.strip():
            raise ConfigError(f"user id at position {position} is blank", "leave out rows without a user")
    return ids
