"""The rows of an ablation table on disk: each appears when it is done, so an interrupted table goes on.

<out>/run.json                          what the table is of; a table of something else is never mixed in
<out>/rows/<variant>-seed<n>.json       one trained and measured variant
<out>/rows/<variant>-seed<n>.safetensors   its AUC by task and bootstrap draw, for paired differences
<out>/models/<variant>-seed<n>/         the model; may be removed afterwards
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructue_feast.errors import ConfigError, DataError, StorageError, VersionMismatchError, listed

if TYPE_CHECKING:
    from instructue_feast.evaluation.metrics import RowScores

# T = tasks, D = bootstrap draws

RUN_FILE, ROWS, MODELS = "run.json", "rows", "models"
BASELINE = "baseline"
"""Stands where a variant's name would, for rows that no variant changes."""

TaskScores = list[dict[str, "RowScores"]]


@dataclass(frozen=True, slots=True)
class AblationRow:
    """One variant, trained from one seed.

    Attributes:
        name: `<variant>-seed<n>`.
        document: What is known of it, JSON-ready.
        scores: Scores of each task by row; empty where a table has validation figures only.
    """

    name: str
    document: dict[str, Any]
    scores: TaskScores


class AblationFolder:
    """The folder of a table.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, identity: Mapping[str, Any], *, resume: bool) -> None:
        """Starts a table, or goes on with one.

        Args:
            identity: What all rows have in common, JSON-ready.
            resume: Keep the rows that are there.

        Raises:
            ConfigError: There are rows already, or none to go on with.
            VersionMismatchError: The rows that are there are of something else.
            StorageError: The folder cannot be written.
        """
        file = self.folder / RUN_FILE
        if not resume:
            if file.is_file():
                raise ConfigError(f"{self.folder} holds a table already", "go on with --resume, or take another --out")
            write_text(file, json.dumps(identity, indent=1, sort_keys=True) + "\n")
            return
        if not file.is_file():
            raise ConfigError(f"{self.folder} holds no table to go on with", "start without --resume")
        before, now = _flat(_read_json(file)), _flat(json.loads(json.dumps(identity)))
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if changed:
            raise VersionMismatchError(
                f"the table in {self.folder} was started with other {listed(changed)}",
                "go on with what it was started with, or take another --out",
            )

    def model(self, name: str) -> Path:
        """Where the model of a row is."""
        return self.folder / MODELS / name

    def read(self, name: str) -> AblationRow | None:
        """A row by name; `None` if it is not done.

        Raises:
            DataError: A file is damaged.
        """
        file = self.folder / ROWS / f"{name}.json"
        if not file.is_file():
            return None
        scores_file = file.with_suffix(".safetensors")
        return AblationRow(name, _read_json(file), _read_scores(scores_file) if scores_file.is_file() else [])

    def write(self, row: AblationRow) -> None:
        """Writes a row; the JSON file comes last and makes it done.

        Raises:
            StorageError: It cannot be written.
        """
        file = self.folder / ROWS / f"{row.name}.json"
        if row.scores:
            _write_scores(file.with_suffix(".safetensors"), row.scores)
        write_text(file, json.dumps(row.document, indent=1, allow_nan=False) + "\n")


def write_text(file: Path, text: str) -> None:
    """Writes a file in one step.

    Raises:
        StorageError: It cannot be written.
    """
    scratch = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}", "free disk space or mend the rights") from None


def _write_scores(file: Path, scores: Sequence[Mapping[str, RowScores]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    tensors = {}
    for name in {name: None for own in scores for name in own}:
        tasks = [task for task, own in enumerate(scores) if name in own]
        tensors[f"{name}.task"] = np.array([len(scores), *tasks], np.int64)
        tensors[f"{name}.auc"] = np.array([[scores[task][name].auc, scores[task][name].ks] for task in tasks])
        tensors[f"{name}.draws"] = np.stack([scores[task][name].auc_D for task in tasks])
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {file}: {error}", "free disk space, then go on with --resume") from None


def _read_scores(file: Path) -> TaskScores:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from instructue_feast.evaluation.metrics import RowScores

    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}", "remove this row and go on with --resume") from None
    names = [name.removesuffix(".task") for name in tensors if name.endswith(".task")]
    scores: TaskScores = [{} for _ in range(int(tensors[f"{names[0]}.task"][0]))]
    for name in sorted(names):
        places, values, draws = (tensors[f"{name}.{part}"] for part in ("task", "auc", "draws"))
        for row, task in enumerate(places[1:]):
            scores[task][name] = RowScores(float(values[row, 0]), float(values[row, 1]), draws[row])
    return scores


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {type(error).__name__}", "remove it and go on with --resume") from None


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
