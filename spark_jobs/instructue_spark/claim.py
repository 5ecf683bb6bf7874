"""Owning an output folder while its content is made, and leaving nothing behind when that fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pyspark.sql import SparkSession

from instructue_feast.errors import InstructueError, RunConflictError
from instructue_feast.runs.ownership import Lease, take
from instructue_feast.runs.store import OutputStore

SETTLE_SECONDS = 0.2
"""After how long a task that was cancelled does not write any more."""


@contextmanager
def claimed(spark: SparkSession, store: OutputStore, *folder: str) -> Iterator[Lease]:
    """Claims a folder for the block; after an error or an interrupt its Spark jobs are cancelled and it is gone.

    A folder whose `manifest.json` is there is finished, and stays whatever happens. What a dead process left half-made
    is removed first.

    Args:
        spark: The session; other jobs in it are left alone.
        store: The output.
        folder: Parts of the folder's path.

    Yields:
        The lease, whose token workers compare before they write.

    Raises:
        RunConflictError: A live process has it, or it is finished.
        StorageError: It cannot be written.
    """
    lease = take(store, *folder)
    if store.exists(*folder, "manifest.json"):  # asked once it is owned: until then its maker may be about to finish
        lease.release()
        raise RunConflictError(f"{store.url(*folder)} is finished", "choose another id")
    for name in store.names(*folder):
        if not name.startswith(("owner.", "heartbeat.")):
            store.remove(*folder, name)
    tag = "-".join(folder)
    spark.sparkContext.addJobTag(tag)
    try:
        yield lease
    except BaseException as error:
        with suppress(InstructueError, OSError):
            lease.revoke()  # workers still at it now refuse to write
            if not store.exists(*folder, "manifest.json"):
                stop_jobs(spark, tag)
                lease.remove(SETTLE_SECONDS)
        lease.release()
        if isinstance(error, Exception):  # an interrupted command blocks this thread's connection to the JVM
            with suppress(Exception):  # the JVM may be what has died
                spark.sparkContext.removeJobTag(tag)
        raise
    lease.release()
    spark.sparkContext.removeJobTag(tag)


def stop_jobs(spark: SparkSession, tag: str) -> None:
    """Cancels what is left running under a tag.

    From another thread, because this one may still wait for the answer of the JVM to an interrupted command.
    """
    stopper = threading.Thread(target=spark.sparkContext.cancelJobsWithTag, args=(tag,), daemon=True)
    stopper.start()
    stopper.join(timeout=10)
