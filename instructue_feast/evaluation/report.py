"""The Markdown report of an evaluation, made from its JSON document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = ("gbdt", "logreg", "minilm_events", "llm_mean", "ours_none", "ours_mismatched", "ours", "ours_zeroshot")
"""Rows of the table by task; the JSON document has all of them."""


def markdown(document: Mapping[str, Any]) -> str:
    """Tables of means, differences, tasks and noise.

    Args:
        document: What `suite_document` returned.
    """
    model = document["model"]
    state = f"trained through {model['trained_through']}" if model["trained"] else "untrained"
    parts = [
        f"# Evaluation: {document['suite']}",
        "",
        f"{document.get('data', '')} {len(document['tasks'])} tasks, {document['tasks'][0]['users']} users. Model "
        f"{model['weights_digest'][:12]} ({state}), LLM {model['llm']}. Square brackets hold 95% intervals.".strip(),
        "",
        *_means(document),
        "",
        *_differences(document),
        "",
        *_tasks(document["tasks"]),
    ]
    if document.get("noise"):
        parts += ["", *_noise(document["noise"])]
    if document.get("attributions"):
        parts += ["", *_attributions(document["attributions"])]
    if document.get("few_labels"):
        parts += ["", *_few_labels(document["few_labels"])]
    parts += ["", "## Protocol", "", *(f"- {name}: {value}" for name, value in document["protocol"].items()), ""]
    return "\n".join(parts)


def recovery_markdown(document: Mapping[str, Any]) -> str:
    """The matrix of instructions and interests, and its means.

    Args:
        document: What `recovery_document` returned.
    """
    names = document["interests"]
    lines = [
        f"# Evaluation: {document['suite']}",
        "",
        f"{document['data']} {document['users']} users. AUC of a linear probe for each interest (column) on the "
        "embedding under each instruction (row).",
        "",
        *_head(["instruction about", *names]),
    ]
    for name, row in zip([*names, "nothing (no instruction)"], [*document["auc"], document["none"]], strict=True):
        lines.append(
            _line(
                [
                    name,
                    *(
                        f"**{one:.3f}**" if name == names[at % len(names)] else f"{one:.3f}"
                        for at, one in enumerate(row)
                    ),
                ]
            )
        )
    lines += [
        "",
        f"- own interest: {_interval(document['own'])}",
        f"- another interest: {_interval(document['others'])}",
        f"- difference: {_interval(document['gap'], 'difference')}",
        f"- own interest, against no instruction: {_interval(document['own_minus_none'], 'difference')}",
        f"- interests that their own instruction recovers best: {document['best_is_own']:.0%}",
        "",
    ]
    if document.get("attributions"):
        lines += [*_attributions(document["attributions"]), ""]
    return "\n".join(lines)


def _means(document: Mapping[str, Any]) -> list[str]:
    families = list(document["mean_by_family"])
    unseen = sum(task["unseen"] for task in document["tasks"])
    lines = ["## Mean AUC", ""]
    never = [f"never trained on ({unseen})"] if unseen else []
    lines += _head(["row", "all tasks", *never, *(one.replace("_", " ") for one in families)])
    for row, value in document["mean"].items():
        own = [document["mean_by_family"][family].get(row) for family in families]
        cells = [_interval(document["mean_unseen"].get(row))] if unseen else []
        lines.append(_line([f"`{row}`", _interval(value), *cells, *map(_plain, own)]))
    return lines


def _differences(document: Mapping[str, Any]) -> list[str]:
    unseen = document["differences_unseen"]
    never = ["never trained on"] if unseen else []
    lines = ["## Paired differences of mean AUC", "", *_head(["rows", "all tasks", *never])]
    for name, value in document["differences"].items():
        cells = [_interval(unseen.get(name), "difference")] if unseen else []
        lines.append(_line([name.replace("-", " − "), _interval(value, "difference"), *cells]))
    return lines


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = [row for row in _SHOWN if any(row in task["rows"] for task in tasks)]
    lines = ["## AUC by task", "", *_head(["task", "positives", *rows])]
    for task in tasks:
        name = f"{task['name']}{' †' if task['unseen'] else ''}"
        lines.append(_line([name, str(task["positives"]), *(_plain(task["rows"].get(row)) for row in rows)]))
    return [*lines, "", "† The subject was never trained on."] if any(task["unseen"] for task in tasks) else lines


def _noise(noise: Mapping[str, Any]) -> list[str]:
    lines = ["## Irrelevant events", "", "What they cost in mean AUC.", ""]
    lines += _head(["row", *(f"{float(level):.0%} added" for level in noise)])
    for kind, words in (("drop", ""), ("drop_transferred", ", probe trained on clean histories")):
        for row in ("ours", "minilm_events"):
            cells = [_interval(one[kind].get(row), "difference") for one in noise.values()]
            if any(cells):
                lines.append(_line([f"`{row}`{words}", *cells]))
    return lines


def _few_labels(found: Mapping[str, Any]) -> list[str]:
    lines = ["## Few labels", ""]
    lines.append(
        f"Mean AUC of the linear probe over {found['tasks']} tasks by the number of users of each class it is fitted "
        f"on, tested on all others; intervals over {found['draws']} draws of who is labelled."
    )
    by_count = found["by_labels_of_each_class"]
    rows = list(next(iter(by_count.values()))["mean"])
    lines += ["", *_head(["labels of each class", *(f"`{row}`" for row in rows), "difference"])]
    for count, own in by_count.items():
        means = [f"{own['mean'][row]:.3f}" for row in rows]
        lines.append(_line([count, *means, _interval(own["difference"], "difference")]))
    return lines


def _attributions(found: Mapping[str, Any]) -> list[str]:
    agreement, own = found["agreement"], found.get("own_interest")
    lines = ["## Attributions", ""]
    if agreement["users"]:
        lines.append(
            f"Scores of `explain`, computed quickly (`gates`) and by leaving each text out: rank correlation "
            f"{_interval(agreement, 'mean')} on average, median {agreement['median']:.3f}, above 0.6 for "
            f"{agreement['share_above_0.6']:.0%} of {agreement['users']} users, under {agreement['instructions']} "
            "instructions in turn."
        )
    else:
        lines.append("No user has enough texts to compare quick scores of `explain` with leaving each text out.")
    if own and own["users"]:
        lines += [
            "",
            f"Share of texts that are about the interest the instruction asks about, {own['users']} users:",
            "",
            *_head(["texts", "share", "minus that of all"]),
            *(
                _line([words, _interval(own, name), _interval(own["differences"].get(f"{name}-chance"), "difference")])
                for name, words in (
                    ("focus", f"the {own['texts']} with most of the focus token"),
                    ("gates", f"the {own['texts']} that move the embedding most (`gates`)"),
                    ("chance", "all texts"),
                )
            ),
        ]
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + " --- |" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _interval(value: Mapping[str, float] | None, key: str = "auc") -> str:
    if not value:
        return ""
    sign = "+" if key == "difference" else ""
    return f"{value[key]:{sign}.3f} [{value[f'{key}_low']:{sign}.3f}, {value[f'{key}_high']:{sign}.3f}]"


def _plain(value: Mapping[str, float] | None) -> str:
    return f"{value['auc']:.3f}" if value else ""
