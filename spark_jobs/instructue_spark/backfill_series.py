"""A run for each of several `as_of`s, out of one pass over the raw tables: what training sets are joined with.

python -m instructue_spark.backfill_series --config instructue.yaml --as-of 2017-09-01T00:00:00Z --as-of ...
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError
from instructue_feast.model.factory import load_model
from instructue_feast.runs.manifest import RunManifest, new_id, parse_as_of, to_json
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.release import check_quality, publish_judged
from instructue_feast.runs.store import OutputStore
from instructue_spark.backfill import Backfill, BackfillRequest, check_leakage
from instructue_spark.extract import run_extracts
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session


def run_backfill_series(
    spark: SparkSession, request: BackfillRequest, as_ofs: Sequence[datetime], reporter: Reporter
) -> list[RunManifest]:
    """Makes one run per `as_of` and publishes them together, so that historical retrieval finds each.

    Every run is what a backfill of its `as_of` alone would make.

    Args:
        spark: The session.
        request: What to backfill; its `as_of`, `run_id` and `extract_id` are not used.
        as_ofs: Exclusive upper bounds on event time.
        reporter: Gets the stages of `run_extracts` once, those of `run_backfill` for every run, and `publish`.

    Returns:
        The manifests, by `as_of`.

    Raises:
        ConfigError: No `as_of`, or more of them than views keep runs (`output.keep_runs`).
        LeakageError: The model was trained on events at or after the earliest `as_of`; nothing was computed.
        QualityError: A run fails a gate that judges it by itself; none of the runs is published. They are not compared
            with what is: a view must hold the past as it was, with fewer users and other habits than today.
        InstructueError: As in `run_extracts` and `run_backfill`. Finished runs stay, unpublished;
            one that has begun can be resumed.
    """
    moments = sorted({one.astimezone(UTC) for one in as_ofs})
    config = request.config
    if not moments:
        raise ConfigError("no as_of given", "name at least one")
    if request.publish and len(moments) > config.output.keep_runs:
        raise ConfigError(
            f"{len(moments)} as_ofs, but a view keeps {config.output.keep_runs} runs", "raise `output.keep_runs`"
        )
    config.registry().select(request.instructions)
    model = load_model(config)
    check_leakage(model.config.trained_through, dataclasses.replace(request, as_of=moments[0]))
    stamp = datetime.now(UTC).isoformat()
    run_ids = [new_id(one, config.history_digest(), stamp) for one in moments]
    store = OutputStore(config.output.path)
    run_extracts(spark, config, moments, extract_ids=run_ids, reporter=reporter)
    manifests = []
    try:
        for as_of, run_id in zip(moments, run_ids, strict=True):
            one = dataclasses.replace(request, as_of=as_of, run_id=run_id, extract_id=run_id, publish=False)
            manifests.append(Backfill(spark, one, reporter, model).run())
    except BaseException:
        for run_id in run_ids[len(manifests) :]:
            if not store.exists("runs", run_id):  # a run that has begun is resumed from its extract
                store.remove("extracts", run_id)
        raise
    if request.publish:
        with reporter.stage("publish") as stage:
            stage.rows_in = stage.rows_out = sum(one.users for one in manifests)
            reports = [
                check_quality(store, one.run_id, config, accept=request.accept, compare=False) for one in manifests
            ]  # all of them, before the first is published
            for report in reports:
                before = current_publication(store)
                publish_judged(store, report, config, before=before, accept=request.accept)
    return manifests


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m instructue_spark.backfill_series` and of `spark-submit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="path of instructue.yaml")
    parser.add_argument(
        "--as-of", required=True, action="append", help="ISO 8601 with time zone; repeat for a run each"
    )
    parser.add_argument("--instruction", action="append", help="instruction id; repeat for several; default: all")
    parser.add_argument("--no-publish", action="store_true", help="finish the runs but do not move the pointer")
    parser.add_argument("--allow-leakage", action="store_true", help="embed as_ofs the model has seen in training")
    parser.add_argument("--cores", type=int, help="local cores; default: all")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, object]:
        config = load_config(arguments.config)
        as_ofs = [parse_as_of(one) for one in arguments.as_of]
        request = BackfillRequest(
            config=config,
            instructions=arguments.instruction,
            publish=not arguments.no_publish,
            allow_leakage=arguments.allow_leakage,
        )
        spark = get_session(f"instructue backfill {config.project}", cores=arguments.cores)
        runs = run_backfill_series(spark, request, as_ofs, reporter)
        return {"runs": [to_json(run) for run in runs], "published": request.publish}

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())
