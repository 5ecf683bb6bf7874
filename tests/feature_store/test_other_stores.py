"""An online store this project knows nothing about: a real Postgres, through Feast's own store."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.session import open_store
from instructue_feast.runs.publish import publish
from tests.fake_runs import INSTRUCTIONS, unit_vectors, user_names, write_fake_run, write_feast_repo

pgserver = pytest.importorskip("pgserver", reason="pip install 'instructue-feast[dev]' brings a Postgres")
pytest.importorskip("psycopg_pool")


@pytest.fixture(scope="module")
def postgres():
    """`online_store` lines for a Postgres that lives as long as the module."""
    # Postgres does not run as root; as another user it cannot look into pytest's own folders.
    folder = Path(tempfile.mkdtemp(prefix="pg"))
    folder.chmod(0o755)
    server = pgserver.get_server(folder, cleanup_mode="delete")
    try:
        info = server.get_postmaster_info()
        host = str(info.socket_dir) if info.socket_dir else info.hostname
        yield (
            f"type: postgres\n  host: {host}\n  port: {info.port or 5432}\n  database: postgres\n"
            "  db_schema: public\n  user: postgres\n  password: ''\n"
        )
    finally:
        server.cleanup()


def test_postgres_is_written_by_our_engine_and_read_by_both(tmp_path, postgres):
    repo = tmp_path / "repo"
    output = write_feast_repo(repo)
    file = repo / "feature_store.yaml"
    ours = "type: instructue_feast.feature_store.sqlite.InstructueSqliteOnlineStore\n  path: data/online.db\n"
    assert ours in file.read_text()
    file.write_text(file.read_text().replace(ours, postgres))
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
