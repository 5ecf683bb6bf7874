"""A small project without raw tables: a config, histories with planted tastes, and an extract on disk."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast import schema
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.evaluation.journey import DEMOGRAPHICS, Events, Journey
from instructue_feast.history.pack import PackedHistory
from instructue_feast.runs.manifest import ExtractManifest, to_json
from tests.model_data import make_history, phrasebook

AS_OF = datetime(2017, 10, 1, tzinfo=UTC)
DAY = 86_400
CATEGORIES = ("DOG FOODS", "CAT FOOD", "VITAMINS", "GRAPES", "ANTACIDS", "MILK", None)

CONFIG = """\
project: small
users: {{table: {{path: raw/users}}, user_id: id}}
sources:
  bill: {{table: {{path: raw/bill}}, user_id: id, time: at, text: "{{item}}"}}
  app: {{table: {{path: raw/app}}, user_id: id, time: at, text: "{{app}}"}}
  tabular:
    kind: tabular
    table: {{path: raw/tabular}}
    user_id: id
    time: at
    numeric: {{money: [spend, visits], age: [years]}}
    categorical: [home]
instructions:
  - {{id: churn, text: Will the user stop coming}}
model: {{llm: {llm}, text_encoder: {encoder}, embedding_dim: 16}}
output: {{path: output, min_free_gib: 0}}
"""


def small_config(folder: Path, llm: str, encoder: str) -> Path:
    """Writes `instructue.yaml`; its sources are those of `tests.model_data`."""
    file = folder / "instructue.yaml"
    file.write_text(CONFIG.format(llm=llm, encoder=encoder))
    return file


def small_history(users: int, *, seed: int = 0) -> PackedHistory:
    """Histories of `u000`, `u001`, ...; every third user has no app event."""
    rng = np.random.default_rng(seed)
    sizes = [(int(rng.integers(2, 9)), 0 if user % 3 == 0 else 2, 1) for user in range(users)]
    history = make_history(sizes, seed=seed)
    order = np.lexsort((-history.age_bucket, history.source_index, np.repeat(np.arange(users), history.num_tokens)))
    return dataclasses.replace(
        history,
        user_ids=[f"u{user:03d}" for user in range(users)],
        as_of_us=np.full(users, int(AS_OF.timestamp()) * 1_000_000),
        text_id=history.text_id[order],
        count_bucket=history.count_bucket[order],
        age_bucket=history.age_bucket[order],
    )


def small_book() -> Phrasebook:
    """The texts of `tests.model_data`."""
    ids, sources, texts = phrasebook()
    order = np.argsort(ids)
    return Phrasebook(ids[order], sources[order], tuple(texts[row] for row in order))


def write_extract(config: InstructueConfig, history: PackedHistory, book: Phrasebook, name: str = "small") -> None:
    """Writes an extract the way the Spark job does, in two buckets."""
    folder = Path(config.output.path) / "extracts" / name
    lists = {"source_index": pa.int32(), "text_id": pa.int64(), "count_bucket": pa.int32(), "age_bucket": pa.int32()}
    offsets = pa.array(history.offsets, pa.int32())
    columns = {
        "user_id": pa.array(history.user_ids),
        "as_of": pa.array(history.as_of_us, pa.int64()).cast(schema.TIMESTAMP),
        **{
            key: pa.ListArray.from_arrays(offsets, pa.array(getattr(history, key), kind)) for key, kind in lists.items()
        },
        "num_events": pa.array(history.num_events.tolist(), pa.list_(pa.int32())),
        "tabular_numeric": pa.array(history.tabular_numeric.tolist(), pa.list_(pa.float32())),
    }
    table = pa.table(columns, schema=schema.PACKED_HISTORY)
    half = len(table) // 2
    for bucket, part in enumerate((table[half:], table[:half])):  # read back in another order than by user
        (folder / "history" / f"bucket={bucket}").mkdir(parents=True)
        pq.write_table(part, folder / "history" / f"bucket={bucket}" / "part-0.parquet")
    names = [config.source_names[source] for source in book.source_index]
    (folder / "phrasebook").mkdir()
    texts = pa.table([names, book.text_ids, list(book.texts)], schema=schema.PHRASEBOOK)
    pq.write_table(texts, folder / "phrasebook" / "part-0.parquet")
    manifest = ExtractManifest(
        extract_id=name, as_of=AS_OF.isoformat(), created=AS_OF.isoformat(), history_digest=config.history_digest(),
        sources=list(config.source_names), buckets=2, users=len(history), events=0, distinct_texts=len(book.texts),
        tokens=len(history.text_id), counts={}, seconds=0.0,
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(to_json(manifest)))


def small_project(folder: Path, llm: str, encoder: str, *, users: int = 90) -> InstructueConfig:
    """A config and a finished extract."""
    config = load_config(small_config(folder, llm, encoder))
    write_extract(config, small_history(users), small_book())
    return config


def random_journey(users: int, *, seed: int = 0, lines: int = 60) -> Journey:
    """Purchases of a year, some on the very edges of the windows; the last user never buys anything."""
    rng = np.random.default_rng(seed)
    start, cut, end = (
        int(datetime(*day, tzinfo=UTC).timestamp()) for day in ((2017, 1, 1), (2017, 10, 1), (2018, 1, 1))
    )
    edges = [cut - 92 * DAY - 1, cut - 92 * DAY, cut - 1, cut, cut + 14 * DAY - 1, cut + 14 * DAY, end - 1, end]

    def events(count: int, **columns) -> Events:
        time = np.where(rng.random(count) < 0.05, rng.choice(edges, count), rng.integers(start, end + DAY, count))
        return Events(rng.integers(0, users - 1, count), np.sort(time).astype(np.int64), columns)

    total = users * lines
    bought = events(
        total,
        sales_value=np.round(rng.gamma(1.0, 4.0, total), 2),
        retail_disc=np.round(rng.random(total), 2),
        coupon_disc=np.round(rng.random(total) * (rng.random(total) < 0.05), 2),
        coupon_match_disc=np.zeros(total),
        product_category=rng.choice(np.array(CATEGORIES, object), total),
        brand=rng.choice(np.array(["Private", "National"], object), total),
    )
    # A basket is what one user buys within an hour.
    basket = bought.user_E * 10**7 + bought.time_E // 3600
    kinds = np.array(["Type A", "Type B", "Type C"], object)
    few = users * 4
    received = events(few, campaign_type=rng.choice(kinds, few))
    return Journey(
        user_ids=tuple(str(100 + user) for user in range(users)),
        lines=dataclasses.replace(bought, columns={**bought.columns, "basket_id": basket}),
        promoted=events(total // 4, product_category=rng.choice(np.array(CATEGORIES, object), total // 4)),
        received=dataclasses.replace(received, columns={**received.columns, "ends_at": received.time_E + 30 * DAY}),
        redeemed=events(
            few, campaign_type=rng.choice(kinds, few), product_category=rng.choice(np.array(CATEGORIES, object), few)
        ),
        profile=events(users, **{name: rng.choice(np.array(["a", "b", None], object), users) for name in DEMOGRAPHICS}),
    )
