"""How the project asks: wordings and answers of the UserQA question a task corresponds to."""

from __future__ import annotations

import dataclasses
from typing import Literal

from instructue_feast.config import InstructueConfig
from instructue_feast.evaluation.tasks import Task
from instructue_feast.question_specs import OccursSpec
from instructue_feast.user_qa.questions import draft_question

Positive = Literal["first", "last"]
"""Which answer of a closed set means positive: yes stands first, the highest level last."""


def in_words_of(
    task: Task, config: InstructueConfig | None, positive: Positive = "first", days: int | None = None
) -> Task:
    """The task in the wording of the project's `user_qa:` section; as it is where that asks no such question.

    Args:
        task: A task whose `question_id` is `family` or `family:subject`.
        config: The project.
        positive: Which answer means positive.
        days: Window of the task; its wording names this one, whatever the window of the question.

    Returns:
        The task with instruction, held-out wording and answers as the question has them. It is `unseen` if its subject
        is held out; a family without a subject that is held out has near twins which are trained.
    """
    family, _, subject = task.question_id.partition(":")
    specs = config.user_qa.questions if config is not None and config.user_qa is not None else ()
    for spec in specs:
        if spec.id != family or (isinstance(spec, OccursSpec) and spec.subject is not None) != bool(subject):
            continue
        draft = draft_question(dataclasses.replace(spec, days=days or spec.days), subject=subject or None)
        if len(draft.answers) < 2:
            continue
        answers = draft.answers if positive == "first" else draft.answers[::-1]
        return dataclasses.replace(
            task,
            instruction=draft.wordings[0],
            paraphrase=draft.held_out_wordings[0] if draft.held_out_wordings else task.paraphrase,
            answers=answers,
            unseen=bool(subject) and draft.held_out,
        )
    return task
