"""Tombstones: the users who were erased, as salted hashes, so that no later extract or run brings them back.

    <root>/tombstones/salt.json           drawn once per output, never changed
    <root>/tombstones/<time>-<id>.json    the hashes one call added; immutable

No user id is stored. The hash of a short, guessable id can be found by trying all ids with the salt, so the folder is
as confidential as the rest of the output. Whoever loses the salt loses the tombstones.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from instructue_feast.errors import DataError, RunConflictError, SchemaError
from instructue_feast.runs.store import OutputStore

HASH_CHARS = 32
"""Hexadecimal digits kept of a SHA-256: 128 bits, so that no two users of any roster share a hash."""

_SALT = ("tombstones", "salt.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tombstone:
    """One erased user: the hash of the id, and since when (ISO 8601, UTC)."""

    user_hash: str
    erased: str


class Tombstones:
    """The erased users of an output, as they are when the object is made.

    Args:
        store: The project's output.

    Raises:
        StorageError: A document cannot be read.
        SchemaError: A document was written by another release, or the salt is lost.

    Example:
        >>> erased = Tombstones(OutputStore("memory://tombstones-example"))
        >>> erased.add(["anna", "otto"])
        2
        >>> erased.contains(["otto", "eve"]).tolist()
        [True, False]
    """

    def __init__(self, store: OutputStore) -> None:
        self._store = store
        self.salt: str | None = None
        self._since: dict[str, str] = {}
        names = [name for name in store.names("tombstones") if name.endswith(".json") and name != _SALT[-1]]
        if store.exists(*_SALT):
            self.salt = str(store.read_json(*_SALT)["salt"])
        elif names:
            raise SchemaError(
                f"{store.url(*_SALT)} is missing, so the erased users are not known any more", "restore that file"
            )
        for name in names:
            document = store.read_json("tombstones", name)
            try:
                for one in document["user_hashes"]:
                    self._since.setdefault(one, document["erased"])
            except (KeyError, TypeError):
                raise SchemaError(
                    f"{store.url('tombstones', name)} holds no tombstones", "was it written by another release?"
                ) from None

    def __len__(self) -> int:
        return len(self._since)

    @property
    def user_hashes(self) -> frozenset[str]:
        """The hashes of all erased users."""
        return frozenset(self._since)

    def list(self) -> list[Tombstone]:
        """All tombstones, the oldest first."""
        ordered = sorted(self._since.items(), key=lambda one: (one[1], one[0]))
        return [Tombstone(user_hash=user_hash, erased=erased) for user_hash, erased in ordered]

    def add(self, user_ids: Iterable[str]) -> int:
        """Erases users from everything that is computed from now on; all of them in one step, or none.

        Args:
            user_ids: Ids as the extraction writes them: strings, integers in decimal notation.

        Returns:
            How many of them were not erased before.

        Raises:
            DataError: An id is empty or not a string.
            StorageError: The document cannot be written; then nobody was added.
        """
        users = list(dict.fromkeys(user_ids))
        wrong = sum(1 for user in users if not isinstance(user, str) or not user.strip())
        if wrong:
            raise DataError(f"{wrong} of {len(users)} user ids are empty or no strings", "pass each id as a string")
        if not users:
            return 0
        if self.salt is None:
            with suppress(RunConflictError):  # somebody else has just drawn it
                self._store.claim({"salt": secrets.token_hex(32)}, *_SALT)
            self.salt = str(self._store.read_json(*_SALT)["salt"])
        new = sorted({self.user_hash(user) for user in users} - self._since.keys())
        if new:
            erased = datetime.now(UTC)
            name = f"{erased:%Y%m%dT%H%M%S%f}-{uuid.uuid4().hex[:8]}.json"
            self._store.write_json({"erased": erased.isoformat(), "user_hashes": new}, "tombstones", name)
            self._since.update(dict.fromkeys(new, erased.isoformat()))
        return len(new)

    def user_hash(self, user_id: str) -> str:
        """The hash of an id: the first 128 bits of SHA-256 over salt and id, as hexadecimal digits.

        Raises:
            SchemaError: Nobody was ever erased, so there is no salt.
        """
        if self.salt is None:
            raise SchemaError("there are no tombstones, hence no salt", "add one first")
        return hashlib.sha256((self.salt + user_id).encode()).hexdigest()[:HASH_CHARS]

    def contains(self, user_ids: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Which users are erased: a mask of the length of `user_ids`."""
        if not self._since:
            return np.zeros(len(user_ids), dtype=np.bool_)
        return np.fromiter((self.user_hash(user) in self._since for user in user_ids), np.bool_, len(user_ids))
