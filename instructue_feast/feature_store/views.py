"""The feature views of the current publication: one for each (instruction, embedding version)."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureService, FeatureView, Field, FileSource
from feast.data_format import ParquetFormat
from feast.types import Array, Bytes, Float32, String
from feast.value_type import ValueType

from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.feature_store.online import OWNER, OWNER_TAG
from instructue_feast.runs.histories import FEATURE, PublishedHistory
from instructue_feast.runs.items import FEATURE as ITEM_FEATURE
from instructue_feast.runs.items import item_sets
from instructue_feast.runs.publish import Publication, PublishedView, current_publication
from instructue_feast.runs.serving import served_views
from instructue_feast.runs.store import OutputStore

HISTORY_TAG = "packed_history"
"""Tag of the feature service: the view whose packed histories the model of its embeddings reads."""


def feature_views(config_path: Path | str) -> dict[str, object]:
    """Feast objects of the current publication, by the name they must have in `definitions.py`.

    Feast registers what it finds under module-level names, so a repo's `definitions.py` is
    `globals().update(feature_views(Path(__file__).with_name("instructue.yaml")))`.

    Args:
        config_path: The project's `instructue.yaml`.

    Returns:
        The entity; for each published view a `FeatureView` named `<instruction>__<version8>` with the one feature
        `<instruction>`; and the `FeatureService` of the current view of each instruction the config declares. Just the
        entity, and a line on stderr, while nothing is published.

    Raises:
        ConfigError: The config is wrong.
        StorageError: `published.json` cannot be read.
    """
    config = load_config(config_path)
    publication = current_publication(OutputStore(config.output.path))
    entity = Entity(
        name=config.feast.entity,
        join_keys=[config.feast.join_key],
        value_type=ValueType.STRING,
        description="A user of the project's sources.",
        tags={OWNER_TAG: OWNER},
    )
    objects: dict[str, object] = {entity.name: entity}
    if publication is None:
        sys.stderr.write(
            f"Nothing is published in {config.output.path} yet, so there are no feature views to register.\n"
            "Hint: run `instructue backfill`, which publishes, then apply again.\n"
        )
        return objects
    views = {view.name: _feature_view(config, publication, view, entity) for view in publication.views}
    objects.update(views)
    histories = {one.name: _history_view(config, publication, one, entity) for one in publication.histories}
    objects.update(histories)
    objects.update(_item_views(config, publication))
    declared = config.registry()
    current = served_views(OutputStore(config.output.path), publication, config.feast.promotion)
    served = [views[name] for instruction, name in current.items() if instruction in declared]
    if served:
        objects[config.feast.service] = FeatureService(
            name=config.feast.service,
            features=served,
            description="The current user embedding of every instruction.",
            tags={
                OWNER_TAG: OWNER,
                "publication": publication.id,
                "run": publication.run_id,
                HISTORY_TAG: _history_of(publication, served),
            },
        )
    return objects


def _item_views(config: InstructueConfig, publication: Publication) -> dict[str, object]:
    """The item embeddings of every published model, and the entity they belong to."""
    store, models = OutputStore(config.output.path), {view.model_version for view in publication.views}
    # Not `item`: a shop may have an entity of that name, and applying ours would replace it.
    entity = Entity(name="embedded_item", join_keys=["item_id"], value_type=ValueType.STRING, tags={OWNER_TAG: OWNER})
    objects: dict[str, object] = {}
    for one in item_sets(store):
        if one.model_version not in models:
            continue
        objects[entity.name] = entity
        objects[one.view] = FeatureView(
            name=one.view,
            entities=[entity],
            ttl=timedelta(0),
            schema=[
                Field(name="item_id", dtype=String),
                Field(
                    name=ITEM_FEATURE,
                    dtype=Array(Float32),
                    vector_index=True,
                    vector_length=one.embedding_dim,
                    vector_search_metric="COSINE",
                    description="Unit-norm answer embedding of the item's text.",
                ),
            ],
            source=FileSource(
                name=f"{one.view}__source",
                path=store.url("items", one.model_version[:8], "items.parquet"),
                file_format=ParquetFormat(),
                timestamp_field="event_timestamp",
                created_timestamp_column="created",
                tags={OWNER_TAG: OWNER},
            ),
            online=True,
            description=f"Items in the space of the users of model version {one.model_version[:8]}.",
            tags={OWNER_TAG: OWNER, "model_version": one.model_version, "created": one.created},
        )
    return objects


def _history_of(publication: Publication, served: list[FeatureView]) -> str:
    """The packed histories that the model of what is served reads; none for a service of several models."""
    models = {view.tags["model_version"] for view in served}
    return next((one.name for one in publication.histories if {one.model_version} == models), "")


def _feature_view(
    config: InstructueConfig, publication: Publication, view: PublishedView, entity: Entity
) -> FeatureView:
    tags = {
        OWNER_TAG: OWNER,
        "instruction": view.instruction,
        "embedding_version": view.embedding_version,
        "model_version": view.model_version,
        "trained": str(view.trained).lower(),
        "publication": publication.id,
        "run": view.newest.run_id,
        "as_of": view.newest.as_of,
    }
    key = config.feast.join_key
    source = _source(config, publication, view.name)
    vector = Field(
        name=view.instruction,
        dtype=Array(Float32),
        vector_index=True,
        vector_length=view.embedding_dim,
        vector_search_metric="COSINE",
        description="Unit-norm user embedding.",
    )
    return FeatureView(
        name=view.name,
        entities=[entity],
        ttl=timedelta(days=config.feast.ttl_days),
        schema=[Field(name=key, dtype=String), vector],
        source=source,
        online=True,
        description=f"User embedding for the instruction {view.instruction}, version {view.embedding_version[:8]}.",
        tags=tags,
    )


def _history_view(
    config: InstructueConfig, publication: Publication, history: PublishedHistory, entity: Entity
) -> FeatureView:
    """Packed histories, for `AdHocEmbeddings`; in no feature service, because no recommender takes them as input."""
    key = config.feast.join_key
    return FeatureView(
        name=history.name,
        entities=[entity],
        ttl=timedelta(days=config.feast.ttl_days),
        schema=[
            Field(name=key, dtype=String),
            Field(name=FEATURE, dtype=Bytes, description="Packed history; see `runs/history_bytes.py`."),
        ],
        source=_source(config, publication, history.name),
        online=True,
        description=f"Packed histories that model version {history.model_version[:8]} reads.",
        tags={
            OWNER_TAG: OWNER,
            "model_version": history.model_version,
            "history_digest": history.history_digest,
            "publication": publication.id,
            "run": history.run_id,
            "as_of": history.as_of,
        },
    )


def _source(config: InstructueConfig, publication: Publication, view: str) -> FileSource:
    key = config.feast.join_key
    return FileSource(
        name=f"{view}__source",
        path=OutputStore(config.output.path).url("published", publication.id, view),
        file_format=ParquetFormat(),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
        field_mapping=None if key == "user_id" else {"user_id": key},
        tags={OWNER_TAG: OWNER},
    )
