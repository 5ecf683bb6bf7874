"""Checkpoints without pickle: our weights and LoRA's, the optimizer's state as safetensors, the rest as JSON.

    <work>/run.json              what was started; a resume with other settings or data is refused
    <work>/checkpoint-<step>/    model.safetensors  learner.safetensors  optimizer.safetensors  scheduler.json
                                 trainer_state.json   - the folder appears complete or not at all

Random numbers need no saving: sampling and dropout are functions of the seed and the number of the pass.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from instructue_feast.errors import ConfigError, DataError, StorageError, VersionMismatchError, listed
from instructue_feast.files import replacing
from instructue_feast.training.losses import Learner

RUN_FILE = "run.json"
STATE_FILE = "trainer_state.json"
_LEARNER, _OPTIMIZER, _SCHEDULER = "learner.safetensors", "optimizer.safetensors", "scheduler.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")


def trainable_state(learner: Learner) -> dict[str, torch.Tensor]:
    """Everything training changes, by name: our weights and buffers, LoRA's, and the temperature."""
    trained = {name for name, one in learner.named_parameters() if one.requires_grad}
    return {
        name: value
        for name, value in learner.state_dict().items()
        if name in trained or not name.startswith("model.llm.")
    }


def write(folder: Path, learner: Learner, optimizer: torch.optim.Optimizer, scheduler: Any, state: Any) -> None:
    """Writes a checkpoint.

    Args:
        folder: `<work>/checkpoint-<step>`.
        learner: Model and temperature.
        optimizer: Its state is tensors per parameter.
        scheduler: Has a JSON-ready `state_dict`.
        state: `TrainerState` of Transformers.

    Raises:
        StorageError: It cannot be written; earlier checkpoints are as they were.
    """
    hint = "free disk space or mend the rights, then go on with --resume; earlier checkpoints are intact"
    try:
        with replacing(folder) as scratch:
            save_file({name: one.detach().cpu().clone() for name, one in trainable_state(learner).items()},
                      scratch / _LEARNER)  # fmt: skip
            entries = optimizer.state_dict()["state"]
            tensors = {
                f"{index}.{key}": torch.as_tensor(value).detach().cpu().clone()
                for index, own in entries.items()
                for key, value in own.items()
            }
            save_file(tensors, scratch / _OPTIMIZER)
            values = {key: value for key, value in scheduler.state_dict().items() if _plain(value)}
            (scratch / _SCHEDULER).write_text(json.dumps(values), encoding="utf-8")
            state.save_to_json(str(scratch / STATE_FILE))
    except SafetensorError as error:
        raise StorageError(f"cannot write {folder}: {error}", hint) from None
    except StorageError as error:
        raise StorageError(error.message, hint) from None


def read_learner(folder: Path, learner: Learner) -> None:
    """Puts a checkpoint's weights into a learner.

    Raises:
        DataError: A file is missing or damaged.
        VersionMismatchError: The checkpoint has other weights.
    """
    tensors = _read(folder / _LEARNER)
    expected = {name: one.shape for name, one in trainable_state(learner).items()}
    if expected != {name: one.shape for name, one in tensors.items()}:
        raise VersionMismatchError(f"{folder} has other weights than this run", "train into another folder")
    learner.load_state_dict(tensors, strict=False)


def read_optimizer(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Puts a checkpoint's optimizer and scheduler states into new ones.

    Raises:
        DataError: A file is missing or damaged.
    """
    state = optimizer.state_dict()
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in _read(folder / _OPTIMIZER).items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
    scheduler.load_state_dict(scheduler.state_dict() | _read_json(folder / _SCHEDULER))
    for group, rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def checkpoints(work: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = [(int(match[1]), one) for one in work.glob("checkpoint-*") if (match := _NAME.match(one.name))]
    return [one for _, one in sorted(found) if (one / STATE_FILE).is_file()]


def remove_old(work: Path, keep: int) -> None:
    """Removes all but the newest checkpoints."""
    for one in checkpoints(work)[:-keep]:
        shutil.rmtree(one, ignore_errors=True)


def open_work(work: Path, identity: Mapping[str, Any], *, resume: bool) -> Path | None:
    """Starts a working folder, or finds where to go on.

    Args:
        work: The folder.
        identity: What decides the weights: settings, data, models. JSON-ready.
        resume: Whether to go on.

    Returns:
        The checkpoint to go on from.

    Raises:
        ConfigError: There is a run already, or none to resume.
        VersionMismatchError: The run to resume was started with something else.
        StorageError: The folder cannot be written.
    """
    file = work / RUN_FILE
    if not resume:
        if checkpoints(work):
            raise ConfigError(
                f"{work} holds checkpoints of an earlier run", "go on with --resume, or remove the folder"
            )
        try:
            work.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(identity, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(
                f"cannot write {file}: {error.strerror}", "mend the rights, or choose another folder"
            ) from None
        return None
    found = checkpoints(work)
    if not found or not file.is_file():
        raise ConfigError(f"{work} holds no checkpoint to resume", "start without --resume")
    started = _flat(_read_json(file))
    changed = [name for name, value in _flat(identity).items() if started.get(name) != value]
    if changed:
        shown = ", ".join(
            f"{name}: {started.get(name)} then, {_flat(identity)[name]} now" for name in sorted(changed)[:5]
        )
        raise VersionMismatchError(
            f"{work} was started with other {listed(changed)} ({shown})",
            "resume with what it was started with, or train into another folder",
        )
    return found[-1]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(values)).items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | bool) or (
        isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    )


def _read(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{file} cannot be read: {error}", "remove this checkpoint and resume from the one before"
        ) from None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{file} cannot be read: {type(error).__name__}", "remove this checkpoint and resume from the one before"
        ) from None
