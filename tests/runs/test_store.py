from __future__ import annotations

import pytest

from instructue_feast.errors import MissingDependencyError, RunConflictError, StorageError
from instructue_feast.runs.store import OutputStore


def test_a_location_whose_file_system_is_not_installed_says_what_to_install():
    with pytest.raises(MissingDependencyError, match=r"nosuch://[\s\S]*s3fs"):
        OutputStore("nosuch://bucket/output")


@pytest.mark.parametrize("root", ["{tmp}", "memory://store-test"])
def test_a_claim_is_given_once(root, tmp_path):
    store = OutputStore(root.format(tmp=tmp_path))
    store.claim({"pid": 1}, "runs", "one", "owner.json")
    with pytest.raises(RunConflictError, match="belongs to another process"):
        store.claim({"pid": 2}, "runs", "one", "owner.json")
    assert store.read_json("runs", "one", "owner.json") == {"pid": 1}
    store.remove("runs", "one")
    store.claim({"pid": 2}, "runs", "one", "owner.json")


def test_a_document_is_replaced_whole_and_leaves_no_scratch_file(tmp_path):
    store = OutputStore(str(tmp_path))
    store.write_json({"n": 1}, "a", "doc.json")
    store.write_json({"n": 2}, "a", "doc.json")
    assert store.read_json("a", "doc.json") == {"n": 2}
    assert store.names("a") == ["doc.json"]


def test_an_unreadable_document_is_named(tmp_path):
    store = OutputStore(str(tmp_path))
    with pytest.raises(StorageError, match=r"cannot read .*doc\.json"):
        store.read_json("doc.json")
    (tmp_path / "doc.json").write_text("{half")
    with pytest.raises(StorageError, match=r"cannot read .*doc\.json"):
        store.read_json("doc.json")


def test_a_file_where_a_folder_should_be_is_a_storage_error(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(StorageError, match="cannot write"):
        OutputStore(str(tmp_path)).write_json({}, "runs", "x.json")
