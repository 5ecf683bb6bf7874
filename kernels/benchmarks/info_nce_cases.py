"""The kernels of `info_nce` as they are shipped, for `compile_table.py`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from compile_table import Case

from instructue_kernels.info_nce import triton as kernels
from instructue_kernels.info_nce.tiles import LARGE_D, Tile, tile_for

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CAPABILITIES = (80, 90, 100)
LENGTHS = ("first", "N", "num_anchors", "K")

MASKS: dict[str, dict[str, object]] = {
    "one way": {"BOTH": False},
    "both ways": {"BOTH": True},
    "all masks": {"BOTH": True, "GROUPS": True, "OWNERS": True, "MARGIN": True, "ANCHOR_ANSWERS": 1},
    "three positives": {"BOTH": False, "GROUPS": True, "OWNERS": True, "ANCHOR_ANSWERS": 3, "P": 3},
}


def cases() -> list[Case]:
    """Every capability, bucket of D and dtype; masks none, all, and with several positives."""
    found = [case for capability in CAPABILITIES for dtype in DTYPES for case in _rows(capability, dtype)]
    for capability in CAPABILITIES:
        for dtype in DTYPES:
            sizes = (LARGE_D, LARGE_D + 1) if dtype != torch.float32 else (LARGE_D,)
            # The others share their tiles with bfloat16 or are simpler: the one variant that needs most registers.
            masks = MASKS if dtype == torch.bfloat16 else {"all masks": MASKS["all masks"]}
            for size in sizes:
                for name, flags in masks.items():
                    tile = tile_for(capability, size, dtype, masked=len(flags) > 1)
                    label = f"{_bucket(size)} {name}"
                    found += _tiles(capability, dtype, tile, label, flags, tma=tile.tma)
    # Rows that are no multiples of 16 bytes are read by pointer, with the tiles of masks.
    for name in ("both ways", "all masks"):
        tile = tile_for(90, LARGE_D, torch.bfloat16, masked=name != "both ways", aligned=False)
        found += _tiles(90, torch.bfloat16, tile, f"{_bucket(LARGE_D)} {name}, odd D", MASKS[name], tma=False)
    return found


def _bucket(size: int) -> str:
    return f"D>{LARGE_D}" if size > LARGE_D else f"D<={LARGE_D}"


def _tiles(
    capability: int, dtype: torch.dtype, tile: Tile, variant: str, flags: dict[str, object], *, tma: bool
) -> Iterator[Case]:
    """The two kernels that compute tiles of logits."""
    short = DTYPES[dtype]
    labels = ("groups", "candidate_groups", "owners", "candidate_owners", "answers", "candidate_answers")
    chosen: dict[str, object] = {
        "ANCHOR_ANSWERS": 0, "GROUPS": False, "OWNERS": False, "MARGIN": False, "BOTH": False, "P": 1, **flags,
        "CANDIDATE_ANSWERS": int(bool(flags.get("ANCHOR_ANSWERS", 0))), "FOLD": dtype != torch.float16,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_D": tile.block_d, "BAND": tile.band, "TMA": tma,
        "SPLIT": tile.split,
        "PRECISION": "tf32x3",
    }  # fmt: skip
    used = {"groups": chosen["GROUPS"], "owners": chosen["OWNERS"], "answers": chosen["ANCHOR_ANSWERS"]}
    types = dict.fromkeys(("places", *[one for one in labels if used[one.removeprefix("candidate_")]]), "*i32")
    types |= dict.fromkeys(("anchor_norms", "candidate_norms", "factor_pointer", "row_sums", "pulls"), "*fp32")
    types |= dict.fromkeys(("row_factors",), "*fp32") | {"gradients": f"*{short}"}
    types |= dict.fromkeys((*LENGTHS, "D", "anchor_stride", "candidate_stride", "gradient_stride"), "i32")
    types |= {"margin": "fp32", "gain": "fp32"}
    if chosen["MARGIN"]:
        types["closest"] = "*fp32"
    if chosen["BOTH"]:
        types |= dict.fromkeys(("column_sums", "column_factors"), "*fp32")
    for name, rows in (("anchors", tile.block_n), ("candidates", tile.block_k)):
        types[name] = f"tensordesc<{short}[{rows},{tile.block_d}]>" if tma else f"*{short}"
    odd = () if tma or capability == 80 else ("D", "anchor_stride", "candidate_stride")
    for kernel in (kernels.sums_kernel, kernels.gradients_kernel):
        names = kernel.arg_names
        yield Case(
            op="info_nce",
            kernel=kernel,
            variant=f"{variant}, {short}",
            capability=capability,
            signature={name: kind for name, kind in types.items() if name in names},
            constants={name: chosen.get(name) for name in names if name not in types},
            unaligned=[*LENGTHS, *odd],
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            tensor_cores=dtype != torch.float32,
            tma=tma,
            table_only=variant.startswith("D>512 three")
            or "one way" in variant
            or (short == "fp16" and "D>" in variant),
        )


def _rows(capability: int, dtype: torch.dtype) -> Iterator[Case]:
    """Kernels that read each vector once."""
    short = DTYPES[dtype]
    types = dict.fromkeys(("rows", "anchors", "candidates", "gradients"), f"*{short}")
    types |= dict.fromkeys(("norms", "anchor_norms", "candidate_norms", "cosines", "products", "inner"), "*fp32")
    types |= {"coefficient_pointer": "*fp32", "places": "*i32"}
    strides = ("stride", "anchor_stride", "candidate_stride", "product_stride", "gradient_stride")
    types |= dict.fromkeys(("N", "D", *strides), "i32")
    blocks = {
        kernels.norms_kernel: {"BLOCK_N": 16, "BLOCK_D": 128},
        kernels.positives_kernel: {"P": 1, "BLOCK_N": 16, "BLOCK_D": 128},
        kernels.project_kernel: {"FOLD": dtype != torch.float16, "BLOCK_N": 4, "BLOCK_D": 256},
    }
    for kernel, constants in blocks.items():
        yield Case(
            op="info_nce",
            kernel=kernel,
            variant=short,
            capability=capability,
            signature={name: kind for name, kind in types.items() if name in kernel.arg_names},
            constants=constants,
            unaligned=["N"],
        )
