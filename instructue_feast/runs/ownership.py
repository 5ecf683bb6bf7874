"""Who works on a folder of the output: one live process at a time, and a dead one can be succeeded.

    <folder>/owner.json       who it is; the token in it is what workers compare before they write
    <folder>/heartbeat.json   when its owner was last alive, written every few seconds

An owner on this machine is dead as soon as its process is; `kill -9` included. Of an owner elsewhere only the
heartbeat is known: it is dead when that is older than `STALE_AFTER_SECONDS`, which also bounds how far the clocks of
two hosts may differ.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from instructue_feast.errors import InstructueError, RunConflictError, StorageError
from instructue_feast.runs.store import OutputStore

_DOCUMENTS = {"owner.json", "heartbeat.json", "owner.lock"}
HEARTBEAT_SECONDS = 10.0
STALE_AFTER_SECONDS = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """A process that owns a folder.

    Attributes:
        host: Name of its machine.
        place: Machine, boot and process-id namespace: within it a pid says everything.
        pid: Its process id.
        born: When the process started, in clock ticks after boot; tells it from a later process with its pid.
        started: When it took the folder, ISO 8601.
        token: Differs for every taking.
    """

    host: str
    place: str
    pid: int
    born: str
    started: str
    token: str

    @classmethod
    def of_this_process(cls) -> Owner:
        """An owner with a new token."""
        return cls(
            host=socket.gethostname(), place=_place(), pid=os.getpid(), born=_born(os.getpid()),
            started=datetime.now(UTC).isoformat(), token=uuid.uuid4().hex,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class Lease:
    """A folder that this process owns, with a heartbeat until it is released; see `take`."""

    def __init__(self, store: OutputStore, folder: tuple[str, ...], owner: Owner, previous: Owner | None) -> None:
        self.owner, self.previous = owner, previous
        self._store, self._folder = store, folder
        self._beat()
        self._done, self._beating = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat_on, daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        """What a worker passes to `still_owned`."""
        return self.owner.token

    def check(self) -> None:
        """Raises `RunConflictError` when somebody else has taken the folder over."""
        if not still_owned(self._store, self.token, *self._folder):
            raise RunConflictError(
                f"{self._store.url(*self._folder)} was taken over by another process", "leave it to that one"
            )

    def revoke(self) -> None:
        """Makes workers still at it refuse to write, while the folder stays this process's own.

        Where that cannot be written, as on a full disk, nothing changes.
        """
        before = self.owner
        try:
            with self._beating, _lock(self._store, self._folder):
                if still_owned(self._store, self.token, *self._folder):
                    now = datetime.now(UTC).isoformat()
                    self.owner = dataclasses.replace(before, token=uuid.uuid4().hex, started=now)
                    self._store.write_json(dataclasses.asdict(self.owner), *self._folder, "owner.json")
        except (InstructueError, OSError):
            self.owner = before

    def remove(self, settle_seconds: float = 0.0) -> bool:
        """Removes the folder, unless somebody has taken it over; nobody can take it before all else in it is gone.

        Args:
            settle_seconds: After how long to look again: tasks that are being killed may bring something back once or
                twice, also while it is removed.

        Returns:
            Whether it is gone.
        """
        try:
            for _ in range(10):
                with suppress(InstructueError, OSError):
                    if not still_owned(self._store, self.token, *self._folder):
                        return False
                    for name in self._content():
                        self._store.remove(*self._folder, name)
                time.sleep(settle_seconds)
                if not self._content():
                    break
        finally:
            self._end(with_folder=True)
        return not self._store.names(*self._folder)

    def _content(self) -> set[str]:
        return set(self._store.names(*self._folder)) - _DOCUMENTS

    def release(self) -> None:
        """Gives the folder up, unless somebody has taken it over; workers still at it then refuse to write."""
        self._end(with_folder=False)

    def _end(self, *, with_folder: bool) -> None:
        self._done.set()
        self._thread.join()
        with suppress(InstructueError, OSError), _lock(self._store, self._folder):
            if still_owned(self._store, self.token, *self._folder):
                self._store.remove_file(*self._folder, "owner.json")
                self._store.remove_file(*self._folder, "heartbeat.json")
                if with_folder and self._store.is_local:  # who waits for this lock begins anew, see `_lock`
                    Path(self._store.path(*self._folder, "owner.lock")).unlink()
                    Path(self._store.path(*self._folder)).rmdir()

    def _beat(self) -> None:
        beat = {"token": self.token, "at": datetime.now(UTC).isoformat()}
        self._store.write_json(beat, *self._folder, "heartbeat.json")

    def _beat_on(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            # A full disk is reported by whoever has something to write; the next beat may succeed.
            with suppress(InstructueError, OSError), self._beating:
                if not still_owned(self._store, self.token, *self._folder):
                    return
                self._beat()


def take(store: OutputStore, *folder: str) -> Lease:
    """Takes a folder that nobody owns, or whose owner is dead.

    Args:
        store: The output.
        folder: Parts of the folder's path; it is made when missing.

    Raises:
        RunConflictError: A live process owns it; the message says which.
        StorageError: It cannot be written.
    """
    owner = Owner.of_this_process()
    try:
        store.fs.makedirs(store.path(*folder), exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {store.url(*folder)}: {error.strerror}", "mend the rights") from None
    with _lock(store, folder, make=True):
        previous = owner_of(store, *folder)
        if previous is not None and is_live(store, previous, *folder):
            raise RunConflictError(
                f"{store.url(*folder)} belongs to another process: {previous}",
                f"wait for it, stop it, or choose another id; once it is dead (at the latest "
                f"{STALE_AFTER_SECONDS:.0f} s after its last heartbeat) the same command takes over",
            )
        store.write_json(dataclasses.asdict(owner), *folder, "owner.json")
    if not store.is_local and not still_owned(store, owner.token, *folder):  # no lock there: the last writer has it
        raise RunConflictError(f"{store.url(*folder)} was taken by another process", "leave it to that one")
    return Lease(store, folder, owner, previous)


def owner_of(store: OutputStore, *folder: str) -> Owner | None:
    """Who owns a folder, alive or dead; `None` when nobody does."""
    if not store.exists(*folder, "owner.json"):
        return None
    value: dict[str, Any] = {}
    with suppress(StorageError):  # an owner that died while it wrote its name is dead
        value = store.read_json(*folder, "owner.json")
    known = {field.name for field in dataclasses.fields(Owner)}
    unknown: dict[str, Any] = dict.fromkeys(known, "") | {"pid": -1, "place": "unknown"}
    return Owner(**(unknown | {name: one for name, one in value.items() if name in known}))


def still_owned(store: OutputStore, token: str, *folder: str) -> bool:
    """Whether the owner with that token still owns the folder.

    Raises:
        StorageError: Its document cannot be read, which says nothing about who owns the folder.
    """
    if not store.exists(*folder, "owner.json"):
        return False
    return bool(store.read_json(*folder, "owner.json").get("token") == token)


def is_live(store: OutputStore, owner: Owner, *folder: str) -> bool:
    """Whether an owner is alive, as far as can be told from here."""
    if owner.place == _place():
        return _born(owner.pid) == owner.born != ""
    last = owner.started  # between taking a folder and its first heartbeat
    with suppress(StorageError):
        beat = store.read_json(*folder, "heartbeat.json")
        last = str(beat.get("at")) if beat.get("token") == owner.token else last
    try:
        age = (datetime.now(UTC) - datetime.fromisoformat(last)).total_seconds()
    except (ValueError, TypeError):
        return False
    return age < STALE_AFTER_SECONDS


def _place() -> str:
    """Names the set of processes a pid of this machine belongs to."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
    with suppress(OSError):
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _born(pid: int) -> str:
    """Start of a live process; empty when there is none."""
    if pid <= 0:
        return ""
    try:
        # The name before the last parenthesis may hold anything; state and start are fields 3 and 22 of the line.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "unknown"
    return "" if fields[0] in "ZX" else fields[19]


@contextmanager
def _lock(store: OutputStore, folder: tuple[str, ...], *, make: bool = False) -> Iterator[None]:
    """Serialises the takers of a folder; on object stores there is no lock.

    Args:
        store: The output.
        folder: Parts of the folder's path.
        make: Whether to make the folder when its owner removes it just now.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not store.is_local:
        yield
        return
    path = Path(store.path(*folder, "owner.lock"))
    while True:
        if make:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            stream = path.open("a")
        except FileNotFoundError:
            if make:
                continue
            raise
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if _is_file(stream, path):  # or the folder was removed while this waited for its lock
                yield
                return


def _is_file(stream: IO[str], path: Path) -> bool:
    try:
        return path.stat().st_ino == os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        return False
