"""Which texts of a history move an embedding, under one instruction.

The score of a text is how far the embedding would go back along a direction if the text were not there:

    score_i = direction . (e - e without text i)

By default the direction points away from the embedding of the same user without any text: a text scores high when it
makes the user differ from a blank one, below zero when it hides the user. With a `target`, such as the vector of an
answer, the direction is that vector: a text scores high when it speaks for the answer.

`leave_one_out` computes this as written, with one pass per text. `gates` and `path` estimate it from gradients: a gate
on each text fades it from focus, summaries and attention (`UserBatch.gate_T`), and the slope at the open gate is the
first order of the difference. Where a model reads only the newest texts of a source, leaving one of them out lets an
older one in, which no gate sees. It is much the same whichever is left out, so it is measured exactly on one text of
the source and added to all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from instructue_feast.errors import ConfigError, DataError, did_you_mean
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.variants import with_tokens
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.model.layout import Ints, token_budget_batches

# U = users, B = users of a batch, T = texts of all its users, L = texts of a user, A = anchors, E = embedding size

Floats = npt.NDArray[np.float32]
Method = Literal["gates", "path", "leave_one_out", "focus"]
METHODS: tuple[str, ...] = get_args(Method)

PATH_GATES = (1.0, 0.75, 0.5, 0.25)
"""Where `path` takes the slope."""


@dataclass(frozen=True, slots=True)
class Attribution:
    """The texts of one user under one instruction, in the order of the packed history.

    Attributes:
        text_ids: `[L]` int64.
        scores: `[L]` float32, see the module; for `focus` the focus weights.
        focus_weights: `[L]` float32 share of each text in the focus token, summing to one.
    """

    text_ids: npt.NDArray[np.int64]
    scores: Floats
    focus_weights: Floats


def explain(
    embedder: UserEmbedder,
    history: PackedHistory,
    instruction: Instruction,
    *,
    method: Method = "gates",
    target: Floats | None = None,
) -> list[Attribution]:
    """Scores every text of every user.

    Args:
        embedder: The embedder that made, or would make, the embeddings.
        history: U users.
        instruction: The instruction.
        method: `gates` (one slope), `path` (mean of several), `leave_one_out` (exact, slow) or `focus` (weights of the
            focus token alone, no direction).
        target: `[E]` unit vector to explain the cosine to; by default the distance from a user without texts.

    Returns:
        U attributions.

    Raises:
        ConfigError: Unknown method, a missing soft prompt, or a prompt longer than the LLM's positions.
        DataError: A text is not in the table, or the target has another size.

    Example:
        >>> (found,) = explain(embedder, history.take([0]), registry["churn"])  # doctest: +SKIP
        >>> found.text_ids[found.scores.argmax()]  # doctest: +SKIP
        4410953312250195372
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}", did_you_mean(method, METHODS))
    if target is not None and target.shape != (embedder.embedding_dim,):
        raise DataError(
            f"a target of shape {list(target.shape)}, embeddings have {embedder.embedding_dim} numbers",
            "take the vector of an answer of the same model",
        )
    weights_T = embedder.focus_weights(history, [instruction])[:, 0]
    if method == "focus":
        scores_T = weights_T
    else:
        directions_UE = _directions(embedder, history, instruction, target)
        if method == "leave_one_out":
            scores_T = _leave_one_out(embedder, history, instruction, directions_UE)
        else:
            gates = PATH_GATES if method == "path" else PATH_GATES[:1]
            slopes = [_slopes(embedder, history, instruction, directions_UE, gate) for gate in gates]
            scores_T = _refilled(
                embedder, history, instruction, directions_UE, np.mean(slopes, axis=0, dtype=np.float32)
            )
    return [
        Attribution(history.text_id[start:end], scores_T[start:end], weights_T[start:end])
        for start, end in zip(history.offsets[:-1], history.offsets[1:], strict=True)
    ]


def without_texts(history: PackedHistory) -> PackedHistory:
    """The same users with their numbers only."""
    return with_tokens(history, np.zeros(len(history.text_id), bool))


def without_each_text(history: PackedHistory, user: int) -> PackedHistory:
    """One user as often as there are texts, each time without one of them."""
    length = int(history.num_tokens[user])
    return without_one(history, np.full(length, user), np.arange(length))


def without_one(history: PackedHistory, users: Ints, places: Ints) -> PackedHistory:
    """Users by position, any of them several times, each without its text at a place."""
    copies = history.take(users)
    keep_T = np.ones(len(copies.text_id), bool)
    keep_T[copies.offsets[:-1] + places] = False
    kept = with_tokens(copies, keep_T)
    return dataclasses.replace(kept, user_ids=[f"{place:09d}" for place in range(len(users))])


def _directions(
    embedder: UserEmbedder, history: PackedHistory, instruction: Instruction, target: Floats | None
) -> Floats:
    """`[U, E]`."""
    if target is not None:
        return np.broadcast_to(target, (len(history), len(target))).astype(np.float32)
    return -embedder.encode(without_texts(history), [instruction])[:, 0]


def _leave_one_out(
    embedder: UserEmbedder, history: PackedHistory, instruction: Instruction, directions_UE: Floats
) -> Floats:
    """`[T]` exact scores."""
    whole_UE = embedder.encode(history, [instruction])[:, 0]
    parts = [np.zeros(0, np.float32)]
    for user, direction_E in enumerate(directions_UE):
        if history.num_tokens[user]:
            left_LE = embedder.encode(without_each_text(history, user), [instruction])[:, 0]
            parts.append((whole_UE[user] - left_LE) @ direction_E)
    return np.concatenate(parts)


def _refilled(
    embedder: UserEmbedder,
    history: PackedHistory,
    instruction: Instruction,
    directions_UE: Floats,
    slopes_T: Floats,
) -> Floats:
    """Adds what an older text does that moves up into the prompt: one exact difference per user and full source."""
    anchors = list(_full_sources(history, embedder.model.config.prompt_texts))
    if not anchors:
        return slopes_T
    users = np.array([user for user, _ in anchors])
    middle = np.array([shown_T[len(shown_T) // 2] for _, shown_T in anchors])
    whole_UE = embedder.encode(history, [instruction])[:, 0]
    left_AE = embedder.encode(without_one(history, users, middle - history.offsets[users]), [instruction])[:, 0]
    exact_A = ((whole_UE[users] - left_AE) * directions_UE[users]).sum(-1)
    scores_T = slopes_T.copy()
    for (_, shown_T), anchor, exact in zip(anchors, middle, exact_A, strict=True):
        scores_T[shown_T] += exact - slopes_T[anchor]
    return scores_T


def _full_sources(history: PackedHistory, limit: int) -> Iterator[tuple[int, Ints]]:
    """Users and the texts that stand in the prompt, of each source that has more of them."""
    for user, (start, end) in enumerate(itertools.pairwise(history.offsets)):
        for source in np.unique(history.source_index[start:end]) if limit else ():
            members = start + np.flatnonzero(history.source_index[start:end] == source)
            if len(members) > limit:
                yield user, members[-limit:]


def _slopes(
    embedder: UserEmbedder, history: PackedHistory, instruction: Instruction, directions_UE: Floats, gate: float
) -> Floats:
    """`[T]` slope of `direction . e` in the gate of each text, where all gates are at `gate`."""
    model = embedder.model
    scores_T = np.zeros(len(history.text_id), np.float32)
    lengths = model.prefix_lengths(history)
    with _frozen(model):
        for users in token_budget_batches(lengths, history.user_ids, embedder.max_batch_tokens):
            part = history.take(users)
            if not len(part.text_id):
                continue
            gate_T = torch.full((len(part.text_id),), gate, device=model.device, requires_grad=True)
            batch, suffix, similarity_T1 = embedder.inputs(part, instruction)
            output = model(dataclasses.replace(batch, gate_T=gate_T), [[suffix]] * len(part), similarity_T1)
            directions_BE = torch.from_numpy(directions_UE[users]).to(model.device)
            # Users do not touch each other, so one backward pass gives the slopes of all.
            (slope_T,) = torch.autograd.grad((output.embeddings[:, 0] * directions_BE).sum(), gate_T)
            places = np.concatenate([np.arange(history.offsets[user], history.offsets[user + 1]) for user in users])
            scores_T[places] = slope_T.cpu().numpy()
    return scores_T


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights: only what depends on a gate is kept for the backward pass."""
    trainable = [one for one in model.parameters() if one.requires_grad]
    for one in trainable:
        one.requires_grad_(False)
    try:
        yield
    finally:
        for one in trainable:
            one.requires_grad_(True)
