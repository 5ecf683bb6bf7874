"""Tuned soft prompts: saved once, then read by backfills and lookups like any other part of an instruction."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import StorageError, VersionMismatchError
from instructue_feast.instructions import Instruction
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.soft_prompt_file import HEADER, TENSORS, SoftPrompt, read_soft_prompt

FOLDER = "soft_prompts"
"""Folder of soft prompts: of a run, of a model that comes with some, and where tuning puts them beside the config."""


def model_digest(model: InstructUEModel) -> str:
    """What a soft prompt is bound to: weights and settings of the model, not the compute type or where it lies."""
    return hashlib.sha256(f"{model.weights_digest()} {model.config.identity()}".encode()).hexdigest()


def save_soft_prompt(prompt: SoftPrompt, path: str | Path) -> None:
    """Writes a soft prompt as safetensors, complete or not at all.

    Raises:
        StorageError: It cannot be written.
    """
    target = Path(path)
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.from_numpy(getattr(prompt, field).copy()) for field, (name, _) in TENSORS.items()}
        scratch.write_bytes(save(arrays, metadata={HEADER: prompt.header()}))
        scratch.replace(target)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {target}: {error}", "free disk space or mend the rights") from None
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def soft_prompts_of(
    config: InstructueConfig, instructions: Iterable[Instruction], model: InstructUEModel
) -> dict[str, SoftPrompt]:
    """The soft prompts of a project's instructions, by `Instruction.content_hash`.

    Raises:
        DataError: A file is missing or damaged.
        VersionMismatchError: One was tuned with another model, or its file has changed since the config was read.
    """
    paths = {one.id: one.soft_prompt for one in config.instructions}
    found = {}
    for one in instructions:
        path = paths.get(one.id)
        if one.soft_prompt is None or path is None:
            continue
        prompt = read_soft_prompt(path)
        require_model(prompt, model)
        if prompt.digest != one.soft_prompt:
            raise VersionMismatchError(f"the soft prompt of instruction {one.id!r} has changed", "start again")
        found[one.content_hash] = prompt
    return found


def require_model(prompt: SoftPrompt, model: InstructUEModel) -> None:
    """Refuses a soft prompt of another model.

    Raises:
        VersionMismatchError: It was tuned with another model.
    """
    actual = model_digest(model)
    if prompt.model_digest != actual:
        raise VersionMismatchError(
            f"the soft prompt of instruction {prompt.instruction_id!r} was tuned with model "
            f"{prompt.model_digest[:12]}, this is {actual[:12]}",
            "tune it again with this model, or drop `soft_prompt` from the instruction",
        )


def require_text(prompt: SoftPrompt, instruction: Instruction, where: str) -> None:
    """Refuses a soft prompt of other words.

    Args:
        prompt: The soft prompt.
        instruction: What it is to stand behind.
        where: Where it comes from, for the message.

    Raises:
        VersionMismatchError: It was tuned for other words.
    """
    if prompt.text != instruction.text:
        raise VersionMismatchError(
            f"instruction {instruction.id!r}: {where} was tuned for the words {prompt.text!r}",
            "tune it again with `instructue tune-instruction` for the words in use",
        )


def save_run_soft_prompts(prompts: Mapping[str, SoftPrompt], folder: Path) -> None:
    """Puts soft prompts into a run's folder, by content hash of their instructions.

    Raises:
        StorageError: They cannot be written.
    """
    for key, one in prompts.items():
        save_soft_prompt(one, folder / FOLDER / f"{key}.safetensors")


def load_run_soft_prompts(folder: Path) -> dict[str, SoftPrompt]:
    """The soft prompts in a run's folder, by content hash; empty without any.

    Raises:
        DataError: A file is damaged.
    """
    files = sorted((folder / FOLDER).glob("*.safetensors"))
    return {file.stem: read_soft_prompt(str(file)) for file in files}
