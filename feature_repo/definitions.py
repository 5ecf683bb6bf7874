"""Feature views of the published user embeddings; see instructue.yaml."""

from pathlib import Path

from instructue_feast.feature_store.views import feature_views

globals().update(feature_views(Path(__file__).with_name("instructue.yaml")))
