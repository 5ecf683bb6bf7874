"""A finished data set comes back as it was written; anything else is an error with a way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from instructue_feast.errors import ConfigError, DataError, SchemaError, VersionMismatchError
from instructue_feast.user_qa.loading import load_manifest, load_phrasebook, load_user_qa
from tests.user_qa.data_sets import AS_OFS, write_data_set

MICROS = [int(one.timestamp() * 1_000_000) for one in AS_OFS]


def test_rows_come_in_order_of_time_and_user_with_their_own_history(tmp_path: Path):
    store, config = write_data_set(tmp_path)
    qa = load_user_qa(store, "qa", config)
    assert qa.history.user_ids == ["10", "2", "9", "10", "2"]
    assert qa.history.as_of_us.tolist() == [MICROS[0]] * 3 + [MICROS[1]] * 2
    assert qa.history.text_id.tolist() == [10, 2, 9, 110, 102]
    assert qa.offsets.tolist() == [0, 2, 4, 6, 8, 10]
    assert qa.question_P.tolist() == [0, 2] * 5
    assert qa.answer_P.tolist() == [0, 4] * 3 + [1, 5] * 2
    assert (len(qa), qa.num_pairs) == (5, 10)
    assert qa.weight_P.dtype == np.float32
    assert [one.answers for one in qa.questions] == [(0, 1), (2, 3), (4, 5)]
    assert [one.held_out for one in qa.questions] == [False, True, False]
    assert qa.trained_through == "2025-03-01T00:00:00+00:00"


def test_the_held_out_split_has_its_own_rows_and_the_same_numbers(tmp_path: Path):
    store, config = write_data_set(tmp_path)
    qa = load_user_qa(store, "qa", config, "held_out")
    assert qa.history.user_ids == ["2"]
    assert qa.questions[qa.question_P[0]].id == "buys:yogurt"
    assert qa.answers[qa.answer_P[0]] == "No."
    assert load_phrasebook(store, "qa").column("text_id").to_pylist().count(102) == 1
    assert load_manifest(store, "qa").families["buys"].first_rate == 0.5


def test_taking_rows_takes_their_pairs_along(tmp_path: Path):
    store, config = write_data_set(tmp_path)
    qa = load_user_qa(store, "qa", config)
    some = qa.take([4, 1])
    assert some.history.user_ids == ["2", "2"]
    assert some.history.text_id.tolist() == [102, 2]
    assert some.answer_P.tolist() == [1, 5, 0, 4]
    assert some.questions == qa.questions
    assert next(iter(some.triplets())) == (0, "Does it buy tea?", "No tea.")
    everything = list(qa.take(range(len(qa))).triplets())
    assert everything == list(qa.triplets())
    assert len(everything) == qa.num_pairs
    assert qa.take([]).num_pairs == 0


def test_what_is_missing_or_foreign_is_named(tmp_path: Path):
    store, config = write_data_set(tmp_path)
    with pytest.raises(ConfigError, match="no finished UserQA data set 'qaa'") as error:
        load_user_qa(store, "qaa", config)
    assert "did you mean qa?" in error.value.hint
    with pytest.raises(ConfigError, match="unknown split 'test'"):
        load_user_qa(store, "qa", config, "test")
    other = dataclasses.replace(config, history=dataclasses.replace(config.history, days=7))
    with pytest.raises(VersionMismatchError, match="other history settings"):
        load_user_qa(store, "qa", other)


def test_a_split_without_pairs_is_an_error(tmp_path: Path):
    store, config = write_data_set(tmp_path, held_out=False)
    with pytest.raises(DataError, match="no pairs in split held_out"):
        load_user_qa(store, "qa", config, "held_out")


def test_tables_that_do_not_fit_together_are_refused(tmp_path: Path):
    store, config = write_data_set(tmp_path)
    root = tmp_path / "out" / "user_qa" / "qa"
    history = root / "history" / "part-0.parquet"
    table = pq.ParquetFile(history).read()
    pq.write_table(table.slice(1), history)
    with pytest.raises(SchemaError, match="pairs without a history"):
        load_user_qa(store, "qa", config)
    pq.write_table(table, history)
    pq.write_table(table, root / "history" / "part-2.parquet")
    with pytest.raises(SchemaError, match="a user twice"):
        load_user_qa(store, "qa", config)
    (root / "history" / "part-2.parquet").unlink()
    answers = root / "answers" / "part-0.parquet"
    pq.write_table(pq.ParquetFile(answers).read().slice(1), answers)
    with pytest.raises(SchemaError, match="order of their ids"):
        load_user_qa(store, "qa", config)
