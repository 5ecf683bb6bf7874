"""A tuned instruction in a backfill: the run carries its soft prompt, and a lookup of any kind finds it there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.dataset as ds
import pytest

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.from_run import check_run_model, open_embedder
from instructue_feast.inference.soft_prompts import save_soft_prompt
from instructue_feast.model.factory import load_model
from instructue_feast.runs.reader import read_run
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import BackfillRequest, run_backfill
from instructue_spark.report import Reporter
from tests.model_data import make_soft_prompt
from tests.projects import AS_OF, load, make_project

pytestmark = pytest.mark.spark


def backfill(spark, config, **values):
    request = BackfillRequest(config=config, as_of=AS_OF, publish=False, **values)
    return run_backfill(spark, request, Reporter(stream=None))


def vectors(config: InstructueConfig, run_id: str, name: str) -> np.ndarray:
    rows = read_run(OutputStore(config.output.path), run_id).sort_by("user_id").to_pylist()
    return np.array([row[name] for row in rows], np.float32)


def tune(folder: Path, config: InstructueConfig, **changes) -> InstructueConfig:
    """Writes a soft prompt for `churn` and names it in the config."""
    model = load_model(config)
    header = {"instruction_id": "churn", "text": "Will this shopper leave soon"}
    prompt = make_soft_prompt(model, size=1.0, **(header | changes))
    save_soft_prompt(prompt, folder / "tuned" / "churn.safetensors")
    file = folder / "instructue.yaml"
    text = file.read_text().replace("leave soon}", "leave soon, soft_prompt: tuned/churn.safetensors}")
    file.write_text(text)
    return load(folder)


@pytest.fixture
def project(tmp_path, tmp_path_factory):
    make_project(tmp_path, tmp_path_factory.mktemp("models"), buckets=2)
    return load(tmp_path)


def test_a_tuned_instruction_changes_its_own_vectors_and_nothing_else(spark, project, tmp_path):
    plain = backfill(spark, project, run_id="plain")
    config = tune(tmp_path, project)
    tuned = backfill(spark, config, run_id="tuned", extract_id=plain.extract_id)
    versions = [{one.id: one.embedding_version for one in run.instructions} for run in (plain, tuned)]
    assert versions[0]["churn"] != versions[1]["churn"]
    assert versions[0]["taste"] == versions[1]["taste"]
    assert plain.model_version == tuned.model_version
    assert np.abs(vectors(config, "plain", "churn") - vectors(config, "tuned", "churn")).max() > 1e-3
    np.testing.assert_allclose(vectors(config, "plain", "taste"), vectors(config, "tuned", "taste"), atol=1e-5)

    store = OutputStore(config.output.path)
    (tmp_path / "tuned" / "churn.safetensors").rename(tmp_path / "moved.safetensors")
    embedder = open_embedder(store, "tuned")  # the run brings its own copy
    (tmp_path / "moved.safetensors").rename(tmp_path / "tuned" / "churn.safetensors")
    check_run_model(store, "tuned", config, embedder)
    files = store.fs.glob(store.path("extracts", tuned.extract_id, "history", "bucket=*", "*.parquet"))
    history = PackedHistory.from_arrow(
        ds.dataset(files).to_table().sort_by("user_id"),
        num_sources=len(config.source_names),
        num_numeric=len(config.numeric_columns),
    )
    direct = embedder.encode(history, config.registry().select(["churn"]))[:, 0]
    np.testing.assert_allclose(direct, vectors(config, "tuned", "churn"), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_digest": "0" * 64}, VersionMismatchError, "tuned with model"),
        ({"text": "Will this shopper stay"}, VersionMismatchError, "tuned for the words"),
        ({}, DataError, "cannot be read"),
    ],
)
def test_a_soft_prompt_that_does_not_belong_is_refused_before_extraction(
    spark, project, tmp_path, changes, error, message
):
    config = tune(tmp_path, project, **changes)
    if not changes:
        (tmp_path / "tuned" / "churn.safetensors").unlink()
    with pytest.raises(error, match=message):
        backfill(spark, config)
    assert OutputStore(config.output.path).names("extracts") == []
    assert OutputStore(config.output.path).names("runs") == []
