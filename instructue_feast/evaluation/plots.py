"""Pictures of an evaluation, made from its JSON document."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_OURS, _OTHERS, _WEAK = "#1b6ca8", "#8a8f98", "#c8553d"


def write_plots(document: Mapping[str, Any], stem: Path) -> list[Path]:
    """Writes `<stem>-means.png`, `-tasks.png`, `-instructions.png` and `-noise.png`, as far as there are figures.

    Args:
        document: What `suite_document` returned.
        stem: Path without suffix.

    Returns:
        What was written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    written = []
    for name, draw in (("means", _means), ("tasks", _tasks), ("instructions", instructions_figure), ("noise", _noise)):
        figure = draw(document)
        if figure is None:
            continue
        file = stem.with_name(f"{stem.name}-{name}.png")
        figure.savefig(file, dpi=130, bbox_inches="tight")
        written.append(file)
    from matplotlib import pyplot as plt

    plt.close("all")
    return written


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height))
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colour(row: str) -> str:
    return _OURS if row in ("ours", "ours_zeroshot", "ours_fewshot", "ours_fewshot_cosine", "ours_gbdt") else _OTHERS


def _means(document: Mapping[str, Any]) -> Any:
    rows = [row for row in document["mean"] if row != "ours_paraphrased"]
    if not rows:
        return None
    rows.sort(key=lambda row: document["mean"][row]["auc"])
    figure, axes = _figure(6.4, 0.6 + 0.3 * len(rows))
    for place, row in enumerate(rows):
        value = document["mean"][row]
        axes.plot([value["auc_low"], value["auc_high"]], [place, place], color=_colour(row), linewidth=3, alpha=0.4)
        axes.plot(value["auc"], place, "o", color=_colour(row))
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel("mean AUC over tasks, with 95% intervals")
    return figure


def _tasks(document: Mapping[str, Any]) -> Any:
    tasks = document["tasks"]
    kinds = {"gbdt": (_OTHERS, "s"), "minilm_events": (_WEAK, "^"), "ours": (_OURS, "o"), "ours_zeroshot": (_OURS, "x")}
    figure, axes = _figure(6.4, 0.8 + 0.26 * len(tasks))
    for row, (colour, marker) in kinds.items():
        places = [place for place, task in enumerate(tasks) if row in task["rows"]]
        values = [tasks[place]["rows"][row]["auc"] for place in places]
        if values:
            axes.plot(values, [-place for place in places], marker, color=colour, label=row, markersize=5)
    names = [f"{task['name']}{' †' if task['unseen'] else ''}" for task in tasks]
    axes.set_yticks([-place for place in range(len(tasks))], names, fontsize=8)
    axes.axvline(0.5, color="black", linewidth=0.5)
    axes.set_xlabel("AUC († never trained on)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def instructions_figure(document: Mapping[str, Any]) -> Any:
    """Mean AUC under right, paraphrased, mismatched and no instruction; None without two of them.

    Args:
        document: What `suite_document` returned.
    """
    rows = [row for row in ("ours", "ours_paraphrased", "ours_mismatched", "ours_none") if row in document["mean"]]
    if len(rows) < 2:
        return None
    names = {"ours": "right", "ours_paraphrased": "paraphrased", "ours_mismatched": "mismatched", "ours_none": "none"}
    figure, axes = _figure(4.4, 3.2)
    for offset, (key, label) in enumerate((("mean", "all tasks"), ("mean_unseen", "never trained on"))):
        own = [row for row in rows if row in document[key]]
        value = np.array([document[key][row]["auc"] for row in own])
        low = np.array([document[key][row]["auc_low"] for row in own])
        high = np.array([document[key][row]["auc_high"] for row in own])
        if len(own):
            axes.errorbar(
                np.array([rows.index(row) for row in own]) + 0.15 * offset,
                value,
                yerr=np.stack([value - low, high - value]),
                fmt="o",
                capsize=3,
                color=(_OURS, _WEAK)[offset],
                label=label,
            )
    axes.set_xticks(range(len(rows)), [names[row] for row in rows])
    axes.set_xlabel("instruction")
    axes.set_ylabel("mean AUC")
    if document["mean_unseen"]:
        axes.legend(frameon=False, fontsize=8)
    return figure


def write_recovery_plot(document: Mapping[str, Any], stem: Path) -> list[Path]:
    """Writes `<stem>-recovery.png`: AUC of every interest under every instruction.

    Args:
        document: What `recovery_document` returned.
        stem: Path without suffix.

    Returns:
        What was written.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    auc = np.array([*document["auc"], document["none"]])
    names = document["interests"]
    figure, axes = plt.subplots(figsize=(1.6 + 0.5 * len(names), 1.4 + 0.4 * len(auc)))
    image = axes.imshow(auc, cmap="Blues", vmin=0.5, vmax=1.0)
    for row, column in np.ndindex(*auc.shape):
        colour = "white" if auc[row, column] > 0.8 else "black"
        axes.text(column, row, f"{auc[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(auc)), [*names, "no instruction"], fontsize=8)
    axes.set_xlabel("interest the probe looks for")
    axes.set_ylabel("instruction asks about")
    figure.colorbar(image, label="AUC", shrink=0.8)
    file = stem.with_name(f"{stem.name}-recovery.png")
    figure.savefig(file, dpi=130, bbox_inches="tight")
    plt.close(figure)
    return [file]


def _noise(document: Mapping[str, Any]) -> Any:
    noise = document.get("noise") or {}
    if not noise:
        return None
    figure, axes = _figure(4.4, 3.2)
    for row, colour in (("ours", _OURS), ("minilm_events", _WEAK)):
        for suffix, style in (("", "-"), ("_transferred", ":")):
            if row not in document["mean"] or any(row + suffix not in one["mean"] for one in noise.values()):
                continue
            values = [document["mean"][row]["auc"], *(one["mean"][row + suffix]["auc"] for one in noise.values())]
            label = row if not suffix else f"{row}, probe trained on clean histories"
            levels = [0.0, *(float(level) for level in noise)]
            axes.plot(levels, values, style, color=colour, marker="o", label=label)
    axes.set_xlabel("irrelevant events added per real event")
    axes.set_ylabel("mean AUC")
    axes.legend(frameon=False, fontsize=7)
    return figure
