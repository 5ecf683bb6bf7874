"""Quality gates: what a run must look like beside what is published now, before the pointer moves to it.

That every vector is finite, of unit length, and there once per user is the audit's business (`runs/audit.py`), which
no setting can switch off. Gates judge what is valid but suspicious.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from instructue_feast.config import GatesConfig
from instructue_feast.errors import QualityError
from instructue_feast.runs.manifest import RunManifest
from instructue_feast.runs.publish import Publication, PublishedView, current_publication
from instructue_feast.runs.reader import finished_runs, run_manifest
from instructue_feast.runs.sample import Drift, Sample, drift, mean_pairwise_cosine, sample_run, sample_view
from instructue_feast.runs.store import OutputStore

GATES_FILE = ("quality", "gates.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """One judgement: `value` against `limit`; `limit` is a lower bound when `at_least`."""

    name: str
    value: float
    limit: float
    at_least: bool = False
    instruction: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the value is inside the limit; NaN, which stands for unknown, is not."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        what = f"{self.name} of {self.instruction}" if self.instruction else self.name
        return f"{what} is {self.value:.4g}, {'at least' if self.at_least else 'at most'} {self.limit:.4g} is allowed"


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityReport:
    """What the gates found.

    Attributes:
        run_id: The run that was judged.
        base_run: The published run it was compared with; `None` when nothing was published.
        checked: When, ISO 8601 in UTC.
        gates: The judgements.
        drift: By instruction, of those whose embedding version is the published one.
        notes: What was not compared, and why.
    """

    run_id: str
    base_run: str | None
    checked: str
    gates: list[Gate] = field(default_factory=list)
    drift: dict[str, Drift] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Gate]:
        """The gates that did not pass."""
        return [one for one in self.gates if not one.passed]

    @property
    def passed(self) -> bool:
        """Whether all gates passed."""
        return not self.failed

    def to_json(self) -> dict[str, Any]:
        """JSON-ready values; what is not a number becomes null."""
        gates = [{**dataclasses.asdict(one), "passed": one.passed} for one in self.gates]
        values = {**dataclasses.asdict(self), "gates": gates, "passed": self.passed}
        return {name: _finite(value) for name, value in values.items()}


def judge(
    store: OutputStore, run_id: str, config: GatesConfig, *, compare: bool = True
) -> tuple[QualityReport, Sample]:
    """Compares a finished run with what is published.

    Args:
        store: The project's output.
        run_id: The run.
        config: The limits.
        compare: Leave this out for a run of another time than what is published: it is judged by itself alone.

    Returns:
        The report, and the sample of the run it is based on.

    Raises:
        ConfigError, RunConflictError: No such finished run.
        StorageError: A file is missing or damaged.
    """
    manifest, publication = run_manifest(store, run_id), current_publication(store) if compare else None
    names = [one.id for one in manifest.instructions]
    sample = sample_run(store, run_id, manifest.buckets, names, config.sample_users)
    base = _base(publication, manifest)
    report = QualityReport(
        run_id=run_id, base_run=base.newest.run_id if base else None, checked=datetime.now(UTC).isoformat()
    )
    report.gates.extend(_of_rows(store, manifest, base, config))
    report.gates.extend(_of_vectors(manifest, sample, config))
    if publication is None or base is None:
        nothing = "nothing is published yet" if compare else "this run is one of a series of as_ofs"
        report.notes.append(f"{nothing}, so nothing was compared")
        return report, sample
    for one in manifest.instructions:
        view = next((view for view in publication.current_views if view.instruction == one.id), None)
        if view is None:
            report.notes.append(f"{one.id}: new, nothing to compare with")
        elif view.embedding_version != one.embedding_version:
            report.notes.append(f"{one.id}: another embedding version is published, its vectors cannot be compared")
        else:
            _of_drift(report, sample, sample_view(store, publication, view, config.sample_users), one.id, config)
    return report, sample


def require_passed(report: QualityReport) -> None:
    """Raises a `QualityError` that names the gates which failed."""
    if report.failed:
        raise QualityError(
            f"run {report.run_id} was not published: " + "; ".join(str(one) for one in report.failed),
            f"look at runs/{report.run_id}/quality/report.html in the output; if this is as it should be, publish it "
            f'with `instructue publish {report.run_id} --accept "<why>"`, or change the limit under `gates`',
        )


def _of_rows(store: OutputStore, manifest: RunManifest, base: PublishedView | None, config: GatesConfig) -> list[Gate]:
    empty = manifest.empty / max(1, manifest.users)
    gates = [Gate(name="empty_share", value=empty, limit=config.max_empty_share)]
    if base is not None:
        ratio = manifest.users / max(1, base.newest.rows)
        gates.append(Gate(name="rows_ratio", value=ratio, limit=config.min_rows_ratio, at_least=True))
        gates.append(Gate(name="rows_ratio", value=ratio, limit=config.max_rows_ratio))
        if base.newest.run_id in finished_runs(store):
            old = run_manifest(store, base.newest.run_id)
            rise = empty - old.empty / max(1, old.users)
            gates.append(Gate(name="empty_share_rise", value=rise, limit=config.max_empty_share_rise))
    return gates


def _of_vectors(manifest: RunManifest, sample: Sample, config: GatesConfig) -> list[Gate]:
    gates = []
    if len(sample.user_ids) < config.min_sample_users:
        return []
    empty = manifest.empty / max(1, manifest.users)  # users without a history rightly share one vector
    for name, vectors in sample.vectors.items():
        distinct = len(np.unique(vectors.view(np.dtype((np.void, vectors.dtype.itemsize * vectors.shape[1])))))
        same = max(0.0, 1 - distinct / len(vectors) - empty)
        gates.append(Gate(name="identical_share", value=same, limit=config.max_identical_share, instruction=name))
        cosine = mean_pairwise_cosine(vectors)
        gates.append(Gate(name="mean_pairwise_cosine", value=cosine, limit=config.max_mean_cosine, instruction=name))
    return gates


def _of_drift(report: QualityReport, new: Sample, old: Sample, name: str, config: GatesConfig) -> None:
    users = min(len(new.user_ids), len(old.user_ids))
    if users < config.min_sample_users:
        report.notes.append(f"{name}: {users} users are too few to compare (`gates.min_sample_users`)")
        return
    found = drift(new, old, name)
    report.drift[name] = found
    report.gates.append(Gate(name="mean_shift", value=found.mean_shift, limit=config.max_mean_shift, instruction=name))
    report.gates.append(Gate(name="psi", value=found.psi, limit=config.max_psi, instruction=name))
    if found.common >= config.min_sample_users and not math.isnan(found.knn_overlap):
        limit = config.min_knn_overlap
        report.gates.append(
            Gate(name="knn_overlap", value=found.knn_overlap, limit=limit, at_least=True, instruction=name)
        )
    else:
        report.notes.append(f"{name}: {found.common} users in both samples are too few to compare neighbours")


def _base(publication: Publication | None, manifest: RunManifest) -> PublishedView | None:
    """The published view whose newest run counts are compared with: one of an instruction of the run, if there is."""
    if publication is None:
        return None
    ours = {one.id for one in manifest.instructions}
    views = sorted(publication.current_views, key=lambda view: view.instruction not in ours)
    return views[0] if views else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
