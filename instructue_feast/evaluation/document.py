"""The JSON document of an evaluation."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from instructue_feast.evaluation.attributions import MIN_TEXTS, TOP, Attributions
from instructue_feast.evaluation.metrics import RowScores
from instructue_feast.evaluation.recovery import Recovery
from instructue_feast.evaluation.scoring import difference, means
from instructue_feast.evaluation.suite import ROWS, TRANSFERRED, SuiteOptions, SuiteResult
from instructue_feast.evaluation.tasks import LabelledTasks
from instructue_feast.model.modeling import InstructUEModel

DIFFERENCES = (
    ("ours", "gbdt"), ("ours", "logreg"), ("ours", "pca128"), ("ours", "minilm_events"), ("ours", "minilm_profile"),
    ("ours", "llm_last"), ("ours", "llm_mean"), ("ours", "ours_none"), ("ours", "ours_mismatched"),
    ("ours", "ours_paraphrased"), ("ours_zeroshot", "gbdt"), ("ours_gbdt", "gbdt"), ("ours_fewshot", "ours"),
    ("ours_fewshot_cosine", "ours_zeroshot"),
)  # fmt: skip
"""Paired differences of mean AUC."""

_PACKAGES = ("instructue-feast", "numpy", "scikit-learn", "lightgbm", "scipy", "torch", "transformers", "pyarrow")


def suite_document(
    result: SuiteResult, model: InstructUEModel, options: SuiteOptions, *, suite: str, data: str
) -> dict[str, Any]:
    """Everything a suite measured, as JSON-ready values.

    Args:
        result: What was measured.
        model: The model that was measured.
        options: How.
        suite: Its name.
        data: What the data is, as a sentence.

    Returns:
        `tasks`, `mean`, `mean_unseen` (the rows' mean AUC over all tasks, and over those whose subject was never
        trained on), `differences`, `paraphrased`, `noise`, `attributions` if they were checked, `protocol`, `model`,
        `few_labels` if there are soft prompts, `versions`, `seconds`.
    """
    unseen = [row for row, task in enumerate(result.labelled.tasks) if task.unseen]
    families = sorted({task.family for task in result.labelled.tasks})
    scores = result.scores
    return {
        "suite": suite,
        "data": data,
        "tasks": task_documents(result.labelled, scores, result.mismatch),
        "mean": means(scores),
        "mean_unseen": means([scores[row] for row in unseen]),
        "mean_by_family": {
            family: means([scores[row] for row, task in enumerate(result.labelled.tasks) if task.family == family])
            for family in families
        },
        "differences": differences(scores),
        "differences_unseen": differences([scores[row] for row in unseen]),
        "paraphrased": {
            "mean": means(
                [{"ours_paraphrased": own["ours_paraphrased"]} for own in scores if "ours_paraphrased" in own]
            ),
            "loss": difference(scores, "ours", "ours_paraphrased"),
        },
        "noise": noise_document(result),
        **_section(result.attributions),
        **({} if result.few_labels is None else {"few_labels": result.few_labels.document("ours_fewshot", "ours")}),
        "protocol": protocol(options) | _words(result.attributions),
        "model": model_document(model),
        "versions": versions(),
        "seconds": result.seconds | {"total": round(sum(result.seconds.values()), 2)},
    }


def recovery_document(
    found: Recovery,
    model: InstructUEModel,
    options: SuiteOptions,
    *,
    users: int,
    seconds: Mapping[str, float],
    attributions: Attributions | None = None,
) -> dict[str, Any]:
    """What the synthetic suite measured, as JSON-ready values.

    Args:
        found: What was recovered.
        model: The model that was measured.
        options: How.
        users: How many users.
        seconds: Wall time by step.
        attributions: What was measured of them.
    """
    return {
        "suite": "synthetic",
        "data": "Made-up users whose interests are known.",
        "users": users,
        **found.document(),
        **_section(attributions),
        "protocol": {
            "auc": "row: the instruction asks about this interest; column: the probe looks for this one",
            "own": "mean of the diagonal",
            "others": "mean off the diagonal",
            **{
                name: value
                for name, value in protocol(options).items()
                if name in ("folds", "intervals", "probe", "seed")
            },
            **_words(attributions),
        },
        "model": model_document(model),
        "versions": versions(),
        "seconds": dict(seconds) | {"total": round(sum(seconds.values()), 2)},
    }


def _section(attributions: Attributions | None) -> dict[str, Any]:
    return {} if attributions is None else {"attributions": attributions.document()}


def _words(attributions: Attributions | None) -> dict[str, str]:
    if attributions is None:
        return {}
    words = {
        "attributions": "Spearman correlation over a user's texts of the scores by `gates` and by `leave_one_out`; "
        f"users drawn among those with {MIN_TEXTS} texts or more, instructions in turn"
    }
    if attributions.own_interest is not None:
        words["own_interest"] = (
            f"share of the {TOP} texts that rank highest by `focus` and by `gates` that have a word of the interest; "
            "chance: of all texts; users with that interest and another one"
        )
    return words


def task_documents(
    labelled: LabelledTasks, scores: Sequence[Mapping[str, RowScores]], mismatch: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """One document per task."""
    documents = []
    for row, (task, label_U, own) in enumerate(zip(labelled.tasks, labelled.labels, scores, strict=True)):
        document: dict[str, Any] = {
            "name": task.name,
            "family": task.family,
            "instruction": task.instruction,
            "positives": int(label_U.sum()),
            "users": len(label_U),
            "rows": {
                name: one.estimate.as_dict() | {"ks": round(one.ks, 5)} for name, one in sorted(own.items(), key=_order)
            },
            "unseen": task.unseen,
            "subject": task.subject,
        }
        if task.paraphrase:
            document["paraphrase"] = task.paraphrase
        if mismatch:
            document["mismatched_instruction"] = labelled.tasks[mismatch[row]].instruction
        documents.append(document)
    return documents


def _order(item: tuple[str, Any]) -> int:
    return ROWS.index(item[0]) if item[0] in ROWS else len(ROWS)


def differences(scores: Sequence[Mapping[str, RowScores]]) -> dict[str, dict[str, float]]:
    """Every pair of `DIFFERENCES` that was measured, as `<row>-<other>`."""
    found = {f"{row}-{minus}": difference(scores, row, minus) for row, minus in DIFFERENCES}
    return {name: value for name, value in found.items() if value is not None}


def noise_document(result: SuiteResult) -> dict[str, Any]:
    """Mean AUC by level of noise, and what the noise costs each row.

    `drop` is clean minus noisy AUC with probes trained on noisy histories as well, `drop_transferred` the same with
    probes trained on clean ones.
    """
    document: dict[str, Any] = {}
    for level, scores in result.noise.items():
        # Side by side, so that a difference of clean and noisy is paired.
        both = [
            {f"noisy {name}": one for name, one in noisy.items()} | clean
            for noisy, clean in zip(scores, result.scores, strict=True)
        ]
        rows = ("ours", "minilm_events")
        document[f"{level:g}"] = {
            "mean": means(scores),
            "drop": {row: drop for row in rows if (drop := difference(both, row, f"noisy {row}"))},
            "drop_transferred": {
                row: drop for row in rows if (drop := difference(both, row, f"noisy {row}{TRANSFERRED}"))
            },
        }
    return document


def protocol(options: SuiteOptions) -> dict[str, Any]:
    """How it was measured, in words and numbers."""
    return {
        "folds": "5 folds by user, stratified; scores of a user come from a probe that has not seen the user's fold",
        "auc": "mean over folds of the AUC within a fold",
        "ks": "of percentiles within folds, over all users",
        "intervals": "95%, percentiles of 1,000 bootstrap draws over users, the same draws for every row and task",
        "probe": "standardised, logistic regression, penalty chosen by AUC in 3 inner folds of the training users",
        "gbdt": "LightGBM, 150 trees, learning rate .05, 15 leaves, on hand features",
        "ours_gbdt": "scores of `gbdt` and of the probe, added up by a logistic regression on out-of-fold scores",
        "ours_zeroshot": "cosine to the positive answer minus mean cosine to the others; no labels",
        "ours_fewshot_cosine": "the same under the tuned instruction; labels of the quarter before, none at the cut",
        "ours_mismatched": "the embedding under another task's instruction, a fixed shift of the tasks",
        "mean_unseen": "tasks about a category that a hash keeps out of training",
        "seed": options.seed,
        "noise_levels": list(options.noise),
    }


def model_document(model: InstructUEModel) -> dict[str, Any]:
    """Which model it was."""
    config = model.config
    return {
        "weights_digest": model.weights_digest(),
        "trained": config.trained,
        "trained_through": config.trained_through,
        "llm": config.llm,
        "llm_layers": config.llm_layers,
        "embedding_dim": config.embedding_dim,
        "dtype": str(model.llm_dtype).removeprefix("torch."),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
