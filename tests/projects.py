"""A tiny shop with tiny models: raw tables and a config, for tests that walk the whole path."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast.config import InstructueConfig, load_config
from tests.tiny_models import make_tiny_models

AS_OF = dt.datetime(2025, 3, 1, tzinfo=dt.UTC)
NUM_USERS = 12
PRODUCTS = ("coffee", "tea", "bread", "milk", "soap", "apples", "rice", "pasta")

CONFIG = """\
project: shop
users: {{table: {{path: raw/users}}, user_id: id}}
sources:
  bill:
    table: {{path: raw/bill}}
    user_id: customer
    time: paid_at
    event_id: line
    text: "{{product}}, {{price|bucket:1,5,10}}"
    max_texts: 6
  search:
    table: {{path: raw/search}}
    user_id: customer
    time: at
    text: "looked for {{words}}"
  profile:
    kind: tabular
    table: {{path: raw/profile}}
    user_id: customer
    time: since
    numeric: {{money: [spend], age: [years]}}
    categorical: [city]
instructions:
  - {{id: churn, text: Will this shopper leave soon}}
  - {{id: taste, text: What does this shopper like to drink}}
history: {{days: 60}}
model: {{llm: {llm}, text_encoder: {encoder}, embedding_dim: 16}}
output: {{path: output, buckets: {buckets}, min_free_gib: 0}}
"""


def make_project(folder: Path, models: Path, *, buckets: int = 4) -> Path:
    """Writes raw tables, `instructue.yaml` and the Feast files; returns the config's path.

    User `u0` has no events at all; the others have a few each, by a fixed rule.
    """
    llm, encoder = make_tiny_models(models)
    bill, search, profile = [], [], []
    for user in range(1, NUM_USERS):
        for step in range(user * 2):
            bill.append(
                {
                    "customer": f"u{user}",
                    "paid_at": AS_OF - dt.timedelta(days=(user * 3 + step * 5) % 50, hours=step + 1),
                    "line": f"{user}-{step}",
                    "product": PRODUCTS[(user + step * step) % len(PRODUCTS)],
                    "price": float((user * step) % 13) + 0.5,
                }
            )
        if user % 3 == 0:
            words = PRODUCTS[user % len(PRODUCTS)]
            search.append({"customer": f"u{user}", "at": AS_OF - dt.timedelta(days=user), "words": words})
        if user % 2 == 0:
            since = AS_OF - dt.timedelta(days=30)
            profile.append(
                {"customer": f"u{user}", "since": since, "spend": 10.0 * user, "years": 20 + user, "city": "Rome"}
            )
    write_table(folder, "users", [{"id": f"u{user}"} for user in range(NUM_USERS)])
    write_table(folder, "bill", bill)
    write_table(folder, "search", search)
    write_table(folder, "profile", profile)
    config = folder / "instructue.yaml"
    config.write_text(CONFIG.format(llm=llm, encoder=encoder, buckets=buckets))
    return config


def write_table(folder: Path, name: str, rows: list[dict]) -> None:
    """Writes one raw table."""
    (folder / "raw" / name).mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for position, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            column = table.column(position).cast(pa.timestamp("us", tz="UTC"))
            table = table.set_column(position, field.name, column)
    pq.write_table(table, folder / "raw" / name / "part-0.parquet")


def load(folder: Path) -> InstructueConfig:
    """The project's config."""
    return load_config(folder / "instructue.yaml")
