"""Project folders: a config, and what makes the folder a Feast repo."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from instructue_feast.errors import ConfigError, StorageError, did_you_mean
from instructue_feast.files import replacing

TEMPLATES = ("complete_journey", "synthetic")
"""Names of the config templates."""

CHECKPOINT = "models/complete-journey"
"""Where the project of a template with a trained model keeps its copy of it."""

STAMP = ".instructue-project"
"""File in a project folder: digests of what wrote it, and of the copy of the trained model. Written last."""


_NO_MODEL = "  # path: models/mine  # once a model is trained on these sources; left out: seeded and untrained"


def render_config(template: str, *, raw: str = "raw", output: str = "output", model: str | None = CHECKPOINT) -> str:
    """Text of an `instructue.yaml`.

    Args:
        template: One of `TEMPLATES`.
        raw: Folder of the raw tables, absolute or relative to the config.
        output: Folder of everything the project writes.
        model: Folder of the trained model, `None` for none; `synthetic` has none.

    Raises:
        ConfigError: There is no such template.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"unknown project template {template!r}", did_you_mean(template, TEMPLATES))
    text = _read(f"{template}.yaml")
    text = text.replace("path: raw/", f"path: {raw}/").replace("\n  path: output\n", f"\n  path: {output}\n")
    if model is None:
        return re.sub(rf"^  path: {CHECKPOINT} .*$", _NO_MODEL, text, flags=re.MULTILINE)
    return text.replace(f"\n  path: {CHECKPOINT} ", f"\n  path: {model} ")


def project_files(
    template: str, *, raw: str = "raw", output: str = "output", model: str | None = CHECKPOINT
) -> dict[str, str]:
    """The text files of a project folder by name; see `write_project`."""
    return {
        "instructue.yaml": render_config(template, raw=raw, output=output, model=model),
        "user_qa.yaml": _read(f"{template}.user_qa.yaml"),
        "feature_store.yaml": _read("feature_store.yaml"),
        "definitions.py": _read("definitions.py.txt"),
    }


def write_project(folder: Path, template: str, *, raw: str = "raw", output: str = "output") -> Path:
    """Writes config, questions, `feature_store.yaml`, `definitions.py`, the trained model if there is one, and a stamp.

    The folder is then also a Feast repo. A file that is there with other content is kept as `<name>.bak`. Where a
    template has a trained model, a copy of it goes to `CHECKPOINT`; a model that is there stays.

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
        checkpoint, copied = checkpoint_folder(template), read_stamp(folder).get("checkpoint")
        if checkpoint is not None and not (folder / CHECKPOINT).exists():
            with replacing(folder / CHECKPOINT) as copy:
                shutil.copytree(checkpoint, copy, dirs_exist_ok=True)
            copied = _weights_digest(checkpoint)
        (folder / STAMP).write_text(json.dumps({"data": _data_digest(), "checkpoint": copied}) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {folder}: {error.strerror}", "free disk space or mend the rights") from None
    return folder / "instructue.yaml"


def checkpoint_folder(template: str) -> Path | None:
    """The trained model that comes with a template, in the installed package; None where there is none."""
    folder = Path(str(resources.files("instructue_feast.datasets"))) / "checkpoints" / template
    return folder if folder.is_dir() else None


def read_stamp(folder: Path) -> dict[str, str | None]:
    """What `write_project` noted in a folder; empty where it did not, or an older release did.

    Returns:
        `data`, a digest of the code and templates that wrote the folder, and `checkpoint`, one of the copied model.
    """
    try:
        found = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_current(folder: Path, template: str) -> bool:
    """Whether a project folder is complete and of this very version of the package."""
    checkpoint = checkpoint_folder(template)
    expected = {"data": _data_digest(), "checkpoint": None if checkpoint is None else _weights_digest(checkpoint)}
    return read_stamp(folder) == expected


def has_old_checkpoint(folder: Path, template: str) -> bool:
    """Whether a project's copy of the trained model is that of an older package; not if it was trained there."""
    own, theirs = folder / CHECKPOINT, checkpoint_folder(template)
    if theirs is None or not own.is_dir() or _weights_digest(own) == _weights_digest(theirs):
        return False
    return read_stamp(folder).get("checkpoint") in (None, _weights_digest(own))


def _weights_digest(folder: Path) -> str:
    """Hash of a model's settings and weights, not of its card."""
    return _files_digest(one for one in folder.rglob("*") if one.suffix == ".safetensors" or one.name == "config.json")


def _data_digest() -> str:
    """Hash of what writes raw tables and project files: the files of this package."""
    own = Path(str(resources.files("instructue_feast.datasets")))
    return _files_digest(one for one in own.iterdir() if one.is_file())


def _files_digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _read(name: str) -> str:
    return resources.files("instructue_feast.datasets").joinpath(name).read_text(encoding="utf-8")
