"""`instructue train`: from a data set on disk to a model that `load_model` takes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast import schema
from instructue_feast.cli.main import main
from instructue_feast.config import load_config
from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.model.factory import load_model
from instructue_feast.runs.manifest import to_json
from instructue_feast.runs.store import OutputStore
from instructue_feast.training.run import load_training_data, make_model, train
from instructue_feast.user_qa import tables
from tests.training.conftest import fresh_model, settings
from tests.training.data import make_data

CONFIG = """\
project: shop
sources:
  bill: {{table: {{path: raw}}, user_id: u, time: t, text: "{{item}}"}}
  app: {{table: {{path: raw}}, user_id: u, time: t, text: "{{app}}"}}
  tabular:
    {{kind: tabular, table: {{path: raw}}, user_id: u, time: t, numeric: {{money: [spend, visits], age: [years]}},
     categorical: [home]}}
instructions: [{{id: churn, text: Will they leave}}]
model: {{llm: {llm}, text_encoder: {encoder}, embedding_dim: 16}}
output: {{path: output}}
"""
SMALL = {
    "steps": 3, "users_per_step": 4, "questions_per_user": 3, "lora_r": 2, "validation_fraction": 0.3,
    "report_to": "[tensorboard]", "logging_steps": 1, "eval_steps": 2,
}  # fmt: skip


@pytest.fixture
def config(tmp_path, llm, encoder):
    """A project with the data set `tiny`, written as the Spark job writes it."""
    file = tmp_path / "instructue.yaml"
    file.write_text(CONFIG.format(llm=llm, encoder=encoder))
    project = load_config(file)
    store = OutputStore(project.output.path)
    data = make_data(24)
    questions = [
        {"question_id": one.id, "wordings": list(one.wordings), "held_out_wordings": list(one.held_out_wordings)}
        | {key: getattr(one, key) for key in ("family", "kind", "source", "subject", "days", "held_out")}
        for one in data.train.questions
    ]
    answers = [{"answer_id": one, "question_index": one // 2, "text": data.train.answers[one]} for one in range(16)]
    history = data.train.history
    lists = {
        name: pa.ListArray.from_arrays(history.offsets.astype(np.int32), getattr(history, name))
        for name in ("source_index", "text_id", "count_bucket", "age_bucket")
    }
    rows = {"user_id": history.user_ids, "as_of": pa.array(history.as_of_us).cast(schema.TIMESTAMP), **lists}
    rows |= {name: list(getattr(history, name)) for name in ("num_events", "tabular_numeric")}
    root = ("user_qa", "tiny")
    write(store, pa.Table.from_pylist(questions, tables.QUESTIONS), *root, "questions")
    write(store, pa.Table.from_pylist(answers, tables.ANSWERS), *root, "answers")
    write(store, pa.table(rows).select(schema.PACKED_HISTORY.names).cast(schema.PACKED_HISTORY), *root, "history")
    write(store, data.phrasebook, *root, "phrasebook")
    for split, own in (("train", data.train), ("held_out", data.held_out)):
        names = {"question_index": "question_P", "answer_id": "answer_P", "weight": "weight_P"}
        columns = {
            name: pa.ListArray.from_arrays(own.offsets.astype(np.int32), getattr(own, field))
            for name, field in names.items()
        }
        pairs = pa.table({"user_id": history.user_ids, "as_of": rows["as_of"], **columns}).cast(tables.PAIRS)
        write(store, pairs, *root, "pairs", f"split={split}")
    manifest = tables.UserQAManifest(
        qa_id="tiny", created="", history_digest=project.history_digest(), questions_digest="", as_ofs=[],
        trained_through="2017-10-01T00:00:00+00:00", generator="templates", num_questions=8, num_held_out=2, users=24,
        pairs={"train": data.train.num_pairs, "held_out": data.held_out.num_pairs},
    )  # fmt: skip
    store.write_json(to_json(manifest), *root, "manifest.json")
    return file


def write(store, table, *parts):
    store.fs.makedirs(store.path(*parts), exist_ok=True)
    pq.write_table(table, store.path(*parts, "part-0.parquet"))


def command(config, out, *more, **changes):
    values = [f"--set={name}={value}" for name, value in (SMALL | changes).items()]
    return main(["train", "--config", str(config), "--qa", "tiny", "--out", str(out), *values, *more])


def test_the_whole_way_from_a_data_set_to_a_model_the_project_loads(config, tmp_path, capsys):
    out = tmp_path / "models/mine"
    assert command(config, out, "--stop-after", "2") == 0
    assert "Stopped early" in capsys.readouterr().out
    assert command(config, out, "--resume", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["finished"], result["step"]) == (True, 3)
    assert {"eval_auc_users", "eval_auc_wordings", "eval_auc_subjects"} <= set(result["metrics"])
    assert list((tmp_path / "models/mine.training/runs").glob("*/events.out.tfevents.*"))
    config.write_text(config.read_text().replace("embedding_dim: 16", f"embedding_dim: 16, path: {out}"))
    model = load_model(load_config(config))
    assert model.config.trained
    record = json.loads((out / "training.json").read_text())
    assert record["model_version"]
    assert command(config, out) == 2  # the model is there
    assert "holds a model already" in capsys.readouterr().err


def test_the_help_has_an_example(capsys):
    assert main(["train", "--help"]) == 0
    assert "Example: instructue train" in capsys.readouterr().out


def test_mistakes_are_explained(config, tmp_path, capsys):
    assert main(["train", "--config", str(config), "--qa", "tin", "--out", str(tmp_path / "m")]) == 2
    assert "did you mean tiny" in capsys.readouterr().err
    assert command(config, tmp_path / "m", lora_targets="[no_such_layer]") == 2
    assert "lora_targets" in capsys.readouterr().err
    assert command(config, tmp_path / "m", "--resume") == 2
    assert "no checkpoint to resume" in capsys.readouterr().err
    config.write_text(config.read_text().replace('"{app}"', '"app {app}"'))
    assert command(config, tmp_path / "m") == 5
    assert "other history settings" in capsys.readouterr().err


def test_data_of_another_model_is_refused(config, llm, encoder, tmp_path):
    project, chosen = load_config(config), settings()
    data = load_training_data(project, "tiny")
    history = dataclasses.replace(data.train.history, num_events=np.zeros((24, 2), np.int32))
    other = dataclasses.replace(data, train=dataclasses.replace(data.train, history=history))
    with pytest.raises(VersionMismatchError, match="has 2 sources and 3 numeric columns, the model 3 and 3"):
        train(make_model(project, chosen), other, chosen, tmp_path / "m")
    with pytest.raises(VersionMismatchError, match="built with other history settings"):
        train(make_model(project, chosen), make_data(8), chosen, tmp_path / "m", config=project)


def test_an_empty_data_set_is_refused(llm, encoder, tmp_path):
    data, chosen = make_data(8), settings()
    none = np.zeros(0, np.int32)
    empty = dataclasses.replace(
        data.train, offsets=np.zeros(9, np.int64), question_P=none, answer_P=none, weight_P=none.astype(np.float32)
    )
    with pytest.raises(DataError, match="data set tiny is empty"):
        train(fresh_model(llm, encoder, chosen), dataclasses.replace(data, train=empty), chosen, tmp_path / "m")
