"""Erasing users: out of the online store, out of every file, never to be computed again, with proof.

The order is what makes a crash harmless. The tombstone comes first, so nothing brings a user back; then the online
store, which is what others read; then the files; then everything is read again. Running it again finishes what was cut
short.
"""

from __future__ import annotations

import mmap
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from feast import FeatureStore
from feast.infra.key_encoding_utils import deserialize_entity_key
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.feature_store.lookup import checked_ids
from instructue_feast.feature_store.materialize import CONFIG_NAME
from instructue_feast.feature_store.readers import keys_of
from instructue_feast.feature_store.session import open_store
from instructue_feast.runs.erase import (
    ErasedFiles,
    FoundInFiles,
    erase_files,
    find_in_files,
    matching,
    matching_tombstones,
)
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones

_OURS = re.compile(r"^(?P<feature>[a-z][a-z0-9_]*?)__[0-9a-f]{8}(?:_v\d+)?$")
"""Every view of ours ever registered, also those the registry has forgotten: its feature is in its name."""

_BLOCK = 500


@dataclass(frozen=True, slots=True)
class FoundOnline:
    """What a reading of the raw online store found: keys read, and those of erased users that hold anything of ours."""

    keys: int
    erased: int


@dataclass(frozen=True, slots=True)
class ErasureProof:
    """What an erasure did, and what a reading of everything afterwards found. Holds no user id.

    Attributes:
        erased: ISO 8601, UTC.
        users: How many were asked for; 0 for a sweep.
        newly: How many of them had no tombstone yet.
        user_hashes: Their tombstones.
        online_rows: Rows removed from the online store; `None` when it was left alone.
        files: What was removed from files.
        found_online: The reading of the online store; `None` when it was left alone.
        found_in_files: The reading of all files.
    """

    erased: str
    users: int
    newly: int
    user_hashes: list[str]
    online_rows: int | None
    files: ErasedFiles
    found_online: FoundOnline | None
    found_in_files: FoundInFiles

    @property
    def absent(self) -> bool:
        """Whether nothing of the users was found anywhere, and nothing can still be under way."""
        online = self.found_online.erased if self.found_online else 0
        return not (online or self.found_in_files.erased or self.found_in_files.unfinished)


def erase_users(repo: Path | str, user_ids: Sequence[str], *, online: bool = True) -> ErasureProof:
    """Erases users everywhere this project keeps them, and reads everything again to prove it.

    Online rows of all views of ours, also of earlier versions; packed histories; extracts, runs, publications and
    UserQA data sets; search indexes that know them. The tombstone, a salted hash, keeps later extracts from taking them
    in again. The raw tables are the owner's: delete there as well.

    Args:
        repo: Folder with `feature_store.yaml` and `instructue.yaml`.
        user_ids: Ids as the runs hold them; those nobody knows are no error. Empty for a sweep: everybody who was ever
            erased, recognised by hash, as after restoring a backup.
        online: `False` leaves the online store alone.

    Returns:
        The proof; see `ErasureProof.absent`.

    Raises:
        ConfigError: A blank id, a folder that is no repo, or an online store that cannot delete one user.
        StorageError: Something cannot be read or written; erase again.
    """
    ids = list(dict.fromkeys(checked_ids(user_ids)))
    folder = Path(repo).resolve()
    config = load_config(folder / CONFIG_NAME)
    output, store = OutputStore(config.output.path), open_store(folder)
    raw = raw_store(store, config.feast.join_key) if online else None
    tombstones = Tombstones(output)
    newly = tombstones.add(ids)
    matches = matching(ids) if ids else matching_tombstones(tombstones)
    known = raw.erased(tombstones) if raw and not ids else ids
    online_rows = raw.delete(known) if raw else None
    files = erase_files(output, matches)
    return ErasureProof(
        erased=datetime.now(UTC).isoformat(),
        users=len(ids),
        newly=newly,
        user_hashes=[tombstones.user_hash(one) for one in ids],
        online_rows=online_rows,
        files=files,
        found_online=raw.find(tombstones, ids) if raw else None,
        found_in_files=find_in_files(output, matches),
    )


def raw_store(store: FeatureStore, join_key: str) -> RawSqlite | RawRedis:
    """The raw contents of a repo's online store.

    Raises:
        ConfigError: Feast has no deletion of one user for this kind of store, and neither have we.
    """
    online = store._get_provider().online_store
    if isinstance(online, SqliteOnlineStore):
        return RawSqlite(store, join_key)
    if isinstance(online, RedisOnlineStore):
        return RawRedis(store, join_key)
    raise ConfigError(
        f"users cannot be deleted from an online store of type {type(online).__name__}",
        "delete the rows of their entity keys there, then erase with --no-online",
    )


class RawSqlite:
    """The tables of our views in a SQLite online store, registered or not."""

    def __init__(self, store: FeatureStore, join_key: str) -> None:
        self._path = SqliteOnlineStore._get_db_path(store.config)
        self._project, self._join_key = store.project, join_key

    def delete(self, user_ids: Sequence[str]) -> int:
        """Removes users and what SQLite would keep of them in free pages; returns how many rows there were."""
        if not Path(self._path).exists():
            return 0
        removed = 0
        try:
            with closing(self._connect()) as connection:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("BEGIN IMMEDIATE")
                for table in self._tables(connection):
                    for keys in _blocks(keys_of(self._join_key, user_ids)):
                        marks = ",".join("?" * len(keys))
                        query = f'DELETE FROM "{table}" WHERE entity_key IN ({marks})'  # noqa: S608 - a table that exists
                        removed += connection.execute(query, keys).rowcount
                connection.execute("COMMIT")
                if user_ids:
                    connection.execute("VACUUM")  # free pages may hold what was overwritten earlier
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            raise StorageError(f"the online store cannot be written: {error}", "erase again when it is free") from None
        return removed

    def erased(self, tombstones: Tombstones) -> list[str]:
        """Users in the store who were erased."""
        users = sorted(set(self._users()))
        return [user for user, gone in zip(users, tombstones.contains(users), strict=True) if gone]

    def find(self, tombstones: Tombstones, user_ids: Sequence[str]) -> FoundOnline:
        """Reads every key of our tables, and looks for the keys of the users in the file's bytes.

        Keys that tables of others hold stay in the file with them, so their bytes prove nothing.
        """
        users = list(self._users())
        erased = int(tombstones.contains(users).sum())
        keys = self._not_of_others(keys_of(self._join_key, user_ids))
        for suffix in ("", "-wal", "-journal"):
            file = Path(f"{self._path}{suffix}")
            if file.exists() and user_ids:
                with file.open("rb") as stream:
                    if file.stat().st_size:
                        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                            erased += sum(1 for key in keys if data.find(key) >= 0)
        return FoundOnline(len(users), erased)

    def _users(self) -> Iterator[str]:
        if not Path(self._path).exists():
            return
        with closing(self._connect()) as connection:
            for table in self._tables(connection):
                query = f'SELECT entity_key FROM "{table}"'  # noqa: S608 - a table that exists
                for (key,) in connection.execute(query):
                    yield from _user_of(key, self._join_key)

    def _not_of_others(self, keys: list[bytes]) -> list[bytes]:
        if not keys or not Path(self._path).exists():
            return keys
        held: set[bytes] = set()
        with closing(self._connect()) as connection:
            ours = set(self._tables(connection))
            query = (
                "SELECT m.name FROM sqlite_master m JOIN pragma_table_info(m.name) c "
                "WHERE m.type = 'table' AND c.name = 'entity_key'"
            )
            for (table,) in connection.execute(query).fetchall():
                for part in _blocks(keys) if table not in ours else ():
                    marks, name = ",".join("?" * len(part)), table.replace('"', '""')
                    query = f'SELECT entity_key FROM "{name}" WHERE entity_key IN ({marks})'  # noqa: S608 - a table that exists
                    held.update(key for (key,) in connection.execute(query, part))
        return [key for key in keys if key not in held]

    def _tables(self, connection: sqlite3.Connection) -> list[str]:
        names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        head = f"{self._project}_"
        return [name for name in names if name.startswith(head) and _OURS.match(name.removeprefix(head))]

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, isolation_level=None, timeout=60)


class RawRedis:
    """The hashes of a Redis online store; those of one entity hold all its views, ours and others'."""

    def __init__(self, store: FeatureStore, join_key: str) -> None:
        self._client: Any = store._get_provider().online_store._get_client(store.config.online_store)
        self._project, self._join_key = store.project.encode(), join_key

    def delete(self, user_ids: Sequence[str]) -> int:
        """Removes the users' fields of our views, and hashes that are empty then; returns how many rows there were."""
        removed = 0
        for keys in _blocks([key + self._project for key in keys_of(self._join_key, user_ids)]):
            with self._client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.hkeys(key)
                held = pipe.execute()
            with self._client.pipeline(transaction=False) as pipe:
                for key, fields in zip(keys, held, strict=True):
                    views = _views_in(fields)
                    removed += len(views)
                    if views:
                        pipe.hdel(key, *(field for view in views for field in _fields_of(view)))
                pipe.execute()
        return removed

    def erased(self, tombstones: Tombstones) -> list[str]:
        """Users in the store who were erased."""
        users = sorted({user for _, user in self._keys()})
        return [user for user, gone in zip(users, tombstones.contains(users), strict=True) if gone]

    def find(self, tombstones: Tombstones, user_ids: Sequence[str]) -> FoundOnline:
        """Reads every key, and for those of erased users whether anything of ours is left."""
        found = list(self._keys())
        gone = tombstones.contains([user for _, user in found])
        keys = {key for (key, _), erased in zip(found, gone, strict=True) if erased}
        keys |= {key + self._project for key in keys_of(self._join_key, user_ids)}
        left = sum(1 for key in sorted(keys) if _views_in(self._client.hkeys(key)))
        return FoundOnline(len(found), left)

    def _keys(self) -> Iterator[tuple[bytes, str]]:
        head = keys_of(self._join_key, [""])[0][:-4]  # up to the length of the id
        for key in self._client.scan_iter(b"*" + self._project, count=1000):
            if key.startswith(head):
                for user in _user_of(key.removesuffix(self._project), self._join_key):
                    yield key, user


def _views_in(fields: Sequence[bytes]) -> list[str]:
    times = [field[4:].decode(errors="replace") for field in fields if field.startswith(b"_ts:")]
    return [view for view in times if _OURS.match(view)]


def _fields_of(view: str) -> tuple[str | bytes, ...]:
    match = _OURS.match(view)
    assert match is not None
    return _mmh3(f"{view}:{match['feature']}"), f"_ts:{view}", f"_rev:{view}"


def _user_of(key: bytes, join_key: str) -> Iterator[str]:
    try:
        entity = deserialize_entity_key(key, entity_key_serialization_version=3)
    except (ValueError, IndexError, UnicodeDecodeError):
        return  # another project's, whose name ends in ours
    if list(entity.join_keys) == [join_key]:
        yield entity.entity_values[0].string_val


def _blocks(keys: list[bytes]) -> Iterator[list[bytes]]:
    for start in range(0, len(keys), _BLOCK):
        yield keys[start : start + _BLOCK]
