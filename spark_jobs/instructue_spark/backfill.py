"""The backfill job: extract, encode what is new, embed every user, finish the run, publish it.

    python -m instructue_spark.backfill --config instructue.yaml --as-of 2017-10-01T00:00:00Z

Prints one JSON object per line (`instructue_spark.report`). A run that fails leaves neither run nor extract
behind; event vectors that were finished stay, because they are as good as new for the next run. A finished run stays,
also when its publication fails: `instructue publish` can be tried again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig, load_config
from instructue_feast.errors import ConfigError, DataError, LeakageError, VersionMismatchError, did_you_mean
from instructue_feast.inference.soft_prompts import soft_prompts_of
from instructue_feast.inference.version import embedding_version, model_version
from instructue_feast.instructions import Instruction
from instructue_feast.model.factory import load_model
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.audit import combine_digests
from instructue_feast.runs.manifest import (
    ExtractManifest,
    RunInstruction,
    RunManifest,
    check_id,
    from_json,
    new_id,
    parse_as_of,
    to_json,
)
from instructue_feast.runs.publish import prune_publications, publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run
from instructue_feast.soft_prompt_file import SoftPrompt
from instructue_spark.claim import claimed
from instructue_spark.embed import RunPlan, build_soft_tokens, embed_users, encode_new_texts
from instructue_spark.extract import run_extract
from instructue_spark.report import Reporter, run_main
from instructue_spark.session import get_session


@dataclass(frozen=True, slots=True, kw_only=True)
class BackfillRequest:
    """What to backfill.

    Attributes:
        config: The project.
        as_of: Exclusive upper bound on event time.
        instructions: Instruction ids; all declared ones for `None`.
        run_id: Id of the new run; derived from `as_of` and the time when left out.
        extract_id: A finished extract to embed; a new one is made when left out.
        publish: Move the pointer to the run at the end.
        allow_leakage: Embed an `as_of` the model has seen in training.
    """

    config: InstructueConfig
    as_of: datetime
    instructions: Sequence[str] | None = None
    run_id: str | None = None
    extract_id: str | None = None
    publish: bool = True
    allow_leakage: bool = False


def run_backfill(spark: SparkSession, request: BackfillRequest, reporter: Reporter) -> RunManifest:
    """Makes one run.

    Args:
        spark: The session.
        request: What to backfill.
        reporter: Gets the stages `sources`, `phrasebook`, `history`, `encode`, `soft_tokens`, `embed`, `publish`.

    Returns:
        The manifest of the finished run.

    Raises:
        ConfigError: An instruction is not declared, or an id cannot be a folder's name.
        LeakageError: The model was trained on events at or after `as_of`.
        VersionMismatchError: A soft prompt was tuned with another model.
        DataError: A raw table is missing, empty or unreadable.
        RunConflictError: The run exists or another process is writing it.
        InvalidEmbeddingError: A vector is NaN, infinite or not of unit length; nothing is published.
        StorageError: Too little disk.
    """
    config = request.config
    instructions = config.registry().select(request.instructions)
    store = OutputStore(config.output.path)
    store.require_free(config.output.min_free_gib)
    created = datetime.now(UTC)
    stamp = created.isoformat()
    run_id = check_id("run", request.run_id or new_id(request.as_of, config.history_digest(), stamp))
    if request.extract_id is not None:
        check_id("extract", request.extract_id)
    with claimed(spark, store, "runs", run_id):
        model = load_model(config)  # first, because a wrong model folder should fail before an hour of extraction
        _check_leakage(model.config.trained_through, request)
        prompts = soft_prompts_of(config, instructions, model)
        extract = _extract(spark, request, store, run_id, reporter)
        try:
            manifest = _make_run(
                spark, request, model, extract, instructions, prompts, store, run_id, created, reporter
            )
        except BaseException:
            if request.extract_id is None:
                store.remove("extracts", extract.extract_id)
            raise
    if request.publish:
        with reporter.stage("publish") as stage:
            stage.rows_in = stage.rows_out = manifest.users
            publish(store, run_id, keep_runs=config.output.keep_runs)
            prune_publications(store, keep=config.output.keep_publications)
    return manifest


def _make_run(
    spark: SparkSession,
    request: BackfillRequest,
    model: InstructUEModel,
    extract: ExtractManifest,
    instructions: tuple[Instruction, ...],
    prompts: dict[str, SoftPrompt],
    store: OutputStore,
    run_id: str,
    created: datetime,
    reporter: Reporter,
) -> RunManifest:
    config = request.config
    texts_encoded = encode_new_texts(spark, config, store, extract, reporter)
    with reporter.stage("soft_tokens") as stage:
        stage.rows_in = extract.distinct_texts
        stage.rows_out = build_soft_tokens(config, store, model, extract, run_id, prompts)
    plan = RunPlan(
        root=store.root,
        run_id=run_id,
        extract_id=extract.extract_id,
        created_us=int(created.timestamp() * 1_000_000),
        num_sources=len(config.source_names),
        num_numeric=len(config.numeric_columns),
        instructions=instructions,
        embedding_dim=model.config.embedding_dim,
        dtype=config.model.dtype,
        max_batch_tokens=config.model.max_batch_tokens,
    )
    used = [
        RunInstruction(
            id=one.id,
            text=one.text,
            content_hash=one.content_hash,
            embedding_version=embedding_version(model, config, one),
        )
        for one in instructions
    ]
    version, trained, embedding_dim = model_version(model, config), model.config.trained, model.config.embedding_dim
    markers, loads = embed_users(spark, plan, store, extract, reporter)
    manifest = RunManifest(
        run_id=run_id,
        project=config.project,
        as_of=extract.as_of,
        created=created.isoformat(),
        extract_id=extract.extract_id,
        history_digest=extract.history_digest,
        model_version=version,
        trained=trained,
        embedding_dim=embedding_dim,
        instructions=used,
        buckets=markers,
        users=sum(marker.rows for marker in markers),
        tokens=sum(marker.tokens for marker in markers),
        texts_encoded=texts_encoded,
        distinct_texts=extract.distinct_texts,
        digest=combine_digests([marker.digest for marker in markers]),
        seconds=round((datetime.now(UTC) - created).total_seconds(), 3),
        model_loads=loads,
    )
    if manifest.users != extract.users:
        raise DataError(
            f"run {run_id}: {manifest.users} users embedded of {extract.users} extracted",
            "did somebody touch the extract? Run the backfill again",
        )
    finish_run(store, manifest)
    return manifest


def _check_leakage(trained_through: str | None, request: BackfillRequest) -> None:
    """Refuses to embed a moment the model has seen the future of."""
    if trained_through is None or request.allow_leakage:
        return
    if datetime.fromisoformat(trained_through) > request.as_of:
        raise LeakageError(
            f"the model was trained on events up to {trained_through}, later than as_of {request.as_of.isoformat()}",
            "use a model trained on earlier data, or --allow-leakage where nobody measures with the result",
        )


def _extract(
    spark: SparkSession, request: BackfillRequest, store: OutputStore, run_id: str, reporter: Reporter
) -> ExtractManifest:
    """Makes the run's extract, or opens the one asked for and checks that it fits the config and `as_of`."""
    if request.extract_id is None:
        return run_extract(spark, request.config, request.as_of, extract_id=run_id, reporter=reporter)
    where = f"extract {request.extract_id}"
    if not store.exists("extracts", request.extract_id, "manifest.json"):
        finished = [name for name in store.names("extracts") if store.exists("extracts", name, "manifest.json")]
        raise ConfigError(f"there is no finished {where}", did_you_mean(request.extract_id, finished))
    found = from_json(ExtractManifest, store.read_json("extracts", request.extract_id, "manifest.json"), where)
    if found.history_digest != request.config.history_digest() or found.as_of != request.as_of.isoformat():
        raise VersionMismatchError(
            f"{where} was made with as_of {found.as_of} and other settings or another as_of than asked for",
            "leave --extract out to extract anew",
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `python -m instructue_spark.backfill` and of `spark-submit`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="path of instructue.yaml")
    parser.add_argument("--as-of", required=True, help="exclusive upper bound on event time, ISO 8601 with time zone")
    parser.add_argument("--instruction", action="append", help="instruction id; repeat for several; default: all")
    parser.add_argument("--run-id", help="id of the new run")
    parser.add_argument("--extract", help="a finished extract to embed instead of extracting anew")
    parser.add_argument("--no-publish", action="store_true", help="finish the run but do not move the pointer")
    parser.add_argument("--allow-leakage", action="store_true", help="embed an as_of the model has seen in training")
    parser.add_argument("--cores", type=int, help="local cores; default: all")
    arguments = parser.parse_args(argv)

    def job(reporter: Reporter) -> dict[str, object]:
        config = load_config(arguments.config)
        request = BackfillRequest(
            config=config,
            as_of=parse_as_of(arguments.as_of),
            instructions=arguments.instruction,
            run_id=arguments.run_id,
            extract_id=arguments.extract,
            publish=not arguments.no_publish,
            allow_leakage=arguments.allow_leakage,
        )
        config.registry().select(request.instructions)
        spark = get_session(f"instructue backfill {config.project}", cores=arguments.cores)
        manifest = run_backfill(spark, request, reporter)
        extract = OutputStore(config.output.path).read_json("extracts", manifest.extract_id, "manifest.json")
        return {"run": to_json(manifest), "extract": extract, "published": request.publish}

    return run_main(job)


if __name__ == "__main__":
    raise SystemExit(main())
