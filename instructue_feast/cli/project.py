"""Opening a project on this machine: its model, an extract, and the soft tokens of some users' texts."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from instructue_feast.cli.extract import log_file
from instructue_feast.cli.jobs import StageDisplay, run_job
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError, DataError, StorageError, did_you_mean
from instructue_feast.instructions import Instruction

if TYPE_CHECKING:
    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.inference.soft_tokens import SoftTokenTable
    from instructue_feast.model.modeling import InstructUEModel


@dataclass(frozen=True, slots=True)
class Project:
    """A project and the file it was read from."""

    file: str
    config: InstructueConfig

    @classmethod
    def open(cls, file: str, model: str | None = None, dtype: Literal["float32", "bfloat16"] | None = None) -> Project:
        """Reads it, with another model or compute type where asked for."""
        config = load_config(file)
        settings = config.model
        if model is not None:
            settings = dataclasses.replace(settings, path=str(Path(model).resolve()))
        if dtype is not None:
            settings = dataclasses.replace(settings, dtype=dtype)
        return cls(file, dataclasses.replace(config, model=settings))

    def words(self, instruction_id: str) -> Instruction:
        """A declared instruction without its soft prompt.

        Raises:
            ConfigError: It is not declared.
        """
        texts = {one.id: one.text for one in self.config.instructions}
        if instruction_id not in texts:
            raise ConfigError(f"unknown instruction {instruction_id!r}", did_you_mean(instruction_id, texts))
        return Instruction(instruction_id, texts[instruction_id])

    def load_model(self) -> InstructUEModel:
        """The model, checked against the project; a trained one with LoRA merged, as it is served."""
        from instructue_feast.model.factory import load_model
        from instructue_feast.model.modeling import InstructUEModel

        model = load_model(self.config)
        path = self.config.model.path
        return model if path is None else InstructUEModel.from_pretrained(path, dtype=model.llm_dtype, merge_lora=True)

    def extract(self, as_of: datetime, *, quiet: bool = False) -> str:
        """A finished extract at `as_of`: one that is there, or a new one."""
        from instructue_feast.evaluation.extracts import find_extract

        found = find_extract(self.config, as_of)
        if found is not None:
            return found
        arguments = ["--config", self.file, "--as-of", as_of.isoformat()]
        log = log_file(self.config.output.path, "extract")
        return str(run_job("instructue_spark.extract", arguments, log=log, quiet=quiet).value["extract_id"])


def read_user(config: InstructueConfig, extract_id: str, user_id: str) -> tuple[PackedHistory, Phrasebook]:
    """Packed history of one user, and its texts; nothing else of the extract is kept in memory.

    Raises:
        DataError: The extract has no such user; the message does not name the user.
        StorageError: A file is missing or damaged.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.runs.store import OutputStore

    store = OutputStore(config.output.path)
    files = store.files("extracts", extract_id, "history", "bucket=*")
    try:
        rows = ds.dataset(files, filesystem=store.fs, format="parquet", partitioning=None).to_table(
            filter=pc.field("user_id") == user_id
        )
        if not len(rows):
            raise DataError(f"extract {extract_id} has no such user", "use an id of the project's users table")
        history = PackedHistory.from_arrow(
            rows, num_sources=len(config.source_names), num_numeric=len(config.numeric_columns)
        )
        ids = np.unique(history.text_id)
        book = ds.dataset(store.files("extracts", extract_id, "phrasebook"), filesystem=store.fs).to_table(
            filter=pc.field("text_id").isin(pa.array(ids))
        )
    except (OSError, pa.ArrowException) as error:
        raise StorageError(
            f"extract {extract_id} cannot be read: {type(error).__name__}", "extract again under another id"
        ) from None
    book = book.sort_by("text_id")
    names = list(config.source_names)
    sources = np.array([names.index(one) for one in book.column("source").to_pylist()], np.int32)
    return history, Phrasebook(book.column("text_id").to_numpy(), sources, tuple(book.column("text").to_pylist()))


class Steps:
    """Shows the steps of a command as stages.

    Args:
        display: Where.
    """

    def __init__(self, display: StageDisplay) -> None:
        self._display = display
        self._started: dict[str, float] = {}

    def of(self, name: str) -> Callable[[int, int], None]:
        """A callback for what is done of a step, and of how much."""
        return partial(self.report, name)

    def report(self, name: str, done: int, total: int) -> None:
        """Shows what is done of a step, and of how much."""
        if name not in self._started:
            self._started[name] = time.monotonic()
            self._display.show({"event": "stage_started", "name": name})
        self._display.show({"event": "progress", "name": name, "done": done, "total": total})
        if done == total:
            seconds = time.monotonic() - self._started.pop(name)
            self._display.show(
                {"event": "stage_done", "name": name, "seconds": seconds, "rows_in": total, "rows_out": done}
            )


def soft_tokens_of(model: InstructUEModel, book: Phrasebook, history: PackedHistory) -> SoftTokenTable:
    """The soft-token table of the texts in some histories; no other text is encoded."""
    import numpy as np

    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.evaluation.ours import TaskEncoder, encode_texts

    ids = np.unique(history.text_id)
    rows = book.rows(ids)
    used = Phrasebook(ids, book.source_index[rows], tuple(book.texts[row] for row in rows))
    return TaskEncoder(model, used, encode_texts(model, used)).table
