"""The Complete Journey suite: every row on every task, paraphrases and noise included."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import numpy.typing as npt

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, LeakageError, did_you_mean
from instructue_feast.evaluation.attributions import Attributions, measure_agreement
from instructue_feast.evaluation.extracts import Phrasebook, users_in_order
from instructue_feast.evaluation.few_labels import FewLabels, measure_few_labels
from instructue_feast.evaluation.journey import Journey, seconds
from instructue_feast.evaluation.journey_features import HandFeatures, compressed, hand_features
from instructue_feast.evaluation.journey_tasks import CUT, journey_tasks
from instructue_feast.evaluation.metrics import RowScores
from instructue_feast.evaluation.noise import LEVELS, add_noise, irrelevant_phrasebook
from instructue_feast.evaluation.ours import TaskEmbeddings, TaskEncoder, derangement, encode_texts
from instructue_feast.evaluation.scoring import RowInput, score_tasks
from instructue_feast.evaluation.tasks import LabelledTasks
from instructue_feast.evaluation.text_rows import demographic_texts, journey_profiles, llm_vectors, mean_event_vectors
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.soft_prompt_file import SoftPrompt

# U = users, T = tasks

ROWS = (
    "gbdt", "logreg", "pca128", "minilm_events", "minilm_profile", "llm_last", "llm_mean", "ours_none",
    "ours_mismatched", "ours", "ours_zeroshot", "ours_fewshot", "ours_fewshot_cosine", "ours_gbdt",
    "ours_paraphrased",
)  # fmt: skip
"""All rows, in the order of the report."""

FEW_SHOT = ("ours_fewshot", "ours_fewshot_cosine")
"""Rows that need soft prompts."""

TRANSFERRED = "_transferred"
"""Ends the name of a row whose probe was trained on clean histories and tested on noisy ones."""

Matrix = npt.NDArray[np.float32]
Inputs = list[dict[str, RowInput]]
OnStep = Callable[[str, int, int], None]
"""Called with the name of a step, what is done, and what there is in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteOptions:
    """What to compute.

    Attributes:
        rows: Names out of `ROWS`; all for `None`.
        tasks: Task names; all for `None`.
        noise: Levels of noise; empty for none.
        seed: Seed of folds, draws and noise.
        jobs: Processes for the probes.
        max_batch_tokens: Upper bound on the padded tokens of one forward pass.
        soft_prompts: Tuned soft prompts by task name, for the rows of few shots.
        allow_leakage: Evaluate a model that has seen what comes after the cut.
        explain_users: Users whose attributions are checked against leaving texts out; 0 for none.
    """

    rows: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    noise: tuple[float, ...] = LEVELS
    seed: int = 0
    jobs: int = 1
    max_batch_tokens: int | None = None
    soft_prompts: Mapping[str, SoftPrompt] = field(default_factory=dict)
    allow_leakage: bool = False
    explain_users: int = 100

    def __post_init__(self) -> None:
        if self.explain_users < 0:
            raise ConfigError(f"explain_users is {self.explain_users}", "take 0 for none, or a number of users")
        for name in self.rows or ():
            if name not in ROWS:
                raise ConfigError(f"unknown row {name!r}", did_you_mean(name, ROWS))

    def wants(self, *names: str) -> bool:
        """Whether any of these rows is asked for."""
        return self.rows is None or any(name in self.rows for name in names)

    @property
    def wants_ours(self) -> bool:
        """Whether any row of our model is asked for."""
        return self.wants(*(name for name in ROWS if name.startswith("ours")))

    @property
    def wants_attributions(self) -> bool:
        """Whether attributions are checked: those of our model, of some users."""
        return self.explain_users > 0 and self.wants_ours


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteResult:
    """What a suite measured.

    Attributes:
        labelled: Tasks and labels.
        scores: Rows of each task, by name.
        noise: The same under noise, by level.
        mismatch: Whose instruction each task got in the mismatched row.
        seconds: Wall time by step.
        attributions: How well those agree with leaving texts out; `None` when they were not checked.
        few_labels: `ours` and `ours_fewshot` by number of labels; `None` without soft prompts.
    """

    labelled: LabelledTasks
    scores: list[dict[str, RowScores]]
    noise: dict[float, list[dict[str, RowScores]]]
    mismatch: list[int]
    seconds: dict[str, float]
    attributions: Attributions | None = None
    few_labels: FewLabels | None = None


def check_leakage(model: InstructUEModel, cut: datetime, *, allow: bool = False) -> None:
    """Refuses a model that has seen what it is asked to predict.

    Raises:
        LeakageError: Training went on after the cut.
    """
    through = model.config.trained_through
    if through is not None and not allow and datetime.fromisoformat(through) > cut:
        raise LeakageError(
            f"the model was trained on events up to {through}, later than {cut.isoformat()}",
            "evaluate a model whose training ends before that, or pass --allow-leakage",
        )


def run_journey_suite(
    config: InstructueConfig,
    journey: Journey,
    model: InstructUEModel,
    history: PackedHistory,
    book: Phrasebook,
    options: SuiteOptions,
    on_step: OnStep | None = None,
) -> SuiteResult:
    """Measures every row on every task.

    Args:
        config: The project.
        journey: Its raw tables.
        model: The model.
        history: Packed histories at the cut, of all users.
        book: Their texts.
        options: What to compute.
        on_step: Called as work goes on.

    Raises:
        ConfigError: Unknown task.
        DataError: A household of the suite has no packed history, or no task has enough positives.
        LeakageError: The model has seen what comes after the cut.
    """
    check_leakage(model, CUT, allow=options.allow_leakage)
    clock = Clock(on_step)
    with clock.step("features"):
        labelled = journey_tasks(journey, config).select(options.tasks)
        past = journey.named(labelled.user_ids).between(0, seconds(CUT))
        hand = hand_features(past, seconds(CUT))
        history = users_in_order(history, labelled.user_ids)
    bench = _Bench(config, model, options, clock, labelled, history, book)
    shared = bench.hand_rows(hand) | bench.text_rows(past, hand)
    inputs: Inputs = [dict(shared) for _ in labelled.tasks]
    mismatch = derangement(labelled.tasks)
    clean = bench.our_rows(inputs, mismatch, hand.values)
    with clock.step("probes"):
        scores = bench.score(inputs, "probes")
    levels = options.noise if options.wants("ours", "minilm_events") else ()
    noise = {level: bench.noisy_scores(level, clean, shared.get("minilm_events")) for level in levels}
    return SuiteResult(
        labelled=labelled,
        scores=scores,
        noise=noise,
        mismatch=mismatch,
        attributions=bench.attributions(),
        few_labels=bench.few_labels(inputs),
        seconds=clock.seconds,
    )


class _Bench:
    """Features of all rows of one suite."""

    def __init__(
        self,
        config: InstructueConfig,
        model: InstructUEModel,
        options: SuiteOptions,
        clock: Clock,
        labelled: LabelledTasks,
        history: PackedHistory,
        book: Phrasebook,
    ) -> None:
        self.config, self.model, self.options, self.clock = config, model, options, clock
        self.labelled, self.history = labelled, history
        if options.noise:  # one phrasebook for all passes, so that texts are encoded once
            irrelevant = irrelevant_phrasebook(config)
            book = book.with_texts(irrelevant.text_ids, irrelevant.source_index, irrelevant.texts)
        self.book = book
        self.vectors: dict[str, Matrix] = {}
        if options.wants("minilm_events") or options.wants_ours:
            with clock.step("event texts"):
                self.vectors = encode_texts(model, book)
        self.encoder = TaskEncoder(model, book, self.vectors, options.max_batch_tokens)

    def hand_rows(self, hand: HandFeatures) -> dict[str, RowInput]:
        """Trees and linear models on hand features."""
        logs = compressed(hand.values)
        rows = {
            "gbdt": RowInput(method="trees", features=hand.values),
            "logreg": RowInput(method="linear", features=logs),
            "pca128": RowInput(method="pca", features=np.column_stack([logs, compressed(hand.recency_counts)])),
        }
        return {name: row for name, row in rows.items() if self.options.wants(name)}

    def text_rows(self, past: Journey, hand: HandFeatures) -> dict[str, RowInput]:
        """Rows of frozen text models."""
        rows = {}
        if self.options.wants("minilm_events"):
            rows["minilm_events"] = self.event_row(self.history)
        if not self.options.wants("minilm_profile", "llm_last", "llm_mean"):
            return rows
        profiles = journey_profiles(past, hand, demographic_texts(past))
        if self.options.wants("minilm_profile"):
            with self.clock.step("profiles"):
                encoder = self.model.text_encoder(self.model.config.encoder_names[0])
                rows["minilm_profile"] = RowInput(method="linear", features=encoder.encode(profiles))
        if self.options.wants("llm_last", "llm_mean"):
            with self.clock.step("llm"):
                vectors = llm_vectors(self.model.config.llm, profiles, on_users=self.clock.progress("llm"))
            for name, features in zip(("llm_last", "llm_mean"), vectors, strict=True):
                if self.options.wants(name):
                    rows[name] = RowInput(method="linear", features=features)
        return rows

    def event_row(self, history: PackedHistory) -> RowInput:
        """Mean event vectors, those of several encoders side by side."""
        means = [mean_event_vectors(history, self.book, one) for one in self.vectors.values()]
        return RowInput(method="linear", features=np.column_stack(means))

    def our_rows(self, inputs: Inputs, mismatch: Sequence[int], hand: Matrix) -> TaskEmbeddings | None:
        """Adds the rows of our model to the tasks."""
        if not self.options.wants_ours:
            return None
        with self.clock.step("ours"):
            found = self.encoder.embed(
                self.history,
                self.labelled.tasks,
                paraphrased=self.options.wants("ours_paraphrased"),
                none=self.options.wants("ours_none"),
                soft_prompts=self.options.soft_prompts if self.options.wants(*FEW_SHOT) else None,
                on_users=self.clock.progress("ours"),
            )
        for name, features in found.rows(mismatch).items():
            for row, own in enumerate(features):
                if own is not None and self.options.wants(name):
                    inputs[row][name] = RowInput(method="linear", features=own)
        for name, score_TU in found.scores().items():
            for row, score_U in enumerate(score_TU):
                if self.options.wants(name) and np.isfinite(score_U).all():
                    inputs[row][name] = RowInput(method="score", features=score_U[:, None])
        for row, index in enumerate(found.right):
            if self.options.wants("ours_gbdt"):
                inputs[row]["ours_gbdt"] = RowInput(
                    method="stacked", features=hand, embedding=found.vector_UKE[:, index]
                )
        return found

    def noisy_scores(
        self, level: float, clean: TaskEmbeddings | None, clean_events: RowInput | None
    ) -> list[dict[str, RowScores]]:
        """`ours` and `minilm_events` on noisy histories, with probes trained there and with probes trained on clean."""
        step = f"noise {level:.0%}"
        history, _ = add_noise(self.history, self.config, level, seed=self.options.seed)
        inputs: Inputs = [{} for _ in self.labelled.tasks]
        with self.clock.step(step):
            if clean is not None and self.options.wants("ours"):
                noisy = self.encoder.embed(
                    history, self.labelled.tasks, paraphrased=False, none=False, on_users=self.clock.progress(step)
                )
                for row, (before, after) in enumerate(zip(clean.right, noisy.right, strict=True)):
                    _add_noisy(
                        inputs[row],
                        "ours",
                        clean.vector_UKE[:, before],
                        np.ascontiguousarray(noisy.vector_UKE[:, after]),
                    )
            if clean_events is not None:
                events = self.event_row(history).features
                for own in inputs:
                    _add_noisy(own, "minilm_events", clean_events.features, events)
            return self.score(inputs, step)

    def attributions(self) -> Attributions | None:
        """Attributions under the instructions of the tasks, checked against leaving texts out."""
        if not self.options.wants_attributions:
            return None
        with self.clock.step("attributions"):
            found = measure_agreement(
                self.encoder.embedder(),
                self.history,
                [task.instruction for task in self.labelled.tasks],
                users=self.options.explain_users,
                seed=self.options.seed,
                on_users=self.clock.progress("attributions"),
            )
        return Attributions(found)

    def few_labels(self, inputs: Inputs) -> FewLabels | None:
        """Embeddings under the words and under the tuned instruction, for probes with few labels."""
        both = ("ours", "ours_fewshot")
        own = [row for row, rows in enumerate(inputs) if all(name in rows for name in both)]
        if not own:
            return None
        with self.clock.step("few labels"):
            return measure_few_labels(
                [self.labelled.tasks[row].name for row in own],
                [{name: inputs[row][name].features for name in both} for row in own],
                [self.labelled.labels[row] for row in own],
                seed=self.options.seed,
                jobs=self.options.jobs,
                on_task=self.clock.progress("few labels"),
            )

    def score(self, inputs: Inputs, step: str) -> list[dict[str, RowScores]]:
        """Scores of every row."""
        return score_tasks(
            inputs,
            list(self.labelled.labels),
            seed=self.options.seed,
            jobs=self.options.jobs,
            on_task=self.clock.progress(step),
        )


def _add_noisy(rows: dict[str, RowInput], name: str, clean: Matrix, noisy: Matrix) -> None:
    rows[name] = RowInput(method="linear", features=noisy)
    rows[name + TRANSFERRED] = RowInput(method="linear", features=clean, test=noisy)


class Clock:
    """Times steps and passes progress on.

    Attributes:
        seconds: Wall time by step.
    """

    def __init__(self, on_step: OnStep | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_step = on_step

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times a step; a name that comes again adds up."""
        started = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 2)

    def progress(self, name: str) -> Callable[[int, int], None]:
        """A callback for what is done of a step."""

        def report(done: int, total: int) -> None:
            if self._on_step is not None:
                self._on_step(name, done, total)

        return report
