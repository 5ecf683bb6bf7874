"""Project folders: a config, and what makes the folder a Feast repo."""

from __future__ import annotations

import shutil
import uuid
from importlib import resources
from pathlib import Path

from instructue_feast.errors import ConfigError, StorageError, did_you_mean
from instructue_feast.files import replacing

TEMPLATES = ("complete_journey", "synthetic")
"""Names of the config templates."""

CHECKPOINT = "models/complete-journey"
"""Where the project of a template with a trained model keeps its copy of it."""


def render_config(template: str, *, raw: str = "raw", output: str = "output", model: str = CHECKPOINT) -> str:
    """Text of an `instructue.yaml`.

    Args:
        template: One of `TEMPLATES`.
        raw: Folder of the raw tables, absolute or relative to the config.
        output: Folder of everything the project writes.
        model: Folder of the trained model; `synthetic` has none.

    Raises:
        ConfigError: There is no such template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"unknown project template {template!r}", did_you_mean(template, TEMPLATES))
    text = _read(f"{template}.yaml")
    text = text.replace("path: raw/", f"path: {raw}/").replace("\n  path: output\n", f"\n  path: {output}\n")
    return text.replace(f"\n  path: {CHECKPOINT} ", f"\n  path: {model} ")


def project_files(
    template: str, *, raw: str = "raw", output: str = "output", model: str = CHECKPOINT
) -> dict[str, str]:
    """The text files of a project folder by name; see `write_project`."""
    return {
        "instructue.yaml": render_config(template, raw=raw, output=output, model=model),
        "user_qa.yaml": _read(f"{template}.user_qa.yaml"),
        "feature_store.yaml": _read("feature_store.yaml"),
        "definitions.py": _read("definitions.py.txt"),
    }


def write_project(folder: Path, template: str, *, raw: str = "raw", output: str = "output") -> Path:
    """Writes config, questions, `feature_store.yaml` and `definitions.py`, so that the folder is also a Feast repo.

    A file that is there with other content is kept as `<name>.bak`. Where a template has a trained model, a copy of it
    goes to `CHECKPOINT`; a model that is there stays.

    Args:
        folder: The project's folder; made when missing.
        template: One of `TEMPLATES`.
        raw: Folder of the raw tables, absolute or relative to `folder`.
        output: Folder of everything the project writes, absolute or relative to `folder`.

    Returns:
        Path of the config.

    Raises:
        ConfigError: There is no such template.
        StorageError: The folder cannot be written.

    Example:
        >>> import tempfile
        >>> write_project(Path(tempfile.mkdtemp()), "synthetic").name
        'instructue.yaml'
    """
    files = project_files(template, raw=raw, output=output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            target = folder / name
            if target.exists():
                if target.read_text(encoding="utf-8") == text:
                    continue
                shutil.copyfile(target, folder / f"{name}.bak")
            scratch = folder / f"{name}.{uuid.uuid4().hex}.tmp"
            scratch.write_text(text, encoding="utf-8")
            scratch.replace(target)
        checkpoint = checkpoint_folder(template)
        if checkpoint is not None and not (folder / CHECKPOINT).exists():
            with replacing(folder / CHECKPOINT) as copy:
                shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}", "free disk space or mend the rights") from None
    return folder / "instructue.yaml"


def checkpoint_folder(template: str) -> Path | None:
    """The trained model that comes with a template, in the installed package; None where there is none."""
    folder = Path(str(resources.files("instructue_feast.datasets"))) / "checkpoints" / template
    return folder if folder.is_dir() else None


def _read(name: str) -> str:
    return resources.files("instructue_feast.datasets").joinpath(name).read_text(encoding="utf-8")
