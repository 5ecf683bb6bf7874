"""Time and memory over the number of rows, as drawn by `gpu.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kernel_bench import Row

METRICS = ("time", "memory")


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """One picture an op, metric and size of vectors, from two numbers of rows on."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    files = []
    for op, metric, size in sorted({(one.op, one.metric, one.d) for one in rows if one.metric in METRICS}):
        own = [one for one in rows if (one.op, one.metric, one.d) == (op, metric, size)]
        if len({one.n for one in own}) < 2:
            continue
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for provider in dict.fromkeys(one.provider for one in own):
            line = sorted((one.n, one.p50) for one in own if one.provider == provider)
            axes.plot([n for n, _ in line], [value for _, value in line], marker="o", label=provider)
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel=f"{metric} in {own[0].unit}")
        axes.set_title(f"{op}, D = {size}, {own[0].dtype}, {own[0].device}", fontsize=9)
        axes.legend()
        files.append(folder / f"{op}_{metric}_{size}.png")
        figure.savefig(files[-1], dpi=120)
        plt.close(figure)
    return files
