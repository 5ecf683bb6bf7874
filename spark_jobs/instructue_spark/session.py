"""The Spark session every job runs in, with the settings its results depend on."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from pyspark.sql import SparkSession

from instructue_feast.java import require_java

_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.ansi.enabled": "true",
    # True would turn a truncated file into zero rows.
    "spark.sql.files.ignoreCorruptFiles": "false",
    "spark.sql.files.ignoreMissingFiles": "false",
    # Lets the per-user join reuse the one shuffle by bucket instead of shuffling packed users again.
    "spark.sql.requireAllClusterKeysForCoPartition": "false",
}


def get_session(app_name: str, *, cores: int | None = None, driver_memory: str = "2g") -> SparkSession:
    """Returns the session a job runs in.

    An active session, or a master given by `spark-submit`, `PYSPARK_SUBMIT_ARGS` or `spark-defaults.conf`, is used as
    it is. Otherwise a local one is started.

    Args:
        app_name: Name shown by Spark.
        cores: Cores of a local session; all of the machine when left out.
        driver_memory: Heap of a local session, for example `2g`.

    Raises:
        MissingDependencyError: A local session is needed and there is no Java of version 17 or newer.

    Example:
        >>> spark = get_session("extract", cores=2)  # doctest: +SKIP
    """
    active = SparkSession.getActiveSession()
    if active is not None:
        return settle(active)
    builder = SparkSession.builder.appName(app_name)
    if _master_is_configured():
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    else:
        require_java()
        # Forced, not defaulted: on a local master another interpreter lacks this package.
        os.environ["PYSPARK_PYTHON"] = os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
        cores = cores or os.cpu_count() or 1
        builder = (
            builder.master(f"local[{cores}]")
            .config("spark.driver.memory", driver_memory)
            # Less work beside the tasks and a smaller peak than the default collector, on the few cores of one machine.
            # A source with many columns becomes one method of over 8,000 bytes, which Java by default never compiles.
            .config("spark.driver.extraJavaOptions", "-XX:+UseParallelGC -XX:-DontCompileHugeMethods")
            # An extract compiles some 140 classes; the default of 100 throws away each before it is used again.
            .config("spark.sql.codegen.cache.maxEntries", "1000")
            .config("spark.driver.host", "127.0.0.1")
            .config("spark.driver.bindAddress", "127.0.0.1")
            .config("spark.ui.enabled", "false")
            .config("spark.ui.showConsoleProgress", "false")
            .config("spark.sql.shuffle.partitions", str(max(4, 2 * cores)))
        )
    return settle(builder.getOrCreate())


def settle(spark: SparkSession) -> SparkSession:
    """Gives a session the SQL settings that our results depend on, and returns it."""
    for key, value in _SETTINGS.items():
        spark.conf.set(key, value)
    # Spark logs the message of every failing task, which may quote a row. We report what went wrong ourselves.
    spark.sparkContext.setLogLevel("FATAL")
    return spark


def _master_is_configured() -> bool:
    """Whether somebody else decides where Spark runs."""
    if "PYSPARK_GATEWAY_PORT" in os.environ or "SPARK_REMOTE" in os.environ:  # started by spark-submit or Connect
        return True
    if re.search(r"--master\b|spark\.master=", os.environ.get("PYSPARK_SUBMIT_ARGS", "")):
        return True
    folder = os.environ.get("SPARK_CONF_DIR")
    defaults = Path(folder, "spark-defaults.conf") if folder else None
    return bool(
        defaults
        and defaults.is_file()
        and re.search(r"^\s*spark\.master[\s=]", defaults.read_text(encoding="utf-8"), re.MULTILINE)
    )
