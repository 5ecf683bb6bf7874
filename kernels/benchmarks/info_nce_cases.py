"""The kernels of `info_nce` as they are shipped, for `compile_table.py`."""

from __future__ import annotations

from compile_table import Case

from instructue_kernels.info_nce import triton as kernels

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def cases() -> list[Case]:
    """Inverse norms for every dtype."""
    return [
        Case(
            op="info_nce",
            kernel=kernels.norms_kernel,
            variant=dtype,
            capability=capability,
            signature={"rows": f"*{short}", "norms": "*fp32", "num_rows": "i32", "D": "i32", "stride": "i64"},
            constants={"BLOCK_N": 16, "BLOCK_D": 128},
            num_warps=4,
            num_stages=2,
        )
        for capability in (80, 90, 100)
        for dtype, short in DTYPES.items()
    ]
