"""The backfill job in this process, with tiny models: what a run holds and what is left when it fails."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import instructue_spark.embed as embedding
from instructue_feast.config import InstructueConfig
from instructue_feast.errors import (
    ConfigError,
    DataError,
    InvalidEmbeddingError,
    LeakageError,
    PublishConflictError,
    RunConflictError,
    StorageError,
    UnsafeArtifactError,
    VersionMismatchError,
)
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.from_run import check_run_model, open_embedder
from instructue_feast.model.factory import load_model
from instructue_feast.runs.manifest import RunManifest
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import BackfillRequest, run_backfill
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter
from tests.projects import AS_OF, NUM_USERS, load, make_project, write_table

pytestmark = pytest.mark.spark

SILENT = Reporter(stream=None)


def backfill(spark, config: InstructueConfig, **values) -> RunManifest:
    return run_backfill(spark, BackfillRequest(config=config, as_of=values.pop("as_of", AS_OF), **values), SILENT)


def vectors(config: InstructueConfig, run_id: str) -> dict[str, np.ndarray]:
    """Vectors by user, `[instructions, dim]`."""
    rows = read_run(OutputStore(config.output.path), run_id).to_pylist()
    names = [one.id for one in config.instructions]
    return {row["user_id"]: np.asarray([row[name] for name in names], np.float32) for row in rows}


def everything_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def done(spark, models, tmp_path_factory) -> tuple[InstructueConfig, RunManifest]:
    """One finished, published backfill, shared by the tests that only look."""
    folder = tmp_path_factory.mktemp("shop")
    make_project(folder, models)
    config = load(folder)
    return config, backfill(spark, config, run_id="first")


@pytest.fixture
def project(models, tmp_path) -> InstructueConfig:
    make_project(tmp_path, models)
    return load(tmp_path)


def test_every_user_gets_a_unit_vector_per_instruction_even_without_events(done):
    config, run = done
    found = vectors(config, run.run_id)
    assert set(found) == {f"u{user}" for user in range(NUM_USERS)}
    assert all(np.allclose(np.linalg.norm(one, axis=1), 1, atol=1e-5) for one in found.values())
    assert run.users == NUM_USERS
    assert sum(marker.rows for marker in run.buckets) == NUM_USERS
    assert run.tokens > NUM_USERS * 10
    assert not run.trained


def test_instructions_and_users_differ(done):
    config, run = done
    found = np.stack(list(vectors(config, run.run_id).values()))
    assert np.abs(found[:, 0] - found[:, 1]).max() > 1e-3
    assert np.abs(found - found[:1]).max() > 1e-3


def test_a_run_is_published_under_views_named_after_instruction_and_version(done):
    config, run = done
    publication = current_publication(OutputStore(config.output.path))
    assert publication is not None
    assert publication.run_id == run.run_id
    assert {view.name for view in publication.views} == {one.view for one in run.instructions}


def test_a_run_equals_a_direct_encode_with_the_model_it_carries(done):
    config, run = done
    store = OutputStore(config.output.path)
    embedder = open_embedder(store, run.run_id)
    assert check_run_model(store, run.run_id, config, embedder).run_id == run.run_id
    files = store.fs.glob(store.path("extracts", run.extract_id, "history", "bucket=*", "*.parquet"))
    history = PackedHistory.from_arrow(
        ds.dataset(files).to_table(), num_sources=len(config.source_names), num_numeric=len(config.numeric_columns)
    )
    direct = embedder.encode(history, config.registry().select(None))
    served = vectors(config, run.run_id)
    assert np.abs(direct - np.stack([served[user] for user in history.user_ids])).max() < 1e-5


def test_a_run_made_by_another_model_is_refused(done, tmp_path):
    config, run = done
    store = OutputStore(config.output.path)
    embedder = open_embedder(store, run.run_id)
    other = dataclasses.replace(config, history=dataclasses.replace(config.history, days=30))
    with pytest.raises(VersionMismatchError, match=f"run {run.run_id} was made by model version"):
        check_run_model(store, run.run_id, other, embedder)
    copy = OutputStore(str(tmp_path))
    shutil.copytree(store.path("runs", run.run_id), copy.path("runs", run.run_id))
    weights = Path(copy.path("runs", run.run_id, "model", "model.safetensors"))
    tensors = load_file(weights)
    save_file({name: value + 1 for name, value in tensors.items()}, weights)
    with pytest.raises(VersionMismatchError, match="soft-token table was built with model"):
        open_embedder(copy, run.run_id)


def test_the_encoder_runs_once_per_distinct_text_ever(spark, project):
    first = backfill(spark, project)
    assert first.texts_encoded == first.distinct_texts > 0
    again = backfill(spark, project)
    assert again.texts_encoded == 0
    assert again.digest == first.digest
    folder = Path(project.output.path) / "event_vectors"
    stored = ds.dataset(list(map(str, folder.rglob("*.parquet")))).to_table().column("text_id").to_pylist()
    assert len(stored) == len(set(stored)) == first.distinct_texts
    raw = Path(project.output.path).parent
    write_table(raw, "search", [{"customer": "u1", "at": AS_OF.replace(day=1, month=2), "words": "something new"}])
    third = backfill(spark, project)
    assert third.texts_encoded == 1


def test_vectors_that_are_complete_are_never_written_over(tmp_path):
    store, name = OutputStore(str(tmp_path)), "night-00000-of-00003"
    half = embedding._new_vector_folder(store, "v" * 64, name)
    store.write_json({}, *half, "part.parquet")
    assert embedding._new_vector_folder(store, "v" * 64, name) == half
    store.write_json({}, *half, "_SUCCESS")
    other = embedding._new_vector_folder(store, "v" * 64, name)
    assert other != half
    store.write_json({}, *other, "_SUCCESS")
    assert len({half, other, embedding._new_vector_folder(store, "v" * 64, name)}) == 3


def test_two_runs_of_one_extract_encode_into_folders_of_their_own(spark, project):
    folder = Path(project.output.path) / "event_vectors"
    run = backfill(spark, project, publish=False)
    assert [one.name for one in folder.glob("*/*")] == [run.run_id]
    shutil.rmtree(folder)
    backfill(spark, project, extract_id=run.extract_id, run_id="other", publish=False)
    assert [one.name for one in folder.glob("*/*")] == ["other"]


def test_the_number_of_buckets_does_not_change_an_embedding(spark, done, models, tmp_path):
    config, run = done
    make_project(tmp_path, models, buckets=1)
    other = backfill(spark, load(tmp_path), run_id="one-bucket")
    one, four = vectors(load(tmp_path), other.run_id), vectors(config, run.run_id)
    assert max(np.abs(one[user] - four[user]).max() for user in four) < 1e-5


def test_a_second_backfill_of_the_same_run_is_refused_and_the_first_stays(spark, done):
    config, run = done
    before = everything_below(Path(config.output.path))
    with pytest.raises(RunConflictError, match="first"):
        backfill(spark, config, run_id=run.run_id)
    assert everything_below(Path(config.output.path)) == before


def test_an_extract_can_be_embedded_for_one_instruction_only(spark, done):
    config, run = done
    other = backfill(
        spark, config, extract_id=run.extract_id, instructions=["taste"], publish=False, run_id="taste-only"
    )
    assert [one.id for one in other.instructions] == ["taste"]
    assert other.instructions[0].embedding_version == run.instructions[1].embedding_version
    publication = current_publication(OutputStore(config.output.path))
    assert publication is not None
    assert publication.run_id == run.run_id


def test_a_failing_backfill_leaves_an_extract_of_the_same_name_alone(spark, project):
    run_extract(spark, project, AS_OF, extract_id="mine", reporter=SILENT)
    before = everything_below(Path(project.output.path))
    with pytest.raises(RunConflictError, match="mine"):
        backfill(spark, project, run_id="mine")
    assert everything_below(Path(project.output.path)) == before


def test_an_extract_of_other_settings_is_refused(spark, done):
    config, run = done
    other = dataclasses.replace(config, history=dataclasses.replace(config.history, days=30))
    with pytest.raises(VersionMismatchError, match="leave --extract out"):
        backfill(spark, other, extract_id=run.extract_id)


def test_the_model_is_loaded_once_per_python_worker(done):
    _, run = done
    assert len(run.buckets) == 4
    assert run.model_loads <= 2  # local[2] has two workers, which may have it from an earlier run


def test_events_at_or_after_as_of_change_no_embedding(spark, project, done):
    _, run = done
    raw = Path(project.output.path).parent
    rows = pq.read_table(raw / "raw" / "bill").to_pylist()
    future = [row | {"line": f"future-{row['line']}", "paid_at": AS_OF, "product": "caviar"} for row in rows]
    write_table(raw, "bill", rows + future)
    assert backfill(spark, project).digest == run.digest


@pytest.mark.parametrize("wrong", ["..", ".", "a/b", "", "-x", "a b"])
def test_an_id_that_is_no_folder_name_is_refused_and_nothing_is_touched(spark, done, wrong):
    config, _ = done
    before = everything_below(Path(config.output.path))
    with pytest.raises(ConfigError, match="id"):
        backfill(spark, config, run_id=wrong or "/")
    with pytest.raises(ConfigError, match="extract"):
        backfill(spark, config, extract_id=wrong or "/")
    assert everything_below(Path(config.output.path)) == before


def test_an_unknown_extract_lists_those_that_exist(spark, done):
    config, run = done
    with pytest.raises(ConfigError, match=f"(?s)no finished extract firts.*did you mean {run.extract_id}"):
        backfill(spark, config, extract_id="firts")


def test_a_finished_run_survives_a_failed_publication(spark, project, monkeypatch):
    def conflict(*_args, **_values):
        raise PublishConflictError("another publisher was faster", "publish again")

    monkeypatch.setattr("instructue_spark.backfill.release", conflict)
    with pytest.raises(PublishConflictError):
        backfill(spark, project, run_id="kept")
    monkeypatch.undo()
    store = OutputStore(project.output.path)
    assert read_run(store, "kept").num_rows == NUM_USERS
    assert publish(store, "kept").run_id == "kept"


def test_a_model_that_has_seen_the_future_is_refused(spark, project, tmp_path):
    model = load_model(project)
    model.config.trained, model.config.trained_through = True, "2025-03-02T00:00:00+00:00"
    model.save_pretrained(tmp_path / "model")
    config = dataclasses.replace(project, model=dataclasses.replace(project.model, path=str(tmp_path / "model")))
    with pytest.raises(LeakageError, match="later than as_of"):
        backfill(spark, config)
    assert_nothing_left(config)


def assert_nothing_left(config: InstructueConfig) -> None:
    store = OutputStore(config.output.path)
    assert store.names("runs") == []
    assert store.names("extracts") == []
    assert current_publication(store) is None


def test_an_unknown_instruction_is_refused_before_anything_is_written(spark, project):
    with pytest.raises(ConfigError, match="unknown instruction"):
        backfill(spark, project, instructions=["chrun"])
    assert not Path(project.output.path).exists()


def test_too_little_disk_is_refused_before_anything_is_written(spark, project):
    config = dataclasses.replace(project, output=dataclasses.replace(project.output, min_free_gib=1e9))
    with pytest.raises(StorageError, match="GiB are free"):
        backfill(spark, config)
    assert not Path(project.output.path).exists()


def saved_model(config: InstructueConfig, folder: Path) -> InstructueConfig:
    load_model(config).save_pretrained(folder)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(folder)))


def test_a_saved_model_gives_the_embeddings_of_the_model_that_was_saved(spark, done, tmp_path):
    config, run = done
    path = saved_model(config, tmp_path / "model")
    other = backfill(spark, path, extract_id=run.extract_id, publish=False, run_id="saved-model")
    assert other.digest == run.digest
    assert other.model_version == run.model_version


def test_a_model_folder_without_weights_or_with_pickled_ones_is_refused(spark, project, tmp_path):
    config = saved_model(project, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors"):
        backfill(spark, config)
    torch.save({"x": torch.zeros(1)}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UnsafeArtifactError):
        backfill(spark, config)
    assert_nothing_left(config)


def test_a_model_of_other_sources_is_refused(spark, project, tmp_path):
    config = saved_model(project, tmp_path / "model")
    fewer = dataclasses.replace(config, sources={name: config.sources[name] for name in ("bill", "search")})
    with pytest.raises(VersionMismatchError, match="was made for sources"):
        backfill(spark, fewer)
    assert_nothing_left(config)


def test_broken_weights_never_reach_a_run(spark, project, tmp_path):
    config = saved_model(project, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("projection"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, file)
    with pytest.raises(InvalidEmbeddingError, match="NaN"):
        backfill(spark, config)
    assert_nothing_left(config)


def test_a_missing_raw_table_leaves_nothing_behind(spark, project):
    shutil.rmtree(Path(project.output.path).parent / "raw" / "search")
    with pytest.raises(DataError, match="search"):
        backfill(spark, project)
    assert_nothing_left(project)
