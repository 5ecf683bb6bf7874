"""The Spark jobs: extraction, text encoding, embedding, and the backfill that chains them."""
