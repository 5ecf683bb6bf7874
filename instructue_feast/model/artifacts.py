"""Model folders: where they are, whether they are safe to load, and what identifies their content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from instructue_feast.errors import DataError, UnsafeArtifactError, listed

_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_MODEL_FILES = (
    "config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "vocab.*",
    "merges.txt", "*.model", "modules.json", "sentence_bert_config.json", "*_Pooling/config.json",
    "*_Dense/config.json", "lora/*.json", "lora/*.safetensors",
)  # fmt: skip
_NOT_CONTENT = ("*.safetensors.index.json",)


def cache_root() -> Path:
    """Folder of converted models and digests: `$INSTRUCTUE_CACHE`, by default `~/.cache/instructue`."""
    return Path(os.environ.get("INSTRUCTUE_CACHE") or "~/.cache/instructue").expanduser()


def local_folder(name: str, *, kind: str) -> Path:
    """Returns the folder of a model, fetching a Hugging Face hub name when it is not a local path.

    Only configs, tokenizers and safetensors are fetched; pickled weights and code never are.

    Args:
        name: A folder, or a hub name such as `org/model`.
        kind: What to call the model in an error.

    Raises:
        DataError: There is no such folder and the hub has no such model, or cannot be reached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    hint = "give a folder, a Hugging Face name, or one of the bundled aliases"
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise DataError(f"{kind} {name!r}: no such folder", hint)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_MODEL_FILES)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise DataError(
            f"{kind} {name!r} is neither a folder nor reachable on the hub: {type(error).__name__}", hint
        ) from None


def require_safetensors(folder: Path, *, kind: str, weights: str = "*.safetensors") -> None:
    """Refuses a model folder that has no safetensors weights.

    Raises:
        UnsafeArtifactError: Its weights are pickled instead.
        DataError: It has no weights at all.
    """
    if any(folder.glob(weights)):
        return
    names = [one.name for one in folder.iterdir()] if folder.is_dir() else []
    unsafe = [name for name in names if name.lower().endswith(_UNSAFE_SUFFIXES)]
    if unsafe:
        raise UnsafeArtifactError(
            f"{kind} {folder} holds weights that can execute code when loaded: {listed(unsafe)}",
            "convert them to safetensors on a machine you can afford to lose",
        )
    raise DataError(
        f"{kind} {folder} has no weights ({weights}); it holds {listed(names)}", "save the model there first"
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of Transformers while loading; a backfill has its own."""
    from transformers.utils import logging as transformers_logging

    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


def file_digest(path: Path) -> str:
    """SHA-256 of a file, remembered in the cache folder by path, size and modification time.

    Hashing 270 MB takes about a second, and every worker of a backfill asks; the memory makes it once per machine.
    """
    real = path.resolve()
    status = real.stat()
    return _remembered_digest(str(real), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _remembered_digest(path: str, size: int, mtime_ns: int) -> str:
    note = cache_root() / "digests" / f"{hashlib.sha256(path.encode()).hexdigest()}.json"
    stamp = [path, size, mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(note.read_text(encoding="utf-8"))
        if known["stamp"] == stamp:
            return str(known["sha256"])
    with Path(path).open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # a read-only cache costs time, not correctness
        note.parent.mkdir(parents=True, exist_ok=True)
        scratch = note.with_name(f"{note.name}.{uuid.uuid4().hex}.tmp")
        scratch.write_text(json.dumps({"stamp": stamp, "sha256": digest}), encoding="utf-8")
        scratch.replace(note)
    return digest


def folder_digest(folder: Path, *, extra: Iterable[str] = ()) -> str:
    """SHA-256 over what a model folder computes: config, weights, tokenizer, pooling; not its place or read-me.

    Args:
        folder: The model folder.
        extra: More strings that determine the result.
    """
    skipped = {path for pattern in _NOT_CONTENT for path in folder.glob(pattern)}
    files = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)} - skipped)
    parts = [f"{path.relative_to(folder).as_posix()} {file_digest(path)}" for path in files if path.is_file()]
    return hashlib.sha256("\n".join([*parts, *extra]).encode()).hexdigest()
