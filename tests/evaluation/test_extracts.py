from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, DataError, StorageError
from instructue_feast.evaluation.extracts import find_extract, latest_extract, read_extract, users_in_order
from tests.evaluation.small import AS_OF, small_book, small_config, small_history, small_project


@pytest.fixture
def project(tmp_path):
    return small_project(tmp_path, "x", "y", users=20)


def test_an_extract_is_found_by_time_and_history_settings(project, tmp_path):
    assert find_extract(project, AS_OF) == "small"
    assert find_extract(project, AS_OF + timedelta(days=1)) is None
    assert latest_extract(project) == "small"
    text = (tmp_path / "instructue.yaml").read_text()
    (tmp_path / "instructue.yaml").write_text(text.replace('"{item}"', '"the {item}"'))
    other = load_config(tmp_path / "instructue.yaml")
    assert find_extract(other, AS_OF) is None
    with pytest.raises(ConfigError, match="no finished extract"):
        latest_extract(other)


def test_an_unfinished_extract_is_not_found(project, tmp_path):
    (tmp_path / "output" / "extracts" / "small" / "manifest.json").unlink()
    assert find_extract(project, AS_OF) is None


def test_an_extract_is_read_back_as_it_was_written(project):
    history, book = read_extract(project, "small")
    expected = small_history(20)
    assert history.user_ids == expected.user_ids
    for name in ("offsets", "source_index", "text_id", "count_bucket", "age_bucket", "num_events", "tabular_numeric"):
        np.testing.assert_array_equal(getattr(history, name), getattr(expected, name))
    assert book.texts == small_book().texts
    assert [book.texts[row] for row in book.rows(history.text_id[:5])]


def test_users_come_in_the_order_asked_for_and_unknown_ones_are_counted(project):
    history, book = read_extract(project, "small")
    assert users_in_order(history, ["u007", "u003"]).user_ids == ["u007", "u003"]
    with pytest.raises(DataError, match="2 of 3 users") as caught:
        users_in_order(history, ["u001", "secret", "hidden"])
    assert "secret" not in str(caught.value)
    with pytest.raises(DataError, match="1 of 1 text ids"):
        book.rows(np.array([1]))


def test_a_damaged_extract_is_a_storage_error(project, tmp_path):
    for file in (tmp_path / "output" / "extracts" / "small").glob("history/*/*.parquet"):
        file.write_bytes(b"PAR1")
    with pytest.raises(StorageError, match="cannot be read"):
        read_extract(project, "small")


def test_a_project_without_extracts_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match="no finished extract") as caught:
        latest_extract(load_config(small_config(tmp_path, "x", "y")))
    assert "--as-of" in caught.value.hint
