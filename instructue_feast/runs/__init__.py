"""Extracts, runs and publications on any fsspec file system: no torch, no Spark, no Feast."""
