from __future__ import annotations

from pathlib import Path

import pytest

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError

GOOD = """
project: shop
users: {table: {path: raw/users}, user_id: id}
sources:
  bill:
    table: {path: raw/bill, format: orc}
    user_id: customer
    time: paid_at
    event_id: [basket, line]
    text: "{category|lower}: {price|bucket:1,2.5}"
    max_texts: 8
  profile:
    kind: tabular
    table: {catalog: lake.profiles}
    user_id: customer
    numeric: {money: [spend, income], age: [years]}
    categorical: [city]
instructions:
  - {id: churn, text: 'Will they leave?'}
  - {id: taste, text: 'What do they like?'}
model: {embedding_dim: 64}
output: {path: out}
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "instructue.yaml"
    file.write_text(text)
    return file


def test_a_config_becomes_frozen_dataclasses_with_absolute_paths(tmp_path):
    config = load_config(write(tmp_path, GOOD))
    assert config.source_names == ("bill", "profile")
    assert config.sources["bill"].table.path == str(tmp_path / "raw" / "bill")
    assert config.output.path == str(tmp_path / "out")
    assert config.event_sources["bill"].columns == ("customer", "paid_at", "basket", "line", "category", "price")
    assert config.numeric_columns == (
        ("profile", "money", "spend"),
        ("profile", "money", "income"),
        ("profile", "age", "years"),
    )
    assert list(config.registry()) == ["churn", "taste"]
    with pytest.raises(AttributeError):
        config.project = "other"


def test_urls_stay_urls(tmp_path):
    config = load_config(write(tmp_path, GOOD.replace("path: out", "path: s3://bucket/out")))
    assert config.output.path == "s3://bucket/out"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "user_id: customer\n    time",
            "user_idd: customer\n    time",
            r"unknown key `sources.bill.user_idd`.*did you mean user_id",
        ),
        ("max_texts: 8", "max_text: 8", r"unknown key `sources.bill.max_text`.*did you mean max_texts"),
        ("format: orc", "fmt: orc", r"unknown key `sources.bill.table.fmt`.*These exist: \[catalog, format"),
        ("embedding_dim", "embeding_dim", r"unknown key `model.embeding_dim`.*did you mean embedding_dim"),
        ("project: shop", "projekt: shop", r"unknown key `projekt`.*did you mean project"),
        ("    time: paid_at\n", "", r"`sources.bill.time` is missing"),
        ("max_texts: 8", "max_texts: 0", r"`sources.bill.max_texts`.*greater than or equal to 1"),
        ("max_texts: 8", "max_texts: many", r"`sources.bill.max_texts`.*valid integer"),
        ("kind: tabular", "kind: table", r"`sources.profile`.*'events', 'tabular'"),
        ("category|lower", "category|upper", r"unknown filter 'upper'"),
        ("bucket:1,2.5", "bucket:2,1", r"bucket edges '2,1'"),
        ("{category|lower}", "{category|lower", r"unbalanced braces|empty column|unknown filter"),
        ("catalog: lake.profiles", "catalog: a, path: b", r"exactly one of `path` and `catalog`"),
        ("id: taste", "id: churn", r"instruction id 'churn' is declared twice"),
        ("id: taste", "id: Taste!", r"cannot be a feature name"),
        ("Will they leave", "<USER> leave", r"prompt markup \(<USER>\)"),
        ("  bill:", "  Bill-1:", r"source name 'Bill-1'"),
        ("path: out", "path: ${NOT_SET_ANYWHERE}", r"environment variable NOT_SET_ANYWHERE is not set"),
        ("project: shop", "project: [", r"not valid YAML"),
    ],
)
def test_a_wrong_key_or_value_is_named_and_what_exists_is_listed(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(write(tmp_path, GOOD.replace(old, new)))


def test_a_missing_file_says_how_to_get_one(tmp_path):
    with pytest.raises(ConfigError, match="instructue data"):
        load_config(tmp_path / "none.yaml")


def test_environment_variables_and_defaults_are_filled_in(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE_TO", "/elsewhere")
    text = GOOD.replace("path: out", "path: ${WHERE_TO}/x").replace("format: orc", "format: ${FORMAT:-csv}")
    config = load_config(write(tmp_path, text))
    assert config.output.path == "/elsewhere/x"
    assert config.sources["bill"].table.format == "csv"


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        ("max_texts: 8", "max_texts: 9", True),
        ("bucket:1,2.5", "bucket:1,3", True),
        ("[spend, income]", "[income, spend]", True),
        ("{money: [spend, income], age: [years]}", "{age: [years], money: [spend, income]}", True),
        ("format: orc", "format: csv", True),
        ("raw/bill", "raw/other", False),
        ("embedding_dim: 64", "embedding_dim: 32", False),
    ],
)
def test_the_history_digest_follows_what_determines_a_history_and_nothing_else(tmp_path, old, new, changes):
    before = load_config(write(tmp_path, GOOD)).history_digest()
    after = load_config(write(tmp_path, GOOD.replace(old, new))).history_digest()
    assert (before != after) == changes


@pytest.mark.parametrize("count", [2, 9])
def test_the_set_of_sources_is_open(tmp_path, count):
    one = '{table: {path: x}, user_id: u, time: t, text: "{a}"}'
    sources = "\n".join(f"  source_{index}: {one}" for index in range(count))
    text = f"project: p\nsources:\n{sources}\ninstructions: [{{id: i, text: x}}]\noutput: {{path: o}}\n"
    assert len(load_config(write(tmp_path, text)).source_names) == count
