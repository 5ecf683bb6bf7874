"""The extracts a UserQA data set is made of: finished ones where they fit, new ones where not."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from pyspark.sql import SparkSession

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, VersionMismatchError, did_you_mean
from instructue_feast.runs.manifest import ExtractManifest, from_json, new_id
from instructue_feast.runs.store import OutputStore
from instructue_spark.extract import run_extracts
from instructue_spark.report import Reporter


def find_extracts(
    spark: SparkSession,
    config: InstructueConfig,
    as_ofs: list[datetime],
    given: Sequence[str],
    store: OutputStore,
    reporter: Reporter,
) -> list[ExtractManifest]:
    """A finished extract for every `as_of`: a given one, the newest that fits, or a new one; new ones share a pass.

    Args:
        spark: The session.
        config: The project.
        as_ofs: Points in time, ascending, in UTC.
        given: Ids of extracts to use.
        store: The project's output.
        reporter: Gets the progress of the stage `extracts`.

    Raises:
        ConfigError: A given extract does not exist, or belongs to none of the `as_of`s.
        VersionMismatchError: A given extract was made with other history settings.
    """
    digest = config.history_digest()
    named = [_manifest(store, name) for name in given]
    for one in named:
        if one.history_digest != digest:
            message = f"extract {one.extract_id} was made with other history settings"
            raise VersionMismatchError(message, "extract again with this config, or leave `--extracts` out")
    others = [
        _manifest(store, name)
        for name in ([] if len(named) == len(as_ofs) else store.names("extracts"))
        if store.exists("extracts", name, "manifest.json")
    ]
    ranked = sorted((one for one in others if one.history_digest == digest), key=lambda one: one.created) + named
    by_moment = {datetime.fromisoformat(one.as_of): one for one in ranked}
    wrong = [one.extract_id for one in named if datetime.fromisoformat(one.as_of) not in as_ofs]
    if wrong:
        raise ConfigError(f"extracts {wrong} belong to none of the as_ofs", "pass only extracts of these as_ofs")
    missing = [one for one in as_ofs if one not in by_moment]
    if missing:
        stamp = datetime.now(UTC).isoformat()
        names = [new_id(one, digest, stamp) for one in missing]
        made = run_extracts(spark, config, missing, extract_ids=names, reporter=Reporter(stream=None))
        by_moment |= dict(zip(missing, made, strict=True))
    reporter.progress("extracts", len(as_ofs), len(as_ofs))
    return [by_moment[one] for one in as_ofs]


def _manifest(store: OutputStore, name: str) -> ExtractManifest:
    if not store.exists("extracts", name, "manifest.json"):
        raise ConfigError(f"there is no finished extract {name!r}", did_you_mean(name, store.names("extracts")))
    return from_json(ExtractManifest, store.read_json("extracts", name, "manifest.json"), f"manifest of {name}")
