"""Real histories for benchmarks: households of The Complete Journey, packed at 2017-10-01, and models to read them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.datasets.complete_journey import write_complete_journey
from instructue_feast.evaluation.extracts import find_extract, read_extract
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.factory import untrained
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.manifest import parse_as_of

AS_OF = "2017-10-01T00:00:00Z"
TEXTS = (
    "Which product categories will this shopper buy next?",
    "Is this shopper about to stop visiting the stores?",
    "Does this shopper respond to coupons, campaigns and promotions?",
    "Is there a baby in this household?",
    "Which pets does this household keep?",
    "Does this shopper care for health and fitness?",
    "When and how often does this shopper visit the stores?",
    "Will this shopper spend more or less next quarter?",
)
INSTRUCTIONS = [Instruction(f"instruction_{index}", text) for index, text in enumerate(TEXTS)]


@dataclass(frozen=True, slots=True)
class Sample:
    """Some households, in the order of the extract, and the texts they know.

    Attributes:
        history: Their packed histories.
        text_ids: `[N]` distinct texts of these households, ascending.
        source_index: `[N]` source of each text.
        texts: N texts.
    """

    history: PackedHistory
    text_ids: np.ndarray
    source_index: np.ndarray
    texts: list[str]

    def table(self, model: InstructUEModel) -> SoftTokenTable:
        """Their soft-token table under a model; every source has the same encoder."""
        (name,) = model.config.encoder_names
        vectors = model.text_encoder(name).encode(self.texts)
        return SoftTokenTable.build(model, self.text_ids, self.source_index, vectors)


def open_project(folder: str | Path) -> InstructueConfig:
    """The project in a folder; written and extracted there when it is missing."""
    target = Path(folder)
    if not (target / "instructue.yaml").exists():
        write_complete_journey(target)
    config = load_config(target / "instructue.yaml")
    if find_extract(config, parse_as_of(AS_OF)) is None:
        command = [sys.executable, "-m", "instructue_spark.extract", "--config", str(target / "instructue.yaml")]
        subprocess.run([*command, "--as-of", AS_OF], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return config


def sample(config: InstructueConfig, users: int) -> Sample:
    """Every n-th household of the extract, so that lengths are as ragged as they come."""
    extract = find_extract(config, parse_as_of(AS_OF))
    assert extract is not None
    everybody, book = read_extract(config, extract)
    history = everybody.take(np.linspace(0, len(everybody) - 1, min(users, len(everybody))).astype(np.int64))
    text_ids = np.unique(history.text_id)
    rows = book.rows(text_ids)
    return Sample(history, text_ids, book.source_index[rows], [book.texts[row] for row in rows])


def open_model(config: InstructueConfig, kind: str, dtype: str) -> InstructUEModel:
    """`checkpoint`: the trained model of the project, 2 layers. `full`: the whole LLM, seeded and untrained."""
    if kind == "checkpoint":
        assert config.model.path is not None
        return InstructUEModel.from_pretrained(config.model.path, dtype=dtype, merge_lora=True)
    encoders = {source: config.encoder_of(source) for source in config.source_names}
    return untrained(
        encoders=encoders, numeric_columns=config.numeric_columns, llm=config.model.llm, dtype=getattr(torch, dtype)
    )
