"""Several `as_of`s in one pass: each sees what it would see alone, and Feast finds the right one for every row."""

from __future__ import annotations

import dataclasses
import datetime as dt
import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from instructue_feast.errors import ConfigError, DataError, LeakageError, QualityError
from instructue_feast.feature_store.materialize import apply_repo
from instructue_feast.feature_store.session import open_store
from instructue_feast.model.factory import load_model
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.reader import finished_runs, read_run
from instructue_feast.runs.store import OutputStore
from instructue_spark import embed, sources
from instructue_spark.backfill import BackfillRequest, run_backfill
from instructue_spark.backfill_series import run_backfill_series
from instructue_spark.extract import run_extracts
from instructue_spark.report import Reporter
from tests.oracles.extracts import assert_same, read_extract
from tests.oracles.history import expected_extract
from tests.oracles.lake import (
    AS_OF,
    event_source,
    random_events,
    random_snapshots,
    tabular_source,
    write_config,
    write_lake,
)
from tests.projects import AS_OF as SHOP_AS_OF
from tests.projects import load, make_project

pytestmark = pytest.mark.spark

ROOT = Path(__file__).parents[2]
SILENT = Reporter(stream=None)


def test_every_as_of_gets_the_extract_it_would_get_alone(spark, tmp_path, monkeypatch):
    rng = random.Random(5)
    write_lake(
        tmp_path,
        {
            "bill": random_events(rng, 300),
            "search": random_events(rng, 150),
            "profile": random_snapshots(rng, 60),
            "users": pa.table({"id": ["1", "silent"]}),
        },
    )
    tables = {
        "bill": event_source("bill", max_texts=3),
        "search": event_source("search", "{word}", rank="frequency", max_texts=2, days=3),
        "profile": tabular_source("profile"),
    }
    config = write_config(tmp_path, tables, users={"table": {"path": "raw/users"}, "user_id": "id"})
    as_ofs = [AS_OF - dt.timedelta(days=days) for days in (0, 9, 2)]
    opened = []
    monkeypatch.setattr(
        sources, "read_table", lambda *args, real=sources.read_table: opened.append(args[-1]) or real(*args)
    )
    manifests = run_extracts(spark, config, as_ofs, extract_ids=["a", "b", "c"], reporter=SILENT)
    assert sorted(opened) == ["source bill", "source profile", "source search", "users"]
    for as_of, manifest in zip(as_ofs, manifests, strict=True):
        expected = expected_extract(config, as_of)
        assert_same(read_extract(config, manifest.extract_id), expected)
        assert manifest.users == len(expected.users)
        assert manifest.distinct_texts == len(expected.phrasebook)
        assert manifest.tokens == sum(len(row["text_id"]) for row in expected.users.values())
        assert manifest.events == sum(expected.counts[name].kept for name in ("bill", "search"))
    assert len({manifest.events for manifest in manifests}) == 3


def test_an_as_of_without_anybody_is_named_and_nothing_stays(spark, tmp_path):
    write_lake(tmp_path, {"bill": random_events(random.Random(6), 40)})
    config = write_config(tmp_path, {"bill": event_source("bill")})
    early = dt.datetime(1999, 1, 1, tzinfo=dt.UTC)
    with pytest.raises(DataError, match="1999-01-01"):
        run_extracts(spark, config, [AS_OF, early], extract_ids=["a", "b"], reporter=SILENT)
    assert OutputStore(config.output.path).names("extracts") == []


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shop")
    make_project(folder, tmp_path_factory.mktemp("models"), buckets=2)
    for name in ("feature_store.yaml", "definitions.py"):
        shutil.copy(ROOT / "feature_repo" / name, folder)
    return folder


def test_historical_retrieval_finds_the_newest_as_of_before_each_row(spark, shop):
    config = load(shop)
    as_ofs = [SHOP_AS_OF - dt.timedelta(days=14 * step) for step in range(3)]
    runs = run_backfill_series(spark, BackfillRequest(config=config), as_ofs, SILENT)
    assert [run.as_of for run in runs] == [one.isoformat() for one in sorted(as_ofs)]
    assert sum(run.model_loads for run in runs) <= 2  # by each worker once, not once for each run
    store = OutputStore(config.output.path)
    alone = run_backfill(spark, BackfillRequest(config=config, as_of=as_ofs[1], publish=False), SILENT)
    assert alone.digest == runs[1].digest
    publication = current_publication(store)
    assert publication is not None
    assert all([run.run_id for run in view.runs] == [run.run_id for run in runs] for view in publication.views)
    apply_repo(shop)
    asked = pd.DataFrame(
        {"user_id": "u5", "event_timestamp": [at + dt.timedelta(days=3) for at in sorted(as_ofs)]}
        | {"row": range(len(as_ofs))}
    )
    feast = open_store(shop)
    frame = feast.get_historical_features(asked, feast.get_feature_service("user_embeddings")).to_df()
    frame = frame.sort_values("row")
    for run, vector in zip(runs, frame["taste"], strict=True):
        (expected,) = read_run(store, run.run_id, ["taste"], ["u5"]).column("taste").to_pylist()
        np.testing.assert_array_equal(np.float32(vector), np.float32(expected))
    assert not np.array_equal(frame["taste"].iloc[0], frame["taste"].iloc[2])


def test_a_worker_keeps_the_model_of_a_series_and_loads_another_one(shop):
    config = load(shop)
    store = OutputStore(config.output.path)
    first, second, *_ = finished_runs(store)
    plan = embed.RunPlan(
        root=store.root, run_id=first, extract_id=first, created_us=0, num_sources=1, num_numeric=0, instructions=(),
        embedding_dim=1, dtype="float32", max_batch_tokens=None, model_version="one", owner="",
    )  # fmt: skip
    loads = []
    for changes in ({}, {"run_id": second}, {"run_id": second, "model_version": "two"}):
        before = embed._model_loads()
        embed._worker_embedder(dataclasses.replace(plan, **changes), "cpu")
        loads.append(embed._model_loads() - before)
    assert loads == [1, 0, 1]


def test_a_model_that_saw_the_first_as_of_is_refused_before_anything_is_computed(spark, shop, tmp_path):
    config = load(shop)
    model = load_model(config)
    model.config.trained = True
    model.config.trained_through = (SHOP_AS_OF - dt.timedelta(days=20)).isoformat()
    model.save_pretrained(tmp_path / "model")
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(tmp_path / "model")),
        output=dataclasses.replace(config.output, path=str(tmp_path / "output")),
    )
    request = BackfillRequest(config=config)
    as_ofs = [SHOP_AS_OF, SHOP_AS_OF - dt.timedelta(days=21)]
    with pytest.raises(LeakageError, match="later than as_of"):
        run_backfill_series(spark, request, as_ofs, SILENT)
    assert not (tmp_path / "output").exists()
    allowed = dataclasses.replace(request, allow_leakage=True, publish=False)
    assert len(run_backfill_series(spark, allowed, as_ofs, SILENT)) == 2


def test_a_series_with_a_run_that_fails_a_gate_publishes_none_of_its_runs(spark, shop, tmp_path):
    config = load(shop)
    output = dataclasses.replace(config.output, path=str(tmp_path / "output"))
    # Before the shop opened there is nobody but the roster.
    as_ofs = [SHOP_AS_OF, SHOP_AS_OF - dt.timedelta(days=3_000)]
    gates = dataclasses.replace(config.gates, max_empty_share=0.9)
    request = BackfillRequest(config=dataclasses.replace(config, output=output, gates=gates))
    with pytest.raises(QualityError, match=r"empty_share is 1, at most 0\.9"):
        run_backfill_series(spark, request, as_ofs, SILENT)
    store = OutputStore(output.path)
    assert len(finished_runs(store)) == 2
    assert current_publication(store) is None
    run_backfill_series(spark, dataclasses.replace(request, accept="as it was"), as_ofs, SILENT)
    publication = current_publication(store)
    assert publication is not None
    assert [len(one.runs) for one in publication.views] == [2] * len(publication.views)


def test_more_as_ofs_than_a_view_keeps_are_refused(spark, shop):
    config = load(shop)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, keep_runs=1))
    with pytest.raises(ConfigError, match="keeps 1 runs"):
        run_backfill_series(
            spark,
            BackfillRequest(config=config),
            [SHOP_AS_OF, SHOP_AS_OF - dt.timedelta(days=1)],
            SILENT,
        )
