"""An online store this project knows nothing about: a real Postgres, through Feast's own store."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from feast.infra.online_stores.postgres_online_store.postgres import PostgreSQLOnlineStore

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.native_search import search_online
from instructue_feast.feature_store.online import online_store
from instructue_feast.feature_store.search import UserSearch
from instructue_feast.feature_store.session import open_store
from instructue_feast.runs.publish import publish
from tests.fake_runs import INSTRUCTIONS, unit_vectors, user_names, write_fake_run, write_feast_repo

pgserver = pytest.importorskip("pgserver", reason="pip install 'instructue-feast[dev]' brings a Postgres")
pytest.importorskip("psycopg_pool")

CROWD = user_names(300)


@pytest.fixture(scope="module")
def postgres():
    """`online_store` lines for a Postgres that lives as long as the module."""
    # Postgres does not run as root; as another user it cannot look into pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)
    server = pgserver.get_server(folder, cleanup_mode="delete")
    try:
        server.psql("CREATE DATABASE searchable;\n\\c searchable\nCREATE EXTENSION vector;\n")
        info = server.get_postmaster_info()
        host = str(info.socket_dir) if info.socket_dir else info.hostname
        yield (
            f"type: postgres\n  host: {host}\n  port: {info.port or 5432}\n  database: postgres\n"
            "  db_schema: public\n  user: postgres\n  password: ''\n"
        )
    finally:
        server.cleanup()


def repo_on(repo, postgres, **options):
    """A Feast repo whose online store is that Postgres, and its output."""
    output = write_feast_repo(repo, **options)
    file = repo / "feature_store.yaml"
    ours = "type: instructue_feast.feature_store.sqlite.InstructueSqliteOnlineStore\n  path: data/online.db\n"
    assert ours in file.read_text()
    file.write_text(file.read_text().replace(ours, postgres))
    return output


def test_postgres_is_written_by_our_engine_and_read_by_both(tmp_path, postgres):
    repo = tmp_path / "repo"
    output = repo_on(repo, postgres)
    users = user_names(25)
    for seed in (1, 2):  # published again for the same time
        publish(output, write_fake_run(output, users=users, seed=seed))
        apply_repo(repo)
        assert [one.rows for one in materialize(repo)] == [25] * len(INSTRUCTIONS)
    found = UserEmbeddings(repo).get([*users, "nobody"])
    store = open_store(repo)
    service = store.get_feature_service("user_embeddings")
    stock = store.get_online_features(features=service, entity_rows=[{"user_id": one} for one in users]).to_dict()
    for name in INSTRUCTIONS:
        expected = unit_vectors(2, users, name)
        np.testing.assert_array_equal(found.vectors[name][:-1], expected)
        assert found.found[name].tolist() == [True] * 25 + [False]
        np.testing.assert_array_equal(np.float32(stock[name]), expected)
        assert found.as_of[name][0] == np.datetime64("2017-10-01T00:00:00")


@pytest.fixture(scope="module", params=["postgres", "milvus"])
def searchable(request, tmp_path_factory):
    """A repo that serves 300 users from Postgres with pgvector, or from Milvus Lite where that is installed."""
    repo = tmp_path_factory.mktemp("searchable") / "repo"
    if request.param == "milvus":
        pytest.importorskip("milvus_lite")
        settings = "type: milvus\n  path: data/milvus.db\n  embedding_dim: 8\n  index_type: FLAT\n"
    else:
        settings = request.getfixturevalue("postgres").replace("database: postgres", "database: searchable")
    output = repo_on(repo, f"{settings}  vector_enabled: true\n")
    publish(output, write_fake_run(output, users=CROWD, seed=2))
    apply_repo(repo)
    materialize(repo)
    return repo


def test_the_store_finds_the_nearest_users_and_gives_each_its_own_score(searchable):
    vectors = unit_vectors(2, CROWD, "churn")
    embeddings = UserEmbeddings(searchable)
    for row in (7, 150):
        hits = search_online(embeddings, "churn", 3 * vectors[row], k=10)
        exact = UserSearch(searchable).similar(CROWD[row], "churn", k=9)
        assert hits.ids == [CROWD[row], *exact.ids]
        np.testing.assert_allclose(
            hits.scores, vectors[[CROWD.index(one) for one in hits.ids]] @ vectors[row], atol=1e-6
        )
        assert hits.view == exact.view


def test_feasts_own_search_gives_vectors_and_distances_to_the_wrong_users(searchable):
    """The trap, on a store that answers rightly when it is asked directly."""
    store = open_store(searchable)
    view = store.get_feature_view(UserEmbeddings(searchable).served()["churn"].name)
    vectors = unit_vectors(2, CROWD, "churn")
    query = {"features": [f"{view.name}:churn"], "query": vectors[7].tolist(), "top_k": 10}
    if isinstance(online_store(store), PostgreSQLOnlineStore):
        with pytest.raises(ValueError, match="COSINE is not supported"):  # Milvus's name, which views of ours bear
            store.retrieve_online_documents_v2(**query)
        view.features[0].vector_search_metric = "cosine"
        store.apply([view])
    answer = store.retrieve_online_documents_v2(**query).to_dict()
    right = search_online(UserEmbeddings(searchable), "churn", vectors[7], k=10)
    assert sorted(answer["user_id"]) == sorted(right.ids)
    owners = [CROWD[int(np.argmax(vectors @ np.float32(one)))] for one in answer["churn"]]
    assert owners != answer["user_id"]
    own = vectors[[CROWD.index(one) for one in answer["user_id"]]] @ vectors[7]
    assert np.abs(np.float32(answer["distance"]) - own).max() > 0.01  # as a similarity, and as a distance
    assert np.abs(1 - np.float32(answer["distance"]) - own).max() > 0.01


def test_a_store_whose_search_nobody_tried_and_a_vector_of_another_view_are_refused(searchable, tmp_path):
    embeddings = UserEmbeddings(searchable)
    with pytest.raises(DataError, match="pass 8 finite numbers"):
        search_online(embeddings, "churn", np.ones(4))
    with pytest.raises(ConfigError, match="unknown instruction 'taste_of'"):
        search_online(embeddings, "taste_of", np.ones(8))
    output = write_feast_repo(tmp_path / "repo")
    publish(output, write_fake_run(output, users=CROWD[:2]))
    apply_repo(tmp_path / "repo")
    with pytest.raises(ConfigError, match="InstructueSqliteOnlineStore is not known to be right"):
        search_online(UserEmbeddings(tmp_path / "repo"), "churn", np.ones(8))
