"""Inference: the soft-token table, `UserEmbedder.encode`, and what identifies an embedding.

Import from the modules; this file imports nothing.
"""
