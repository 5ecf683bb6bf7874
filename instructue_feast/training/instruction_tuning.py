"""Few-shot tuning of an instruction: soft tokens behind its words and a shift of their vector, everything else frozen.

Labels of some users pull the embedding toward what the words alone do not say: the soft tokens change how the LLM reads
a user, the shift changes which texts and numbers of the user the focus finds. Nothing else moves, so a tuned
instruction is some kilobytes, and costs a backfill nothing: instructions are read once for all users.

Source: Q-Anchor (arXiv 2602.14492) tunes 6 soft-prompt tokens by a prototype-contrastive loss; the loss here is that of
a linear probe on shots it was not fitted on, see `probe_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.inference.soft_prompts import model_digest
from instructue_feast.instructions import Instruction
from instructue_feast.model.layout import Ints
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.soft_prompt_file import SoftPrompt
from instructue_feast.training.user_prefixes import InstructionReader, UserPrefixes

# N = shots, B = shots of a step, P = tokens, H = hidden size, D = sizes of all text encoders together,
# E = embedding size

Labels = npt.NDArray[np.int8]
OnStep = Callable[[int, int], None]
"""Called with steps done and steps in all."""

LEAST_SHOTS = 8
"""Of each class; with fewer, nothing could be kept aside to tell learning from memorising."""

_RIDGE = 3.0
"""Penalty of the probe in `probe_loss`, beside coordinates of size one."""

_EMBED_USERS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningSettings:
    """How an instruction is tuned.

    Attributes:
        steps: Most steps.
        tokens: P.
        shots_per_step: Most shots of a step, half of each class.
        learning_rate: Step size of Adam, in units of the size of a word's embedding, and of an instruction's vector.
        validation_share: Share of the shots that is kept aside to choose the step.
        eval_steps: Steps between two looks at them.
        patience: Stop after so many looks without a gain.
        least_gain: Gain in AUC below which the words stay as they are: a smaller one is noise among so few shots.
        seed: Of the draw of shots and of the order of steps.
    """

    steps: int = 24
    tokens: int = 6
    shots_per_step: int = 96
    learning_rate: float = 0.05
    validation_share: float = 0.25
    eval_steps: int = 12
    patience: int = 3
    least_gain: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "eval_steps", "patience", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}", "take a number above zero")
        if self.shots_per_step < 4 or self.shots_per_step % 2:
            raise ConfigError(f"shots_per_step is {self.shots_per_step}", "take an even number from 4")
        if not 0 <= self.least_gain < 1:
            raise ConfigError(f"least_gain is {self.least_gain}", "take a number from 0, such as 0.01")
        if not 0 < self.validation_share < 1:
            raise ConfigError(f"validation_share is {self.validation_share}", "take a number between 0 and 1")


@dataclass(frozen=True, slots=True)
class Shots:
    """N labelled users.

    Attributes:
        users: `[N]` positions among the users of `UserPrefixes`.
        labels: `[N]` 0 or 1.
        held: `[N]` whether a shot is kept aside.
    """

    users: Ints
    labels: Labels
    held: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.users)


def draw_shots(
    user_ids: Sequence[str], labels: Labels, shots: int, *, settings: TuningSettings, name: str, fewer: bool = False
) -> Shots:
    """Draws `shots` users of each class; the same users come first whatever the task, so that tasks share prefixes.

    Args:
        user_ids: Labelled users.
        labels: 0 or 1 of each.
        shots: Users of each class.
        settings: Seed and share kept aside.
        name: What to call the task in an error.
        fewer: Take what there is of a class that has fewer, but never fewer than `LEAST_SHOTS`.

    Raises:
        DataError: One class only, or too few of one.
        ConfigError: Fewer than `LEAST_SHOTS` are asked for.
    """
    if shots < LEAST_SHOTS:
        raise ConfigError(f"{shots} shots of each class", f"take at least {LEAST_SHOTS}")
    counts = [int((labels == one).sum()) for one in (0, 1)]
    if not all(counts):
        raise DataError(f"{name}: all {len(labels)} labels are {int(counts[0] == 0)}", "label users of both classes")
    least = LEAST_SHOTS if fewer else shots
    if min(counts) < least:
        raise DataError(
            f"{name}: {counts[1]} positive and {counts[0]} negative labels, {least} of each are needed",
            "label more users, or lower --shots",
        )
    draw = np.array([xxhash.xxh64_intdigest(f"{settings.seed}/{one}".encode()) for one in user_ids], np.uint64)
    order = np.argsort(draw, kind="stable")
    users, held = [], []
    for one in (0, 1):
        own = order[labels[order] == one][:shots]
        kept = max(2, round(len(own) * settings.validation_share))
        users.append(own)
        held.append(np.arange(len(own)) >= len(own) - kept)
    chosen = np.concatenate(users)
    return Shots(chosen, labels[chosen].astype(np.int8), np.concatenate(held))


def initial_soft_prompt(model: InstructUEModel, token_ids: Ints, tokens: int) -> torch.Tensor:
    """`[P, H]` float32 embeddings of the instruction's last words, repeated where it is shorter.

    Tokens of the user marker where it has no words at all.
    """
    if not len(token_ids):
        return model.prompt.user.detach().float().expand(tokens, -1).clone()
    ids = np.resize(token_ids[-tokens:], tokens)
    embed = model.llm.get_input_embeddings()  # type: ignore[operator]
    words: torch.Tensor = embed(torch.from_numpy(ids).to(model.device)).detach().float().clone()
    return words


def ranking_loss(score_B: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """Mean over pairs of a positive and a negative of `softplus(-(difference of their scores))`: a smooth 1 - AUC.

    Scores count in units of their spread, so their size teaches nothing.

    Args:
        score_B: Scores.
        label_B: int64 0 or 1; at least one of each.
    """
    spread = score_B.detach().std().clamp(min=1e-6)
    ahead = score_B[label_B == 1][:, None] - score_B[label_B == 0][None]
    return F.softplus(-ahead / spread).mean()


def probe_loss(embedding_BE: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    """How badly a linear probe that is fitted on one half of the shots ranks the other half, both ways.

    The probe is ridge regression: its solution has a closed form, so the gradient goes through the fit. Embeddings are
    used by a probe on users it has not seen; a loss on cosines among the shots improves what a probe makes up for.

    Args:
        embedding_BE: Unit vectors.
        label_B: int64 0 or 1; at least two of each.
    """
    half_B = torch.zeros_like(label_B, dtype=torch.bool)
    for one in (0, 1):
        half_B[torch.nonzero(label_B == one)[::2, 0]] = True  # every other shot of either class
    halves = [ranking_loss(_probe(embedding_BE, label_B, own), label_B[~own]) for own in (half_B, ~half_B)]
    return torch.stack(halves).mean()


def _probe(embedding_BE: torch.Tensor, label_B: torch.Tensor, fitted_B: torch.Tensor) -> torch.Tensor:
    """Scores of the shots that are not fitted."""
    size = embedding_BE.shape[1]
    x_BE = embedding_BE * math.sqrt(size)
    x_BE = x_BE - x_BE[fitted_B].mean(0)
    x_FE, sign_F = x_BE[fitted_B], label_B[fitted_B].to(x_BE.dtype) * 2 - 1
    gram_EE = x_FE.T @ x_FE / len(x_FE) + _RIDGE * torch.eye(size, dtype=x_BE.dtype, device=x_BE.device)
    weight_E: torch.Tensor = torch.linalg.solve(gram_EE, x_FE.T @ (sign_F - sign_F.mean()) / len(x_FE))
    return x_BE[~fitted_B] @ weight_E


def answer_scores(embedding_BE: torch.Tensor, answer_AE: torch.Tensor, positive_A: torch.Tensor) -> torch.Tensor:
    """`[B]` mean cosine to the answers that mean 1, minus that to the others: a score that needs no probe."""
    cosine_BA = embedding_BE @ answer_AE.T
    return cosine_BA[:, positive_A].mean(1) - cosine_BA[:, ~positive_A].mean(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning gave.

    Attributes:
        prompt: What was learned; plain when the words alone were best.
        step: Step it was taken from.
        auc_untuned: AUC of the shots kept aside under the words alone: of a linear probe on the other shots; where the
            answers are known, the mean of that and of the AUC of the cosine to them.
        auc_start: The same at step 0.
        auc: The same at the end; never below `auc_untuned`.
        history: `(step, training loss, AUC)` of each look.
    """

    prompt: SoftPrompt
    step: int
    auc_untuned: float
    auc_start: float
    auc: float
    history: tuple[tuple[int, float, float], ...]


def untuned_prompt(instruction: Instruction, model: InstructUEModel) -> SoftPrompt:
    """A soft prompt without rows or shift, for an instruction there are no labels for: it changes nothing."""
    return SoftPrompt(
        vectors=np.zeros((0, model.config.hidden_size), np.float32),
        shift=np.zeros(_shift_size(model), np.float32),
        instruction_id=instruction.id,
        text=instruction.text,
        model_digest=model_digest(model),
        labels={"shots": 0, "positive": 0, "held": 0},
        metrics={},
    )


def _shift_size(model: InstructUEModel) -> int:
    """D."""
    dims = model.config.encoder_dims or {}
    return sum(dims[name] for name in model.config.encoder_names)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningJob:
    """One instruction to tune.

    Attributes:
        instruction: The instruction; a soft prompt it has is ignored.
        shots: Who is positive.
        answers: Texts of its answers, those that mean 1 first; none for the probe alone.
        num_positive: How many answers mean 1.
    """

    instruction: Instruction
    shots: Shots
    answers: tuple[str, ...] = ()
    num_positive: int = 1


def shared_users(jobs: Sequence[TuningJob]) -> tuple[Ints, list[TuningJob]]:
    """The users any job needs, each once, and the jobs with positions among those."""
    users = np.unique(np.concatenate([one.shots.users for one in jobs]))
    moved = [replace(one, shots=replace(one.shots, users=np.searchsorted(users, one.shots.users))) for one in jobs]
    return users, moved


class InstructionTuner:
    """Tunes instructions on shots among some users, whose prefixes are read once for all of them.

    Args:
        prefixes: The users.
        settings: How.

    Example:
        >>> tuner = InstructionTuner(UserPrefixes(model, table, history), TuningSettings())  # doctest: +SKIP
        >>> job = TuningJob(instruction=Instruction("vip", "Is this a big spender?"), shots=shots)  # doctest: +SKIP
        >>> tuner.tune(job).auc  # doctest: +SKIP
        0.81
    """

    def __init__(self, prefixes: UserPrefixes, settings: TuningSettings) -> None:
        self.prefixes = prefixes
        self.settings = settings
        self._digest = model_digest(prefixes.model)

    def tune(self, job: TuningJob, on_step: OnStep | None = None) -> Tuned:
        """Learns the soft prompt of one instruction.

        Args:
            job: The instruction and its shots.
            on_step: Called after each step.
        """
        settings, model, shots = self.settings, self.prefixes.model, job.shots
        suffix = model.suffix(job.instruction.text)
        plain = InstructionReader(self.prefixes, suffix, 0)
        reader = InstructionReader(self.prefixes, suffix, settings.tokens)
        start_PH = initial_soft_prompt(model, suffix.token_ids, settings.tokens)
        still_D = torch.zeros(_shift_size(model), device=model.device)
        answer_AE = self._answers(job.answers)
        positive_A = torch.arange(len(job.answers), device=model.device) < job.num_positive

        def loss_of(embedding_BE: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
            loss = probe_loss(embedding_BE, label_B)
            if answer_AE is not None:
                loss = loss + ranking_loss(answer_scores(embedding_BE, answer_AE, positive_A), label_B)
            return loss

        def auc_of(
            reader: InstructionReader, soft_PH: torch.Tensor | None, shift_D: torch.Tensor | None = None
        ) -> float:
            embedding_NE = self._embed(reader, soft_PH, shift_D, shots)
            by_probe = _probe_auc(embedding_NE, shots)
            if answer_AE is None:
                return by_probe
            held = torch.from_numpy(shots.held)
            score_H = answer_scores(embedding_NE[held], answer_AE, positive_A)
            return (by_probe + float(roc_auc_score(shots.labels[shots.held], score_H.cpu().numpy()))) / 2

        untuned = auc_of(plain, None)
        start = auc_of(reader, start_PH)
        best, best_PH, best_D, best_step = untuned, start_PH[:0], still_D, 0
        if start > best:
            best, best_PH = start, start_PH
        history = [(0, math.nan, start)]
        scale = float(start_PH.pow(2).mean().sqrt())
        unit_PH, unit_D = torch.nn.Parameter(start_PH / scale), torch.nn.Parameter(still_D.clone())
        size = 1 / math.sqrt(len(still_D) / len(suffix.vectors))  # encoder vectors have length one
        learned = [unit_PH, unit_D]
        optimizer = torch.optim.Adam(learned, lr=settings.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / settings.steps)
        batches = _Batches(shots, settings)
        since, running = 0, 0.0
        for step in range(1, settings.steps + 1):
            members = batches.next()
            embedding_BE = reader.embed(shots.users[members], unit_PH * scale, unit_D * size)
            loss = loss_of(embedding_BE, torch.from_numpy(shots.labels[members]).long().to(model.device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
            schedule.step()
            running += float(loss.detach())
            if on_step is not None:
                on_step(step, settings.steps)
            if step % settings.eval_steps and step != settings.steps:
                continue
            now_PH, now_D = unit_PH.detach() * scale, unit_D.detach() * size
            auc = auc_of(reader, now_PH, now_D)
            history.append((step, running / settings.eval_steps, auc))
            running, since = 0.0, since + 1
            if auc > best:
                best, best_PH, best_D, best_step, since = auc, now_PH, now_D, step, 0
            if since == settings.patience:
                break
        if best - untuned < settings.least_gain:
            best, best_PH, best_D, best_step = untuned, start_PH[:0], still_D, 0
        prompt = SoftPrompt(
            vectors=best_PH.cpu().numpy().astype(np.float32),
            shift=best_D.cpu().numpy().astype(np.float32),
            instruction_id=job.instruction.id,
            text=job.instruction.text,
            model_digest=self._digest,
            labels={"shots": len(shots), "positive": int(shots.labels.sum()), "held": int(shots.held.sum())},
            metrics={"auc_untuned": untuned, "auc": best, "step": float(best_step)},
        )
        return Tuned(
            prompt=prompt, step=best_step, auc_untuned=untuned, auc_start=start, auc=best, history=tuple(history)
        )

    @torch.no_grad()
    def _answers(self, answers: Sequence[str]) -> torch.Tensor | None:
        model = self.prefixes.model
        return model.answer_embeddings([model.answer_ids(text) for text in answers]) if answers else None

    @torch.no_grad()
    def _embed(
        self, reader: InstructionReader, soft_PH: torch.Tensor | None, shift_D: torch.Tensor | None, shots: Shots
    ) -> torch.Tensor:
        """`[N, E]`."""
        parts = [
            reader.embed(shots.users[first : first + _EMBED_USERS], soft_PH, shift_D)
            for first in range(0, len(shots), _EMBED_USERS)
        ]
        return torch.cat(parts)


def _probe_auc(embedding_NE: torch.Tensor, shots: Shots) -> float:
    """AUC of the shots kept aside, by a linear probe on the others."""
    vector_NE = embedding_NE.cpu().numpy() * math.sqrt(embedding_NE.shape[1])
    probe = LogisticRegression(C=_PROBE_C, max_iter=500).fit(vector_NE[~shots.held], shots.labels[~shots.held])
    return float(roc_auc_score(shots.labels[shots.held], probe.decision_function(vector_NE[shots.held])))


_PROBE_C = 0.1


class _Batches:
    """Balanced batches without end: each class is shuffled and gone through again and again."""

    def __init__(self, shots: Shots, settings: TuningSettings) -> None:
        self._rng = np.random.default_rng(settings.seed)
        self._members = [np.flatnonzero(~shots.held & (shots.labels == one)) for one in (0, 1)]
        self._half = min(settings.shots_per_step // 2, *(len(one) for one in self._members))
        self._queues: list[Ints] = [np.zeros(0, np.int64), np.zeros(0, np.int64)]

    def next(self) -> Ints:
        """Positions of one batch."""
        parts = []
        for one, members in enumerate(self._members):
            if len(self._queues[one]) < self._half:
                self._queues[one] = self._rng.permutation(members)
            parts.append(self._queues[one][: self._half])
            self._queues[one] = self._queues[one][self._half :]
        return np.concatenate(parts)
