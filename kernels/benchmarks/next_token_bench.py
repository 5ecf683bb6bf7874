"""The next-token loss in every way it can be had, with a frozen head as in training; part of `gpu.py`."""

from __future__ import annotations

import torch
from adapter_bench import called, measured
from kernel_bench import Row, Shape

from instructue_kernels.next_token import next_token_loss
from instructue_kernels.next_token.chunked import torch_has_it
from instructue_kernels.next_token.liger import liger_installed

SHARE = 0.1
"""Of the whole time budget."""

POSITIONS, VOCABULARY, HIDDEN = 8192, 49152, 576


def run(seconds: float, *, smoke: bool = False) -> list[Row]:
    """float32 and bfloat16 heads."""
    sizes = (64, 300, 16) if smoke else (POSITIONS, VOCABULARY, HIDDEN)
    dtypes = (torch.float32, torch.bfloat16)
    return [
        one for dtype in dtypes for one in measure(*sizes, dtype, seconds / len(dtypes), repeats=2 if smoke else 20)
    ]


def measure(
    positions: int, vocabulary: int, hidden: int, dtype: torch.dtype, seconds: float, *, repeats: int
) -> list[Row]:
    """Forward and backward down to the hidden states."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator).to(device).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 0.02).to(device, dtype)
    target = torch.randint(0, vocabulary, (positions,), generator=generator).to(device)
    impls = ["chunked", *(["torch"] if torch_has_it() else []), "reference"]
    if device == "cuda" and liger_installed():
        impls.append("liger")
    calls = {
        {"reference": "eager"}.get(impl, impl): called(
            lambda own, impl=impl: next_token_loss(own, weight, target, impl=impl),
            [states],
            torch.ones((), device=device, dtype=dtype if impl == "torch" else torch.float32),
            "forward+backward",
        )
        for impl in impls
    }
    name = str(dtype).removeprefix("torch.")
    shape = Shape(op="next_token", mode="forward+backward", n=positions, m=vocabulary, d=hidden, dtype=name)
    return measured(shape, calls, seconds, repeats)
