from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast.errors import DataError
from instructue_feast.evaluation.label_file import read_labels
from instructue_feast.evaluation.tasks import require_learnable

KNOWN = ["001", "002", "secret-7", "004"]


def write(tmp_path, text, name="labels.csv"):
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_a_csv_file_keeps_ids_as_they_are(tmp_path):
    found = read_labels(write(tmp_path, "user_id,label\n001,1\n002,0\n"), KNOWN)
    assert found.user_ids == ("001", "002")
    assert found.labels.tolist() == [1, 0]


def test_columns_may_have_other_names_when_there_are_two(tmp_path):
    assert read_labels(write(tmp_path, "customer,vip\n004,1.0\n001,FALSE\n"), KNOWN).labels.tolist() == [1, 0]


def test_further_columns_do_not_matter_when_the_two_are_named(tmp_path):
    file = write(tmp_path, "note,label,user_id\nx,1,004\ny,0,001\n")
    assert read_labels(file, KNOWN).user_ids == ("004", "001")


@pytest.mark.parametrize("labels", [[1, 0], [True, False], [1.0, 0.0], ["1", "0"]])
def test_a_parquet_file_may_hold_any_kind_of_binary_label(tmp_path, labels):
    pq.write_table(pa.table({"user_id": ["001", "002"], "label": labels}), tmp_path / "labels.parquet")
    assert read_labels(tmp_path / "labels.parquet", KNOWN).labels.tolist() == [1, 0]


def test_numeric_ids_of_a_parquet_file_are_read_as_text(tmp_path):
    pq.write_table(pa.table({"household_id": [7, 8], "label": [1, 0]}), tmp_path / "labels.parquet")
    assert read_labels(tmp_path / "labels.parquet", ["7", "8"]).user_ids == ("7", "8")


def test_a_user_named_twice_with_one_label_counts_once(tmp_path):
    assert read_labels(write(tmp_path, "user_id,label\n001,1\n001,1\n002,0\n"), KNOWN).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty"),
        ("user_id,label\n", "has no rows"),
        ("user_id,label\n001,2\n002,0\n", "1 of 2 labels in column label are not binary"),
        ("user_id,label\n001,yes\n", "not binary"),
        ("user_id,label\n001,\n002,0\n", "1 of 2 rows lack"),
        ("user_id,label\nsecret-7,1\nsecret-8,0\nsecret-9,0\n", "2 of 3 users are not among the 4"),
        ("user_id,label\nsecret-7,1\nsecret-7,0\n", "1 users are labelled both 0 and 1"),
        ("user,label,weight\n001,1,2\n", "no 'user_id'"),
        ("user_id,target,weight\n001,1,2\n", "no 'label'"),
        ("user_id,label\n001,1,1,1\n", "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_names_nobody(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        read_labels(write(tmp_path, text), KNOWN)
    assert "secret" not in str(caught.value)
    assert caught.value.hint


def test_a_missing_or_foreign_file_says_what_is_wanted(tmp_path):
    with pytest.raises(DataError, match="no label file"):
        read_labels(tmp_path / "none.csv", KNOWN)
    with pytest.raises(DataError, match=r"is \.txt"):
        read_labels(write(tmp_path, "x", "labels.txt"), KNOWN)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read"):
        read_labels(tmp_path / "broken.parquet", KNOWN)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "no labelled users"),
        ([1] * 30, "all 30 labels are 1"),
        ([0] * 30 + [1] * 4, "4 positives and 30 negatives, at least 15"),
    ],
)
def test_labels_no_probe_can_learn_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        require_learnable("vip", np.array(labels, np.int8), least=15)
