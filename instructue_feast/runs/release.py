"""Releasing a run: gates, their report in the run's folder, publication, and the ledger."""

from __future__ import annotations

from instructue_feast.config import InstructueConfig
from instructue_feast.runs.gates import GATES_FILE, QualityReport, judge, require_passed
from instructue_feast.runs.ledger import note_published
from instructue_feast.runs.publish import Publication, current_publication, prune_publications, publish
from instructue_feast.runs.quality_report import write_quality_report
from instructue_feast.runs.store import OutputStore


def check_quality(
    store: OutputStore, run_id: str, config: InstructueConfig, *, accept: str | None = None, compare: bool = True
) -> QualityReport:
    """Judges a finished run, and writes `runs/<id>/quality/gates.json` and `report.html`.

    Args:
        store: The project's output.
        run_id: The run.
        config: The project, with its `gates`.
        accept: Why a run that fails its gates is good all the same.
        compare: See `judge`.

    Raises:
        QualityError: A gate failed.
    """
    report, sample = judge(store, run_id, config.gates, compare=compare)
    store.write_json(report.to_json(), "runs", run_id, *GATES_FILE)
    write_quality_report(store, report, sample)
    if accept is None:
        require_passed(report)
    return report


def publish_judged(
    store: OutputStore,
    report: QualityReport,
    config: InstructueConfig,
    *,
    before: Publication | None,
    accept: str | None = None,
    verified: str | None = None,
) -> Publication:
    """Publishes the run of a report of `check_quality`, notes it in the ledger, and prunes old publications.

    Args:
        store: The project's output.
        report: What the gates found.
        config: The project.
        before: What is published now; if something else is by then, nothing happens.
        accept: Why a run that failed is published all the same; kept in its ledger.
        verified: See `publish`.

    Raises:
        InstructueError: See `publish`.
    """
    publication = publish(
        store,
        report.run_id,
        keep_runs=config.output.keep_runs,
        expected=before.id if before else None,
        verified=verified,
    )
    note = f"gates accepted: {accept}" if report.failed else ""
    note_published(store, report.run_id, before.run_id if before else None, note)
    prune_publications(store, keep=config.output.keep_publications)
    return publication


def release(
    store: OutputStore, run_id: str, config: InstructueConfig, *, accept: str | None = None, verified: str | None = None
) -> tuple[Publication, QualityReport]:
    """Judges a finished run, and publishes it if it passes.

    Args:
        store: The project's output.
        run_id: The run.
        config: The project, with its `gates`.
        accept: Why a run that fails its gates is published all the same.
        verified: See `publish`.

    Returns:
        The publication and what the gates found.

    Raises:
        QualityError: A gate failed; the pointer stays where it is.
        InstructueError: See `publish`.
    """
    before = current_publication(store)
    report = check_quality(store, run_id, config, accept=accept)
    return publish_judged(store, report, config, before=before, accept=accept, verified=verified), report
