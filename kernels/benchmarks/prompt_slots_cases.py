"""The kernels of `prompt_slots` as they are shipped, for `compile_table.py`."""

from __future__ import annotations

from compile_table import Case

from instructue_kernels.prompt_slots import triton as kernels


def cases() -> list[Case]:
    """float32 tables and a bfloat16 prompt; memory bounds them."""
    return [one for capability in (80, 90, 100) for one in _of(capability)]


def _of(capability: int) -> list[Case]:
    floats = dict.fromkeys(("table", "soft", "count", "age"), "*fp32")
    indices = dict.fromkeys(("row_of", "count_of", "age_of", "slots"), "*i64")
    sizes = {"P": "i32", "V": "i32", "H": "i32"}
    described = [
        (
            kernels.fill_kernel,
            floats | indices | {"filled": "*bf16"} | sizes,
            {"BLOCK_P": kernels.BLOCK_SLOTS, "BLOCK_H": kernels.BLOCK_HIDDEN},
            4,
        ),
        (
            kernels.rows_kernel,
            {"grad": "*bf16", "order": "*i64", "ends": "*i64", "total": "*fp32", "H": "i32"},
            {"BLOCK_H": kernels.BLOCK_HIDDEN},
            2,
        ),
        (
            kernels.buckets_kernel,
            {"grad": "*bf16", "slots": "*i64", "bucket_of": "*i64", "total": "*fp32", **sizes}
            | {"buckets": "i32", "share": "i32"},
            {"BLOCK_P": kernels.BLOCK_SUMMED, "BLOCK_C": 16, "BLOCK_H": kernels.BUCKET_HIDDEN},
            4,
        ),
    ]
    return [
        Case(
            op="prompt_slots",
            kernel=kernel,
            variant="bf16",
            capability=capability,
            signature=signature,
            constants=constants,
            unaligned=("P", "V", "buckets", "share"),
            num_warps=warps,
        )
        for kernel, signature, constants, warps in described
    ]
