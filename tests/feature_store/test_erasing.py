"""Erasing users: gone from every store and file, for good, with everybody else as before."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sqlite3

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from redis import Redis

from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.feature_store import erase as erasing
from instructue_feast.feature_store.erase import erase_users
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.online import online_store
from instructue_feast.feature_store.scan import Scan
from instructue_feast.feature_store.session import open_store
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs import erase as erasing_files
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.reader import run_manifest, verify_bucket
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from tests.fake_runs import use_redis, write_fake_run, write_feast_repo
from tests.feature_store.real_runs import write_real_run
from tests.model_data import make_history, make_model, make_table

CHURN = Instruction("churn", "What about churn?")
HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])
USERS = HISTORY.user_ids
GONE, OTHERS = USERS[2:4], [*USERS[:2], *USERS[4:]]


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        yield UserEmbedder(model, make_table(model, tiny[1]))


@pytest.fixture(params=["sqlite", "redis"])
def served(request, tmp_path, embedder):
    """Two published runs of two versions, packed histories, UserQA and quarantine, all served."""
    repo = tmp_path / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    if request.param == "redis":
        use_redis(repo, request.getfixturevalue("redis_address"), project=f"erase{abs(hash(str(repo)))}")
    for run_id, version in (("night-1", "a" * 64), ("night-2", "b" * 64), ("night-3", "c" * 64)):
        write_real_run(store, embedder, HISTORY, [CHURN], run_id=run_id, model_version=version)
        publish(store, run_id)
        apply_repo(repo)
        materialize(repo)
    for name in ("history", "pairs/split=train"):
        folder = store.path("user_qa", "qa-1", name)
        store.fs.makedirs(folder)
        pq.write_table(pa.table({"user_id": USERS, "x": pa.array([np.nan] * len(USERS))}), f"{folder}/part-0.parquet")
        (store.fs.open(f"{folder}/.part-0.parquet.crc", "wb")).close()
    quarantine = store.path("extracts", "night-1", "quarantine")
    store.fs.makedirs(quarantine)
    rows = {"user_id": [GONE[0], None, OTHERS[0]], "row": ['{"a": 1}'] * 3}
    pq.write_table(pa.table(rows), f"{quarantine}/part-0.parquet")
    return repo, store


def everybody(store):
    """User ids in any Parquet file below the output, with the file."""
    found = {}
    for path in store.fs.find(store.path()):
        if path.endswith(".parquet"):
            table = pq.read_table(path, partitioning=None)
            if "user_id" in table.schema.names:
                found[path] = table
    return found


def raw_online(repo):
    """Every byte the online store holds."""
    text = (repo / "feature_store.yaml").read_text()
    if "connection_string: " in text:
        host, port = text.split("connection_string: ")[1].split()[0].split(":")
        project = text.split("project: ")[1].split()[0].encode()
        client = Redis(host=host, port=int(port))
        keys = [key for key in client.scan_iter() if key.endswith(project)]
        return b"".join(key + b"".join(client.hkeys(key)) for key in keys)
    return b"".join(file.read_bytes() for file in sorted((repo / "data").glob("online.db*")))


def test_an_erased_user_is_nowhere_and_everybody_else_is_as_before(served):
    repo, store = served
    before, embeddings = everybody(store), UserEmbeddings(repo)
    others = embeddings.get(OTHERS)
    assert embeddings.get(GONE).found["churn"].all()
    assert all(user.encode() in raw_online(repo) for user in USERS)
    proof = erase_users(repo, GONE)
    assert proof.absent
    assert proof.online_rows > 2 * len(GONE)
    assert set(proof.files.rows) == {"extracts", "runs", "published", "user_qa"}
    after = everybody(store)
    assert after.keys() == before.keys()
    for path, table in before.items():
        mask = [user not in GONE for user in table.column("user_id").to_pylist()]
        expected, got = table.filter(pa.array(mask)), after[path]
        assert got.schema.names == expected.schema.names
        for name in expected.schema.names:
            assert repr(got.column(name).to_pylist()) == repr(expected.column(name).to_pylist()), (path, name)
    content = raw_online(repo)
    assert not any(user.encode() in content for user in GONE)
    assert all(user.encode() in content for user in OTHERS)
    found = embeddings.get([*GONE, *OTHERS])
    assert found.found["churn"].tolist() == [False] * len(GONE) + [True] * len(OTHERS)
    np.testing.assert_array_equal(found.vectors["churn"][len(GONE) :], others.vectors["churn"])
    assert not embeddings.embed(GONE, "What now?").found.any()
    assert not list(repo.rglob("*.crc"))


def test_runs_and_publications_stay_valid_and_an_erased_user_does_not_come_back(served):
    repo, store = served
    erase_users(repo, GONE)
    for run_id in ("night-1", "night-2", "night-3"):
        manifest = run_manifest(store, run_id)
        assert manifest.users == len(OTHERS)
        for marker in manifest.buckets:
            verify_bucket(store, manifest, marker)
    publication = current_publication(store)
    assert {run.rows for view in publication.views for run in view.runs} == {len(OTHERS)}
    assert {one.rows for one in publication.histories} == {len(OTHERS)}
    for run_id in ("night-1", "night-3"):  # a rollback, and forward again
        publish(store, run_id)
        apply_repo(repo)
        assert {one.rows for one in materialize(repo)} == {len(OTHERS)}
    content = raw_online(repo)
    assert not any(user.encode() in content for user in GONE)
    assert Tombstones(store).contains(GONE).all()


def test_the_proof_holds_no_id(served):
    repo, store = served
    proof = erase_users(repo, GONE)
    text = json.dumps(dataclasses.asdict(proof)) + str(proof)
    assert not any(user in text for user in USERS)
    assert proof.user_hashes == [Tombstones(store).user_hash(user) for user in GONE]
    for path in (repo / "data").rglob("*.json"):
        assert not any(user in path.read_text() for user in GONE)


@pytest.mark.parametrize("steps", [0, 1, 3, 6, 9])
def test_an_erasure_cut_short_leaves_nothing_half_written_and_the_next_one_finishes(
    tmp_path, embedder, monkeypatch, steps
):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    apply_repo(repo)
    materialize(repo)
    done = []

    def failing(original):
        def call(*arguments, **options):
            if len(done) >= steps:
                raise KeyboardInterrupt
            done.append(original.__name__)
            return original(*arguments, **options)

        return call

    with monkeypatch.context() as patched:
        for name in ("_rewrite", "_relink", "_mend_extracts", "_mend_runs", "_mend_publications"):
            patched.setattr(erasing_files, name, failing(getattr(erasing_files, name)))
        with pytest.raises(KeyboardInterrupt):
            erase_users(repo, GONE)
    assert not [path for path in (repo / "data").rglob("*") if path.suffix in (".tmp", ".erasing")]
    assert all(table.num_rows for table in everybody(store).values())
    assert Tombstones(store).contains(GONE).all()
    assert erase_users(repo, GONE).absent
    manifest = run_manifest(store, "night-1")
    assert manifest.users == len(OTHERS)
    for marker in manifest.buckets:
        verify_bucket(store, manifest, marker)
    publish(store, "night-1")


def test_erasing_twice_and_erasing_strangers_change_nothing(served):
    repo, store = served
    erase_users(repo, GONE)
    before = everybody(store)
    again = erase_users(repo, [*GONE, "nobody"])
    assert again.absent
    assert (again.newly, again.online_rows, again.files.files) == (1, 0, 0)
    assert {path: table.num_rows for path, table in everybody(store).items()} == {
        path: table.num_rows for path, table in before.items()
    }


def test_a_sweep_erases_what_a_restored_backup_brought_back(served):
    repo, store = served
    shutil.copytree(repo / "data", repo / "backup", copy_function=shutil.copy2)
    erase_users(repo, GONE)
    tombstones = repo / "data" / "output" / "tombstones"
    shutil.copytree(tombstones, repo / "backup" / "output" / "tombstones")
    shutil.rmtree(repo / "data")
    shutil.move(repo / "backup", repo / "data")
    materialize(repo)
    proof = erase_users(repo, [])
    assert proof.absent
    assert proof.users == 0
    assert not any(set(GONE) & set(table.column("user_id").to_pylist()) for table in everybody(store).values())
    assert not any(user.encode() in raw_online(repo) for user in GONE)


def test_a_view_the_registry_has_forgotten_is_erased_from_too(tmp_path):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    publish(store, write_fake_run(store, instructions=["churn"]))
    apply_repo(repo)
    materialize(repo)
    connection = sqlite3.connect(repo / "data" / "online.db")
    (table,) = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    connection.execute(f'CREATE TABLE "instructue_old__0123abcd" AS SELECT * FROM "{table}"')
    connection.execute(f'CREATE TABLE "instructue_not_ours" AS SELECT * FROM "{table}"')
    connection.commit()
    connection.close()
    erase_users(repo, ["user-0001"])
    connection = sqlite3.connect(repo / "data" / "online.db")
    count = {
        name: connection.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0]
        for name in (table, "instructue_old__0123abcd", "instructue_not_ours")
    }
    assert count == {table: 11, "instructue_old__0123abcd": 11, "instructue_not_ours": 12}


def test_fields_of_other_views_in_the_same_redis_hash_stay(repo, redis_address):
    use_redis(repo, redis_address, project="shared")
    store = OutputStore(str(repo / "data" / "output"))
    publish(store, write_fake_run(store))
    apply_repo(repo)
    materialize(repo)
    host, port = redis_address.split(":")
    client = Redis(host=host, port=int(port))
    key = erasing.keys_of("user_id", ["user-0001"])[0] + b"shared"
    client.hset(key, mapping={"_ts:spending": b"x", "abcd": b"y"})
    assert erase_users(repo, ["user-0001", "user-0002"]).absent
    assert client.hgetall(key) == {b"_ts:spending": b"x", b"abcd": b"y"}
    assert not client.exists(erasing.keys_of("user_id", ["user-0002"])[0] + b"shared")


def test_rows_of_other_views_in_the_same_sqlite_file_stay_and_disprove_nothing(repo):
    store = OutputStore(str(repo / "data" / "output"))
    publish(store, write_fake_run(store))
    apply_repo(repo)
    materialize(repo)
    key = erasing.keys_of("user_id", ["user-0001"])[0]
    with sqlite3.connect(repo / "data" / "online.db") as connection:
        connection.execute("CREATE TABLE instructue_spending (entity_key BLOB, feature_name TEXT, value BLOB)")
        connection.execute("INSERT INTO instructue_spending VALUES (?, 'spent', x'00')", [key])
    assert erase_users(repo, ["user-0001", "user-0002"]).absent
    with sqlite3.connect(repo / "data" / "online.db") as connection:
        assert connection.execute("SELECT entity_key FROM instructue_spending").fetchall() == [(key,)]


def test_an_unfinished_run_is_named_because_it_may_still_be_written(tmp_path):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo)
    publish(store, write_fake_run(store))
    apply_repo(repo)
    write_fake_run(store, "2017-11-01T00:00:00Z", finish=False)
    proof = erase_users(repo, ["user-0001"])
    assert not proof.absent
    assert proof.found_in_files.erased == 0
    assert len(proof.found_in_files.unfinished) == 1


def test_an_online_store_that_cannot_delete_is_refused_before_anything_happens(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo)
    publish(store, write_fake_run(store))
    apply_repo(repo)
    materialize(repo)
    monkeypatch.setattr(erasing, "SqliteOnlineStore", int)
    with pytest.raises(ConfigError, match="--no-online"):
        erase_users(repo, ["user-0001"])
    assert len(Tombstones(store)) == 0
    proof = erase_users(repo, ["user-0001"], online=False)
    assert proof.absent
    assert proof.found_online is None
    assert b"user-0001" in raw_online(repo)


def test_a_file_that_cannot_be_replaced_is_an_error_that_names_no_user(tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo)
    publish(store, write_fake_run(store))
    apply_repo(repo)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(erasing_files.pq, "write_table", full)
    with pytest.raises(StorageError, match="erase again") as error:
        erase_users(repo, ["user-0001"])
    assert "user-0001" not in str(error.value)


@pytest.mark.parametrize("moment", ["before the write", "after the write"])
def test_a_materialization_that_runs_meanwhile_does_not_bring_a_user_back(served, monkeypatch, moment):
    repo, _ = served
    store = online_store(open_store(repo))
    write, proofs = type(store).write_rows, []

    def erase_and_write(self, *args):
        if moment == "after the write":
            stored = write(self, *args)
        if not proofs:
            proofs.append(erase_users(repo, GONE))
        return stored if moment == "after the write" else write(self, *args)

    monkeypatch.setattr(type(store), "write_rows", erase_and_write)
    materialize(repo)
    assert proofs[0].absent
    assert not any(user.encode() in raw_online(repo) for user in GONE)
    found = UserEmbeddings(repo).get(USERS, ["churn"]).found["churn"]
    assert found.tolist() == [user in OTHERS for user in USERS]


def test_a_file_that_an_erasure_replaces_while_it_is_read_stops_the_materialization(served, monkeypatch):
    """Row numbers found before would point at other users' vectors after."""
    repo, _ = served
    batches = Scan.batches

    def erase_and_read(self, size):
        erase_users(repo, GONE)
        return batches(self, size)

    monkeypatch.setattr(Scan, "batches", erase_and_read)
    with pytest.raises(StorageError, match=r"was replaced while it was read\nHint: .*Materialize again"):
        materialize(repo)
    monkeypatch.undo()
    materialize(repo)
    found = UserEmbeddings(repo).get(USERS, ["churn"]).found["churn"]
    assert found.tolist() == [user in OTHERS for user in USERS]
