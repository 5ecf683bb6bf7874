"""Redis as the online store: Feast's own hashes and bytes, written in atomic blocks and never backwards."""

from __future__ import annotations

import asyncio
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from feast import FeatureView, RepoConfig
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from instructue_feast.feature_store.online import (
    VectorStorageConfig,
    WireRows,
    expired,
    is_ours,
    to_micros,
    versioned_name,
)
from instructue_feast.feature_store.wire import (
    KEY_VERSION,
    as_stock_value,
    encode_time,
    entity_keys,
)

FeastRow = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
_BLOCK = 500  # rows in one script call: what readers see at once, and a few milliseconds of the server's time

# One call stores a block of rows of one event time and one revision. A row is skipped if the stored event time is
# later, or the same with a higher revision, unless the call overwrites. Redis runs a script as a whole, so no reader
# sees half a block and no other writer comes between the comparison and the write.
_WRITE = """
local ts_field, rev_field, ts, micros, rev = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local ttl, until_ms, features, stored = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8]), 0
local overwrite = ARGV[9] == '1'
local clock = redis.call('TIME')
local now_ms = clock[1] * 1000 + math.floor(clock[2] / 1000)
local function number(raw, i)
  local value, scale, c = 0, 1
  repeat
    c = string.byte(raw, i)
    i, value, scale = i + 1, value + (c % 128) * scale, scale * 128
  until c < 128
  if value >= 9223372036854775808 then value = value - 18446744073709551616 end
  return value, i
end
local function time(raw)
  local i, seconds, nanos, tag, value = 1, 0, 0
  while i <= #raw do
    tag = string.byte(raw, i)
    value, i = number(raw, i + 1)
    if tag == 8 then seconds = value else nanos = value end
  end
  return seconds * 1000000 + math.floor(nanos / 1000)
end
for n, key in ipairs(KEYS) do
  local old = redis.call('HMGET', key, ts_field, rev_field)
  local keep = true
  if overwrite then
    keep = true
  elseif old[1] == ts then
    keep = rev < 0 or not old[2] or tonumber(old[2]) <= rev
  elseif old[1] then
    keep = time(old[1]) < micros
  end
  if keep then
    local row = {'HSET', key, ts_field, ts, rev_field, rev < 0 and '0' or ARGV[5]}
    for f = 1, features do
      row[#row + 1] = ARGV[9 + f]
      row[#row + 1] = ARGV[9 + features + (n - 1) * features + f]
    end
    local fresh = until_ms > 0 and redis.call('EXISTS', key) == 0
    redis.call(unpack(row))
    if ttl > 0 then
      redis.call('EXPIRE', key, ttl)
    elseif until_ms == 0 then
      redis.call('PERSIST', key)
    elseif until_ms > 0 then
      local left = redis.call('PTTL', key)
      if fresh or (left >= 0 and now_ms + left < until_ms) then redis.call('PEXPIREAT', key, until_ms) end
    end
    stored = stored + 1
  end
end
return stored
"""


class InstructueRedisOnlineStoreConfig(VectorStorageConfig, RedisOnlineStoreConfig):  # type: ignore[misc]
    """Feast's options for Redis, and how vectors are stored."""

    type: Literal["instructue_feast.feature_store.redis.InstructueRedisOnlineStore"] = (
        "instructue_feast.feature_store.redis.InstructueRedisOnlineStore"
    )
    expire_with_ttl: bool = False
    """Let Redis remove users whose embeddings have all outlived their views' ttl. A user is one Redis key for all the
    views of an entity: it goes when the last of them has, and stays if one has no ttl. Only where every writer of the
    project uses this store: stock Feast adds to a key without prolonging it."""


class InstructueRedisOnlineStore(RedisOnlineStore):  # type: ignore[misc]
    """Feast's Redis store; stock Feast reads what it writes and the reverse.

    What differs: of two rows with the same event time the later revision stays (stock Feast keeps the first), also when
    two processes write at once; rows appear in blocks of 500; a value of ours that has outlived its view's ttl is not
    served. One more hash field per view, `_rev:<view>`, holds the revision.
    """

    def __init__(self) -> None:
        self._views: dict[str, FeatureView] = {}
        self._script: Any = None
        self._connecting = threading.Lock()

    def _get_client(self, online_store_config: RedisOnlineStoreConfig) -> Any:
        """Feast's client, made once.

        Threads that come first at the same time would make several, and each that is dropped closes the connections
        that somebody already reads from.
        """
        with self._connecting:
            return super()._get_client(online_store_config)

    def write_rows(self, config: RepoConfig, view: FeatureView, rows: WireRows) -> int:
        """Stores rows in blocks, each at once, except where something newer is stored and `rows.overwrite` is not set.

        Returns:
            How many rows were stored.
        """
        client, name = self._get_client(config.online_store), versioned_name(config, view)
        if self._script is None:
            self._script = client.register_script(_WRITE)
        project = config.project.encode()
        features = [_mmh3(f"{name}:{feature}") for feature in rows.values]
        columns = list(rows.values.values())
        head = [f"_ts:{name}", f"_rev:{name}"]
        options = config.online_store
        cluster = options.redis_type == RedisType.redis_cluster
        with client.pipeline(transaction=False) as pipe:
            for event, revision, places in _blocks(rows, 1 if cluster else _BLOCK):
                keys = [rows.keys[place] + project for place in places]
                arguments = [
                    *head,
                    encode_time(event),
                    event,
                    revision,
                    options.key_ttl_seconds or 0,
                    _until(view, event) if options.expire_with_ttl else -1,
                    len(features),
                    int(rows.overwrite),
                    *features,
                    *(column[place] for place in places for column in columns),
                ]
                if cluster:  # each key has its own node, and redis-py sends no EVALSHA to several of them at once
                    pipe.execute_command("EVAL", _WRITE, 1, *keys, *arguments)
                else:
                    self._script(keys=keys, args=arguments, client=pipe)
            return sum(pipe.execute())

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Feast's own write, for whatever does not come from our engine, with the same rules about what is newer."""
        by_features: dict[tuple[str, ...], list[FeastRow]] = defaultdict(list)
        for row in data:
            by_features[tuple(row[1])].append(row)
        for names, rows in by_features.items():
            keys = [serialize_entity_key(row[0], entity_key_serialization_version=KEY_VERSION) for row in rows]
            values = {name: [row[1][name].SerializeToString() for row in rows] for name in names}
            event = np.array([to_micros(row[2]) for row in rows], dtype=np.int64)
            revision = np.array([to_micros(row[3]) if row[3] else -1 for row in rows], dtype=np.int64)
            self.write_rows(config, table, WireRows(keys, values, event, None, revision))
        if progress:
            progress(len(data))

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[FeastRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """The same in a thread: one script for both."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def delete_entities(self, config: RepoConfig, views: Sequence[FeatureView], ids: Sequence[str]) -> int:
        """Removes users from views; a hash that is empty then is gone.

        Returns:
            How many rows there were.
        """
        project, removed = config.project.encode(), 0
        client = self._get_client(config.online_store)
        for view in views:
            fields = _fields(config, view)
            with client.pipeline(transaction=False) as pipe:
                for key in entity_keys(view.entity_columns[0].name, ids):
                    pipe.hdel(key + project, *fields)
                removed += sum(1 for count in pipe.execute() if count)
        return removed

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Feast's own removal of a view, and our field with it."""
        super().delete_table(config, table)
        client = self._get_client(config.online_store)
        pattern = b"*" + config.project.encode()
        with client.pipeline(transaction=False) as pipe:
            for key in client.scan_iter(pattern, count=1000):
                pipe.hdel(key, f"_rev:{versioned_name(config, table)}")
            pipe.execute()

    def _generate_hset_keys_for_features(
        self,
        feature_view: FeatureView,
        requested_features: list[str] | None = None,
        fv_name_override: str | None = None,
    ) -> tuple[list[str], list[str | bytes]]:
        # The only step of Feast's three ways to read that knows the view; `_get_features_for_entity` needs its ttl.
        self._views[fv_name_override or feature_view.name] = feature_view
        names, fields = super()._generate_hset_keys_for_features(feature_view, requested_features, fv_name_override)
        return names, fields

    def _get_features_for_entity(
        self, values: Sequence[Any], feature_view: str, requested_features: list[str]
    ) -> tuple[datetime | None, dict[str, Value] | None]:
        time, found = super()._get_features_for_entity(values, feature_view, requested_features)
        if found is None:
            return time, found
        if expired(self._views[feature_view], time, datetime.now(UTC)):  # as if the user were unknown
            return super()._get_features_for_entity([None] * len(values), feature_view, requested_features)  # type: ignore[no-any-return]
        return time, {name: as_stock_value(value) for name, value in found.items()}


def _until(view: FeatureView, event_micros: int) -> int:
    """When a value may go, in milliseconds since 1970; 0 for never. Views of others do not expire online."""
    return event_micros // 1000 + int(view.ttl.total_seconds() * 1000) if view.ttl and is_ours(view) else 0


def _fields(config: RepoConfig, view: FeatureView) -> list[str | bytes]:
    name = versioned_name(config, view)
    return [*(_mmh3(f"{name}:{feature.name}") for feature in view.features), f"_ts:{name}", f"_rev:{name}"]


def _blocks(rows: WireRows, size: int) -> Iterator[tuple[int, int, Iterable[int]]]:
    """Row numbers of the blocks, each of one event time and one revision."""
    if not rows.keys:
        return
    times, group = np.unique(np.stack([rows.event_micros, rows.revision]), axis=1, return_inverse=True)
    for number, (event, revision) in enumerate(times.T.tolist()):
        places = np.flatnonzero(group.ravel() == number) if times.shape[1] > 1 else np.arange(len(rows.keys))
        for start in range(0, len(places), size):
            yield event, revision, places[start : start + size].tolist()
