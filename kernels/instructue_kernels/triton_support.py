"""Whether Triton kernels can run here, asked without importing Triton where it is absent.

Environment: `TRITON_INTERPRET=1`, set before the first import, runs kernels on the CPU, slowly, for tests.
`INSTRUCTUE_TRITON=0` keeps `impl="auto"` from choosing Triton; `impl="triton"` still does.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

OLDEST_CAPABILITY = (8, 0)
"""Older GPUs have no bfloat16 tensor cores; the kernels are not compiled or tested for them."""


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def problem(device_type: str) -> str | None:
    """Why no Triton kernel can run on tensors of a device, or None if one can; torch.compile asks once.

    >>> problem("meta")
    'meta tensors'
    """
    return _problem(device_type)


@functools.cache
def _problem(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'instructue-feast[kernels]')"
    if device_type == "cpu":
        return None if is_interpreted() else "CPU tensors"
    if device_type != "cuda" or torch.version.hip is not None:
        return f"{device_type} tensors" if device_type != "cuda" else "ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < OLDEST_CAPABILITY:
        return f"compute capability {major}.{minor}, and kernels need 8.0"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def auto_allowed(device_type: str) -> bool:
    """Whether `impl="auto"` may choose Triton on a device: a GPU it runs on, and it is not switched off."""
    return device_type == "cuda" and _problem("cuda") is None and os.environ.get("INSTRUCTUE_TRITON", "1") != "0"


def why_not() -> str:
    """Why `impl="auto"` does not choose Triton on this machine's GPU."""
    if os.environ.get("INSTRUCTUE_TRITON", "1") == "0":
        return "INSTRUCTUE_TRITON=0"
    return _problem("cuda") or "the CPU"


@functools.cache
def where() -> str:
    """The GPU and Triton release in words, or why there is no Triton here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = _problem(device)
    if found is not None:
        return found if device == "cuda" or "installed" in found else "no CUDA device"
    release = importlib.metadata.version("triton")
    if device == "cpu":
        return f"Triton {release}, interpreted"
    return f"Triton {release} on {torch.cuda.get_device_name()}"


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def capability(device: torch.device) -> int:
    """Compute capability as one number: 80, 90, 100; 80 when interpreted."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor
