"""The joint loss: users meet answers, users meet users, and the LLM says the answer.

Source: InstructUE (arXiv 2510.11016) and Q-Anchor (arXiv 2602.14492). Negatives are the other answers to the same
question: in a mixed batch the instruction alone tells most answers apart, and nothing is learned about the user.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import nn

from instructue_feast.model.modeling import InstructUEModel, ModelOutput
from instructue_feast.training.collate import TrainingBatch
from instructue_feast.training.plan import Ints
from instructue_feast.training.settings import TrainingSettings
from instructue_feast.training.vectors import TextVectors, embed
from instructue_kernels.info_nce import info_nce
from instructue_kernels.info_nce.gather import gather_rows
from instructue_kernels.next_token import next_token_loss

# B = users of this process, G = users of all, K = questions per user, N = B x K pairs, A = answers, E = embedding size,
# X = answer tokens, H = hidden size

MAX_SCALE = 100.0
"""Largest inverse temperature, as in CLIP: beyond it the loss only sharpens noise."""

_CUT_HEAD_SCALE = 0.1


@dataclass(frozen=True, slots=True)
class Losses:
    """What a pass gives. All but `total` are detached.

    Attributes:
        total: Weighted sum, scaled so that the mean over processes is the loss of the whole pass.
        contrastive: User-answer loss, likewise scaled.
        autoregressive: Next-token loss in nats per token, likewise scaled.
        user_user: User-user loss, likewise scaled.
        chance: Contrastive loss of whoever knows the question only.
        accuracy: Weighted share of pairs whose answer is the nearest one to its question.
        pairs: Pairs of this process.
        tokens: Tokens this process ran through the LLM.
    """

    total: torch.Tensor
    contrastive: torch.Tensor
    autoregressive: torch.Tensor
    user_user: torch.Tensor
    chance: float
    accuracy: torch.Tensor
    pairs: int
    tokens: int


_APART = 1e-3
"""Differences between answers shorter than this stay short: they are rounding."""


class Learner(nn.Module):
    """The model with what only training needs: the temperature and the losses.

    Args:
        model: The model; its LLM may carry LoRA.
        vectors: Vectors of all texts and wordings.
        settings: Weights of the losses, negatives, first temperature.
    """

    def __init__(self, model: InstructUEModel, vectors: TextVectors, settings: TrainingSettings) -> None:
        super().__init__()
        self.model = model
        self.log_scale = nn.Parameter(torch.tensor(-math.log(settings.temperature)))
        self.to_head = _to_head(model) if settings.autoregressive_weight else None
        self.vectors = vectors
        self.settings = settings

    @property
    def temperature(self) -> float:
        """Of the contrastive loss, now."""
        return math.exp(-float(self.log_scale.detach()))

    def train(self, mode: bool = True) -> Learner:
        """Training or evaluation mode; without `centre` the model's centres stay as they are in both."""
        super().train(mode)
        if not self.settings.centre:
            self.model.user_centre.eval()
            self.model.answer_centre.eval()
        return self

    def forward(self, batch: TrainingBatch) -> Losses:
        """The losses of one pass."""
        settings = self.settings
        output = embed(self.model, self.vectors, batch.history, batch.suffixes, batch.wording_BK)
        user_NE = output.embeddings.flatten(0, 1)
        zero = user_NE.sum() * 0.0
        contrastive, user_user, autoregressive, accuracy = zero, zero, zero, zero.detach()
        if settings.contrastive_weight:
            answer_AE = self._answers(batch)
            accuracy = _accuracy(user_NE, answer_AE, batch)
            if settings.answers_apart:
                answer_AE = apart(answer_AE, batch.answer_question_A)
            contrastive = self._user_answer(user_NE, answer_AE, batch)
        if settings.user_user_weight:
            user_user = self._user_user(user_NE, batch)
        if settings.autoregressive_weight:
            autoregressive = self._next_token(output, batch)
        total = (
            settings.contrastive_weight * contrastive
            + settings.user_user_weight * user_user
            + settings.autoregressive_weight * autoregressive
        )
        weight_sum = max(float(batch.weight_GK.sum()), 1e-30)
        return Losses(
            total=total,
            contrastive=contrastive.detach(),
            autoregressive=autoregressive.detach(),
            user_user=user_user.detach(),
            chance=float((batch.entropy_GK * batch.weight_GK).sum()) / weight_sum,
            accuracy=accuracy,
            pairs=len(user_NE),
            tokens=output.prompts.num_tokens + _shared_tokens(batch),
        )

    def _scale(self) -> torch.Tensor:
        return self.log_scale.clamp(max=math.log(MAX_SCALE))

    def _vectors(self, vector_NE: torch.Tensor) -> torch.Tensor:
        """What the contrast multiplies: in the LLM's precision, so that with `bf16` a GPU takes the fused kernels."""
        return vector_NE.to(self.model.llm_dtype)

    def _answers(self, batch: TrainingBatch) -> torch.Tensor:
        """`[A, E]` answers of the pass. Each process embeds a share; gradients find their way back to it."""
        world, rank, total = _world(), _rank(), len(batch.answers)
        if world == 1:
            return self.model.answer_embeddings(batch.answers)
        own = batch.answers[rank::world]
        sizes = [len(range(one, total, world)) for one in range(world)]
        # Without answers of its own a process must still take part in the backward of the gathering.
        nothing_AE = (self.log_scale * 0.0).expand(0, self.model.config.embedding_dim)
        if not own:
            self.model.answer_centre(nothing_AE.new_zeros(0, self.model.config.hidden_size))
        own_AE = self.model.answer_embeddings(own) if own else nothing_AE
        order = np.argsort(np.concatenate([np.arange(one, total, world) for one in range(world)]))
        return gather_rows(own_AE, sizes, _group())[torch.from_numpy(order).to(own_AE.device)]

    def _user_answer(self, user_NE: torch.Tensor, answer_AE: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        device = user_NE.device
        positive_N = batch.positive_GK[batch.members].ravel()
        weight_N = batch.weight_GK[batch.members].ravel()
        same = self.settings.negatives == "same_question"
        loss: torch.Tensor = info_nce(
            self._vectors(user_NE),
            self._vectors(answer_AE),
            self._scale(),
            key_ids=_tensor(batch.answer_text_A, device) if self.settings.false_negative_mask else None,
            positives=_tensor(positive_N, device),
            margin=self.settings.false_negative_margin,
            symmetric=False,  # answers are a shared list: an answer has many users
            query_group=_tensor(batch.answer_question_A[positive_N], device) if same else None,
            key_group=_tensor(batch.answer_question_A, device) if same else None,
            weight=_tensor(weight_N, device),
        )
        return loss * _share(float(weight_N.sum()), float(batch.weight_GK.sum()))

    def _user_user(self, user_NE: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Each pair against the pairs of other users with the same question; the next with its answer is positive."""
        device, K = user_NE.device, batch.positive_GK.shape[1]
        answer = batch.positive_GK.ravel()
        friend, known = _friends(answer, batch.weight_GK.ravel() > 0)
        weight = np.where(known, batch.weight_GK.ravel(), 0.0).astype(np.float32)
        own = (batch.members[:, None] * K + np.arange(K)).ravel()
        share = _share(float(weight[own].sum()), float(weight.sum()))
        key_NE = user_NE
        if _world() > 1:
            users = len(batch.weight_GK)
            sizes = [len(range(one, users, _world())) * K for one in range(_world())]
            places = np.concatenate([np.arange(one, users, _world()) for one in range(_world())])
            order = np.argsort((places[:, None] * K + np.arange(K)).ravel())
            key_NE = gather_rows(user_NE, sizes, _group())[torch.from_numpy(order).to(device)]
        if not weight.any():
            return key_NE.sum() * 0.0
        loss: torch.Tensor = info_nce(
            self._vectors(user_NE),
            self._vectors(key_NE),
            self._scale(),
            key_ids=_tensor(answer, device),
            positives=_tensor(friend[own], device),
            symmetric=False,
            query_group=_tensor(batch.answer_question_A[answer[own]], device),
            key_group=_tensor(batch.answer_question_A[answer], device),
            weight=_tensor(weight[own], device),
        )
        return loss * share

    def _next_token(self, output: ModelOutput, batch: TrainingBatch) -> torch.Tensor:
        user_X, place_X, target_X = answer_places(output.prompts.readout_BK, batch.target_BK)
        device = output.hidden.device
        if not len(target_X):
            unused = [] if self.to_head is None else [one.sum() for one in self.to_head.parameters()]
            return (output.hidden.sum() + sum(unused)) * 0.0  # every process must take part in the backward
        hidden_XH = output.hidden[torch.from_numpy(user_X).to(device), torch.from_numpy(place_X).to(device)]
        head: nn.Linear = self.model.llm.get_output_embeddings()  # type: ignore[operator]
        if self.to_head is not None:
            hidden_XH = self.to_head(hidden_XH.float()).to(head.weight.dtype)
        loss: torch.Tensor = next_token_loss(hidden_XH, head.weight, _tensor(target_X, device), bias=head.bias)
        return loss.float() * _share(len(target_X), batch.spoken_tokens)


def apart(answer_AE: torch.Tensor, question_A: Ints) -> torch.Tensor:
    """What sets each answer apart from the others to its question, at unit length.

    Answers to one question read nearly alike: at first their cosines are .99 and more. As they are, no user can go
    towards one and away from another, and as long as no user does, nothing drives the answers apart. Among the
    answers to one question only their differences count, so the loss sees only those. Of two answers, the order of
    users by the difference of their cosines stays what it is; of more, the lengths of the differences are made equal,
    which changes it a little.

    Args:
        answer_AE: `[A, E]` answers.
        question_A: The question each belongs to.

    Returns:
        `[A, E]`; nearly zero for an answer that equals all others to its question.
    """
    _, group_A = np.unique(question_A, return_inverse=True)
    place_A = torch.from_numpy(group_A).to(answer_AE.device)
    count_Q1 = torch.bincount(place_A)[:, None]
    sum_QE = answer_AE.new_zeros(len(count_Q1), answer_AE.shape[1]).index_add(0, place_A, answer_AE)
    rest_AE = answer_AE - (sum_QE / count_Q1)[place_A]
    return rest_AE * torch.rsqrt(rest_AE.pow(2).sum(-1, keepdim=True) + _APART**2)


def _to_head(model: InstructUEModel) -> nn.Linear:
    """A learned map before the vocabulary head; training only.

    For a whole LLM it starts as the identity. The head of a cut LLM reads states of a layer it was not made for: its
    first loss is twice that of knowing nothing, and pulling it down through `<USER>` alone collapses the embeddings
    before they have learned anything. A tenth of the identity starts it near knowing nothing.
    """
    size = model.config.hidden_size
    foreign = model.config.llm_layers or model.config.transformer_dim
    linear = nn.Linear(size, size, device=model.device)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(size) * (_CUT_HEAD_SCALE if foreign else 1.0))
        linear.bias.zero_()
    return linear


def answer_places(readout_BK: Ints, target_BK: list[list[Ints]]) -> tuple[Ints, Ints, Ints]:
    """Where answer tokens are predicted: the first at `<USER>`, each next one at the token before it.

    Returns:
        User, place in the prompt, and token, for each of X answer tokens.
    """
    user_X = [np.full(len(ids), user) for user, own in enumerate(target_BK) for ids in own]
    place_X = [
        readout_BK[user, k] + np.arange(len(ids)) for user, own in enumerate(target_BK) for k, ids in enumerate(own)
    ]
    target_X = [ids for own in target_BK for ids in own]
    if not target_X:
        return (np.zeros(0, np.int64),) * 3
    return np.concatenate(user_X), np.concatenate(place_X).astype(np.int64), np.concatenate(target_X)


@torch.no_grad()
def _accuracy(user_NE: torch.Tensor, answer_AE: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
    positive_N = _tensor(batch.positive_GK[batch.members].ravel(), user_NE.device)
    weight_N = _tensor(batch.weight_GK[batch.members].ravel(), user_NE.device)
    question_A = _tensor(batch.answer_question_A, user_NE.device)
    similarity_NA = user_NE @ answer_AE.T
    own_N1 = similarity_NA.gather(1, positive_N[:, None])
    stranger_NA = question_A[positive_N][:, None] != question_A
    others_NA = similarity_NA.masked_fill(stranger_NA, -torch.inf).scatter(1, positive_N[:, None], -torch.inf)
    right_N = (own_N1 > others_NA).all(1).float()  # a tie is wrong, so collapsed embeddings do not look accurate
    share = _share(float(weight_N.sum()), float(batch.weight_GK.sum()))
    return (right_N * weight_N).sum() / weight_N.sum().clamp(min=1e-30) * share


def _shared_tokens(batch: TrainingBatch) -> int:
    """Tokens that users share: each distinct instruction, and this process's part of the answers."""
    instructions = {one.token_ids.tobytes(): one.num_instruction_tokens for own in batch.suffixes for one in own}
    return sum(instructions.values()) + sum(len(one) + 1 for one in batch.answers[_rank() :: _world()])


def _friends(answer_N: Ints, asked_N: npt.NDArray[np.bool_]) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """For each pair the next one with the same answer, in a circle, and whether there is one."""
    friend = np.arange(len(answer_N))
    for answer in np.unique(answer_N[asked_N]):
        members = np.flatnonzero((answer_N == answer) & asked_N)
        friend[members] = np.roll(members, -1)
    return friend, friend != np.arange(len(answer_N))


def _share(own: float, total: float) -> float:
    """Turns a mean over this process into its part of the mean over all, given that DDP averages gradients."""
    return own * _world() / total if total else 0.0


def _tensor(values: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group
