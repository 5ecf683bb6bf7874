"""The model card, the machine-readable record of a run, and its curves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml

from instructue_feast.errors import MissingDependencyError
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.training.settings import TrainingSettings

CARD, RECORD, CURVES = "README.md", "training.json", "curves.png"
_METRICS = {
    "contrastive_loss": "contrastive loss, last",
    "chance_loss": "the same without knowing the user",
    "autoregressive_loss": "next-token loss, last (nats per token)",
    "accuracy": "answers told from the others to the same question, last",
    "temperature": "temperature",
    "eval_auc_users": "AUC of the cosine, held-out users",
    "eval_auc_wordings": "AUC of the cosine, held-out users and wordings",
    "eval_auc_subjects": "AUC of the cosine, held-out users and subjects",
}


def write_card(
    folder: Path,
    model: InstructUEModel,
    settings: TrainingSettings,
    history: list[dict[str, float]],
    metrics: dict[str, float],
    *,
    data: dict[str, Any],
    version: str | None,
) -> None:
    """Writes `README.md`, `training.json` and `curves.png` into a model folder.

    Args:
        folder: The folder.
        model: The trained model.
        settings: What it was trained with.
        history: Lines of the log.
        metrics: Last values.
        data: What is known of the data set, JSON-ready.
        version: `model_version`, if the project is known.
    """
    config = model.config
    trainable = sum(one.numel() for one in model.parameters() if one.requires_grad)
    record = {
        "data": data,
        "trained_through": config.trained_through,
        "history_digest": config.history_digest,
        "model_version": version,
        "weights_digest": model.weights_digest(),
        "llm": {"name": config.llm, "digest": config.llm_digest, "layers": config.llm_layers},
        "encoders": config.encoder_digests,
        "trained_weights": trainable,
        "settings": dataclasses.asdict(settings),
        "metrics": metrics,
        "log": history,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    (folder / CARD).write_text(_card(model, settings, metrics, record), encoding="utf-8")
    plot_curves(history, folder / CURVES)


def _card(model: InstructUEModel, settings: TrainingSettings, metrics: dict[str, float], record: dict[str, Any]) -> str:
    config, data = model.config, record["data"]
    front = yaml.safe_dump(
        {
            "library_name": "instructue-feast",
            "base_model": config.llm,
            "tags": ["user-embeddings", "feature-store", "instructue"],
            "datasets": [settings.data_name or data["qa_id"]],
        },
        sort_keys=False,
    )
    layers = f"its first {config.llm_layers} layers" if config.llm_layers else "all layers"
    if config.transformer_dim:
        layers = f"its words only; in place of its layers a small Transformer of size {config.transformer_dim}"
    rows = "\n".join(f"| {text} | {metrics[name]:.4f} |" for name, text in _METRICS.items() if name in metrics)
    learned = "\n".join(f"| `{name}` | {value} |" for name, value in settings.learning().items())
    shuffled = (
        "\n**A control: users were shuffled against answers. It knows nothing.**\n" if settings.shuffle_users else ""
    )
    return f"""---
{front}---

# Instruction-conditioned user embeddings

An `InstructUEModel` of [instructue-feast](https://arxiv.org/abs/2510.11016): a user's behaviour and an instruction in,
a unit vector of {config.embedding_dim} numbers out. This folder holds adapters, LoRA and heads; the base models are
named and identified by their digests.
{shuffled}
| | |
| --- | --- |
| data | {settings.data_name or "data set " + data["qa_id"]} |
| terms of the data | {settings.data_terms or "not stated"} |
| pairs of trained users | {data["pairs"]:,} over {data["questions"]:,} questions |
| pairs drawn | at most {data["pairs_drawn"]:,} |
| users and as_ofs | {data["rows"]:,} trained, {data["held_out_rows"]:,} held out |
| trained through | {config.trained_through}: an `as_of` before it would leak |
| sources | {", ".join(config.sources or [])} |
| LLM | {config.llm}, {layers}; digest {config.llm_digest[:12]} |
| text encoders | {", ".join(config.encoder_names)} |
| trained weights | {record["trained_weights"]:,} |
| model version | {record["model_version"] or "not computed: no project was given"} |
| weights digest | {record["weights_digest"]} |

## Metrics

| | |
| --- | --- |
{rows}

![curves](curves.png)

AUC: the cosine between a user's embedding and each answer's, against the other answers to the question, averaged over
questions. None of the held-out users, words or subjects was trained on.

## Limits

- It knows the sources and history settings it was trained with (history digest
  {str(config.history_digest)[:12]}) and no others.
- It was trained on one population and one period; measure it on yours before use.
- An embedding reveals behaviour. Treat it like the events it was made from.

## Settings

| | |
| --- | --- |
{learned}
"""


def plot_curves(history: list[dict[str, float]], file: Path) -> None:
    """Draws losses, accuracy and AUC, temperature and learning rate over steps as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("curves need matplotlib", "pip install 'instructue-feast[train]'") from None
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    panels = [
        ("contrastive loss", ["contrastive_loss", "chance_loss", "user_user_loss"]),
        ("next-token loss", ["autoregressive_loss"]),
        ("accuracy and AUC", ["accuracy", "eval_auc_users", "eval_auc_wordings", "eval_auc_subjects"]),
        ("temperature and learning rate", ["temperature", "learning_rate"]),
    ]
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            points = [(one["step"], one[name]) for one in history if name in one]
            if points and any(value for _, value in points):
                style = {"linestyle": "--" if name == "chance_loss" else "-", "marker": "." if len(points) < 50 else ""}
                axis.plot(*zip(*points, strict=True), label=name.removeprefix("eval_").replace("_", " "), **style)
        axis.set(title=title, xlabel="step", yscale="log" if "temperature" in title else "linear")
        if axis.lines:
            axis.legend()
    figure.savefig(file, dpi=110)
