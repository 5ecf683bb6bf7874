"""Reading stored bytes directly: the same answers as stock Feast, from any thread, in any state of the store."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import numpy as np
import pytest
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from redis import Redis

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, StorageError, VersionMismatchError
from instructue_feast.feature_store import readers
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.readers import keys_of
from instructue_feast.feature_store.session import quiet
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import INSTRUCTIONS, unit_vectors, use_redis, use_stock, user_names, write_fake_run

OCTOBER, NOVEMBER = "2017-10-01T00:00:00Z", "2017-11-01T00:00:00Z"


def output(repo):
    return OutputStore(load_config(repo / "instructue.yaml").output.path)


def serve(repo, as_of=OCTOBER, **options):
    publication = publish(output(repo), write_fake_run(output(repo), as_of, **options))
    apply_repo(repo)
    materialize(repo)
    return publication


def stock(embeddings, users):
    rows = [{"user_id": user} for user in users]
    service = embeddings.store.get_feature_service("user_embeddings")
    return embeddings.store.get_online_features(features=service, entity_rows=rows).to_dict()


def test_a_lookup_gives_the_numbers_stock_feast_gives(any_repo):
    serve(any_repo)
    embeddings = UserEmbeddings(any_repo)
    users = [*user_names(12), "nobody"]
    found, expected = embeddings.get(users), stock(embeddings, users)
    assert embeddings._readers["user_id"].__class__ is not readers.StockReader
    for name in INSTRUCTIONS:
        for row, vector in enumerate(expected[name]):
            assert found.found[name][row] == (vector is not None)
            if vector is not None:
                np.testing.assert_array_equal(found.vectors[name][row], np.float32(vector))


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_our_own_online_stores_are_read_however_they_keep_their_vectors(any_repo, storage):
    file = any_repo / "feature_store.yaml"
    kind = "Redis" if "Redis" in file.read_text() else "Sqlite"
    ours = f"Instructue{kind}OnlineStore\n"
    file.write_text(file.read_text().replace(ours, f"{ours}  vector_storage: {storage}\n"))
    serve(any_repo, dim=8)
    embeddings = UserEmbeddings(any_repo)
    users = ["user-0007", "nobody", "user-0002"]
    found = embeddings.get(users)
    assert embeddings.store._get_provider().online_store.__class__.__name__ == f"Instructue{kind}OnlineStore"
    for name in INSTRUCTIONS:
        assert found.found[name].tolist() == [True, False, True]
        expected = unit_vectors(0, users, name)
        expected[1] = 0
        np.testing.assert_allclose(found.vectors[name], expected, atol=0 if storage == "float32" else 1e-3)
        assert found.as_of[name][0] == np.datetime64("2017-10-01")


def test_any_other_online_store_is_read_through_its_own_interface(any_repo, monkeypatch):
    serve(any_repo)
    users = ["user-0007", "nobody", "user-0002", "user-0007"]
    fast = UserEmbeddings(any_repo).get(users)
    monkeypatch.setattr("instructue_feast.feature_store.lookup.reader_of", readers.StockReader)
    slow = UserEmbeddings(any_repo).get(users)
    for name in INSTRUCTIONS:
        np.testing.assert_array_equal(fast.vectors[name], slow.vectors[name])
        np.testing.assert_array_equal(fast.found[name], slow.found[name])
        np.testing.assert_array_equal(fast.as_of[name], slow.as_of[name])


def test_thousands_of_users_are_read_in_several_statements(repo, monkeypatch):
    users = user_names(50)
    serve(repo, users=users)
    monkeypatch.setattr(readers, "_SQLITE_KEYS", 7)
    asked = [*users[::-1], "nobody", users[3]]
    found = UserEmbeddings(repo).get(asked)
    assert found.found["taste"].tolist() == [True] * 50 + [False, True]
    np.testing.assert_array_equal(found.vectors["taste"][:50], unit_vectors(0, users[::-1], "taste"))


def test_a_value_written_as_null_is_not_found(any_repo):
    serve(any_repo)
    embeddings = UserEmbeddings(any_repo)
    view = embeddings.served()["churn"]
    key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val="user-0001")])
    online, config = embeddings.store._get_provider().online_store, embeddings.store.config
    table = embeddings.store.get_feature_view(view.name)
    online.online_write_batch(config, table, [(key, {"churn": Value()}, datetime(2025, 1, 1, tzinfo=UTC), None)], None)
    found = embeddings.get(["user-0001", "user-0002"])
    assert found.found["churn"].tolist() == [False, True]
    assert not found.vectors["churn"][0].any()
    assert found.found["taste"].all()


def test_threads_get_whole_answers_while_the_view_is_written_again(any_repo):
    users = user_names(40)
    serve(any_repo, users=users, seed=1)
    embeddings = UserEmbeddings(any_repo)
    embeddings.get(users)
    expected = {seed: {name: unit_vectors(seed, users, name) for name in INSTRUCTIONS} for seed in (1, 2)}
    stop, problems, answers = threading.Event(), [], []

    def client():
        while not stop.is_set():
            try:
                found = embeddings.get(users)
            except Exception as error:
                problems.append(repr(error))
                return
            for name in INSTRUCTIONS:
                new = found.as_of[name] == np.datetime64("2017-11-01")
                right = np.where(new[:, None], expected[2][name], expected[1][name])
                if not (found.found[name].all() and np.array_equal(found.vectors[name], right)):
                    problems.append(f"{name}: a vector is not the one of its as_of")
            answers.append(new.any())

    threads = [threading.Thread(target=client) for _ in range(8)]
    for one in threads:
        one.start()
    try:
        serve(any_repo, NOVEMBER, users=users, seed=2)
    finally:
        stop.set()
        for one in threads:
            one.join()
    assert problems == []
    assert len(answers) > 8
    np.testing.assert_array_equal(embeddings.get(users).vectors["taste"], expected[2]["taste"])


def test_one_answer_never_mixes_versions_while_the_service_moves(repo):
    users = user_names(12)
    old = serve(repo)
    embeddings = UserEmbeddings(repo)
    seen, stop, problems = set(), threading.Event(), []

    def client():
        while not stop.is_set():
            found = embeddings.get(users)
            views = tuple(found.views.values())
            seen.add(views)
            seed = 0 if views == tuple(old.current.values()) else 2
            for name in INSTRUCTIONS:
                known = found.found[name]
                if not np.array_equal(found.vectors[name][known], unit_vectors(seed, users, name)[known]):
                    problems.append(views)

    thread = threading.Thread(target=client)
    thread.start()
    try:
        new = serve(repo, NOVEMBER, versions=dict.fromkeys(INSTRUCTIONS, "v2"), seed=2)
        embeddings.refresh()
        embeddings.get(users)
    finally:
        stop.set()
        thread.join()
    assert problems == []
    assert seen <= {tuple(old.current.values()), tuple(new.current.values())}
    assert embeddings.get(users).views == new.current


def test_async_lookups_run_side_by_side(any_repo):
    serve(any_repo)
    embeddings = UserEmbeddings(any_repo)

    async def many():
        return await asyncio.gather(*(embeddings.get_async([user], ["churn"]) for user in user_names(12)))

    got = np.concatenate([one.vectors["churn"] for one in asyncio.run(many())])
    np.testing.assert_array_equal(got, unit_vectors(0, user_names(12), "churn"))


def test_threads_that_come_first_share_one_redis_client(repo, redis_address, monkeypatch):
    use_redis(repo, redis_address, project="first")
    serve(repo)
    embeddings = UserEmbeddings(repo)
    embeddings.served()
    threads, clients = 8, []
    together = threading.Barrier(threads)

    def slowly(**options):
        time.sleep(0.05)  # long enough for every thread to come by while there is no client yet
        clients.append(Redis(**options))
        return clients[-1]

    monkeypatch.setattr("feast.infra.online_stores.redis.Redis", slowly)

    def first(user):
        together.wait()
        return embeddings.get([user], ["churn"]).vectors["churn"]

    with ThreadPoolExecutor(threads) as pool:
        got = np.concatenate(list(pool.map(first, user_names(threads))))
    np.testing.assert_array_equal(got, unit_vectors(0, user_names(threads), "churn"))
    assert len(clients) == 1


def test_a_caller_that_depends_on_a_version_is_refused_any_other(repo):
    version = serve(repo).current["churn"].rpartition("__")[2]
    assert UserEmbeddings(repo, versions={"churn": version}).get(["user-0001"]).found["churn"].all()
    serve(repo, NOVEMBER, versions={"churn": "v2"}, seed=2)
    with pytest.raises(VersionMismatchError, match=f"not in version {version}"):
        UserEmbeddings(repo, versions={"churn": version}).get(["user-0001"])
    with pytest.raises(ConfigError, match="unknown instruction 'chrun'"):
        UserEmbeddings(repo, versions={"chrun": version}).get(["user-0001"])


def test_a_broken_redis_connection_is_mended(repo, redis_address):
    use_redis(repo, redis_address, project="mended")
    serve(repo)
    embeddings = UserEmbeddings(repo)
    embeddings.get(["user-0001"])
    client = embeddings.store._get_provider().online_store._get_client(embeddings.store.config.online_store)
    for one in client.client_list():
        if str(one["id"]) != str(client.client_id()):
            client.client_kill_filter(_id=one["id"])
    client.connection_pool.disconnect()
    assert embeddings.get(["user-0001", "user-0002"]).found["churn"].all()


def test_feast_serve_answers_with_our_features(served_repo):
    from fastapi.testclient import TestClient
    from feast.feature_server import get_app

    embeddings = UserEmbeddings(served_repo)
    question = {"feature_service": "user_embeddings", "entities": {"user_id": ["user-0003", "nobody"]}}
    with TestClient(get_app(embeddings.store)) as client:
        answer = client.post("/get-online-features", json=question)
    assert answer.status_code == 200, answer.text
    columns = dict(zip(answer.json()["metadata"]["feature_names"], answer.json()["results"], strict=True))
    found = embeddings.get(["user-0003", "nobody"])
    for name in INSTRUCTIONS:
        values = columns[name]["values"]
        np.testing.assert_array_equal(np.float32(values[0]), found.vectors[name][0])
        assert values[1] is None


def drop_tables(repo, embeddings):
    connection = sqlite3.connect(repo / "data" / "online.db")
    for view in embeddings.served().values():
        connection.execute(f'DROP TABLE "{embeddings.store.project}_{view.stored.versioned}"')
    connection.commit()
    connection.close()


def test_a_view_that_is_gone_from_the_store_is_an_error_with_a_way_out(repo):
    serve(repo)
    embeddings = UserEmbeddings(repo)
    embeddings.get(["user-0001"])
    drop_tables(repo, embeddings)
    with pytest.raises(StorageError, match=r"no such table[\s\S]*instructue materialize"):
        embeddings.get(["user-0001"])


def test_a_lookup_that_still_knew_a_removed_view_follows_the_registry(repo):
    serve(repo)
    embeddings = UserEmbeddings(repo)
    embeddings.get(["user-0001"])
    old = embeddings.served()
    new = serve(repo, NOVEMBER, versions=dict.fromkeys(INSTRUCTIONS, "v2"), seed=2)
    embeddings._served, embeddings._resolve_at = old, time.monotonic() + 600
    drop_tables(repo, embeddings)
    found = embeddings.get(["user-0001"])
    assert found.views == new.current
    np.testing.assert_array_equal(found.vectors["churn"], unit_vectors(2, ["user-0001"], "churn"))


def test_a_redis_that_is_down_is_a_storage_error(repo):
    use_redis(repo, "127.0.0.1:1", project="down")
    serve_without_materializing = publish(output(repo), write_fake_run(output(repo)))
    apply_repo(repo)
    with pytest.raises(StorageError, match="online store"):
        UserEmbeddings(repo).get(["user-0001"], list(serve_without_materializing.current)[:1])


def test_what_redis_refuses_is_a_storage_error(repo, redis_address):
    use_redis(repo, redis_address, project="refused")
    serve(repo)
    host, port = redis_address.split(":")
    key = keys_of("user_id", ["odd"])[0] + b"refused"
    Redis(host=host, port=int(port)).set(key, b"no hash")
    with pytest.raises(StorageError, match="cannot be read") as error:
        UserEmbeddings(repo).get(["odd"])
    assert "odd" not in str(error.value)


def test_silence_ends_when_the_last_thread_leaves_it():
    before, first, second = sys.stdout, quiet(), quiet()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        one.submit(first.__exit__, None, None, None).result()
        assert sys.stdout is not before
        other.submit(second.__exit__, None, None, None).result()
    assert sys.stdout is before


def test_a_stock_sqlite_file_may_have_any_name(repo):
    use_stock(repo)
    file = repo / "feature_store.yaml"
    file.write_text(file.read_text().replace("data/online.db", '"data/on#line %20?.db"'))
    serve(repo)
    assert UserEmbeddings(repo).get(["user-0001"], ["churn"]).found["churn"].all()
