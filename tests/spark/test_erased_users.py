"""An erased user is in no later extract: neither as a row nor by a text, and not in quarantine either."""

from __future__ import annotations

from pathlib import Path

import pyarrow.dataset as ds
import pytest

from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from tests.projects import AS_OF, load, make_project, write_table

pytestmark = pytest.mark.spark


def test_an_erased_user_is_in_no_later_extract(spark, tmp_path):
    make_project(tmp_path, tmp_path / "models")
    config = load(tmp_path)
    secret = [{"customer": "u1", "at": AS_OF.replace(month=2, day=3), "words": "a secret"}]
    secret += [{"customer": "u2", "at": AS_OF.replace(month=2, day=3), "words": "rice"}]
    secret += [{"customer": "u1", "at": None, "words": "broken row"}, {"customer": None, "at": None, "words": "x"}]
    write_table(tmp_path, "search", secret)
    store = OutputStore(config.output.path)
    silent = Reporter(stream=None)
    before = run_extract(spark, config, AS_OF, extract_id="before", reporter=silent)
    assert Tombstones(store).add(["u1"]) == 1
    after = run_extract(spark, config, AS_OF, extract_id="after", reporter=silent)
    assert after.users == before.users - 1
    assert after.counts["search"].read == 2
    assert after.counts["search"].quarantined == {"null_user": 1}

    def column(extract: str, table: str, name: str) -> list[str]:
        return ds.dataset(str(Path(store.path("extracts", extract, table)))).to_table().column(name).to_pylist()

    assert "u1" in column("before", "history", "user_id")
    assert "u1" not in column("after", "history", "user_id")
    assert any("a secret" in text for text in column("before", "phrasebook", "text"))
    assert not any("a secret" in text for text in column("after", "phrasebook", "text"))
    assert column("after", "quarantine", "user_id") == [None]
