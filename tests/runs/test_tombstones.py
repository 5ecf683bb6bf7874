from __future__ import annotations

from pathlib import Path

import pytest

from instructue_feast.errors import DataError, SchemaError, StorageError
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones

USERS = ["anna-1942", "otto", "7", "eve"]


@pytest.fixture(params=["{tmp}", "memory://tombstones-{name}"])
def store(request, tmp_path) -> OutputStore:
    return OutputStore(request.param.format(tmp=tmp_path, name=tmp_path.name))


def test_nobody_is_erased_at_first(store):
    erased = Tombstones(store)
    assert len(erased) == 0
    assert not erased.contains(USERS).any()
    assert store.names("tombstones") == []


def test_erased_users_are_known_to_whoever_looks_later(store):
    assert Tombstones(store).add(["otto", "7", "otto"]) == 2
    assert Tombstones(store).add(["7", "eve"]) == 1
    later = Tombstones(store)
    assert later.contains(USERS).tolist() == [False, True, True, True]
    assert [one.erased for one in later.list()] == sorted(one.erased for one in later.list())
    assert {one.user_hash for one in later.list()} == later.user_hashes


def test_no_id_is_written_and_two_outputs_hash_differently(tmp_path):
    hashes = []
    for name in ("one", "two"):
        Tombstones(OutputStore(str(tmp_path / name))).add(USERS)
        hashes.append(Tombstones(OutputStore(str(tmp_path / name))).user_hashes)
    assert not hashes[0] & hashes[1]
    written = "".join(file.read_text() for file in Path(tmp_path).rglob("*.json"))
    assert "otto" not in written
    assert "anna" not in written


def test_a_wrong_id_erases_nobody(store):
    with pytest.raises(DataError, match="1 of 2 user ids"):
        Tombstones(store).add(["otto", " "])
    assert len(Tombstones(store)) == 0


def test_a_lost_salt_is_an_error_instead_of_everybody_coming_back(store):
    Tombstones(store).add(["otto"])
    store.remove_file("tombstones", "salt.json")
    with pytest.raises(SchemaError, match=r"salt\.json is missing"):
        Tombstones(store)


def test_what_cannot_be_written_is_not_remembered(tmp_path):
    (tmp_path / "tombstones").write_text("in the way")
    erased = Tombstones(OutputStore(str(tmp_path)))
    with pytest.raises(StorageError):
        erased.add(["otto"])
    assert len(erased) == 0
