"""Which device a Python worker computes on: the one Spark gave its task."""

from __future__ import annotations

import os

from pyspark import TaskContext

from instructue_feast.errors import ConfigError

DEVICE = "INSTRUCTUE_DEVICE"
"""Overrides what Spark says, for a local master, which cannot schedule GPUs."""


def task_device() -> str:
    """Name of the torch device of the running task.

    With `spark.task.resource.gpu.amount=1`, Spark gives every task an address of its own, so that no two Python workers
    of a host share a GPU. Without that resource it is the CPU, even where there is a GPU: all workers would take the
    same one.

    Raises:
        ConfigError: Spark gave a task more than one GPU, or one that is no number.
    """
    asked = os.environ.get(DEVICE)
    if asked:
        return asked
    context = TaskContext.get()
    gpu = context.resources().get("gpu") if context is not None else None
    if gpu is None:
        return "cpu"
    addresses = list(gpu.addresses)
    if len(addresses) != 1 or not addresses[0].isdigit():
        raise ConfigError(
            f"Spark gave the task the GPUs {addresses}", "set spark.task.resource.gpu.amount=1 and one task per GPU"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and addresses[0] in visible.split(","):  # torch counts the visible ones only
        return f"cuda:{visible.split(',').index(addresses[0])}"
    return f"cuda:{addresses[0]}"
