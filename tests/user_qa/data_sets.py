"""A small finished UserQA data set on disk, without Spark."""

from __future__ import annotations

import dataclasses
import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from instructue_feast import schema
from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.runs.store import OutputStore
from instructue_feast.user_qa import tables
from instructue_feast.user_qa.tables import FamilySummary, UserQAManifest

AS_OFS = (dt.datetime(2025, 1, 1, tzinfo=dt.UTC), dt.datetime(2025, 2, 1, tzinfo=dt.UTC))
USERS = ("10", "2", "9")

CONFIG = """\
project: p
sources:
  bill: {table: {path: raw/bill}, user_id: u, time: t, text: "{word}"}
  profile: {kind: tabular, table: {path: raw/p}, user_id: u, time: t, numeric: [x, y]}
instructions: [{id: a, text: b}]
output: {path: out}
"""


def write_data_set(folder: Path, qa_id: str = "qa", *, held_out: bool = True) -> tuple[OutputStore, InstructueConfig]:
    """Every user at both `as_of`s, except the last; files in an unhelpful order.

    User `n`'s history at an `as_of` is one text with the id `100 * (number of the as_of) + n`. Everybody buys tea at
    the first `as_of` only. One question is held out, answered by user 2 alone.
    """
    (folder / "instructue.yaml").write_text(CONFIG)
    config = load_config(folder / "instructue.yaml")
    store = OutputStore(config.output.path)
    rows = [(user, place) for place in (1, 0) for user in USERS if (user, place) != ("9", 1)]
    history = [
        {
            "user_id": user, "as_of": AS_OFS[place], "source_index": [0], "text_id": [100 * place + int(user)],
            "count_bucket": [1], "age_bucket": [2], "num_events": [3, 1], "tabular_numeric": [1.0, float("nan")],
        }
        for user, place in rows
    ]  # fmt: skip
    pairs = [
        {"user_id": user, "as_of": AS_OFS[place], "question_index": [0, 2], "answer_id": [place, 4 + place],
         "weight": [1.0, 0.5]}
        for user, place in sorted(rows)
    ]  # fmt: skip
    kept = {"user_id": "2", "as_of": AS_OFS[0], "question_index": [1], "answer_id": [3], "weight": [1.0]}
    questions = [_question("buys:tea", "tea"), _question("buys:yogurt", "yogurt", True), _question("level", "level")]
    answers = [(0, "Yes, tea."), (0, "No tea."), (1, "Yes."), (1, "No."), (2, "Low."), (2, "High.")]
    book = [{"source": "bill", "text_id": 100 * place + int(user), "text": "x"} for user, place in rows]
    root = Path(config.output.path) / "user_qa" / qa_id
    _write(root / "questions", questions, tables.QUESTIONS)
    _write(
        root / "answers",
        [{"answer_id": number, "question_index": index, "text": text} for number, (index, text) in enumerate(answers)],
        tables.ANSWERS,
    )
    _write(root / "history", history[2:], schema.PACKED_HISTORY, "part-0.parquet")
    _write(root / "history", history[:2], schema.PACKED_HISTORY, "part-1.parquet")
    _write(root / "phrasebook", book, schema.PHRASEBOOK)
    _write(root / "pairs" / "split=train", pairs, tables.PAIRS)
    _write(root / "pairs" / "split=held_out", [kept] if held_out else [], tables.PAIRS)
    summary = FamilySummary(kind="occurs", source="bill", days=30, questions=2, held_out=1, pairs=6, first_rate=0.5)
    manifest = UserQAManifest(
        qa_id=qa_id, created="2025-03-01T00:00:00+00:00", history_digest=config.history_digest(), questions_digest="x",
        as_ofs=[one.isoformat() for one in AS_OFS], trained_through="2025-03-01T00:00:00+00:00", generator="templates",
        num_questions=3, num_held_out=1, users=5, pairs={"train": 10, "held_out": int(held_out)}, cut="2025-03-01",
        checked=11, families={"buys": summary},
    )  # fmt: skip
    store.write_json(dataclasses.asdict(manifest), "user_qa", qa_id, "manifest.json")
    return store, config


def _question(name: str, subject: str, held_out: bool = False) -> dict[str, object]:
    return {
        "question_id": name, "family": name.split(":")[0], "kind": "occurs", "source": "bill", "subject": subject,
        "days": 30, "held_out": held_out, "wordings": [f"Does it buy {subject}?", "Or so?"],
        "held_out_wordings": ["Really?"],
    }  # fmt: skip


def _write(folder: Path, rows: list[dict[str, object]], expected: pa.Schema, name: str = "part-0.parquet") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=expected), folder / name)
