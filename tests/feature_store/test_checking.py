"""`check`: passes for what is served as computed, and names each departure."""

from __future__ import annotations

import shutil
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest

from instructue_feast.feature_store.check import CheckSettings, check_repo
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import write_fake_run, write_feast_repo
from tests.feature_store.real_runs import write_real_run
from tests.model_data import make_history, make_model, make_table

CHURN = Instruction("churn", "What about churn?")
HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])
NOW = datetime(2017, 10, 3, tzinfo=UTC)


@pytest.fixture(scope="module")
def original(tiny, tmp_path_factory):
    repo = tmp_path_factory.mktemp("check") / "repo"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        embedder = UserEmbedder(model, make_table(model, tiny[1]))
        store = write_feast_repo(repo, instructions=["churn"], ttl_days=30)
        write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    apply_repo(repo)
    materialize(repo)
    return repo


@pytest.fixture
def repo(original, tmp_path):
    shutil.copytree(original, tmp_path / "repo")
    return tmp_path / "repo"


def answers(repo, **settings):
    return {one.name: one for one in check_repo(repo, CheckSettings(**{"now": NOW, **settings}))}


def failed(repo, **settings):
    return {name for name, one in answers(repo, **settings).items() if one.ok is False}


def online(repo, statement):
    connection = sqlite3.connect(repo / "data" / "online.db")
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    (table,) = [name for name in tables if "churn__" in name]
    connection.execute(statement.format(table=table))
    connection.commit()
    connection.close()


def test_what_is_served_as_computed_passes_every_check(original):
    found = answers(original, max_age=timedelta(days=2), encode=6)
    assert {name: one.ok for name, one in found.items()} == dict.fromkeys(
        ("feature service", "version", "ttl", "staleness", "coverage", "offline = online", "as_of",
         "offline = direct encode"), True,
    )  # fmt: skip
    assert "6 of 6" in found["coverage"].detail
    assert not any(user in str(list(found.values())) for user in HISTORY.user_ids)


def test_a_user_who_is_not_online_is_missed_in_coverage(repo):
    online(repo, 'DELETE FROM "{table}" WHERE rowid = 1')
    assert failed(repo) == {"coverage"}
    assert failed(repo, min_coverage=0.8) == set()


def test_a_vector_that_is_not_the_published_one_is_found(repo):
    online(repo, 'UPDATE "{table}" SET value = (SELECT value FROM "{table}" WHERE rowid = 2) WHERE rowid = 1')
    assert failed(repo) == {"offline = online"}


def test_rows_of_another_run_are_found(repo):
    online(repo, 'UPDATE "{table}" SET event_ts = event_ts - 86400 WHERE rowid = 3')
    assert failed(repo) == {"as_of"}


def test_an_old_run_is_stale_and_later_expired(original):
    late = NOW + timedelta(days=40)
    assert failed(original, max_age=timedelta(days=1)) == {"staleness"}
    assert failed(original, now=late) == {"ttl"}


def test_a_store_without_the_view_fails_the_coverage_and_says_why(repo):
    online(repo, 'DROP TABLE "{table}"')
    assert failed(repo) == {"coverage"}


def test_a_publication_that_was_not_applied_fails_version_and_service(repo):
    store = OutputStore(str(repo / "data" / "output"))
    publish(store, write_fake_run(store, "2017-10-02T00:00:00Z", instructions=["churn"], dim=16))
    assert {"feature service", "version", "coverage"} <= failed(repo)


def test_an_embedding_the_model_does_not_make_is_found(repo, monkeypatch):
    encode = UserEmbedder.encode
    monkeypatch.setattr(UserEmbedder, "encode", lambda self, history, *rest: encode(self, history, *rest)[::-1])
    assert failed(repo) == {"offline = direct encode"}


def test_without_the_extract_the_direct_encode_is_not_asked(repo):
    shutil.rmtree(repo / "data" / "output" / "extracts")
    found = answers(repo)
    assert found["offline = direct encode"].ok is None
    assert failed(repo) == set()
