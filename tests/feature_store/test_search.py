"""Finding users and items by embedding: the right entity in every row, and nobody who was erased."""

from __future__ import annotations

import numpy as np
import pytest

from instructue_feast.errors import ConfigError, DataError, InvalidEmbeddingError
from instructue_feast.feature_store import search as searching
from instructue_feast.feature_store.erase import erase_users
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.search import UserSearch, best, build_indexes, embed_items
from instructue_feast.feature_store.session import open_store
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs.items import write_items
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from tests.fake_runs import unit_vectors, user_names, write_fake_run, write_feast_repo
from tests.feature_store.real_runs import write_real_run
from tests.model_data import make_history, make_model, make_table

CHURN = Instruction("churn", "What about churn?")
HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])
USERS = user_names(2_000)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """2,000 users in three buckets, published, not served online."""
    repo = tmp_path_factory.mktemp("crowd") / "repo"
    store = write_feast_repo(repo, instructions=["churn", "taste"])
    publish(store, write_fake_run(store, users=USERS, instructions=["churn", "taste"], dim=32))
    return repo


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        yield UserEmbedder(model, make_table(model, tiny[1]))


@pytest.fixture(scope="module")
def shop(embedder, tmp_path_factory):
    repo = tmp_path_factory.mktemp("search") / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    return repo


def brute_force(vectors, query, k, without=None):
    order = sorted(range(len(vectors)), key=lambda row: -float(vectors[row] @ query))
    return [row for row in order if row != without][:k]


@pytest.mark.parametrize("instruction", ["churn", "taste"])
def test_exact_search_returns_the_right_entity_in_every_row(crowd, instruction):
    vectors = unit_vectors(0, USERS, instruction, dim=32)
    search = UserSearch(crowd)
    for row in (0, 7, 1_999):
        found = search.similar(USERS[row], instruction, k=25)
        expected = brute_force(vectors, vectors[row], 25, without=row)
        assert found.ids == [USERS[one] for one in expected]
        np.testing.assert_allclose(found.scores, vectors[expected] @ vectors[row], atol=1e-6)
        assert found.view.startswith(f"{instruction}__")


def test_chunks_and_ties_change_nothing(monkeypatch):
    vectors = np.repeat(unit_vectors(0, USERS[:50], "churn", dim=8), 3, axis=0)
    whole = best(vectors, vectors[9], 12)
    monkeypatch.setattr(searching, "_CHUNK", 7)
    parts = best(vectors, vectors[9], 12)
    np.testing.assert_array_equal(whole[0], parts[0])
    assert whole[0][:3].tolist() == [9, 10, 11]
    assert best(vectors[:2], vectors[0], 10)[0].tolist() == [0, 1]
    assert len(best(vectors[:0], vectors[0], 10)[0]) == 0


def test_the_index_finds_nineteen_of_twenty_true_neighbours_and_the_right_entities(crowd):
    built = build_indexes(crowd)
    assert set(built.values()) == {len(USERS)}
    search = UserSearch(crowd)
    hits = 0
    for row in range(0, 2_000, 20):
        exact, about = search.similar(USERS[row], "churn"), search.similar(USERS[row], "churn", exact=False)
        hits += len(set(exact.ids) & set(about.ids))
        own = unit_vectors(0, about.ids, "churn", dim=32) @ unit_vectors(0, [USERS[row]], "churn", dim=32)[0]
        np.testing.assert_allclose(about.scores, own, atol=1e-5)
    assert hits / 1_000 >= 0.95


def test_without_an_index_the_approximate_search_says_how_to_build_one(shop):
    with pytest.raises(ConfigError, match="instructue index --instruction churn"):
        UserSearch(shop).similar(HISTORY.user_ids[0], "churn", exact=False)


def test_an_audience_in_words_is_matched_by_the_answer_tower(shop, embedder):
    text = "This shopper likes grocery item 3."
    answer = embedder.model.answer_embeddings([embedder.model.answer_ids(text)])[0].detach().numpy()
    vectors = embedder.encode(HISTORY, [CHURN])[:, 0]
    found = UserSearch(shop).target(text, "churn", k=3)
    assert found.ids == [HISTORY.user_ids[row] for row in brute_force(vectors, answer, 3)]
    np.testing.assert_allclose(found.scores, np.sort(vectors @ answer)[::-1][:3], atol=1e-5)


def test_items_become_a_feature_view_and_fit_users(shop, embedder):
    texts = {"sku-1": "coffee", "sku-2": "cat food, a large bag", "sku-3": "soap"}
    made = embed_items(shop, list(texts), list(texts.values()))
    assert made.items == 3
    apply_repo(shop)
    assert made.view in {one.name for one in materialize(shop)}
    store = open_store(shop)
    rows = [{"item_id": one} for one in texts]
    served = store.get_online_features(features=[f"{made.view}:item_embedding"], entity_rows=rows).to_dict()
    expected = np.stack(
        [
            embedder.model.answer_embeddings([embedder.model.answer_ids(one)])[0].detach().numpy()
            for one in texts.values()
        ]
    )
    np.testing.assert_allclose(np.float32(served["item_embedding"]), expected, atol=1e-5)
    user, search = HISTORY.user_ids[2], UserSearch(shop)
    vector = UserEmbeddings(store).get([user], ["churn"]).vectors["churn"][0]
    found = search.recommend(user, "churn", k=2)
    assert found.ids == [list(texts)[row] for row in brute_force(expected, vector, 2)]
    assert search.recommend(user, "churn", items=["sku-3"]).ids == ["sku-3"]
    assert search.recommend(user, "churn", items=texts).ids[:2] == found.ids
    with pytest.raises(ConfigError, match="unknown item 'sku-9'"):
        search.recommend(user, "churn", items=["sku-9"])


def test_published_items_are_read_once_and_again_when_they_are_replaced(shop, monkeypatch):
    read, reads = searching.read_items, []
    monkeypatch.setattr(searching, "read_items", lambda *args: reads.append(args) or read(*args))
    embed_items(shop, ["old"], ["coffee"])
    search, user = UserSearch(shop), HISTORY.user_ids[2]
    assert [search.recommend(user, "churn").ids for _ in range(3)] == [["old"]] * 3
    assert len(reads) == 1
    embed_items(shop, ["new"], ["soap"])
    search._check_at = 0.0  # a second later
    assert search.recommend(user, "churn").ids == ["new"]


def test_wrong_items_are_refused(shop, tmp_path):
    store = OutputStore(str(tmp_path))
    vectors = unit_vectors(0, ["a", "b"], "x")
    with pytest.raises(DataError):
        write_items(store, "m" * 64, ["a", "a"], vectors)
    with pytest.raises(InvalidEmbeddingError):
        write_items(store, "m" * 64, ["a", "b"], vectors * np.nan)
    with pytest.raises(DataError, match="position 1 is empty"):
        embed_items(shop, ["a", "b"], ["x", " "])


def test_wrong_questions_are_refused_without_naming_users(crowd):
    search = UserSearch(crowd)
    with pytest.raises(ConfigError, match="did you mean churn"):
        search.similar(USERS[0], "chrun")
    with pytest.raises(ConfigError, match="no such user") as error:
        search.similar("secret-4711", "churn")
    assert "secret" not in str(error.value)
    with pytest.raises(ConfigError, match="at least one"):
        search.similar(USERS[0], "churn", k=0)
    with pytest.raises(ConfigError, match="fits nobody"):
        search.target(" ", "churn")


def searchable(tmp_path):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    publish(store, write_fake_run(store, users=60, instructions=["churn"]))
    build_indexes(repo)
    return repo, store, UserSearch(repo)


def test_a_search_at_work_forgets_erased_users_and_follows_publications(tmp_path):
    repo, store, search = searchable(tmp_path)
    nearest = search.similar("user-0001", "churn", k=5).ids
    assert search.similar("user-0001", "churn", k=5, exact=False).ids == nearest
    apply_repo(repo)
    proof = erase_users(repo, nearest[:2])
    assert proof.absent
    assert len(proof.files.indexes) == 1
    search._check_at = 0.0
    assert search.similar("user-0001", "churn", k=3).ids == nearest[2:]
    with pytest.raises(ConfigError, match="has no index"):
        search.similar("user-0001", "churn", exact=False)
    left = [user for user in user_names(60) if user not in nearest[:2]]
    publish(store, write_fake_run(store, "2017-11-01T00:00:00Z", users=left, instructions=["churn"], seed=5))
    search._check_at = 0.0
    vectors, row = unit_vectors(5, left, "churn"), left.index("user-0001")
    expected = brute_force(vectors, vectors[row], 4, row)
    assert search.similar("user-0001", "churn", k=4).ids == [left[one] for one in expected]


def test_users_are_forgotten_as_soon_as_the_tombstone_is_there_before_any_file_is_replaced(tmp_path):
    _, store, search = searchable(tmp_path)
    nearest = search.similar("user-0001", "churn", k=5).ids
    Tombstones(store).add(nearest[:2])
    search._check_at = 0.0
    assert search.similar("user-0001", "churn", k=3).ids == nearest[2:]
    assert search.similar("user-0001", "churn", k=5, exact=False).ids == nearest[2:]
    with pytest.raises(ConfigError, match="no such user"):
        search.similar(nearest[0], "churn")
