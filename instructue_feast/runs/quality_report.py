"""The page of a run's gates: a table, and, where Matplotlib is installed, pictures of what moved."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import numpy as np

from instructue_feast.errors import StorageError
from instructue_feast.runs.gates import Gate, QualityReport
from instructue_feast.runs.sample import Sample
from instructue_feast.runs.store import OutputStore

_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:2rem auto;max-width:60rem}table{border-collapse:collapse}"
    "td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:left}.no{color:#b3261e;font-weight:600}"
    "img{max-width:100%}"
)


def write_quality_report(store: OutputStore, report: QualityReport, sample: Sample) -> str:
    """Writes `runs/<id>/quality/report.html`; it holds no user ids and no texts.

    Returns:
        Its URL.

    Raises:
        StorageError: It cannot be written.
    """
    parts = ("runs", report.run_id, "quality", "report.html")
    try:
        store.fs.makedirs(store.path(*parts[:-1]), exist_ok=True)
        store.fs.pipe_file(store.path(*parts), _page(report, sample).encode())
    except OSError as error:
        raise StorageError(f"cannot write {store.url(*parts)}: {error.strerror}", "free disk space") from None
    return store.url(*parts)


def _page(report: QualityReport, sample: Sample) -> str:
    verdict = "All gates passed" if report.passed else f"{len(report.failed)} gates failed"
    compared = f"compared with run {report.base_run}" if report.base_run else "nothing was published before"
    rows = "".join(_row(one) for one in report.gates)
    notes = "".join(f"<li>{html.escape(one)}</li>" for one in report.notes)
    picture = _picture(report, sample)
    image = f'<img alt="drift" src="data:image/png;base64,{picture}">' if picture else ""
    return (
        f'<!doctype html><meta charset="utf-8"><title>Run {html.escape(report.run_id)}</title><style>{_STYLE}</style>'
        f"<h1>{verdict}</h1><p>Run {html.escape(report.run_id)}, {html.escape(compared)}, {report.checked}.</p>"
        f"<table><tr><th>gate<th>instruction<th>value<th>limit<th></tr>{rows}</table><ul>{notes}</ul>{image}"
    )


def _row(gate: Gate) -> str:
    bound = f"{'≥' if gate.at_least else '≤'} {gate.limit:.4g}"
    verdict = "passed" if gate.passed else '<span class="no">failed</span>'
    cells = (html.escape(gate.name), html.escape(gate.instruction or ""), f"{gate.value:.4g}", bound, verdict)
    return "<tr>" + "".join(f"<td>{one}" for one in cells) + "</tr>"


def _picture(report: QualityReport, sample: Sample) -> str | None:
    """PNG as base64: by instruction the index of every dimension, and the cosines to the mean vector."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    names = [name for name, vectors in sample.vectors.items() if len(vectors) > 1]
    if not names:
        return None
    figure = Figure(figsize=(9, 2.4 * len(names)), layout="constrained")
    grid: Any = figure.subplots(len(names), 2, squeeze=False)
    for (left, right), name in zip(grid, names, strict=True):
        drift = report.drift.get(name)
        left.set_title(f"{name}: stability index by dimension", fontsize=9)
        if drift is not None:
            left.bar(range(len(drift.psi_by_dimension)), drift.psi_by_dimension, color="#1b6ca8")
            limits = [one.limit for one in report.gates if one.name == "psi" and one.instruction == name]
            for limit in limits:
                left.axhline(limit, color="#c8553d", linewidth=1)
        else:
            left.text(0.5, 0.5, "not compared", ha="center", va="center", transform=left.transAxes)
        vectors = sample.vectors[name].astype(np.float64)
        mean = vectors.mean(axis=0)
        right.hist(vectors @ mean / max(float(np.linalg.norm(mean)), 1e-12), bins=40, color="#8a8f98")
        right.set_title(f"{name}: cosine of users to their mean", fontsize=9)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()
