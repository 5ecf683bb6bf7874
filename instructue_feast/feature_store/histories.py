"""Packed histories in the online store, and the run whose model and soft tokens read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from feast import FeatureStore
from feast.errors import FeatureServiceNotFoundException
from feast.protos.feast.types.Value_pb2 import Value

from instructue_feast.errors import ConfigError
from instructue_feast.feature_store.readers import Column, Reader, StoredFeature, reader_of, stored_feature
from instructue_feast.feature_store.views import HISTORY_TAG


@dataclass(frozen=True, slots=True)
class HistoryView:
    """The packed histories a feature service's model reads.

    Attributes:
        stored: Where they are.
        join_key: Name of the entity's key.
        ttl: Zero for no limit.
        run_id: The run they are of.
        model_version: Of that run.
        root: The project's output, where the run's model and soft tokens lie.
    """

    stored: StoredFeature
    join_key: str
    ttl: timedelta
    run_id: str
    model_version: str
    root: str


def history_view(store: FeatureStore, service: str) -> HistoryView:
    """The view of packed histories that belongs to a feature service.

    Raises:
        ConfigError: There is no such service, or none was published.
    """
    registry, project = store.registry, store.project
    try:
        found = registry.get_feature_service(service, project, allow_cache=True)
    except FeatureServiceNotFoundException:
        raise ConfigError(
            f"the registry has no feature service {service!r}", "run `instructue materialize` first"
        ) from None
    name = found.tags.get(HISTORY_TAG)
    if not name:
        raise ConfigError(
            f"feature service {service!r} has no packed histories: its run's extract was gone when it was published",
            "run the backfill again, or publish while its extract is still there",
        )
    view = registry.get_feature_view(name, project, allow_cache=True)
    return HistoryView(
        stored=stored_feature(store, view),
        join_key=view.entity_columns[0].name,
        ttl=view.ttl or timedelta(0),
        run_id=view.tags["run"],
        model_version=view.tags["model_version"],
        root=view.batch_source.path.rsplit("/published/", 1)[0],
    )


def read_histories(store: FeatureStore, view: str, user_ids: Sequence[str]) -> list[bytes | None]:
    """The packed histories of distinct users as they are stored; `None` for an unknown user."""
    found = store.registry.get_feature_view(view, store.project, allow_cache=True)
    reader = reader_of(store, found.entity_columns[0].name)
    return [one and one[0] for one in histories_of(reader, stored_feature(store, found), user_ids)]


def histories_of(reader: Reader, stored: StoredFeature, user_ids: Sequence[str]) -> list[tuple[bytes, int] | None]:
    """Packed history and `as_of` in microseconds of distinct users; `None` for an unknown user."""
    found: list[tuple[bytes, int] | None] = [None] * len(user_ids)
    if not user_ids:
        return found
    column: Column = reader.read([stored], user_ids)[0]
    for row, raw, moment in zip(column.rows, column.values, column.times_us, strict=True):
        value = Value.FromString(raw).bytes_val
        if value:
            found[row] = value, moment
    return found
