"""The kernels of `adapter` as they are shipped, for `compile_table.py`."""

from __future__ import annotations

from collections.abc import Mapping

from compile_table import Case

from instructue_kernels.adapter import triton as kernels

CAPABILITIES = (80, 90, 100)
_TILES = {"PRECISION": "ieee"}


def cases() -> list[Case]:
    """bfloat16 weights with a bfloat16 or int8 store, as in training, for every capability."""
    return [one for capability in CAPABILITIES for one in _of(capability)]


def _of(capability: int) -> list[Case]:
    found = []
    for stored in ("bf16", "i8"):
        vectors: dict[str, str] = {"vectors": f"*{stored}", "rows": "*i64", "mean": "*fp32", "spread": "*fp32"}
        flags: dict[str, object] = {"HAS_ROWS": True, "HAS_SCALE": stored == "i8"}
        scale: dict[str, str] = {"scale": "*fp32"} if stored == "i8" else {}
        if stored != "i8":
            flags["scale"] = None
        sizes = {"num_texts": "i32", "D": "i32", "vector_stride": "i64", "eps": "fp32"}
        statistics = Case(
            op="adapter",
            kernel=kernels.statistics_kernel,
            variant=stored,
            capability=capability,
            signature=vectors | scale | sizes,
            constants=flags | {"BLOCK_N": 16, "BLOCK_D": kernels.BLOCK_VECTOR},
            unaligned=("num_texts",),
            num_warps=4,
        )
        up = vectors | scale | dict.fromkeys(("norm_weight", "norm_bias", "up", "up_bias", "before", "middle"), "*bf16")
        up |= {"offsets": "*i64", "num_sources": "i32", "D": "i32", "M": "i32", "vector_stride": "i64"}
        blocks = {"BLOCK_N": kernels.BLOCK_ROWS, "BLOCK_M": kernels.BLOCK_COLUMNS, "BLOCK_D": kernels.BLOCK_INNER}
        found.append(statistics)
        constants = flags | blocks | _TILES | {"KEEP": True}
        found.append(_product(kernels.up_kernel, f"{stored} training", capability, up, constants))
        outer = {"left": "*bf16", "right": f"*{stored}", "rows": "*i64", "mean": "*fp32", "spread": "*fp32"} | scale
        outer |= {"offsets": "*i64", "outer": "*fp32", "sums": "*fp32", "num_sources": "i32", "X": "i32", "Y": "i32"}
        outer |= {"right_stride": "i64", "splits": "i32"}
        blocks = {"BLOCK_X": kernels.BLOCK_COLUMNS, "BLOCK_Y": kernels.BLOCK_COLUMNS, "BLOCK_N": kernels.BLOCK_INNER}
        found.append(
            _product(
                kernels.outer_kernel,
                f"{stored} normalised",
                capability,
                outer,
                flags | blocks | _TILES | {"NORMALISE": True},
            )
        )
    plain = {"left": "*bf16", "right": "*bf16", "offsets": "*i64", "outer": "*fp32", "sums": "*fp32"}
    plain |= {"num_sources": "i32", "X": "i32", "Y": "i32", "right_stride": "i64", "splits": "i32"}
    absent = dict.fromkeys(("rows", "scale", "mean", "spread"), None)
    unused = {"NORMALISE": False, "HAS_ROWS": False, "HAS_SCALE": False}
    found.append(_product(kernels.outer_kernel, "plain", capability, plain, blocks | _TILES | absent | unused))
    product = {"left": "*bf16", "weights": "*bf16", "offsets": "*i64", "out": "*bf16"}
    product |= dict.fromkeys(("num_sources", "X", "Y"), "i32")
    blocks = {"BLOCK_N": kernels.BLOCK_ROWS, "BLOCK_Y": kernels.BLOCK_COLUMNS, "BLOCK_X": kernels.BLOCK_INNER}
    forward = {"before": None, "middle": None, "inner_stride": 1, "GELU_BACKWARD": False}
    backward = {"bias": None, "column_stride": 1, "GELU_BACKWARD": True}
    found.append(
        _product(
            kernels.product_kernel,
            "down",
            capability,
            product | {"bias": "*bf16", "source_stride": "i64", "column_stride": "i64"},
            blocks | _TILES | forward,
        )
    )
    found.append(
        _product(
            kernels.product_kernel,
            "gelu backward",
            capability,
            product | {"before": "*bf16", "middle": "*bf16", "source_stride": "i64", "inner_stride": "i64"},
            blocks | _TILES | backward | {"BLOCK_Y": kernels.GELU_COLUMNS},
        )
    )
    return found


def _product(
    kernel: object, variant: str, capability: int, signature: Mapping[str, str], constants: Mapping[str, object]
) -> Case:
    return Case(
        op="adapter",
        kernel=kernel,
        variant=variant,
        capability=capability,
        signature=signature,
        constants=constants,
        unaligned=("num_sources", "splits"),
        num_warps=kernels.WARPS,
        num_stages=kernels.STAGES,
        tensor_cores=True,
    )
