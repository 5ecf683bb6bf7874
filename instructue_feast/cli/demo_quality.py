"""What `instructue eval` measured of the demo's model: read, checked and drawn before the demo starts its long work."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from instructue_feast.cli.pictures import inlined
from instructue_feast.errors import DataError, VersionMismatchError

EVALUATION = "evaluation.json"
"""In a model's folder: the document that `instructue eval` wrote about it."""
SUITE = "complete-journey"

ROW_WORDS = {
    "gbdt": "LightGBM on hand features",
    "logreg": "logistic regression on hand features",
    "pca128": "128 principal components of hand features and category counts",
    "minilm_events": "mean MiniLM event vectors",
    "minilm_profile": "MiniLM on a text profile",
    "llm_last": "SmolLM2-135M as it comes, last token",
    "llm_mean": "SmolLM2-135M as it comes, mean token",
    "ours_none": "ours, no instruction",
    "ours_mismatched": "ours, wrong instruction",
    "ours": "ours, right instruction",
    "ours_zeroshot": "ours, cosine to the answer, no labels",
    "ours_fewshot": "ours, instruction tuned on labels of a quarter before",
    "ours_fewshot_cosine": "the same, cosine to the answer, no labels at the cut",
    "ours_gbdt": "ours and hand features: LightGBM and a linear probe, stacked",
    "ours_paraphrased": "ours, instruction in words never trained on",
}
"""The rows of an evaluation, in words; `docs/evaluation.md` says how each is made."""


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One row of the table.

    Attributes:
        words: What it is.
        auc: Mean AUC over tasks, and its interval: estimate, low, high.
        unseen_auc: The same over tasks whose subject was never trained on; None where it was not measured.
    """

    words: str
    auc: tuple[float, float, float]
    unseen_auc: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """What the report shows of an evaluation.

    Attributes:
        tasks: How many.
        users: Users of a task.
        trained_before: Date, or moment, that training saw nothing from; empty where that is not known.
        rows: In the order of the evaluation.
        picture: Right and wrong instructions, PNG in base64; empty where fewer than two of these rows were measured.
    """

    tasks: int
    users: int
    trained_before: str
    rows: tuple[QualityRow, ...]
    picture: str


def read_quality(model: Path) -> Quality | None:
    """Reads the evaluation in a model's folder, and loads the model to see that it is the one that was measured.

    Args:
        model: The folder.

    Returns:
        What it says; None without one.

    Raises:
        DataError: The file is damaged, incomplete, or of another suite.
        VersionMismatchError: It was measured on other weights.
    """
    file = model / EVALUATION
    if not file.is_file():
        return None
    mend = f"write it again with `instructue eval --suite {SUITE} --model {model} --json {file}`, or remove it"
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        suite, digest = str(document["suite"]), str(document["model"]["weights_digest"])
        quality = _quality(document) if suite == SUITE else None
    except (OSError, LookupError, TypeError, AttributeError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
        raise DataError(f"{file} is not a whole evaluation: {what}", mend) from None
    if quality is None:
        raise DataError(f"{file} is of the suite {suite!r}, the demo shows {SUITE!r}", mend)
    from instructue_feast.model.modeling import InstructUEModel

    actual = InstructUEModel.from_pretrained(model).weights_digest()
    if digest != actual:
        raise VersionMismatchError(f"{file} was measured on weights {digest[:12]}, the model has {actual[:12]}", mend)
    return quality


def _quality(document: Mapping[str, Any]) -> Quality:
    mean, unseen = ({row: _interval(value) for row, value in document[key].items()} for key in ("mean", "mean_unseen"))
    through = document["model"]["trained_through"]
    moment = "" if through is None else f"{datetime.fromisoformat(through):%Y-%m-%d %H:%M}"
    return Quality(
        tasks=len(document["tasks"]),
        users=int(document["tasks"][0]["users"]),
        trained_before=moment.removesuffix(" 00:00"),
        rows=tuple(QualityRow(ROW_WORDS.get(row, row), auc, unseen.get(row)) for row, auc in mean.items()),
        picture=_picture(document),
    )


def _interval(value: Mapping[str, float]) -> tuple[float, float, float]:
    found = float(value["auc"]), float(value["auc_low"]), float(value["auc_high"])
    if not all(map(math.isfinite, found)):
        raise ValueError("an AUC is not a number")
    return found


def _picture(document: Mapping[str, Any]) -> str:
    import matplotlib as mpl

    mpl.use("Agg")
    from instructue_feast.evaluation.plots import instructions_figure

    figure = instructions_figure(document)
    return "" if figure is None else inlined(figure)
