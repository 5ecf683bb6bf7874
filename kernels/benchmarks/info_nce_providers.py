"""What computes the contrastive loss in the benchmarks: this project's ways, a user's own, and peers where installed.

Every provider is a function of raw queries and keys `[N, D]` and a logarithm of the scale that returns the loss. Peers:
`pip install memeff==0.3.1 inf-cl==1.2.1`. Neither learns the temperature.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from instructue_kernels.info_nce import fused, info_nce

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def eager(query: torch.Tensor, key: torch.Tensor, log_scale: torch.Tensor, *, symmetric: bool = True) -> torch.Tensor:
    """What one writes down in torch, as in CLIP."""
    logits = log_scale.exp().to(query.dtype) * F.normalize(query, dim=1) @ F.normalize(key, dim=1).T
    own = torch.arange(len(query), device=query.device)
    loss = F.cross_entropy(logits.float(), own)
    return (loss + F.cross_entropy(logits.T.float(), own)) / 2 if symmetric else loss


@cache
def compiled() -> Loss:
    """`eager` through torch.compile."""
    return torch.compile(eager, dynamic=False)  # type: ignore[return-value]


def _memeff(query: torch.Tensor, key: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    from memeff import MemoryEfficientCLIPLoss

    temperature = 1.0 / _scale(log_scale)
    found: torch.Tensor = MemoryEfficientCLIPLoss(temperature=temperature, stable=False)(query, key)
    return found


def _inf_cl(query: torch.Tensor, key: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    from inf_cl import cal_flash_loss

    query, key, scale = F.normalize(query, dim=1), F.normalize(key, dim=1), log_scale.exp().detach()
    found: torch.Tensor = (cal_flash_loss(query, key, scale=scale) + cal_flash_loss(key, query, scale=scale)).mean() / 2
    return found


def _scale(log_scale: torch.Tensor) -> float:
    """As a number; peers take no tensor. Read once a tensor, so that no timed call waits for the GPU."""
    if not hasattr(log_scale, "number"):
        log_scale.number = float(log_scale.detach().exp())  # type: ignore[attr-defined]
    number: float = log_scale.number  # type: ignore[attr-defined]
    return number


def ours(impl: str, *, symmetric: bool = True) -> Loss:
    """`info_nce` by one implementation."""
    return lambda query, key, log_scale: info_nce(query, key, log_scale, symmetric=symmetric, impl=impl)  # type: ignore[arg-type]


def providers(sample: torch.Tensor) -> dict[str, Loss]:
    """Those that can run on tensors like the sample."""
    found: dict[str, Loss] = {"chunked": ours("chunked"), "eager": eager}
    if fused.problem(sample, sample) is None:
        found = {"triton": ours("triton"), **found}
    if sample.device.type == "cuda":
        found["compile"] = lambda *arguments: compiled()(*arguments)
        if importlib.util.find_spec("memeff"):
            found["memeff"] = _memeff
        if importlib.util.find_spec("inf_cl"):
            found["inf-cl"] = _inf_cl
    return found


def bare_products(query: torch.Tensor, key: torch.Tensor) -> Callable[[], object]:
    """The four products a symmetric loss cannot do without, by cuBLAS and nothing around them, in bounded chunks."""
    rows = fused.rows_of_chunk(len(key), 128)
    product = torch.empty(min(rows, len(query)), len(key), dtype=query.dtype, device=query.device)

    def run() -> None:
        for start in range(0, len(query), rows):
            part = query[start : start + rows]
            out = product[: len(part)]
            torch.mm(part, key.T, out=out)
            torch.mm(part, key.T, out=out)
            torch.mm(out, key)
            torch.mm(out.T, part)

    return run
