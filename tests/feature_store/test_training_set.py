"""Training sets: the embedding of each row's time, and the difference between known and computed."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pytest

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo
from instructue_feast.runs.publish import publish
from tests.fake_runs import unit_vectors, write_fake_run, write_feast_repo

USER = "user-0003"


def vector(seed, name="churn"):
    return unit_vectors(seed, [USER], name)[0]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """October was computed on 2 October; November only in January, as a backfill does."""
    repo = tmp_path_factory.mktemp("training") / "repo"
    store = write_feast_repo(repo)
    for as_of, created, seed in (
        ("2017-10-01T00:00:00Z", datetime(2017, 10, 2, tzinfo=UTC), 1),
        ("2017-11-01T00:00:00Z", datetime(2018, 1, 5, tzinfo=UTC), 2),
    ):
        publish(store, write_fake_run(store, as_of, seed=seed, created=created))
    apply_repo(repo)
    return UserEmbeddings(repo)


TIMES = ["2017-12-01", "2017-09-30", "2017-10-01T12:00:00", "2017-10-15", "2018-02-01"]


def asked(**columns):
    return pd.DataFrame(
        {"user_id": [USER] * 5, "event_timestamp": pd.to_datetime(TIMES, utc=True, format="ISO8601"), **columns}
    )


def test_as_of_takes_the_newest_past_whenever_it_was_computed(embeddings):
    rows = asked(label=range(5)).set_index(pd.Index(list("edcba")))
    found = embeddings.training_set(rows, ["churn", "taste"])
    assert found.frame.index.tolist() == list("edcba")
    assert found.frame["label"].tolist() == list(range(5))
    for name in ("churn", "taste"):
        expected = [vector(2, name), None, vector(1, name), vector(1, name), vector(2, name)]
        for got, right in zip(found.frame[name], expected, strict=True):
            assert (got is None) == (right is None)
            if right is not None:
                np.testing.assert_array_equal(got, right)
    assert found.found == {"churn": 4, "taste": 4}
    assert found.served == {"churn": 2, "taste": 2}
    assert "2 of them were computed later" in found.explanation


def test_as_served_never_holds_what_had_not_been_computed(embeddings):
    found = embeddings.training_set(asked(), ["churn"], as_served=True)
    expected = [vector(1), None, None, vector(1), vector(2)]  # in December, October's was still served
    for got, right in zip(found.frame["churn"], expected, strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            np.testing.assert_array_equal(got, right)
    assert found.found == found.served == {"churn": 3}
    assert "computed by the row's time" in found.explanation


def test_rows_that_share_user_and_time_and_strangers_all_come_back(embeddings):
    rows = pd.concat([asked(), asked(), asked().assign(user_id="nobody")], ignore_index=True)
    found = embeddings.training_set(rows, ["churn"])
    assert len(found.frame) == 15
    assert found.found == {"churn": 8}


def test_times_without_a_zone_are_in_utc_and_no_rows_give_no_rows(embeddings):
    rows = asked().assign(event_timestamp=pd.to_datetime(TIMES, format="ISO8601"))
    assert embeddings.training_set(rows, ["churn"]).found == {"churn": 4}
    assert len(embeddings.training_set(asked().iloc[:0], ["churn"]).frame) == 0


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (asked().drop(columns="user_id"), ConfigError, "no column 'user_id'"),
        (asked(churn=1), ConfigError, "a column 'churn' already"),
        (
            asked().assign(user_id=["secret", None, "a", "b", "c"]),
            DataError,
            "user id is missing or no string in row 1",
        ),
        (asked().assign(event_timestamp=pd.NaT), DataError, "event_timestamp is missing"),
    ],
)
def test_wrong_rows_are_refused_by_position(embeddings, rows, error, message):
    with pytest.raises(error, match=message) as caught:
        embeddings.training_set(rows, ["churn"])
    assert "secret" not in str(caught.value)
