"""Small histories, phrasebooks and models for tests of the model and of inference."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pyarrow as pa

from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.render import text_id
from instructue_feast.inference.soft_prompts import model_digest
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.encoders import TextEncoder
from instructue_feast.model.factory import untrained
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.schema import PACKED_HISTORY
from instructue_feast.soft_prompt_file import SoftPrompt

SOURCES = ("bill", "app", "tabular")
NUMERIC = (("tabular", "money", "spend"), ("tabular", "money", "visits"), ("tabular", "age", "years"))
PHRASES = {
    "bill": [f"grocery item {index}" for index in range(30)],
    "app": [f"app {index}" for index in range(10)],
    "tabular": ["home: renter", "home: owner"],
}
INSTRUCTIONS = tuple(
    Instruction(name, text)
    for name, text in {
        "general": "",
        "churn": "Will the user stop coming?",
        "taste": "What food does the user like?",
        "apps": "Which apps does the user open?",
        "home": "Does the user rent?",
        "price": "How sensitive to prices is the user?",
        "baby": "Is there a baby?",
        "pets": "Which pets does the user keep, and what do they eat?",
    }.items()
)


def make_model(llm: str, encoder: str, *, seed: int = 0, embedding_dim: int = 16, **settings: Any) -> InstructUEModel:
    """An untrained model over `SOURCES`."""
    return untrained(
        encoders=dict.fromkeys(SOURCES, encoder),
        numeric_columns=NUMERIC,
        llm=llm,
        embedding_dim=embedding_dim,
        seed=seed,
        **settings,
    )


def make_soft_prompt(
    model: InstructUEModel, *, tokens: int = 3, size: float = 0.5, shift: float = 0.1, seed: int = 0, **changes: Any
) -> SoftPrompt:
    """What tuning might have learned: random soft tokens, and a random shift of the instruction's vectors."""
    rng = np.random.default_rng(seed)
    dims = sum((model.config.encoder_dims or {})[name] for name in model.config.encoder_names)
    values = {
        "vectors": (size * rng.normal(size=(tokens, model.config.hidden_size))).astype(np.float32),
        "shift": (shift * rng.normal(size=dims)).astype(np.float32),
        "instruction_id": "tuned", "text": "", "model_digest": model_digest(model),
        "labels": {"shots": 4, "positive": 2}, "metrics": {},
    }  # fmt: skip
    return SoftPrompt(**(values | changes))


def phrasebook() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Ids, source indices and texts of `PHRASES`."""
    rows = [(text_id(source, text), index, text) for index, source in enumerate(SOURCES) for text in PHRASES[source]]
    ids, sources, texts = zip(*rows, strict=True)
    return np.array(ids, np.int64), np.array(sources, np.int32), list(texts)


def make_table(model: InstructUEModel, encoder: str) -> SoftTokenTable:
    """The soft-token table of `PHRASES`."""
    ids, sources, texts = phrasebook()
    return SoftTokenTable.build(model, ids, sources, TextEncoder.load(encoder).encode(texts))


def make_history(sizes: list[tuple[int, int, int]], *, seed: int = 0) -> PackedHistory:
    """Random histories; each size is the number of texts by source, all zero for a user with nothing at all."""
    rng = np.random.default_rng(seed)
    ids, sources, _ = phrasebook()
    by_source = [ids[sources == index] for index in range(len(SOURCES))]
    texts = [
        rng.choice(by_source[r], own[r], replace=own[r] > len(by_source[r]))  # a whale has some more than once
        for own in sizes
        for r in range(len(SOURCES))
    ]
    total = sum(map(sum, sizes))
    numeric = rng.normal(0, 100, (len(sizes), len(NUMERIC))).astype(np.float32)
    numeric[rng.random(numeric.shape) < 0.2] = np.nan
    numeric[[sum(own) == 0 for own in sizes]] = np.nan
    return PackedHistory(
        user_ids=[f"user-{rng.integers(10**9)}-{index}" for index in range(len(sizes))],
        as_of_us=np.zeros(len(sizes), np.int64),
        offsets=np.cumsum([0, *(sum(own) for own in sizes)]).astype(np.int64),
        source_index=np.repeat(np.tile(np.arange(len(SOURCES)), len(sizes)), np.ravel(sizes)).astype(np.int32),
        text_id=np.concatenate(texts).astype(np.int64),
        count_bucket=rng.integers(0, NUM_COUNT_BUCKETS, total).astype(np.int32),
        age_bucket=rng.integers(0, NUM_AGE_BUCKETS, total).astype(np.int32),
        num_events=np.array(sizes, np.int32),
        tabular_numeric=numeric,
    )


def history_table(history: PackedHistory) -> pa.Table:
    """Packed histories in their Arrow form."""
    bounds = list(itertools.pairwise(history.offsets.tolist()))
    columns = {
        "user_id": history.user_ids,
        "as_of": pa.array(history.as_of_us, pa.timestamp("us", tz="UTC")),
        **{
            name: [getattr(history, name)[start:end] for start, end in bounds]
            for name in ("source_index", "text_id", "count_bucket", "age_bucket")
        },
        "num_events": list(history.num_events),
        "tabular_numeric": list(history.tabular_numeric),
    }
    return pa.table(columns, schema=PACKED_HISTORY)
