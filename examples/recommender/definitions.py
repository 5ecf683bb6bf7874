"""The recommender's Feast repo: user embeddings beside the features any team has."""

from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureService, FeatureView, Field, FileSource
from feast.types import Array, Float32, String
from feast.value_type import ValueType

from instructue_feast.feature_store.views import feature_views

HERE = Path(__file__).parent
# One view per instruction, and the service `user_embeddings`: what `instructue backfill` published.
embeddings = feature_views(HERE / "instructue.yaml")
globals().update(embeddings)

user = next(one for one in embeddings.values() if isinstance(one, Entity))
category = Entity(name="category", join_keys=["category"], value_type=ValueType.STRING)


def _view(name: str, entity: Entity) -> FeatureView:
    """A view of everything a Parquet file has about an entity."""
    path = HERE / "features" / f"{name}.parquet"
    known = {entity.join_key, "event_timestamp", "created"}
    fields = [
        Field(name=column.name, dtype=Array(Float32) if pa.types.is_list(column.type) else Float32)
        for column in pq.read_schema(path)
        if column.name not in known
    ]
    source = FileSource(
        name=f"{name}__source",
        path=str(path),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    key = Field(name=entity.join_key, dtype=String)
    return FeatureView(name=name, entities=[entity], ttl=timedelta(days=400), schema=[key, *fields], source=source)


household_stats = _view("household_stats", user)
category_stats = _view("category_stats", category)
# The category's name as the model's answer tower reads it: in the same space as the user embeddings.
category_embedding = _view("category_embedding", category)

ranker_users = FeatureService(name="ranker_users", features=[household_stats])
ranker_categories = FeatureService(name="ranker_categories", features=[category_stats, category_embedding])
