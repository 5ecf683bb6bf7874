"""Tuned soft prompts on disk: one safetensors file with what was learned, and who it belongs to in its header.

Read with NumPy alone, so that a host without PyTorch knows the embedding versions of a config with soft prompts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt

from instructue_feast.errors import DataError

# P = tokens, H = hidden size of the LLM, D = sizes of all text encoders together

FORMAT = "soft-prompt-2"
TENSORS = {"vectors": ("soft_prompt", 2), "shift": ("shift", 1)}
"""Name in the file and number of dimensions of each array."""
HEADER = "soft_prompt"
"""Key of the header in the file's metadata."""

_MAX_BYTES = 1 << 26
_LENGTH_BYTES = 8
_AGAIN = "tune it again with `instructue tune-instruction`"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPrompt:
    """A tuned soft prompt and where it comes from.

    Attributes:
        vectors: `[P, H]` float32: soft tokens behind the words, for the LLM.
        shift: `[D]` float32: what is added to the text encoder's vector of the words, for the focus; for a model with
            several encoders one after the other, in the order of `config.encoder_names`. Zero together with no rows:
            tuning found nothing better than the words alone.
        instruction_id: Instruction it was tuned for.
        text: Its words; with others the vectors mean nothing.
        model_digest: `inference.soft_prompts.model_digest` of the model it was tuned with.
        labels: How many users were labelled and how many positive, counts only.
        metrics: What tuning measured.
    """

    vectors: npt.NDArray[np.float32]
    shift: npt.NDArray[np.float32]
    instruction_id: str
    text: str
    model_digest: str
    labels: dict[str, int]
    metrics: dict[str, float]

    @property
    def digest(self) -> str:
        """What `Instruction.soft_prompt` holds."""
        return arrays_digest(self.vectors, self.shift)

    @property
    def is_plain(self) -> bool:
        """Whether it changes nothing."""
        return not len(self.vectors) and not self.shift.any()

    def header(self) -> str:
        """Everything but the arrays, as JSON."""
        own = {name: getattr(self, name) for name in _HEADER_FIELDS}
        return json.dumps({"format": FORMAT, "digest": self.digest, **own}, sort_keys=True)


_HEADER_FIELDS = tuple(one.name for one in dataclasses.fields(SoftPrompt) if one.name not in TENSORS)


def arrays_digest(*arrays: npt.NDArray[np.float32]) -> str:
    """SHA-256 of shapes and float32 values.

    >>> arrays_digest(np.zeros((0, 4), np.float32), np.zeros(3, np.float32))[:8]
    'bc315ff2'
    """
    digest = hashlib.sha256()
    for one in arrays:
        values = np.ascontiguousarray(one, "<f4")
        digest.update(f"{values.shape}".encode() + values.tobytes())
    return digest.hexdigest()


def read_soft_prompt(path: str) -> SoftPrompt:
    """Reads a soft prompt.

    Args:
        path: A file or any fsspec URL.

    Raises:
        DataError: It is missing, damaged or something else.
    """
    try:
        with fsspec.open(path, "rb") as stream:
            content: bytes = stream.read(_MAX_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(f"soft prompt {path} cannot be read: {type(error).__name__}", _AGAIN) from None
    try:
        return _parse(content)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"soft prompt {path} is damaged or something else: {error}", _AGAIN) from None


def _parse(content: bytes) -> SoftPrompt:
    """Takes a safetensors file apart: length of the header, header, values."""
    start = _LENGTH_BYTES + int.from_bytes(content[:_LENGTH_BYTES], "little")
    if start > len(content):
        raise ValueError("it is cut short")
    header: dict[str, Any] = json.loads(content[_LENGTH_BYTES:start])
    known = json.loads(header["__metadata__"][HEADER])
    if known["format"] != FORMAT:
        raise ValueError(f"format {known['format']!r}, this release reads {FORMAT!r}")
    arrays = {field: _array(header[name], dims, content[start:]) for field, (name, dims) in TENSORS.items()}
    found = SoftPrompt(
        vectors=arrays["vectors"], shift=arrays["shift"], **{name: known[name] for name in _HEADER_FIELDS}
    )
    if found.digest != known["digest"]:
        raise ValueError("the values are not those it was saved with")
    if not all(np.isfinite(one).all() for one in arrays.values()):
        raise ValueError("it holds NaN or infinity")
    return found


def _array(place: dict[str, Any], dims: int, values: bytes) -> npt.NDArray[np.float32]:
    shape = tuple(place["shape"])
    if place["dtype"] != "F32" or len(shape) != dims:
        raise ValueError(f"values of type {place['dtype']} and shape {list(shape)}, expected F32 of {dims} dimensions")
    first, last = place["data_offsets"]
    if last - first != 4 * math.prod(shape) or last > len(values):
        raise ValueError("it is cut short")
    return np.frombuffer(values[first:last], "<f4").astype(np.float32).reshape(shape)
