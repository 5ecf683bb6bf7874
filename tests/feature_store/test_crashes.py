"""A materialization that is killed, two at once, a Redis that restarts empty: nothing torn, nothing older, all back."""

import signal
import subprocess
import sys
import threading
from datetime import datetime

import numpy as np
import pytest
from redis import Redis

from instructue_feast.config import load_config
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.session import open_store, quiet
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import unit_vectors, use_redis, user_names, write_fake_run
from tests.feature_store.stores import redis_server

OCTOBER, NOVEMBER = "2017-10-01T00:00:00Z", "2017-11-01T00:00:00Z"
USERS = user_names(60)

# Materializes in batches of 7 and is killed by the kernel in the middle of the third.
KILLED = """
import os, signal, sys
from instructue_feast.feature_store import engine, materialize
from instructue_feast.feature_store.{module} import {name} as Store
engine._BATCH = 7
written = []
{wound}
materialize.materialize(sys.argv[1])
"""
# SQLite: inside the transaction, after some of its rows. Redis: after the commands have left, before any answer.
WOUNDS = {
    "sqlite": (
        "sqlite",
        "InstructueSqliteOnlineStore",
        """
import contextlib
from instructue_feast.feature_store import sqlite
begin = sqlite._transaction
@contextlib.contextmanager
def transaction(connection):
    with begin(connection):
        yield
        written.append(1)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
sqlite._transaction = transaction
""",
    ),
    "redis": (
        "redis",
        "InstructueRedisOnlineStore",
        """
from redis.client import Pipeline
def parse(self, connection, name, **options):
    written.append(name)
    if len(written) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, connection, name, **options)
answer, Pipeline.parse_response = Pipeline.parse_response, parse
""",
    ),
}


def publish_run(repo, as_of, seed):
    output = OutputStore(load_config(repo / "instructue.yaml").output.path)
    publication = publish(output, write_fake_run(output, as_of, seed=seed, users=USERS, instructions=["churn"]))
    apply_repo(repo)
    return publication


def seeds(repo):
    """For each user the seed of the run whose vector is served, 0 for none; every vector must be one or the other."""
    found = UserEmbeddings(repo).get(USERS, ["churn"])
    result = np.zeros(len(USERS), dtype=int)
    for seed, month in ((1, "2017-10-01"), (2, "2017-11-01")):
        same = (found.vectors["churn"] == unit_vectors(seed, USERS, "churn")).all(axis=1)
        assert (found.as_of["churn"][same] == np.datetime64(month)).all(), "a vector with the time of another run"
        result[same] = seed
    assert (found.found["churn"] == (result > 0)).all(), "a torn vector"
    return result


def test_a_materialization_that_is_killed_leaves_whole_rows_and_the_next_one_finishes(any_repo):
    publish_run(any_repo, OCTOBER, seed=1)
    materialize(any_repo)
    publish_run(any_repo, NOVEMBER, seed=2)
    system = "redis" if "Redis" in (any_repo / "feature_store.yaml").read_text() else "sqlite"
    module, name, wound = WOUNDS[system]
    script = KILLED.format(module=module, name=name, wound=wound)
    done = subprocess.run([sys.executable, "-c", script, str(any_repo)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    after = seeds(any_repo)
    assert set(after) == {1, 2}  # nobody lost, nothing torn
    assert (after == 2).sum() % 7 == 0  # whole batches
    materialize(any_repo)
    assert set(seeds(any_repo)) == {2}


def test_of_two_writers_at_once_the_later_run_stays(any_repo):
    publish_run(any_repo, OCTOBER, seed=1)
    older = open_store(any_repo)  # knows the view with October alone
    with quiet():
        older.refresh_registry()
    publish_run(any_repo, NOVEMBER, seed=2)
    newer = open_store(any_repo)
    start = threading.Barrier(2)

    def write(store, time):
        start.wait()
        for _ in range(5):
            write_view(store, time)

    threads = [
        threading.Thread(target=write, args=(store, datetime.fromisoformat(time)))
        for store, time in ((older, OCTOBER), (newer, NOVEMBER))
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert set(seeds(any_repo)) == {2}


def write_view(store, time):
    """What `store.materialize` does, without the registry, which two threads must not write at once."""
    from feast.infra.common.materialization_job import MaterializationTask

    view = store.list_feature_views()[0]
    task = MaterializationTask(project=store.project, feature_view=view, start_time=time, end_time=time)
    job = store._get_provider().batch_engine.materialize(store.registry, task)[0]
    assert job.error() is None


@pytest.mark.parametrize("disaster", ["restart", "wipe"])
def test_an_emptied_redis_serves_nobody_until_the_published_run_is_written_again(repo, disaster):
    with redis_server() as server:
        use_redis(repo, server.address, project="crash")
        publish_run(repo, OCTOBER, seed=1)
        materialize(repo)
        before = everything(server.address)
        embeddings = UserEmbeddings(repo)
        assert embeddings.get(USERS).found["churn"].all()
        if disaster == "restart":
            server.restart()
        else:
            Redis.from_url(f"redis://{server.address}").flushall()
        assert not embeddings.get(USERS).found["churn"].any()
        materialize(repo)
        assert everything(server.address) == before
        assert embeddings.get(USERS).found["churn"].all()


def everything(address):
    client = Redis.from_url(f"redis://{address}")
    return {key: client.hgetall(key) for key in client.scan_iter()}
