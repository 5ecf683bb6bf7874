"""One local Spark session for the whole folder: starting one takes longer than most tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from pyspark.sql import SparkSession

from instructue_spark.session import get_session


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    # Tiny tables never repay the optimising compiler, which takes half the time of such a session.
    os.environ.setdefault("JDK_JAVA_OPTIONS", "-XX:TieredStopAtLevel=1")
    session = get_session("instructue tests", cores=2, driver_memory="1g")
    session.conf.set("spark.sql.shuffle.partitions", "3")
    yield session
    session.stop()
