"""Feast's batch engine: our views by the column, every other view by the engine it would have had."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import pyarrow as pa
from feast import FeatureView, FileSource, RepoConfig
from feast.importer import import_class
from feast.infra.common.materialization_job import (
    MaterializationJob,
    MaterializationJobStatus,
    MaterializationTask,
)
from feast.infra.common.retrieval_task import HistoricalRetrievalTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import BATCH_ENGINE_CLASS_FOR_TYPE, FeastConfigBaseModel
from feast.types import Array, Bytes, Float32
from feast.value_type import ValueType

from instructue_feast.feature_store.erased import ErasedUsers
from instructue_feast.feature_store.online import EmbeddingStore, WireRows, from_micros, is_ours, to_micros
from instructue_feast.feature_store.scan import Batch, Columns, Scan
from instructue_feast.feature_store.session import is_overwriting, is_quiet
from instructue_feast.feature_store.wire import Storage, encode_bytes, encode_vectors, entity_keys

_BATCH = 2_500  # rows read, encoded and written at a time: while one is written, the next is read
_YEAR = timedelta(weeks=52)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
T = TypeVar("T")


class EmbeddingEngineConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """`batch_engine` in `feature_store.yaml`."""

    type: Literal["instructue_feast.feature_store.engine.EmbeddingEngine"] = (
        "instructue_feast.feature_store.engine.EmbeddingEngine"
    )
    fallback: str | dict[str, Any] = "local"
    """The engine of every other view: what `batch_engine` would be without ours."""


class _Bar(Protocol):
    def update(self, n: int) -> object: ...
    def close(self) -> object: ...


class EmbeddingEngine(ComputeEngine):  # type: ignore[misc]
    """Materializes published embeddings without an object per row.

    The newest row of each user in the window is read from the published files, made wire bytes as a matrix, and handed
    to the online store: to ours as bytes, to any other as Feast's own objects. What `Scan` reads is in
    `feature_store/scan.py`, what the stores promise in `sqlite.py` and `redis.py`.

    A window that goes on where the last one ended, as `feast materialize-incremental` makes them, also takes in what
    was published late or again for a time before it: everything up to its end that has not outlived the view's ttl.
    """

    def __init__(
        self,
        *,
        repo_config: RepoConfig,
        offline_store: Any,
        online_store: Any,
        fallback: str | dict[str, Any] = "local",
        **kwargs: Any,
    ) -> None:
        super().__init__(repo_config=repo_config, offline_store=offline_store, online_store=online_store, **kwargs)
        options = {"type": fallback} if isinstance(fallback, str) else dict(fallback)
        name = options["type"]
        module, engine = BATCH_ENGINE_CLASS_FOR_TYPE.get(name, name).rsplit(".", 1)
        self.fallback: ComputeEngine = import_class(module, engine)(
            repo_config=repo_config, offline_store=offline_store, online_store=online_store, **options
        )

    def update(self, *args: Any, **options: Any) -> None:
        """Nothing of our own to prepare."""
        self.fallback.update(*args, **options)

    def teardown_infra(self, *args: Any, **options: Any) -> None:
        """Nothing of our own to remove."""
        self.fallback.teardown_infra(*args, **options)

    def get_historical_features(self, registry: BaseRegistry, task: HistoricalRetrievalTask) -> Any:
        """As the other engine does."""
        return self.fallback.get_historical_features(registry, task)

    def _materialize_one(self, registry: BaseRegistry, task: MaterializationTask, **options: Any) -> MaterializationJob:
        view = task.feature_view
        if not handles(view):
            return self.fallback.materialize(registry, task, **options)[0]
        job = f"{view.name}-{task.start_time}-{task.end_time}"
        try:
            self._write(task)
        except Exception as error:  # Feast raises it again from the job
            return LocalMaterializationJob(job_id=job, status=MaterializationJobStatus.ERROR, error=error)
        return LocalMaterializationJob(job_id=job, status=MaterializationJobStatus.SUCCEEDED)

    def _write(self, task: MaterializationTask) -> None:
        view, config, started = task.feature_view, self.repo_config, time.monotonic()
        first, last = window(task, datetime.now(UTC))
        source = view.batch_source
        location = FileSource.get_uri_for_file_path(config.repo_path, source.path)
        erased = ErasedUsers(location, config, view, self.online_store)
        scan = Scan(location, _columns(view), to_micros(first), to_micros(last), view.name)
        size = min(config.materialization_config.online_write_batch_size or _BATCH, _BATCH)
        store = _writer(self.online_store, config, view)
        storage: Storage = getattr(config.online_store, "vector_storage", "float32")
        revision, overwrite = published_at(view), is_overwriting()
        bar = task.tqdm_builder(scan.rows) if task.tqdm_builder and not is_quiet() else None
        stored = 0
        try:
            # The next batch is read and encoded while this one is written.
            with ThreadPoolExecutor(1) as reader:
                kept = filter(len, map(erased.without, scan.batches(size)))
                batches = ((one.ids, wire_rows(view, one, revision, storage, overwrite)) for one in kept)
                for ids, rows in _ahead(reader, batches):
                    stored += store(rows)
                    stored -= erased.wrote(ids)
                    if bar is not None:
                        bar.update(len(rows.keys))
            stored -= erased.wrote(pa.array([], pa.string()), last=True)
        finally:
            if bar is not None:
                bar.close()
        if not is_quiet():
            newer = f", {scan.rows - stored:,} kept what is newer" if stored < scan.rows else ""
            print(f"{view.name}: {stored:,} rows written{newer}, {time.monotonic() - started:.1f} s")


def handles(view: Any) -> bool:
    """Whether the engine takes a view by the column: one of ours, of vectors or bytes of one string key in Parquet."""
    if type(view) is not FeatureView or not is_ours(view) or not view.online or getattr(view, "offline", False):
        return False
    keys = view.entity_columns
    return (
        isinstance(view.batch_source, FileSource)
        and len(keys) == 1
        and keys[0].dtype.to_value_type() == ValueType.STRING
        and all(one.dtype in (Array(Float32), Bytes) for one in view.features)
    )


def window(task: MaterializationTask, now: datetime) -> tuple[datetime, datetime]:
    """The event times to materialize, both ends included."""
    start, end, ttl = _aware(task.start_time), _aware(task.end_time), task.feature_view.ttl
    if task.disable_event_timestamp:
        return _EPOCH, end
    previous = task.feature_view.most_recent_end_time
    # Without ttl or an earlier window, Feast's incremental materialization makes one up: the last year.
    made_up = previous is None and not ttl and abs(now - _YEAR - start) < timedelta(minutes=1)
    if made_up or (previous is not None and _aware(previous) == start):
        start = min(start, now - ttl) if ttl else _EPOCH
    return start, end


def published_at(view: FeatureView) -> int | None:
    """When the publication a view belongs to was made, in microseconds; `None` for one that does not say."""
    try:
        made = datetime.strptime(view.tags.get("publication", "").partition("-")[0], "%Y%m%dT%H%M%S%f")
    except ValueError:
        return None
    return to_micros(made.replace(tzinfo=UTC))


def wire_rows(
    view: FeatureView, batch: Batch, revision: int | None, storage: Storage, overwrite: bool = False
) -> WireRows:
    """A batch as it is stored."""
    mapping = view.batch_source.field_mapping or {}
    values = {
        mapping.get(name, name): encode_bytes(one) if isinstance(one, list) else encode_vectors(one, storage)
        for name, one in batch.values.items()
    }
    if revision is not None:
        revisions = np.full(len(batch), revision, dtype=np.int64)
    else:
        revisions = batch.event if batch.created is None else batch.created
    keys = entity_keys(view.entity_columns[0].name, batch.ids.to_pylist())
    return WireRows(keys, values, batch.event, batch.created, revisions, overwrite)


def _columns(view: FeatureView) -> Columns:
    source = view.batch_source
    original = {new: old for old, new in (source.field_mapping or {}).items()}
    return Columns(
        user=original.get(view.entity_columns[0].name, view.entity_columns[0].name),
        event=source.timestamp_field,
        created=source.created_timestamp_column or None,
        features=tuple(original.get(one.name, one.name) for one in view.features),
    )


def _writer(store: Any, config: RepoConfig, view: FeatureView) -> Callable[[WireRows], int]:
    if isinstance(store, EmbeddingStore):
        return lambda rows: store.write_rows(config, view, rows)

    def write(rows: WireRows) -> int:
        store.online_write_batch(config, view, list(_as_feast_rows(view, rows)), None)
        return len(rows.keys)

    return write


def _as_feast_rows(
    view: FeatureView, rows: WireRows
) -> Iterator[tuple[Any, dict[str, Any], datetime, datetime | None]]:
    """Rows as Feast's own engine hands them to a store."""
    join_key = view.entity_columns[0].name
    head = len(entity_keys(join_key, [""])[0])
    for place, key in enumerate(rows.keys):
        entity = EntityKey(join_keys=[join_key], entity_values=[Value(string_val=key[head:].decode())])
        values = {name: Value.FromString(column[place]) for name, column in rows.values.items()}
        created = None if rows.created_micros is None else from_micros(rows.created_micros[place])
        yield entity, values, from_micros(rows.event_micros[place]), created


def _ahead(pool: ThreadPoolExecutor, items: Iterator[T]) -> Iterator[T]:
    """Computes each item while the one before it is in use."""
    coming = pool.submit(next, items, None)
    while (item := coming.result()) is not None:
        coming = pool.submit(next, items, None)
        yield item


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
