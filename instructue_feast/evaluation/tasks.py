"""Tasks: a name, an instruction, and who is positive."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instructue_feast.errors import ConfigError, DataError, did_you_mean
from instructue_feast.evaluation.metrics import Labels

# U = users

FAMILIES = ("user_prediction", "marketing", "recommendation")

MIN_POSITIVES = 40
"""Fewer say too little: an AUC of .8 would have an interval of about .15."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A yes/no question about users, in words.

    Attributes:
        name: `[a-z0-9_]+`.
        family: One of `FAMILIES`, or `custom`.
        subject: What it is about, lower case.
        question_id: The UserQA question that asks the same; empty without one.
        instruction: The wording the embedding is made with.
        paraphrase: A held-out wording; empty without one.
        answers: Answer texts, those that mean positive first.
        num_positive_answers: How many of `answers` mean positive.
        unseen: The project asks this question, but its subject is never trained on.
    """

    name: str
    family: str
    subject: str
    instruction: str
    question_id: str = ""
    paraphrase: str = ""
    answers: tuple[str, ...] = ()
    num_positive_answers: int = 1
    unseen: bool = False


@dataclass(frozen=True, slots=True)
class LabelledTasks:
    """Tasks and their labels.

    Attributes:
        tasks: T tasks.
        user_ids: U users, in the order of the labels.
        labels: `[T, U]` 0 or 1.
    """

    tasks: tuple[Task, ...]
    user_ids: tuple[str, ...]
    labels: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.tasks)

    def select(self, names: Sequence[str] | None) -> LabelledTasks:
        """The named tasks, in the order of the suite; all of them for `None`.

        Raises:
            ConfigError: There is no such task.
        """
        known = [task.name for task in self.tasks]
        for name in names or ():
            if name not in known:
                raise ConfigError(f"unknown task {name!r}", did_you_mean(name, known))
        rows = [row for row, name in enumerate(known) if names is None or name in names]
        return LabelledTasks(tuple(self.tasks[row] for row in rows), self.user_ids, self.labels[rows])


def require_learnable(name: str, label_U: Labels, *, least: int = MIN_POSITIVES) -> None:
    """Refuses labels no probe can be trained and judged on.

    Raises:
        DataError: Nobody is labelled, one class only, or too few of one class.
    """
    if not len(label_U):
        raise DataError(f"task {name}: no labelled users", "label the users of the project")
    positives, negatives = int((label_U == 1).sum()), int((label_U == 0).sum())
    if not positives or not negatives:
        raise DataError(
            f"task {name}: all {len(label_U)} labels are {int(label_U[0])}", "a task needs positives and negatives"
        )
    if min(positives, negatives) < least:
        raise DataError(
            f"task {name}: {positives} positives and {negatives} negatives, at least {least} of each are needed",
            "label more users",
        )


def task_name(*words: str) -> str:
    """A task's name from words.

    >>> task_name("buys", "candy - packaged")
    'buys_candy_packaged'
    """
    return re.sub(r"[^a-z0-9]+", "_", " ".join(words).lower()).strip("_")


def labelled(tasks: Mapping[Task, npt.NDArray[np.bool_]], user_ids: Sequence[str]) -> LabelledTasks:
    """Puts tasks and labels together, in the order of the mapping, without tasks that have too few of one class.

    Raises:
        DataError: No task is left.
    """
    kept = {
        task: label_U
        for task, label_U in tasks.items()
        if MIN_POSITIVES <= int(label_U.sum()) <= len(label_U) - MIN_POSITIVES
    }
    if not kept:
        raise DataError(
            f"none of {len(tasks)} tasks has {MIN_POSITIVES} positives and negatives among {len(user_ids)} users",
            "use more users",
        )
    return LabelledTasks(tuple(kept), tuple(user_ids), np.stack([one.astype(np.int8) for one in kept.values()]))
