"""How large a piece one block of a kernel computes: a table, so no call ever waits for a search.

Chosen by what compiles without spills (`benchmarks/results/compile_triton_*.md`), masks included; see README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Tile:
    """One entry.

    Attributes:
        block_n: Anchors.
        block_k: Candidates.
        block_d: Step along the vectors.
        band: Row blocks whose tiles run at one time.
        num_warps: Warps of a block.
        num_stages: Steps whose loads are in flight.
        tma: Loads by TMA, where rows are multiples of 16 bytes.
        split: What follows the products is done for half the candidates at a time.
    """

    block_n: int
    block_k: int
    block_d: int
    band: int
    num_warps: int
    num_stages: int
    tma: bool
    split: bool = False


LARGE_D = 512
"""Above this the loop is long enough for one more step in flight to pay."""

_WIDE = Tile(128, 256, 64, 8, 8, 3, tma=True, split=True)
_SQUARE = Tile(128, 128, 64, 8, 8, 3, tma=True, split=True)
_NARROW = Tile(128, 64, 64, 8, 8, 3, tma=False)
_SMALL = Tile(64, 64, 64, 16, 8, 3, tma=True)

# Capability and whether labels or a margin must be compared, which takes registers: vectors up to LARGE_D, and beyond.
_HALF = {
    (80, False): (Tile(64, 128, 64, 16, 8, 3, tma=False), Tile(64, 128, 64, 16, 8, 4, tma=False)),
    (80, True): (Tile(64, 128, 64, 16, 8, 3, tma=False), Tile(64, 128, 64, 16, 8, 4, tma=False)),
    (90, False): (_WIDE, Tile(128, 256, 64, 8, 8, 4, tma=True, split=True)),
    (90, True): (_SQUARE, Tile(128, 128, 64, 8, 8, 4, tma=True, split=True)),
    (100, False): (_SQUARE, Tile(128, 128, 64, 8, 8, 4, tma=True, split=True)),
    (100, True): (_SMALL, _SMALL),
}
_FLOAT32 = Tile(64, 64, 32, 16, 8, 3, tma=False)
INTERPRETED = Tile(32, 64, 32, 2, 4, 1, tma=False, split=True)


def tile_for(capability: int, size: int, dtype: torch.dtype, *, masked: bool, aligned: bool = True) -> Tile:
    """The entry of a GPU, the size and dtype of vectors, and whether more than the positive must be told apart.

    Rows that are not aligned to 16 bytes cannot come by TMA; their addresses take registers, as masks do.

    >>> tile_for(90, 512, torch.bfloat16, masked=False).block_k
    256
    """
    if dtype == torch.float32:
        return _FLOAT32
    known = max(one for one in (80, 90, 100) if one <= max(80, capability))
    if known >= 90 and not aligned:
        return _NARROW
    return _HALF[known, masked][size > LARGE_D]
