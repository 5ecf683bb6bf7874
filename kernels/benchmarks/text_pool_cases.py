"""The kernels of `text_pool` as they are shipped, for `compile_table.py`."""

from __future__ import annotations

from compile_table import Case

from instructue_kernels.text_pool import triton as kernels


def cases() -> list[Case]:
    """float32, as the model has it, and bfloat16; up to 16 instructions.

    Memory bounds them: 16 columns are less than wgmma takes, and a float32 product has no tensor core instruction.
    """
    return [one for capability in (80, 90, 100) for dtype in ("fp32", "bf16") for one in _of(capability, dtype)]


def _of(capability: int, dtype: str) -> list[Case]:
    sizes = {"K": "i32", "H": "i32"}
    tile = {"BLOCK_T": kernels.BLOCK_TEXTS, "BLOCK_K": 16, "BLOCK_H": kernels.BLOCK_HIDDEN}
    texts = {"soft": f"*{dtype}", "offsets": "*i64", "rows": "*i64"}
    described = [
        (
            kernels.pool_kernel,
            {"weights": f"*{dtype}", **texts, "pooled": f"*{dtype}", **sizes},
            tile | {"HAS_ROWS": True},
            4,
        ),
        (
            kernels.weights_kernel,
            {"grad": f"*{dtype}", **texts, "of_weights": f"*{dtype}", **sizes, "parts": "i32"},
            tile | {"HAS_ROWS": True},
            4,
        ),
        (
            kernels.soft_kernel,
            dict.fromkeys(("grad", "weights", "of_soft"), f"*{dtype}")
            | dict.fromkeys(("order", "ends", "run_of"), "*i64")
            | sizes,
            {"ADD": False, "BLOCK_K": 16, "BLOCK_H": kernels.BLOCK_HIDDEN},
            2,
        ),
    ]
    return [
        Case(
            op="text_pool",
            kernel=kernel,
            variant=dtype,
            capability=capability,
            signature=signature,
            constants=constants,
            unaligned=("K", "parts"),
            num_warps=warps,
        )
        for kernel, signature, constants, warps in described
    ]
