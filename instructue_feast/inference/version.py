"""What identifies an embedding: two vectors may be compared only if their versions are equal."""

from __future__ import annotations

import hashlib
import json

from instructue_feast.config import InstructueConfig
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES
from instructue_feast.history.render import RENDER_VERSION
from instructue_feast.instructions import Instruction
from instructue_feast.model.modeling import InstructUEModel

_RULES = "embedding-1"
"""Raise it when the same weights and histories would give other vectors (layout, pooling, focus)."""


def model_version(model: InstructUEModel, config: InstructueConfig) -> str:
    """Hash of everything but the instruction that determines an embedding.

    Weights (ours, LoRA's, the base LLM's and encoders' with their tokenizers), settings of the model, the history
    settings of the project, render rules, bucket edges, pooling, size and compute type. Names and places of files do
    not count.

    Returns:
        64 hex digits.
    """
    parts = {
        "rules": _RULES,
        "weights": model.weights_digest(),
        "model": model.config.identity(),
        "history": config.history_digest(),
        "render": RENDER_VERSION,
        "buckets": [COUNT_EDGES, AGE_EDGES_DAYS],
        "pooling": "last hidden state of <USER>, projected, unit length",
        "embedding_dim": model.config.embedding_dim,
        "dtype": str(model.llm_dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def embedding_version(model: InstructUEModel, config: InstructueConfig, instruction: Instruction) -> str:
    """Hash of everything that determines an embedding, instruction included.

    Returns:
        64 hex digits.

    Example:
        >>> embedding_version(model, config, config.registry()["churn"])[:8]  # doctest: +SKIP
        '3f8a90c1'
    """
    return hashlib.sha256(f"{model_version(model, config)} {instruction.content_hash}".encode()).hexdigest()
