from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast.errors import DataError
from instructue_feast.evaluation.plots import write_recovery_plot
from instructue_feast.evaluation.recovery import Truth, interest_tasks, read_truth, read_vocabulary, recovery

INTERESTS = ("travel", "cooking", "cars")


def planted(leak: float, *, users: int = 160, seed: int = 0):
    """Embeddings that hold their own interest, and the others by `leak`."""
    rng = np.random.default_rng(seed)
    strength = (rng.random((users, 3)) < 0.4) * rng.choice([0.4, 0.6, 1.0], (users, 3))
    vectors = rng.normal(0, 1, (users, 3, 8)).astype(np.float32)
    for instruction in range(3):
        for interest in range(3):
            share = 1.0 if instruction == interest else leak
            vectors[:, instruction, interest] += 4 * share * (strength[:, interest] > 0)
    none = rng.normal(0, 1, (users, 8)).astype(np.float32)
    return vectors, none, Truth(tuple(f"u{user}" for user in range(users)), INTERESTS, strength)


@pytest.fixture(scope="module")
def found():
    return recovery(*planted(0.0))


def test_an_instruction_that_brings_out_only_its_own_interest_shows_on_the_diagonal(found):
    assert found.own.value > 0.9
    assert abs(found.others.value - 0.5) < 0.1
    assert found.gap.low > 0.3
    assert found.own_minus_none.low > 0.3
    assert found.best_is_own == 1.0
    assert found.gap.value == pytest.approx(found.own.value - found.others.value)


def test_an_embedding_that_ignores_its_instruction_has_no_gap():
    found = recovery(*planted(1.0))
    assert found.others.value > 0.9
    assert found.gap.low < 0.05


def test_the_matrix_is_drawn_and_documented(found, tmp_path):
    document = found.document()
    assert np.array(document["auc"]).shape == (3, 3)
    assert set(document["gap"]) == {"difference", "difference_low", "difference_high"}
    (file,) = write_recovery_plot(document, tmp_path / "synthetic")
    assert file.name == "synthetic-recovery.png"
    assert file.stat().st_size > 5_000


def test_truth_is_read_without_cold_users_and_named_by_the_strongest_interest(tmp_path):
    table = pa.table(
        {
            "user_id": ["b", "a", "c", "d"],
            "strengths": [[0.0, 1.0, 0.6], [1.0, 0.0, 0.0], [0.0, 0.4, 1.0], [1.0, 0.0, 0.0]],
            "top_interest": ["cooking", "travel", "cars", "travel"],
            "cold": [False, False, False, True],
        }
    )
    pq.write_table(table, tmp_path / "part-0.parquet")
    truth = read_truth(tmp_path)
    assert truth.user_ids == ("a", "b", "c")
    assert truth.interests == INTERESTS
    assert truth.labels.tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_a_missing_truth_table_says_how_to_write_it(tmp_path):
    with pytest.raises(DataError, match="truth table") as caught:
        read_truth(tmp_path / "none")
    assert "instructue data synthetic" in caught.value.hint


def test_the_vocabulary_is_read_by_interest(tmp_path):
    rows = [("travel", "hotel"), ("cars", "petrol station"), ("travel", "travel.visa")]
    pq.write_table(pa.table(list(zip(*rows, strict=True)), names=["interest", "word"]), tmp_path / "part-0.parquet")
    assert read_vocabulary(tmp_path) == {"travel": ("hotel", "travel.visa"), "cars": ("petrol station",)}


def test_a_project_without_vocabulary_is_to_be_written_again(tmp_path):
    with pytest.raises(DataError, match="vocabulary table") as caught:
        read_vocabulary(tmp_path / "none")
    assert "again with `instructue data synthetic`" in caught.value.hint
    assert "--explain-users 0" in caught.value.hint


def test_there_is_one_question_per_interest():
    tasks = interest_tasks(INTERESTS)
    assert [task.instruction for task in tasks] == [f"Is this user interested in {name}?" for name in INTERESTS]
