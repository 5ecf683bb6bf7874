"""Owning an output folder while its content is made, and leaving nothing behind when that fails."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from instructue_feast.runs.store import OutputStore


@contextmanager
def claimed(spark: SparkSession, store: OutputStore, *folder: str) -> Iterator[None]:
    """Claims a folder for the block; after an error or an interrupt its Spark jobs are cancelled and it is gone.

    A folder whose `manifest.json` is there is finished, and stays whatever happens.

    Args:
        spark: The session; other jobs in it are left alone.
        store: The output.
        folder: Parts of the folder's path.

    Raises:
        RunConflictError: Somebody else has it, or it is finished.
        StorageError: It cannot be written.
    """
    owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": datetime.now(UTC).isoformat()}
    store.claim(owner, *folder, "owner.json")
    tag = "-".join(folder)
    spark.sparkContext.addJobTag(tag)
    try:
        yield
    except BaseException as error:
        if not store.exists(*folder, "manifest.json"):
            store.remove_file(*folder, "owner.json")  # workers still at it now refuse to write
            _stop_jobs(spark, tag)
            _remove_for_good(store, folder)
        if isinstance(error, Exception):  # an interrupted command blocks this thread's connection to the JVM
            spark.sparkContext.removeJobTag(tag)
        raise
    spark.sparkContext.removeJobTag(tag)


def _stop_jobs(spark: SparkSession, tag: str) -> None:
    """Cancels what is left running under a tag.

    From another thread, because this one may still wait for the answer of the JVM to an interrupted command.
    """
    stopper = threading.Thread(target=spark.sparkContext.cancelJobsWithTag, args=(tag,), daemon=True)
    stopper.start()
    stopper.join(timeout=10)


def _remove_for_good(store: OutputStore, folder: tuple[str, ...]) -> None:
    """Removes a folder that tasks which are being killed may bring back once or twice."""
    for _ in range(10):
        store.remove(*folder)
        time.sleep(0.2)
        if not store.exists(*folder):
            return
