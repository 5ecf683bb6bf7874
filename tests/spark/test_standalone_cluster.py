"""A backfill on a real standalone cluster, master and two workers as processes, equals one on `local[2]`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyspark
import pytest

import instructue_spark.backfill
from instructue_feast.config import InstructueConfig
from instructue_feast.runs.manifest import RunManifest
from instructue_spark.backfill import BackfillRequest, run_backfill
from instructue_spark.report import Reporter
from tests.projects import AS_OF, NUM_USERS, load, make_project

pytestmark = pytest.mark.spark

BIN = Path(pyspark.__file__).parent / "bin"
BUCKETS = 8
SETTINGS = {
    "spark.driver.memory": "512m",
    "spark.executor.memory": "512m",
    "spark.executor.cores": "1",
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1",
    "spark.driver.host": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.speculation": "false",
}


def environment() -> dict[str, str]:
    """No local master from this process's own session, and this interpreter on driver and executors."""
    names = ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_SUBMIT_ARGS", "SPARK_CONF_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    root = Path(__file__).parents[2]
    return kept | {
        "PYSPARK_PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(str(root / one) for one in (".", "kernels", "spark_jobs")),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_DAEMON_MEMORY": "128m",
        "JDK_JAVA_OPTIONS": "-XX:TieredStopAtLevel=1",
    }


@contextmanager
def daemon(log: Path, *command: str) -> Iterator[None]:
    """A master or a worker, ended with its executors at the end of the block."""
    with (
        log.open("w") as stream,
        subprocess.Popen(
            [str(BIN / "spark-class"), *command], stdout=stream, stderr=subprocess.STDOUT, env=environment()
        ) as process,
    ):
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(log: Path, pattern: str) -> str:
    """What a daemon says once it is up."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if found := re.search(pattern, log.read_text()):
            return found.group(1)
        time.sleep(0.1)
    raise AssertionError(f"{log.name} says nothing like {pattern}:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Iterator[str]:
    """URL of a master with two workers of one core each."""
    folder = tmp_path_factory.mktemp("cluster")
    with ExitStack() as stack:
        package = "org.apache.spark.deploy"
        at = ("--host", "127.0.0.1", "--port", "0", "--webui-port", "0")
        stack.enter_context(daemon(folder / "master.log", f"{package}.master.Master", *at))
        url = wait_for(folder / "master.log", r"Starting Spark master at (spark://\S+)")
        logs = []
        for number in range(2):
            logs.append(folder / f"worker-{number}.log")
            size = ("--cores", "1", "--memory", "1g", "--work-dir", str(folder / f"work-{number}"))
            stack.enter_context(daemon(logs[-1], f"{package}.worker.Worker", *at, *size, url))
        for log in logs:
            wait_for(log, r"(Successfully registered with master)")
        yield url


@pytest.fixture(scope="module")
def local(spark, tmp_path_factory) -> tuple[InstructueConfig, RunManifest]:
    """The same project on `local[2]`; the raw tables are shared with the cluster, the output is not."""
    folder = tmp_path_factory.mktemp("shop")
    make_project(folder, tmp_path_factory.mktemp("models"), buckets=BUCKETS)
    config = load(folder)
    return config, run_backfill(spark, BackfillRequest(config=config, as_of=AS_OF), Reporter(stream=None))


def submit(master: str, folder: Path, partitions: int) -> dict:
    """The result line of the backfill job under `spark-submit`."""
    settings = SETTINGS | {"spark.sql.shuffle.partitions": partitions, "spark.default.parallelism": partitions}
    command = [str(BIN / "spark-submit"), "--master", master]
    for name, value in settings.items():
        command += ["--conf", f"{name}={value}"]
    job = [instructue_spark.backfill.__file__, "--config", str(folder / "instructue.yaml")]
    job += ["--as-of", AS_OF.isoformat()]
    done = subprocess.run([*command, *job], env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["event"] == "result"
    return last["value"]


@pytest.mark.parametrize("partitions", [1, 64])
def test_a_cluster_gives_the_digest_of_a_local_session_whatever_the_partitions(master, local, tmp_path, partitions):
    config, expected = local
    source = Path(config.output.path).parent
    shutil.copytree(source, tmp_path / "shop", ignore=shutil.ignore_patterns("output"))
    value = submit(master, tmp_path / "shop", partitions)
    assert value["run"]["digest"] == expected.digest
    assert value["run"]["users"] == NUM_USERS
    assert [one["rows"] for one in value["run"]["buckets"]] == [one.rows for one in expected.buckets]
    assert value["published"]
    assert (tmp_path / "shop" / "output" / "published.json").is_file()
    # One Python worker per core of the cluster at most loads the model; nothing was computed in the driver.
    assert 1 <= value["run"]["model_loads"] <= 2
