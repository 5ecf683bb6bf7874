"""What ablations are measured by: the suite of The Complete Journey, or what training itself measures."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from instructue_feast.cli.ablation_report import SHOWN
from instructue_feast.cli.ablation_rows import TaskScores
from instructue_feast.cli.console import err
from instructue_feast.cli.project import Project
from instructue_feast.datasets.project import render_config
from instructue_feast.errors import ConfigError, DataError, LeakageError

if TYPE_CHECKING:
    from instructue_feast.config import InstructueConfig
    from instructue_feast.evaluation.journey import Journey
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.model.modeling import InstructUEModel
    from instructue_feast.training.ablations import Variant
    from instructue_feast.training.run import TrainingData
    from instructue_feast.training.settings import TrainingSettings

# U = users

EVALUATION_SEED = 0
"""Of folds and draws: the same whatever the seed of the training, so that differences are paired."""


class Suite(StrEnum):
    """What variants are measured by."""

    complete_journey = "complete-journey"
    validation = "validation"


class Judge(Protocol):
    """What measures a trained model."""

    suite: Suite

    def identity(self) -> dict[str, Any]:
        """What its figures depend on, besides the model."""

    def unseen(self) -> list[int]:
        """Tasks whose subject is never trained on."""

    def baseline(self) -> TaskScores:
        """Scores that no variant changes."""

    def scores(self, model: InstructUEModel, variant: Variant) -> TaskScores:
        """Scores of a model."""


class ValidationJudge:
    """Nothing but what training measures by itself, on users, wordings and subjects that it keeps aside.

    Args:
        data: What `full` trains on.
        base: What `full` trains with.
    """

    suite = Suite.validation

    def __init__(self, data: TrainingData, base: TrainingSettings) -> None:
        from instructue_feast.training.validation import split_rows

        if not len(split_rows(data.train, base.validation_fraction)[1]):
            raise ConfigError(
                "no user is held out, so there is nothing to measure variants by", "raise validation_fraction"
            )

    def identity(self) -> dict[str, Any]:
        """See `Judge`."""
        return {}

    def unseen(self) -> list[int]:
        """See `Judge`."""
        return []

    def baseline(self) -> TaskScores:
        """See `Judge`."""
        return []

    def scores(self, model: InstructUEModel, variant: Variant) -> TaskScores:
        """See `Judge`."""
        del model, variant
        return []


class JourneyJudge:
    """The Complete Journey suite, our rows only. Labels, histories and text vectors are the same for all variants.

    Args:
        project: The project; its extract at the cut is made when there is none.
        journey: Its raw tables.
        names: Tasks; all for `None`.
        jobs: Processes for the probes.
    """

    suite = Suite.complete_journey

    def __init__(self, project: Project, journey: Journey, names: tuple[str, ...] | None, jobs: int) -> None:
        from instructue_feast.evaluation.extracts import read_extract, users_in_order
        from instructue_feast.evaluation.journey_tasks import CUT, journey_tasks

        self._config, self._jobs = project.config, jobs
        self._journey = journey
        self._labelled = journey_tasks(self._journey, project.config).select(names)
        history, self._book = read_extract(project.config, project.extract(CUT))
        self._history: PackedHistory = users_in_order(history, self._labelled.user_ids)
        self._vectors: dict[str, Any] = {}

    def identity(self) -> dict[str, Any]:
        """See `Judge`."""
        return {"tasks": [one.name for one in self._labelled.tasks], "users": len(self._labelled.user_ids)}

    def unseen(self) -> list[int]:
        """See `Judge`."""
        return [row for row, task in enumerate(self._labelled.tasks) if task.unseen]

    def baseline(self) -> TaskScores:
        """Trees on hand features."""
        from instructue_feast.evaluation.journey import seconds
        from instructue_feast.evaluation.journey_features import hand_features
        from instructue_feast.evaluation.journey_tasks import CUT
        from instructue_feast.evaluation.scoring import RowInput

        past = self._journey.named(self._labelled.user_ids).between(0, seconds(CUT))
        row = RowInput(method="trees", features=hand_features(past, seconds(CUT)).values)
        return self._score([{"gbdt": row} for _ in self._labelled.tasks])

    def scores(self, model: InstructUEModel, variant: Variant) -> TaskScores:
        """See `Judge`."""
        import numpy as np

        from instructue_feast.evaluation.ours import TaskEncoder, derangement, encode_texts
        from instructue_feast.evaluation.scoring import RowInput

        self._vectors = self._vectors or encode_texts(model, self._book)
        encoder = TaskEncoder(model, self._book, self._vectors, self._config.model.max_batch_tokens)
        tasks = self._labelled.tasks
        found = encoder.embed(variant.history(self._history, self._config), tasks, paraphrased=False)
        inputs: list[dict[str, RowInput]] = [{} for _ in tasks]
        for name, features in found.rows(derangement(tasks)).items():
            for row, own in enumerate(features):
                if own is not None and name in SHOWN:
                    inputs[row][name] = RowInput(method="linear", features=own)
        for row, score_U in enumerate(found.zero_shot_TU):
            if np.isfinite(score_U).all():
                inputs[row]["ours_zeroshot"] = RowInput(method="score", features=score_U[:, None])
        return self._score(inputs)

    def _score(self, inputs: list[Any]) -> TaskScores:
        from instructue_feast.evaluation.scoring import score_tasks

        return score_tasks(inputs, list(self._labelled.labels), seed=EVALUATION_SEED, jobs=self._jobs)


def _of_the_journey(config: InstructueConfig) -> bool:
    """Whether a project names users and times as the template does; its tables need not be there.

    Sources alone do not tell: other projects may well have the paper's six.
    """
    expected = yaml.safe_load(render_config("complete_journey"))["sources"]
    own = config.sources
    return all(
        name in own and (own[name].user_id, own[name].time) == (one["user_id"], one["time"])
        for name, one in expected.items()
    )


def make_judge(
    project: Project,
    suite: Suite | None,
    data: TrainingData,
    base: TrainingSettings,
    tasks: tuple[str, ...] | None,
    jobs: int,
) -> Judge:
    """What variants are measured by.

    Args:
        project: The project.
        suite: What is asked for; `None` for that of The Complete Journey where the project is of it, else validation.
        data: What `full` trains on.
        base: What `full` trains with.
        tasks: Tasks of the suite; all for `None`.
        jobs: Processes for the probes.

    Raises:
        ConfigError: The suite is of another project, a task is unknown, or no user is held out.
        DataError: A raw table of The Complete Journey is damaged.
        LeakageError: The data set knows what the suite asks.
    """
    from instructue_feast.evaluation.journey import read_journey
    from instructue_feast.evaluation.journey_tasks import CUT

    if suite is Suite.validation:
        return ValidationJudge(data, base)
    try:
        journey = read_journey(project.config)
    except (ConfigError, DataError) as error:
        if suite is not None:
            raise
        if _of_the_journey(project.config):  # training for hours against something else would help nobody
            raise type(error)(error.message, f"{error.hint}; or pass --suite {Suite.validation.value}") from None
        err.print(f"Not a project of The Complete Journey ({error.message}): variants are measured by validation.")
        return ValidationJudge(data, base)
    if datetime.fromisoformat(data.train.trained_through) > CUT:
        raise LeakageError(
            f"data set {data.qa_id} knows of events up to {data.train.trained_through}, the suite begins at "
            f"{CUT.isoformat()}",
            f"build one with `instructue qa --cut {CUT:%Y-%m-%d}`",
        )
    return JourneyJudge(project, journey, tasks, jobs)
