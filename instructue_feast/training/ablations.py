"""The variants of an ablation: what each leaves out of model, losses or data, and nothing else.

All of a table's variants train for the same steps, from the same seed, on the same users, questions and wordings in the
same order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError, did_you_mean, listed
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.variants import one_token_per_event, without_source
from instructue_feast.training.run import TrainingData
from instructue_feast.training.settings import TrainingSettings

FULL = "full"
"""The variant that leaves nothing out; every other is compared with it."""

TRANSFORMER_DIM = 192
"""Hidden size of what stands in for the LLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of an ablation table.

    Attributes:
        name: `[a-z0-9_]+`.
        what: What is different, in a few words.
        changes: Settings that differ from those of `full`.
        source: Source that is left out, in training and evaluation.
        one_token_per_event: Whether a repeated event is repeated tokens instead of one with a count.
        beside: A variant it differs from in one thing, where that is not `full`.

    Example:
        >>> variant = Variant(name="no_summary_tokens", what="no summaries", changes={"summary_tokens": False})
        >>> variant.settings(TrainingSettings(steps=5)).summary_tokens
        False
    """

    name: str
    what: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    one_token_per_event: bool = False
    beside: str | None = None

    def settings(self, base: TrainingSettings) -> TrainingSettings:
        """The settings it trains with."""
        return dataclasses.replace(base, **self.changes)

    def history(self, history: PackedHistory, config: InstructueConfig) -> PackedHistory:
        """What it sees of some users; the same for training and for evaluation.

        Args:
            history: U users.
            config: The project.
        """
        if self.source is not None:
            columns = [place for place, one in enumerate(config.numeric_columns) if one[0] == self.source]
            history = without_source(history, config.source_names.index(self.source), columns)
        if self.one_token_per_event:
            events = config.event_sources
            caps = [events[name].max_texts if name in events else 0 for name in config.source_names]
            history = one_token_per_event(history, caps)
        return history

    def data(self, data: TrainingData, config: InstructueConfig) -> TrainingData:
        """What it trains on: the same questions and answers, about users it sees in its own way."""
        held_out = data.held_out
        return dataclasses.replace(
            data,
            train=dataclasses.replace(data.train, history=self.history(data.train.history, config)),
            held_out=held_out and dataclasses.replace(held_out, history=self.history(held_out.history, config)),
            lengths=data.train.history.num_tokens,
        )


def ablations(base: TrainingSettings, config: InstructueConfig) -> tuple[list[Variant], list[Variant]]:
    """All variants of a project.

    Args:
        base: Settings of `full`.
        config: The project; every source is left out once.

    Returns:
        The variants, `full` first; and those that would be the same as `full`, as it lacks what they leave out.
    """
    sources = [
        Variant(name=f"without_{name}", what=f"source `{name}` never logged", source=name)
        for name in config.source_names
        if len(config.source_names) > 1
    ]
    every = [
        *_model_variants(base),
        *_loss_variants(base),
        *sources,
        Variant(
            name="one_token_per_event",
            what="a repeated event is repeated tokens, no counts",
            one_token_per_event=True,
        ),
        Variant(name="shuffled_users", what="control: answers of other users", changes={"shuffle_users": True}),
    ]
    fitting = [one for one in every if _differs(one, base)]
    return [Variant(name=FULL, what="nothing left out"), *fitting], [one for one in every if one not in fitting]


def _differs(variant: Variant, base: TrainingSettings) -> bool:
    return variant.source is not None or variant.one_token_per_event or variant.settings(base) != base


def _model_variants(base: TrainingSettings) -> list[Variant]:
    return [
        Variant(name="no_focus_token", what="instructions get no focus token", changes={"focus_token": False}),
        Variant(
            name="no_llm",
            what=f"a small Transformer of size {TRANSFORMER_DIM}, not pretrained, all trained, for the LLM's layers",
            changes={"transformer_dim": base.transformer_dim or TRANSFORMER_DIM, "lora_r": 0},
        ),
        Variant(
            name="no_summary_tokens",
            what="neither sources nor users get summary tokens",
            changes={"summary_tokens": False},
        ),
        Variant(name="no_centre", what="what all users share stays in the projection", changes={"centre": False}),
    ]


def _loss_variants(base: TrainingSettings) -> list[Variant]:
    mixed: dict[str, Any] = {"negatives": "batch", "false_negative_mask": True}
    alone = {
        "contrastive_weight": 0.0,
        "user_user_weight": 0.0,
        "autoregressive_weight": 1.0,
        "autoregressive_pairs": base.autoregressive_pairs or 2,
    }
    same_question = [
        Variant(
            name="same_question_negatives",
            what="an answer meets the other answers to its question only",
            changes={"negatives": "same_question", "false_negative_margin": None},
        )
    ]
    no_words = [Variant(name="no_autoregressive", what="no next-token loss", changes={"autoregressive_weight": 0.0})]
    return [
        Variant(name="no_contrastive", what="next-token loss only", changes=alone),
        *(no_words if base.contrastive_weight or base.user_user_weight else []),
        Variant(
            name="answers_as_they_are",
            what="answers to one question are not set apart in the loss",
            changes={"answers_apart": False},
        ),
        *(same_question if base.negatives == "batch" else []),
        Variant(name="batch_negatives", what="an answer meets all answers of the pass", changes=mixed),
        Variant(
            name="batch_negatives_no_mask",
            what="the same, equal answers of other questions included",
            changes={"negatives": "batch", "false_negative_mask": False, "false_negative_margin": None},
            beside="batch_negatives",
        ),
    ]


def chosen(variants: Sequence[Variant], names: Sequence[str] | None) -> list[Variant]:
    """The named variants in the order of the table, `full` among them in any case; all of them for `None`.

    Raises:
        ConfigError: There is no such variant for these settings.
    """
    known = [one.name for one in variants]
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown variant {name!r}", did_you_mean(name, known))
    if names is not None and not names:
        raise ConfigError("no variant is named", f"these exist: {listed(known)}")
    return [one for one in variants if names is None or one.name in (FULL, *names)]
