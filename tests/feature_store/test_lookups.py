"""Looking users up: what is found, how old it is, and what is refused."""

import dataclasses
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from instructue_feast.errors import ConfigError, VersionMismatchError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.runs.publish import publish
from tests.fake_runs import INSTRUCTIONS, unit_vectors, write_fake_run, write_feast_repo


@pytest.fixture(scope="module")
def embeddings(served_repo):
    return UserEmbeddings(served_repo)


def test_vectors_come_in_the_order_asked_for_with_repeats_and_strangers(embeddings):
    ids = ["user-0007", "nobody", "user-0002", "user-0007"]
    found = embeddings.get(ids)
    assert list(found.vectors) == list(INSTRUCTIONS)
    for name in INSTRUCTIONS:
        expected = unit_vectors(0, ids, name)
        expected[1] = 0.0
        assert found.vectors[name].dtype == np.float32
        np.testing.assert_array_equal(found.vectors[name], expected)
        assert found.found[name].tolist() == [True, False, True, True]
        as_of = np.datetime64("2017-10-01T00:00:00", "us")
        np.testing.assert_array_equal(found.as_of[name], [as_of, np.datetime64("NaT"), as_of, as_of])
        assert found.views[name].startswith(f"{name}__")


def test_instructions_can_be_chosen(embeddings):
    found = embeddings.get(["user-0001"], ["taste", "churn"])
    assert list(found.vectors) == ["taste", "churn"]
    np.testing.assert_array_equal(found.vectors["churn"], unit_vectors(0, ["user-0001"], "churn"))
    assert embeddings.get(["user-0001"], []).vectors == {}


def test_asking_for_nobody_gives_empty_arrays(embeddings):
    found = embeddings.get([])
    assert {name: array.shape for name, array in found.vectors.items()} == dict.fromkeys(INSTRUCTIONS, (0, 8))


def test_only_strangers_get_zeros_of_the_right_size(embeddings):
    found = embeddings.get(["nobody", "nobody else"])
    assert not found.found["churn"].any()
    assert not found.vectors["churn"].any()
    assert found.vectors["churn"].shape == (2, 8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["secret-1", None], "position 1 is NoneType"),
        (["secret-1", ""], "position 1 is blank"),
        (["  \t", "secret-1"], "position 0 is blank"),
        (["secret-1", 17], "position 1 is int"),
        ([float("nan")], "position 0 is float"),
        ("secret-1", "got one string"),
        (["secret-1", "secret-\ud800"], "position 1 has no UTF-8 form"),
    ],
)
def test_bad_user_ids_are_refused_by_position_and_never_repeated(embeddings, ids, message):
    with pytest.raises(ConfigError, match=message) as error:
        embeddings.get(ids)
    assert "secret" not in str(error.value)


def test_an_unknown_instruction_names_those_there_are(embeddings):
    with pytest.raises(
        ConfigError, match=r"unknown instruction 'tast'\nHint: did you mean taste\? These exist: \[churn"
    ):
        embeddings.get(["user-0001"], ["tast"])


def test_an_unknown_service_names_those_there_are(served_repo):
    with pytest.raises(ConfigError, match=r"no feature service 'nope'; there are \[user_embeddings\]"):
        UserEmbeddings(served_repo, service="nope").get(["user-0001"])


def test_strange_user_ids_are_looked_up_as_they_are(embeddings):
    strange = ["user-0001'; --", "user-0001\u00a0", "user-0001\x00", " user-0001", "пользователь", "👩‍🚀", "x" * 10_000]
    assert not embeddings.get(strange).found["churn"].any()


def test_age_is_counted_from_as_of(embeddings):
    now = datetime(2017, 10, 4, 12, tzinfo=UTC)
    found = embeddings.get(["user-0001", "nobody"], ["churn"], now=now)
    assert found.age["churn"][0] == np.timedelta64(timedelta(days=3, hours=12))
    assert np.isnat(found.age["churn"][1])


@pytest.fixture
def expiring(any_repo):
    store = write_feast_repo(any_repo, ttl_days=30, files=["instructue.yaml"])
    publish(store, write_fake_run(store))
    apply_repo(any_repo)
    assert [one.rows for one in materialize(any_repo)] == [12, 12, 12]
    return UserEmbeddings(any_repo)


def test_an_embedding_that_has_outlived_its_ttl_is_not_found(expiring):
    last = datetime(2017, 10, 31, tzinfo=UTC)
    assert expiring.get(["user-0001"], ["churn"], now=last).found["churn"].all()
    late = expiring.get(["user-0001", "nobody"], ["churn"], now=last + timedelta(microseconds=1))
    assert not late.found["churn"].any()
    assert not late.vectors["churn"].any()
    assert late.as_of["churn"][0] == np.datetime64("2017-10-01T00:00:00", "us")


def test_a_stored_vector_of_another_size_is_refused(embeddings, monkeypatch):
    served = {name: dataclasses.replace(view, embedding_dim=4) for name, view in embeddings.served().items()}
    monkeypatch.setattr(embeddings, "served", lambda: served)
    with pytest.raises(VersionMismatchError, match="a vector of 8 numbers, not 4"):
        embeddings.get(["user-0001"])


def test_a_lookup_before_anything_is_applied_says_what_to_do(tmp_path):
    write_feast_repo(tmp_path)
    with pytest.raises(ConfigError, match="run `feast apply`"):
        UserEmbeddings(tmp_path).get(["user-0001"])
