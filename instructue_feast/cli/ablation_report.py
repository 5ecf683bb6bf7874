"""An ablation table: one JSON document from the rows on disk, and Markdown and a picture from the document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from instructue_feast.cli.ablation_rows import AblationRow, TaskScores

if TYPE_CHECKING:
    from instructue_feast.training.ablations import Variant

# D = bootstrap draws

SHOWN = ("ours", "ours_zeroshot", "ours_mismatched", "ours_none")
"""Rows of the evaluation, in the order of the table."""

VALIDATION = {"auc_users": "held-out users", "auc_wordings": "held-out wordings", "auc_subjects": "held-out subjects"}
"""What training measures by itself, without a suite."""

_TRAINING = {
    "contrastive_loss": "contrastive loss", "chance_loss": "at chance", "autoregressive_loss": "next-token loss",
    **{f"eval_{name}": words for name, words in VALIDATION.items()},
}  # fmt: skip
_ALL, _UNSEEN = "#1b6ca8", "#c8553d"


def ablation_document(
    plan: Sequence[Variant],
    rows: Mapping[str, Sequence[AblationRow]],
    *,
    unseen: Sequence[int] = (),
    baseline: TaskScores | None = None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything a table has measured so far, as JSON-ready values.

    Args:
        plan: The variants of the table, `full` first.
        rows: Rows that are done, by variant, one per seed.
        unseen: Tasks whose subject is never trained on.
        baseline: Scores of rows that no variant changes.
        about: What all rows have in common.

    Returns:
        `rows`, one per variant that is done: means over tasks and seeds with intervals, `difference` to `full` over the
        seeds both have; `missing`; what `about` says.
    """
    full = rows.get(plan[0].name, ())
    found = [_row(one, rows[one.name], full, rows.get(one.beside or "", ()), unseen) for one in plan if rows[one.name]]
    return {
        **about,
        "baseline": _means(baseline or [], unseen),
        "rows": found,
        "missing": [one.name for one in plan if not rows[one.name]],
    }


def _row(
    variant: Variant,
    own: Sequence[AblationRow],
    full: Sequence[AblationRow],
    beside: Sequence[AblationRow],
    unseen: Sequence[int],
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "variant": variant.name,
        "what": variant.what,
        "changes": dict(variant.changes),
        "seeds": [one.document["seed"] for one in own],
        "training": _training(own),
        "by_seed": [_figures(one, unseen) for one in own],
        **_means(_pooled([one.scores for one in own]), unseen),
    }
    if full and own[0].name != full[0].name:
        row |= _differences(own, full, unseen)
    if beside:
        row["beside"] = {"variant": variant.beside, **_differences(own, beside, unseen)}
    return row


def _figures(row: AblationRow, unseen: Sequence[int]) -> dict[str, Any]:
    means = _means(row.scores, unseen)
    return {"seed": row.document["seed"]} | {
        key: {name: one["auc"] for name, one in value.items()} for key, value in means.items()
    }


def _training(rows: Sequence[AblationRow]) -> dict[str, float]:
    names = [*_TRAINING, "seconds", "eval_seconds", "trained_weights"]
    values = {name: [one.document["training"].get(name) for one in rows] for name in names}
    return {
        name: round(float(np.mean([one for one in own if one is not None])), 5)
        for name, own in values.items()
        if any(one is not None for one in own)
    }


def _means(scores: TaskScores, unseen: Sequence[int]) -> dict[str, Any]:
    if not scores:
        return {}
    from instructue_feast.evaluation.scoring import means

    return {"mean": means(scores), "mean_unseen": means([scores[task] for task in unseen])}


def _pooled(seeds: Sequence[TaskScores]) -> TaskScores:
    """Scores averaged over seeds, draw by draw, so that differences stay paired."""
    from instructue_feast.evaluation.metrics import RowScores

    if not seeds or not all(seeds):
        return []
    return [
        {
            name: RowScores(
                auc=float(np.mean([one[name].auc for one in own])),
                ks=float(np.mean([one[name].ks for one in own])),
                auc_D=np.mean([one[name].auc_D for one in own], axis=0),
            )
            for name in own[0]
            if all(name in one for one in own)
        }
        for own in zip(*seeds, strict=True)
    ]


def _differences(own: Sequence[AblationRow], other: Sequence[AblationRow], unseen: Sequence[int]) -> dict[str, Any]:
    """Over the seeds both have: paired differences of means, and of what training measured."""
    from instructue_feast.evaluation.scoring import difference

    common = {one.document["seed"] for one in own} & {one.document["seed"] for one in other}
    own, other = ([one for one in rows if one.document["seed"] in common] for rows in (own, other))
    if not common:
        return {}
    ours, theirs = _training(own), _training(other)
    found: dict[str, Any] = {
        "validation_difference": {
            name: round(ours[f"eval_{name}"] - theirs[f"eval_{name}"], 5)
            for name in VALIDATION
            if f"eval_{name}" in ours and f"eval_{name}" in theirs
        }
    }
    left, right = _pooled([one.scores for one in own]), _pooled([one.scores for one in other])
    both = [
        mine | {f"other {name}": one for name, one in yours.items()} for mine, yours in zip(left, right, strict=True)
    ]
    for key, chosen in (("difference", both), ("difference_unseen", [both[task] for task in unseen] if both else [])):
        values = {name: difference(chosen, name, f"other {name}") for name in SHOWN}
        found[key] = {name: value for name, value in values.items() if value is not None}
    return found


def markdown(document: Mapping[str, Any]) -> str:
    """The table.

    Args:
        document: What `ablation_document` returned.
    """
    lines = [f"# Ablations: {document['suite']}", "", str(document["sentence"]), ""]
    if any("mean" in row for row in document["rows"]):
        lines += _suite_table(document)
    lines += ["", "## Training", "", *_training_table(document)]
    if document["missing"]:
        lines += ["", f"Not done yet: {', '.join(f'`{name}`' for name in document['missing'])}."]
    if document["skipped"]:
        names = ", ".join(f"`{name}`" for name in document["skipped"])
        lines += ["", f"Not trained, as they would be the same as `full`: {names}."]
    return "\n".join([*lines, ""])


def _suite_table(document: Mapping[str, Any]) -> list[str]:
    seeds = any(len(row["seeds"]) > 1 for row in document["rows"])
    head = ["variant", "what is different", "`ours`", "− full", "never trained on", "− full"]
    lines = _head([*head, *(f"`{name}`" for name in SHOWN[1:]), *(["`ours` by seed"] if seeds else [])])
    for name, value in document["baseline"].get("mean", {}).items():
        unseen = document["baseline"]["mean_unseen"].get(name)
        cells = [f"`{name}`", "baseline", _auc(value), "", _auc(unseen), "", *[""] * (len(SHOWN) - 1 + seeds)]
        lines.append(_line(cells))
    for row in document["rows"]:
        by_seed = ", ".join(f"{one['mean']['ours']:.3f}" for one in row["by_seed"])
        cells = [
            f"`{row['variant']}`",
            row["what"],
            _auc(row["mean"].get("ours")),
            _difference(row.get("difference")),
            _auc(row["mean_unseen"].get("ours")),
            _difference(row.get("difference_unseen")),
            *(_auc(row["mean"].get(name)) for name in SHOWN[1:]),
        ]
        lines.append(_line([*cells, *([by_seed] if seeds else [])]))
    for row in document["rows"]:
        if row.get("beside", {}).get("difference"):
            pair = f"`{row['variant']}` − `{row['beside']['variant']}`"
            lines += ["", f"{pair}: {_difference(row['beside']['difference'])} over all tasks."]
    return lines


def _training_table(document: Mapping[str, Any]) -> list[str]:
    names = [name for name in _TRAINING if any(name in row["training"] for row in document["rows"])]
    titles = [f"AUC, {_TRAINING[name]}" if name.startswith("eval_") else _TRAINING[name] for name in names]
    lines = _head(["variant", *titles, "trained weights", "minutes"])
    for row in document["rows"]:
        values = row["training"]
        moved = row.get("validation_difference", {})
        cells = [
            f"{values[name]:.4f}{_moved(moved.get(name.removeprefix('eval_')))}" if name in values else ""
            for name in names
        ]
        weights = f"{values['trained_weights'] / 1e6:.2f} M"
        lines.append(_line([f"`{row['variant']}`", *cells, weights, f"{values['seconds'] / 60:.1f}"]))
    return [
        *lines,
        "",
        "In brackets: minus `full`. AUC of the cosine to the answers, as `instructue train` reports it.",
    ]


def _moved(value: float | None) -> str:
    return "" if value is None else f" ({value:+.4f})"


def write_picture(document: Mapping[str, Any], file: Path) -> None:
    """Draws the difference of every variant to `full`.

    Args:
        document: What `ablation_document` returned.
        file: A PNG file.
    """
    from matplotlib.figure import Figure

    rows = [row for row in document["rows"] if "validation_difference" in row]
    figure = Figure(figsize=(6.8, 1.2 + 0.34 * max(1, len(rows))), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.axvline(0, color="black", linewidth=0.6)
    for (label, points), colour, shift in zip(
        _series(rows), (_ALL, _UNSEEN, "#8a8f98"), (0.12, -0.12, -0.3), strict=False
    ):
        for place, (value, low, high) in points.items():
            axes.plot([low, high], [shift - place] * 2, color=colour, linewidth=3, alpha=0.35)
            axes.plot(value, shift - place, "o", color=colour, markersize=5, label=label)
            label = None  # one entry in the legend
    axes.set_yticks([-place for place in range(len(rows))], [row["variant"] for row in rows], fontsize=8)
    axes.set_xlabel("AUC minus that of `full`")
    if axes.lines[1:]:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


def _series(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str | None, dict[int, tuple[float, float, float]]]]:
    """Label and `{row: (value, low, high)}` of each kind of point."""
    kinds = (("difference", "ours, all tasks"), ("difference_unseen", "ours, never trained on"))
    series: list[tuple[str | None, dict[int, tuple[float, float, float]]]] = []
    for key, label in kinds:
        points = {
            place: (one["difference"], one["difference_low"], one["difference_high"])
            for place, row in enumerate(rows)
            if (one := row.get(key, {}).get("ours"))
        }
        series.append((label, points))
    if any(points for _, points in series):
        return series
    return [
        (words, {place: (value,) * 3 for place, row in enumerate(rows)
                 if (value := row["validation_difference"].get(name)) is not None})
        for name, words in VALIDATION.items()
    ]  # fmt: skip


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + " --- |" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _auc(value: Mapping[str, float] | None) -> str:
    return f"{value['auc']:.3f} [{value['auc_low']:.3f}, {value['auc_high']:.3f}]" if value else ""


def _difference(values: Mapping[str, Mapping[str, float]] | None) -> str:
    value = (values or {}).get("ours")
    if not value:
        return ""
    return f"{value['difference']:+.3f} [{value['difference_low']:+.3f}, {value['difference_high']:+.3f}]"
