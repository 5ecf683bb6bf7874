"""Initial weights that depend on the seed and the parameter's own name, and on nothing else.

A model with one more source therefore starts with the same weights for the others.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for one parameter; the same on every machine."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@torch.no_grad()
def fill_normal(parameter: torch.Tensor, std: float, *, seed: int, name: str) -> None:
    """Fills a parameter with normal values of standard deviation `std`."""
    values = torch.randn(parameter.shape, generator=generator(seed, name), dtype=torch.float32)
    parameter.copy_(values * std)


def orthonormal(rows: int, columns: int, *, seed: int, name: str) -> torch.Tensor:
    """`[rows, columns]` that keeps cosines: the identity where it fits, padded with zeros, else orthonormal rows."""
    if rows >= columns:
        return torch.eye(rows, columns)
    square = torch.randn(columns, rows, generator=generator(seed, name), dtype=torch.float64)
    basis: torch.Tensor = torch.linalg.qr(square).Q
    return basis.T.float().contiguous()
