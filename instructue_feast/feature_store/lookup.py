"""Looking users up in the online store."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from feast import FeatureStore
from feast.errors import FeatureServiceNotFoundException

from instructue_feast.errors import ConfigError, StorageError, VersionMismatchError, did_you_mean, listed
from instructue_feast.feature_store.adhoc import AdHocEmbeddings, Embedded
from instructue_feast.feature_store.online import to_micros
from instructue_feast.feature_store.readers import (
    Column,
    Reader,
    StoredFeature,
    reader_of,
    stored_feature,
)
from instructue_feast.feature_store.session import open_store, quiet
from instructue_feast.feature_store.wire import decode_vectors, vector_prefix
from instructue_feast.instructions import Instruction

if TYPE_CHECKING:
    import pandas as pd

    from instructue_feast.feature_store.training_set import TrainingSet

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
    embedding_version: str
    stored: StoredFeature

    @property
    def ref(self) -> str:
        """What Feast calls its feature."""
        return f"{self.name}:{self.instruction}"


class UserEmbeddings:
    """The user embeddings a Feast repo serves. One object serves any number of threads.

    Follows the registry: after `feast apply` of a new publication, lookups move to the new views as soon as Feast's
    registry cache expires (`registry.cache_ttl_seconds`), or at once after `refresh`. One `get` reads one state of the
    registry, and every vector of an instruction comes from one view, so from one embedding version.

    Args:
        store: A Feast store, or the folder of a Feast repo.
        service: Name of the feature service.
        versions: Embedding versions a caller depends on, by instruction; eight hex digits or more. A ranker trained on
            one version must not be fed another.

    Raises:
        ConfigError: The folder is no Feast repo.

    Example:
        embeddings = UserEmbeddings("feature_repo")
        found = embeddings.get(["17", "42"], ["churn"])
        found.vectors["churn"]  # [2, 128] float32
    """

    def __init__(
        self,
        store: FeatureStore | Path | str,
        *,
        service: str = DEFAULT_SERVICE,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        self.store = open_store(store) if isinstance(store, str | Path) else store
        self.service = service
        self._versions = dict(versions or {})
        self._served: dict[str, ServedView] = {}
        self._resolve_at = 0.0
        self._resolving = threading.Lock()
        self._readers: dict[str, Reader] = {}
        self._connecting = threading.Lock()

    def refresh(self) -> None:
        """Reads the registry again."""
        with self._resolving:
            with quiet():
                self.store.refresh_registry()
            self._resolve_at = 0.0

    def served(self) -> dict[str, ServedView]:
        """Instruction -> the view that serves it now.

        Raises:
            ConfigError: The registry has no such feature service: nothing has been published and applied.
            VersionMismatchError: It serves another embedding version than the one asked for in `versions`.
        """
        # Feast rebuilds every object from its registry on each call, which takes longer than the lookup itself.
        # One thread does it; the others go on with what was there.
        due = time.monotonic() >= self._resolve_at
        if due and self._resolving.acquire(blocking=not self._served):
            try:
                self._served = self._resolve()
                self._resolve_at = time.monotonic() + _RESOLVE_SECONDS
            finally:
                self._resolving.release()
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
        served = {view.instruction: view for view in views}
        for name, version in self._versions.items():
            if name not in served:
                raise ConfigError(f"unknown instruction {name!r}", did_you_mean(name, served))
            if not served[name].embedding_version.startswith(version):
                raise VersionMismatchError(
                    f"instruction {name!r} is served as {served[name].name}, not in version {version[:8]}",
                    "deploy what was trained on the new version together with it, or roll back with "
                    "`instructue promote`",
                )
        return served

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
            VersionMismatchError: A stored vector has another size than its view, or see `served`.
            StorageError: The online store cannot be read.
        """
        ids = checked_ids(user_ids)
        wanted = self._wanted(instructions)
        try:
            read = self._read(wanted, ids)
        except StorageError:
            self.refresh()  # the views known here may have been removed since
            if self._wanted(instructions) == wanted:
                raise
            wanted = self._wanted(instructions)
            read = self._read(wanted, ids)
        present = np.datetime64(time.time_ns() // 1_000 if now is None else to_micros(now), "us")
        lookup = Lookup({}, {}, {}, {}, {name: view.name for name, view in wanted.items()})
        for name, (vectors, found, as_of) in read.items():
            age = present - as_of
            if wanted[name].ttl:
                found &= age <= np.timedelta64(wanted[name].ttl)  # NaT compares false, and is not found anyway
                vectors[~found] = 0.0
            lookup.vectors[name], lookup.found[name] = vectors, found
            lookup.as_of[name], lookup.age[name] = as_of, age
        return lookup

    def _wanted(self, instructions: Sequence[str] | None) -> dict[str, ServedView]:
        served = self.served()
        if instructions is None:
            return served
        try:
            return {name: served[name] for name in instructions}
        except KeyError as error:
            name = str(error.args[0])
            raise ConfigError(f"unknown instruction {name!r}", did_you_mean(name, served)) from None

    def embed(
        self, user_ids: Sequence[str], instruction: str | Instruction, *, now: datetime | None = None
    ) -> Embedded:
        """Embeds users under an instruction nobody planned for, with the model of the published run.

        See `AdHocEmbeddings.embed`, whose errors it raises; the model is loaded by the first call.
        """
        return self.ad_hoc.embed(checked_ids(user_ids), instruction, now=now)

    async def embed_async(
        self, user_ids: Sequence[str], instruction: str | Instruction, *, now: datetime | None = None
    ) -> Embedded:
        """The same without blocking the event loop; concurrent calls share forward passes."""
        return await self.ad_hoc.embed_async(checked_ids(user_ids), instruction, now=now)

    def training_set(
        self, rows: pd.DataFrame, instructions: Sequence[str] | None = None, *, as_served: bool = False
    ) -> TrainingSet:
        """Joins to each row the embedding that was current at its time; see `training_set.training_set`."""
        from instructue_feast.feature_store.training_set import training_set

        return training_set(self.store, self.served(), rows, instructions, as_served=as_served)

    @cached_property
    def ad_hoc(self) -> AdHocEmbeddings:
        """What answers `embed`."""
        return AdHocEmbeddings(self.store, service=self.service)

    async def get_async(
        self, user_ids: Sequence[str], instructions: Sequence[str] | None = None, *, now: datetime | None = None
    ) -> Lookup:
        """The same as `get`, without blocking the event loop: the read runs in a thread."""
        return await asyncio.to_thread(partial(self.get, user_ids, instructions, now=now))

    def _read(self, wanted: Mapping[str, ServedView], ids: list[str]) -> dict[str, Stored]:
        if not wanted:
            return {}
        key = next(iter(wanted.values())).join_key
        if key not in self._readers:
            with self._connecting:  # stock Feast's stores are not made for threads that come first at the same time
                if key not in self._readers:
                    self._readers[key] = reader_of(self.store, key)
        return _read(self._readers[key], wanted, ids)


Stored = tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_], npt.NDArray[np.datetime64]]


def served_view(store: FeatureStore, name: str) -> ServedView:
    """What the registry knows about one of this project's views.

    Raises:
        VersionMismatchError: The view's name and its embedding version disagree.
    """
    view = store.registry.get_feature_view(name, store.project, allow_cache=True)
    feature = view.features[0]
    version = view.tags.get("embedding_version", "")
    if not version.startswith(name.rpartition("__")[2]):
        raise VersionMismatchError(
            f"view {name} says that it holds embedding version {version[:8]}",
            "register the publication again with `feast apply`",
        )
    return ServedView(
        name=name,
        instruction=feature.name,
        embedding_dim=feature.vector_length,
        ttl=view.ttl or timedelta(0),
        join_key=view.entity_columns[0].name,
        embedding_version=version,
        stored=stored_feature(store, view),
    )


def read_stored(store: FeatureStore, views: Mapping[str, ServedView], user_ids: Sequence[str]) -> dict[str, Stored]:
    """Reads vectors as they are stored, whatever their age: instruction -> vectors, found, as_of.

    Whether a user is found is told by the value: for an unknown user SQLite answers NOT_FOUND, Redis PRESENT and null.
    """
    if not views:
        return {}
    return _read(reader_of(store, next(iter(views.values())).join_key), views, list(user_ids))


def _read(reader: Reader, views: Mapping[str, ServedView], ids: list[str]) -> dict[str, Stored]:
    distinct = ids if len(ids) < 2 else list(dict.fromkeys(ids))
    if not ids:
        columns = [Column([], [], []) for _ in views]
    else:
        columns = reader.read([view.stored for view in views.values()], distinct)
    inverse = None
    if len(distinct) < len(ids):
        position = {one: row for row, one in enumerate(distinct)}
        inverse = np.array([position[one] for one in ids])
    result = {}
    for (name, view), column in zip(views.items(), columns, strict=True):
        stored = _arrays(column, len(distinct), view)
        result[name] = stored if inverse is None else (stored[0][inverse], stored[1][inverse], stored[2][inverse])
    return result


def _arrays(column: Column, users: int, view: ServedView) -> Stored:
    if users == 1 and column.values:  # what a recommender asks most often, without the machinery for many
        value, prefix = column.values[0], vector_prefix(view.embedding_dim)
        if len(value) == len(prefix) + 4 * view.embedding_dim and value.startswith(prefix):
            vector = np.frombuffer(value, "<f4", offset=len(prefix)).reshape(1, -1).copy()
            return vector, np.ones(1, np.bool_), np.array(column.times_us, "datetime64[us]")
    matrix, written = decode_vectors(column.values, view.embedding_dim, view.name)
    rows, times = column.rows, column.times_us
    if not written.all():  # some were written as null
        kept = np.flatnonzero(written).tolist()
        rows, times, matrix = [rows[one] for one in kept], [times[one] for one in kept], matrix[kept]
    shape = users, view.embedding_dim
    if len(rows) == users:  # nobody is missing; their order is the store's
        vectors, as_of, places = np.empty(shape, np.float32), np.empty(users, "datetime64[us]"), np.array(rows, np.intp)
        vectors[places], as_of[places] = matrix, np.array(times, "datetime64[us]")
        return vectors, written, as_of
    vectors, found, as_of = np.zeros(shape, np.float32), np.zeros(users, np.bool_), np.full(users, _NAT)
    if rows:
        vectors[rows], found[rows], as_of[rows] = matrix, True, np.array(times, "datetime64[us]")
    return vectors, found, as_of


_NAT = np.datetime64("NaT", "us")


def checked_ids(user_ids: Sequence[str]) -> list[str]:
    """The ids as a list.

    Raises:
        ConfigError: One is not a non-blank string; the message gives its position, never its value.
    """
    if isinstance(user_ids, str | bytes):
        raise ConfigError("user ids must be a list of strings, got one string", "put it into a list")
    ids = list(user_ids)
    for position, one in enumerate(ids):
        if not isinstance(one, str):
            raise ConfigError(
                f"user id at position {position} is {type(one).__name__}, not a string",
                "pass ids as the strings the run was computed with",
            )
        if not one or one.isspace():
            raise ConfigError(f"user id at position {position} is blank", "leave out rows without a user")
    return ids
