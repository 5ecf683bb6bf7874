"""Published user embeddings as Feast feature views: declared, materialized and looked up."""
