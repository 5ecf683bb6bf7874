"""Kernels on a machine without a GPU: Triton's interpreter in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

SECONDS = 300


def _start() -> None:
    import torch

    torch.set_num_threads(1)
    # Memory that torch hands out uninitialised is NaN, so an output that a kernel does not write is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()


@pytest.fixture(scope="session")
def interpreted():
    """Calls a module-level function in a process where Triton is interpreted and uninitialised memory is NaN.

    Triton reads `TRITON_INTERPRET` when it is imported, hence another process; one for the whole session, since it
    takes seconds to start. Kernels see CPU tensors; only float32 and float16 products are right there.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)
        pool.submit(os.getpid).result(SECONDS)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    with pool:
        yield lambda function, *args: pool.submit(function, *args).result(SECONDS)
