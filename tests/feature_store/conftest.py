"""Feast repos in temporary folders, and a real Redis."""

import pytest

from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.runs.publish import publish
from tests.fake_runs import use_redis, write_fake_run, write_feast_repo
from tests.feature_store.stores import redis_server
from tests.model_fixtures import _one_thread, _scratch_cache, encoder, llm, model, tiny  # noqa: F401


@pytest.fixture
def repo(tmp_path):
    """A Feast repo with nothing published."""
    write_feast_repo(tmp_path / "repo")
    return tmp_path / "repo"


@pytest.fixture(scope="session")
def redis_address():
    """Address of a Redis that lives as long as the tests."""
    with redis_server() as server:
        yield server.address


@pytest.fixture(params=["sqlite", "redis"])
def any_repo(request, repo):
    """The same repo, once with SQLite and once with Redis as the online store."""
    if request.param == "redis":
        use_redis(repo, request.getfixturevalue("redis_address"), project=f"p{abs(hash(str(repo)))}")
    return repo


@pytest.fixture(scope="session")
def served_repo(tmp_path_factory):
    """A repo whose users 0-11 are served from SQLite as of October; for tests that only read."""
    folder = tmp_path_factory.mktemp("served") / "repo"
    store = write_feast_repo(folder)
    publish(store, write_fake_run(store))
    apply_repo(folder)
    materialize(folder)
    return folder
