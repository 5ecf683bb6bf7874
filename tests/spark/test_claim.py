"""Claiming a folder never costs anybody what is finished in it."""

from __future__ import annotations

import pytest

import instructue_spark.claim as claiming
from instructue_feast.errors import RunConflictError
from instructue_feast.runs.ownership import owner_of, take
from instructue_feast.runs.store import OutputStore


def test_what_is_finished_while_another_process_waits_for_it_stays(tmp_path, monkeypatch):
    store = OutputStore(str(tmp_path))

    def take_late(*arguments):
        store.write_json({"users": 3}, "extracts", "one", "history", "data.json")
        store.write_json({}, "extracts", "one", "manifest.json")
        return take(*arguments)

    monkeypatch.setattr(claiming, "take", take_late)
    for _ in range(2):
        with pytest.raises(RunConflictError, match="one is finished"), claiming.claimed(None, store, "extracts", "one"):
            raise AssertionError("it was claimed")
    assert store.read_json("extracts", "one", "history", "data.json") == {"users": 3}
    assert owner_of(store, "extracts", "one") is None
