"""Runs are written bucket by bucket, finished by their manifest, and read back as they were."""

import numpy as np
import pyarrow as pa
import pytest

from instructue_feast.errors import ConfigError, InvalidEmbeddingError, RunConflictError, StorageError
from instructue_feast.runs.audit import bucket_digest, vector_matrix
from instructue_feast.runs.manifest import parse_as_of
from instructue_feast.runs.reader import finished_runs, read_run, run_manifest
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, finished_buckets, write_bucket
from instructue_feast.schema import check, embeddings_schema
from tests.fake_runs import bucket_table, fake_manifest, unit_vectors, user_names, write_fake_run

AS_OF = parse_as_of("2017-10-01T00:00:00Z")


@pytest.fixture
def store(tmp_path):
    return OutputStore(str(tmp_path / "output"))


def test_a_run_reads_back_as_it_was_written(store):
    run_id = write_fake_run(store, users=10, buckets=4)
    table = read_run(store, run_id)
    check(table, embeddings_schema(["churn", "next_basket", "taste"]), "run")
    assert sorted(table.column("user_id").to_pylist()) == user_names(10)
    assert bucket_digest(table) == run_manifest(store, run_id).digest
    np.testing.assert_array_equal(
        vector_matrix(table, "taste", ""), unit_vectors(0, table.column("user_id").to_pylist(), "taste")
    )


def test_reading_can_be_narrowed_to_instructions_and_users(store):
    run_id = write_fake_run(store)
    table = read_run(store, run_id, columns=["taste"], user_ids=["user-0003", "nobody", "user-0001"])
    assert table.schema.names == ["user_id", "event_timestamp", "created", "taste"]
    assert sorted(table.column("user_id").to_pylist()) == ["user-0001", "user-0003"]
    assert read_run(store, run_id, columns=["taste"], user_ids=[]).num_rows == 0


def test_an_unknown_instruction_of_a_run_names_those_there_are(store):
    run_id = write_fake_run(store)
    with pytest.raises(ConfigError, match="did you mean churn"):
        read_run(store, run_id, columns=["chrun"])


def test_an_unknown_run_names_those_there_are(store):
    run_id = write_fake_run(store)
    write_fake_run(store, "2017-11-01T00:00:00Z", finish=False)
    assert finished_runs(store) == [run_id]
    with pytest.raises(ConfigError, match=run_id):
        run_manifest(store, "20170101T000000-00000000")
    with pytest.raises(ConfigError, match="unknown run"):
        run_manifest(store, "../runs")


def test_a_run_without_manifest_is_not_finished(store):
    run_id = write_fake_run(store, finish=False)
    with pytest.raises(RunConflictError, match="not finished: it has 3 buckets"):
        run_manifest(store, run_id)


def test_an_invalid_bucket_leaves_no_file(store):
    table = bucket_table(user_names(3), AS_OF)
    broken = table.set_column(3, table.schema.field(3), pa.array([[float("nan")] * 8] * 3, pa.list_(pa.float32())))
    with pytest.raises(InvalidEmbeddingError, match="run r, bucket 0, instruction churn: 3 of 3"):
        write_bucket(store, "r", 0, broken, tokens=1, seconds=1.0)
    assert store.names("runs") == []


def test_a_bucket_without_marker_does_not_count_and_can_be_written_again(store):
    table = bucket_table(user_names(3), AS_OF)
    marker = write_bucket(store, "r", 0, table, tokens=1, seconds=1.0)
    store.remove("runs", "r", "bucket=00000", "marker.json")
    assert finished_buckets(store, "r") == []
    assert write_bucket(store, "r", 0, table, tokens=1, seconds=1.0) == marker
    assert finished_buckets(store, "r") == [marker]
    assert store.names("runs", "r", "bucket=00000") == ["marker.json", "part.parquet"]


def test_a_run_is_finished_once_and_only_with_the_buckets_on_disk(store):
    run_id = write_fake_run(store, finish=False)
    manifest = fake_manifest(store, run_id, "2017-10-01T00:00:00Z")
    write_bucket(store, run_id, 9, bucket_table(["late"], AS_OF), tokens=1, seconds=1.0)
    with pytest.raises(RunConflictError, match="1 buckets on disk differ from the manifest, the first is 9"):
        finish_run(store, manifest)
    store.remove("runs", run_id, "bucket=00009")
    finish_run(store, manifest)
    with pytest.raises(RunConflictError, match="finished already"):
        finish_run(store, manifest)


def test_a_missing_bucket_file_is_named(store):
    run_id = write_fake_run(store)
    store.remove("runs", run_id, "bucket=00001", "part.parquet")
    with pytest.raises(StorageError, match=r"bucket 1: .*part\.parquet is missing"):
        read_run(store, run_id)


def test_a_full_disk_leaves_neither_file_nor_marker(store, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("instructue_feast.runs.writer.pq.write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        write_bucket(store, "r", 0, bucket_table(["a"], AS_OF), tokens=1, seconds=1.0)
    assert store.names("runs", "r", "bucket=00000") == []
