"""A product-category recommender on Feast, with and without user embeddings, from raw purchases to online scores.

python examples/recommender/run.py --out build/recommender
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import feature_tables
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import ranker
import torch
import typer
from feast import FeatureStore
from rich.console import Console
from rich.table import Table

from instructue_feast.config import load_config
from instructue_feast.datasets.complete_journey import write_complete_journey
from instructue_feast.evaluation.extracts import find_extract, read_extract, users_in_order
from instructue_feast.evaluation.journey import Journey, read_journey
from instructue_feast.feature_store.session import quiet
from instructue_feast.inference.from_run import open_embedder
from instructue_feast.instructions import Instruction
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.store import OutputStore

# U = households, C = categories, D = embedding size

HERE = Path(__file__).parent
MOMENTS = tuple(datetime(2017, month, day, tzinfo=UTC) for month, day in ((10, 1), (10, 31), (11, 30)))
"""The ranker learns from the 30 days after the first two and is judged on the 30 days after the last. All lie after the
training of the embedding model, which ended on 2017-10-01."""
DAYS = 30
INSTRUCTIONS = ("next_basket", "churn", "deals")
AT_ONCE = 70  # instructions of one pass
ONLINE = 50  # households scored from the online store one by one

Matrix = npt.NDArray[np.float32]
out = Console()


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known of all households and categories at one moment, as Feast gave it out.

    Attributes:
        columns: Features `[U, C]` of a recommender without embeddings.
        hand_UX: The same of a household as one row, for a two-tower model.
        stats_CS: The same of a category.
        vector_UKD: User embeddings by instruction.
        item_CD: Category embeddings, centred.
    """

    columns: dict[str, Matrix]
    hand_UX: Matrix
    stats_CS: Matrix
    vector_UKD: Matrix
    item_CD: Matrix

    @property
    def cosines(self) -> dict[str, Matrix]:
        """`[U, C]` of each instruction."""
        return {f"cosine_{name}": self.vector_UKD[:, place] @ self.item_CD.T for place, name in enumerate(INSTRUCTIONS)}


def main(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the project; what is there is used again.")] = Path(
        "build/recommender"
    ),
    households: Annotated[int | None, typer.Option(min=50, help="How many; all 2,469 by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the ranker and of the bootstrap.")] = 0,
) -> None:
    """Backfills, trains with `get_historical_features`, scores with `get_online_features`, prints what came of it."""
    prepare(folder, households)
    journey = read_journey(load_config(folder / "instructue.yaml"))
    items = feature_tables.candidates(journey, MOMENTS[0])
    step("features", lambda: write_features(folder, journey, items))
    step("feast apply", lambda: command("feast", "apply", cwd=folder))
    store = FeatureStore(str(folder))
    moments = [step(f"historical features {one:%m-%d}", lambda one=one: read_moment(store, journey, items, one))
               for one in MOMENTS]  # fmt: skip
    labels = [feature_tables.bought(journey, items, one, DAYS) for one in MOMENTS]
    scores, booster, tower = step("rankers", lambda: fit_and_score(moments, labels, seed))
    asked_UC = step("one instruction per category", lambda: ask_per_category(folder, journey, items))
    rows = measure(with_popularity(asked_UC, moments[-1]) | scores, moments[-1], labels[-1], seed)
    step("materialize", lambda: materialize(folder))
    online = step("online scores", lambda: score_online(store, journey, items, booster, tower, scores["all"]))
    write(folder, rows, online, len(journey.user_ids), len(items))


def step(name: str, work: Any) -> Any:
    """Runs and tells how long it took."""
    started = time.monotonic()
    with out.status(name):
        done = work()
    out.print(f"  {name}: {time.monotonic() - started:.1f} s")
    return done


def command(*words: str, cwd: Path | None = None) -> None:
    """Runs a command of this environment; its output is shown only if it fails."""
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run([str(program), *words[1:]], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        out.print(done.stdout + done.stderr, markup=False)
        raise typer.Exit(done.returncode)


def prepare(folder: Path, households: int | None) -> None:
    """Raw tables, and a published run for each moment; a moment whose run is there is not embedded again."""
    config = folder / "instructue.yaml"
    if not config.exists():
        step("purchases", lambda: write_complete_journey(folder, households=households))
    shutil.copyfile(HERE / "definitions.py", folder / "definitions.py")
    published = current_publication(OutputStore(load_config(config).output.path))
    there = set() if published is None else {run.as_of for view in published.views for run in view.runs}
    missing = [one.isoformat() for one in MOMENTS if one.isoformat() not in there]
    if missing:
        words = [word for one in missing for word in ("--as-of", one)]
        step("backfill", lambda: command("instructue", "backfill", "--config", str(config), *words))


def write_features(folder: Path, journey: Journey, items: tuple[str, ...]) -> None:
    """The Parquet files behind the views of `definitions.py`."""
    feature_tables.write_tables(folder / "features", journey, items, MOMENTS)
    model = InstructUEModel.from_pretrained(folder / "models" / "complete-journey", merge_lora=True).eval()
    with torch.inference_mode():
        words = [model.answer_ids(f"Yes, this shopper buys {one.lower()} soon.") for one in items]
        vectors = model.answer_embeddings(words).numpy()
    columns = {
        "category": pa.array(items),
        "event_timestamp": pa.array([MOMENTS[0]] * len(items), pa.timestamp("us", tz="UTC")),
        "created": pa.array([MOMENTS[0]] * len(items), pa.timestamp("us", tz="UTC")),
        "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), folder / "features" / "category_embedding.parquet")


def read_moment(store: FeatureStore, journey: Journey, items: tuple[str, ...], moment: datetime) -> Moment:
    """Point-in-time correct features of everybody, from the offline store."""

    def ask(key: str, values: tuple[str, ...], service: str) -> dict[str, list[Any]]:
        frame = pd.DataFrame({key: values, "event_timestamp": moment})
        with quiet():
            found = store.get_historical_features(frame, store.get_feature_service(service)).to_df()
        return found.set_index(key).loc[list(values)].to_dict("list")

    users = ask("user_id", journey.user_ids, "ranker_users")
    vectors = ask("user_id", journey.user_ids, "user_embeddings")
    return assemble(users, vectors, ask("category", items, "ranker_categories"))


def assemble(users: dict[str, list[Any]], vectors: dict[str, list[Any]], categories: dict[str, list[Any]]) -> Moment:
    """One `Moment` of what either store answered: lists by feature, in the order of households or categories."""
    lists = sorted(name for name in users if name.endswith("_by_category"))
    profile = sorted(set(users) - {*lists, "user_id", "event_timestamp"})
    stats = sorted(set(categories) - {"embedding", "category", "event_timestamp"})
    by_category = {name: np.array([list(one) for one in users[name]], np.float32) for name in lists}
    profile_UP = np.array([users[name] for name in profile], np.float32).T
    stats_CS = np.array([categories[name] for name in stats], np.float32).T
    shape = (len(profile_UP), len(stats_CS))
    columns = by_category | {
        name: np.broadcast_to(profile_UP[:, place, None], shape) for place, name in enumerate(profile)
    }
    columns |= {name: np.broadcast_to(stats_CS[None, :, place], shape) for place, name in enumerate(stats)}
    logs = [np.log1p(one) for one in by_category.values()]
    hand_UX = np.hstack([np.sign(profile_UP) * np.log1p(np.abs(profile_UP)), *logs])
    item_CD = np.array([list(one) for one in categories["embedding"]], np.float32)
    return Moment(
        columns=columns,
        hand_UX=np.nan_to_num(hand_UX).astype(np.float32),
        stats_CS=stats_CS,
        vector_UKD=np.array([[list(one) for one in vectors[name]] for name in INSTRUCTIONS], np.float32).swapaxes(0, 1),
        item_CD=item_CD - item_CD.mean(0),
    )


def ask_per_category(folder: Path, journey: Journey, items: tuple[str, ...]) -> Matrix:
    """`[U, C]` what the model says to one instruction per category, without any label: cosine to yes minus to no."""
    config = load_config(folder / "instructue.yaml")
    store = OutputStore(config.output.path)
    published, extract = current_publication(store), find_extract(config, MOMENTS[-1])
    assert published is not None
    assert extract is not None
    embedder = open_embedder(store, published.run_id)
    history = users_in_order(read_extract(config, extract)[0], journey.user_ids)
    model, score_UC = embedder.model, np.empty((len(history), len(items)), np.float32)
    with torch.inference_mode():
        yes_CD, no_CD = (
            model.answer_embeddings([model.answer_ids(text.format(one.lower())) for one in items]).numpy()
            for text in ("Yes, this shopper buys {} soon.", "No, this shopper does not buy {} soon.")
        )
    for start in range(0, len(items), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        asked = [
            Instruction(f"category{place}", f"Will this shopper buy {one.lower()} in the next {DAYS} days?")
            for place, one in enumerate(items[some])
        ]
        score_UC[:, some] = np.einsum("ucd,cd->uc", embedder.encode(history, asked), (yes_CD - no_CD)[some])
    return score_UC


def fit_and_score(
    moments: list[Moment], labels: list[npt.NDArray[np.bool_]], seed: int
) -> tuple[dict[str, Matrix], Any, ranker.Fitted]:
    """Scores `[U, C]` of every row at the last moment; everything is fitted on the moments before.

    Returns:
        Scores by row, and the model of the row `all`: LightGBM and the two-tower model it asks.
    """
    *past, now = moments
    label = np.concatenate(labels[:-1])
    household_U = np.tile(np.arange(len(labels[0])), len(past))

    def stacked(get: Any) -> Matrix:
        return np.concatenate([get(one) for one in past])

    def tower(get: Any, item_CI: Matrix) -> tuple[Matrix, ranker.Fitted]:
        crossed = ranker.crossed_scores(stacked(get), item_CI, label, household_U, seed=seed)
        return crossed, ranker.fit_two_tower(stacked(get), item_CI, label, seed=seed)

    def embedded(one: Moment) -> Matrix:
        return one.vector_UKD.reshape(len(one.vector_UKD), -1)

    hand_crossed, hand_tower = tower(lambda one: one.hand_UX, now.stats_CS)
    own_crossed, own_tower = tower(embedded, now.item_CD)
    before = {name: stacked(lambda one, name=name: one.columns[name]) for name in now.columns}
    cosines = {name: stacked(lambda one, name=name: one.cosines[name]) for name in now.cosines}
    hand_now, own_now = hand_tower.score(now.hand_UX), own_tower.score(embedded(now))
    boosters = {
        "hand": ranker.fit_lightgbm(before, label, seed=seed),
        "hand_tower": ranker.fit_lightgbm(before | {"tower": hand_crossed}, label, seed=seed),
        "all": ranker.fit_lightgbm(before | cosines | {"tower": own_crossed}, label, seed=seed),
    }
    scores = {
        "popularity": now.columns["buyers_30d"],
        "bought_before": now.columns["lines_90d_by_category"] + now.columns["buyers_30d"],
        "tower_hand": hand_now,
        "tower_embeddings": own_now,
        "hand": ranker.score_lightgbm(boosters["hand"], now.columns),
        "hand_tower": ranker.score_lightgbm(boosters["hand_tower"], now.columns | {"tower": hand_now}),
        "all": ranker.score_lightgbm(boosters["all"], now.columns | now.cosines | {"tower": own_now}),
    }
    return scores, boosters["all"], own_tower


def with_popularity(asked_UC: Matrix, now: Moment) -> dict[str, Matrix]:
    """Answers are comparable within a category: standardised there, they move the log odds of its popularity."""
    share_UC = np.clip(now.columns["buyers_30d"], 1e-3, 1 - 1e-3)
    centred_UC = (asked_UC - asked_UC.mean(0)) / (asked_UC.std(0) + 1e-6)
    return {"asked": np.log(share_UC / (1 - share_UC)) + centred_UC}


ROWS = {
    "popularity": "most popular categories",
    "bought_before": "what the household bought most in 90 days",
    "asked": "one instruction per category, without labels, and popularity",
    "tower_hand": "two towers on hand features",
    "tower_embeddings": "two towers on embeddings",
    "hand": "LightGBM on hand features",
    "hand_tower": "LightGBM on hand features and their two towers",
    "all": "LightGBM on hand features, cosines and two towers on embeddings",
}


def measure(scores: dict[str, Matrix], now: Moment, label_UC: npt.NDArray[np.bool_], seed: int) -> list[dict[str, Any]]:
    """Means over households with intervals, and paired differences to LightGBM on hand features."""
    fresh_UC = now.columns["lines_90d_by_category"] == 0
    found = {
        "ndcg": {name: ranker.ndcg(one, label_UC) for name, one in scores.items()},
        "recall": {name: ranker.recall(one, label_UC) for name, one in scores.items()},
        "ndcg_new": {name: ranker.ndcg(one, label_UC, fresh_UC) for name, one in scores.items()},
    }
    areas = {name: (ranker.auc(one, label_UC), ranker.auc(one, label_UC, fresh_UC)) for name, one in scores.items()}
    rows: list[dict[str, Any]] = [{"row": name, "auc": areas[name][0], "auc_new": areas[name][1]} for name in scores]
    for metric, by_row in found.items():
        values = [by_row[name] for name in scores]
        for row, (mean, low, high) in zip(rows, ranker.interval(values, seed=seed), strict=True):
            row[metric] = {"mean": mean, "low": low, "high": high}
        differences = [one - by_row["hand"] for one in values]
        for row, (mean, low, high) in zip(rows, ranker.interval(differences, seed=seed), strict=True):
            row[f"{metric}_gain"] = {"mean": mean, "low": low, "high": high}
    return rows


def materialize(folder: Path) -> None:
    """User embeddings by the plug-in's command, everything else as in any Feast repo."""
    command("instructue", "materialize", "--repo", str(folder))
    views = [word for name in ("household_stats", "category_stats", "category_embedding") for word in ("-v", name)]
    end = MOMENTS[-1].isoformat()
    command("feast", "materialize", "2017-01-01T00:00:00+00:00", end, *views, cwd=folder)


def score_online(
    store: FeatureStore,
    journey: Journey,
    items: tuple[str, ...],
    booster: Any,
    tower: ranker.Fitted,
    offline_UC: Matrix,
) -> dict[str, Any]:
    """What a recommender does at request time, for some households one by one; scores must equal the offline ones."""

    def ask(service: str, key: str, values: tuple[str, ...]) -> dict[str, list[Any]]:
        return store.get_online_features(store.get_feature_service(service), [{key: one} for one in values]).to_dict()

    categories = ask("ranker_categories", "category", items)  # the same for everybody: once
    seconds, worst = [], 0.0
    for place, user in enumerate(journey.user_ids[:ONLINE]):
        started = time.perf_counter()
        users, vectors = (ask(name, "user_id", (user,)) for name in ("ranker_users", "user_embeddings"))
        one = assemble(users, vectors, categories)
        towers = tower.score(one.vector_UKD.reshape(1, -1))
        score_C = ranker.score_lightgbm(booster, one.columns | one.cosines | {"tower": towers})[0]
        seconds.append(time.perf_counter() - started)
        worst = max(worst, float(np.abs(score_C - offline_UC[place]).max()))
    if worst > 1e-3:
        raise typer.BadParameter(f"online scores differ from offline ones by up to {worst:.4f}")
    return {"households": len(seconds), "p50_ms": float(np.median(seconds) * 1000), "largest_difference": worst}


def write(folder: Path, rows: list[dict[str, Any]], online: dict[str, Any], users: int, items: int) -> None:
    """Prints the table and leaves it as Markdown and JSON."""
    table = Table(title=f"{users:,} households, {items} categories, the 30 days after {MOMENTS[-1]:%Y-%m-%d}")
    heads = ("ranker", "NDCG@10", "− LightGBM on hand features", "recall@10", "AUC", "new: NDCG@10", "−", "new: AUC")
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in ("ranker", "NDCG@10", "AUC", "new: NDCG@10", "new: AUC"):
        table.add_column(name)
    for row in rows:
        cells = [ROWS[row["row"]], _plain(row["ndcg"]), _gain(row, "ndcg"), _plain(row["recall"]), f"{row['auc']:.3f}"]
        cells += [_plain(row["ndcg_new"]), _gain(row, "ndcg_new"), f"{row['auc_new']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
        short = [f"{row[name]['mean']:.3f}" for name in ("ndcg", "ndcg_new")]
        table.add_row(cells[0], short[0], cells[4], short[1], cells[7])
    out.print(table)
    out.print(
        f"Scored {online['households']} households from the online store, {online['p50_ms']:.1f} ms each; "
        f"scores differ from the offline ones by at most {online['largest_difference']:.1e}."
    )
    (folder / "recommender.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    document = {"rows": rows, "online": online, "households": users, "categories": items}
    (folder / "recommender.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    out.print(f"Written: {folder / 'recommender.md'} and {folder / 'recommender.json'}", soft_wrap=True)


def _plain(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def _gain(row: dict[str, Any], metric: str) -> str:
    if row["row"] == "hand":
        return ""
    value = row[f"{metric}_gain"]
    return f"{value['mean']:+.3f} [{value['low']:+.3f}, {value['high']:+.3f}]"


if __name__ == "__main__":
    typer.run(main)
