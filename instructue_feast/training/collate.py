"""From a plan to what one process feeds the model: histories, suffixes, answers, and who must not meet whom."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.prompt import Suffix
from instructue_feast.training.plan import Ints, Sampler
from instructue_feast.training.vectors import TextVectors
from instructue_feast.user_qa.dataset import UserQA

# B = users of this process, G = users of all processes, K = questions per user, A = answers of the pass,
# X = answer tokens to predict


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """What one process feeds the model.

    Attributes:
        index: Number of the pass.
        history: B histories.
        suffixes: K suffixes of each; those with the next-token loss carry their answer, without its end.
        wording_BK: Wording of each, for the focus.
        answers: LLM tokens of the A answers that the asked questions can have; the same on every process.
        answer_id_A: Their ids, ascending.
        answer_question_A: The question each belongs to.
        answer_text_A: Equal for answers of equal text.
        members: Places of the B users among the G.
        positive_GK: Place in A of each pair's answer.
        weight_GK: Weight in the contrastive loss; 0 for a pair that fills a gap.
        entropy_GK: Loss of whoever knows the question only.
        target_BK: Tokens each spoken pair must predict, from `<USER>` on; empty for the others.
        spoken_tokens: X over all processes.
    """

    index: int
    history: PackedHistory
    suffixes: list[list[Suffix]]
    wording_BK: Ints
    answers: list[Ints]
    answer_id_A: Ints
    answer_question_A: Ints
    answer_text_A: Ints
    members: Ints
    positive_GK: Ints
    weight_GK: npt.NDArray[np.float32]
    entropy_GK: npt.NDArray[np.float64]
    target_BK: list[list[Ints]]
    spoken_tokens: int


class Passes(Dataset[TrainingBatch]):
    """Every pass of a run, as this process sees it.

    Args:
        model: Gives tokens.
        data: The data set.
        sampler: Plans the passes.
        length: Number of passes.
        rank: This process; it takes every `world`-th user.
        world: Number of processes.
        vectors: Vectors of the sampler's wordings, if they are at hand.
    """

    def __init__(
        self,
        model: InstructUEModel,
        data: UserQA,
        sampler: Sampler,
        length: int,
        *,
        rank: int = 0,
        world: int = 1,
        vectors: TextVectors | None = None,
    ) -> None:
        self._data, self._sampler, self._length = data, sampler, length
        self._rank, self._world = rank, world
        known = model.instruction_vectors(sampler.wordings) if vectors is None else vectors.wordings
        self._suffixes = [
            model.suffix(text, vectors=tuple(one[row] for one in known)) for row, text in enumerate(sampler.wordings)
        ]
        self._tokens = [model.answer_ids(text) for text in data.answers]
        texts = {text: index for index, text in enumerate(dict.fromkeys(data.answers))}
        self._text_of_answer = np.array([texts[one] for one in data.answers], np.int64)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> TrainingBatch:
        if not 0 <= index < self._length:
            raise IndexError(index)
        data, plan = self._data, self._sampler.plan(index)
        question_GK = data.question_P[plan.pair_BK].astype(np.int64)
        answer_GK = data.answer_P[plan.pair_BK].astype(np.int64)
        asked = np.unique(question_GK)
        closed = [(answer, int(question)) for question in asked for answer in data.questions[question].answers]
        closed.sort()
        answer_id_A = np.array([answer for answer, _ in closed], np.int64)
        members = np.arange(self._rank, len(plan.row_B), self._world)
        suffixes, targets = [], []
        for user in members:
            own = [
                self._tokens[answer] if speaks else _NOTHING
                for answer, speaks in zip(answer_GK[user], plan.spoken_BK[user], strict=True)
            ]
            targets.append(own)
            suffixes.append(
                [self._suffix(int(word), ids) for word, ids in zip(plan.wording_BK[user], own, strict=True)]
            )
        return TrainingBatch(
            index=index,
            history=self._sampler.shown(plan).take(members),
            suffixes=suffixes,
            wording_BK=plan.wording_BK[members],
            answers=[self._tokens[answer] for answer in answer_id_A],
            answer_id_A=answer_id_A,
            answer_question_A=np.array([question for _, question in closed], np.int64),
            answer_text_A=self._text_of_answer[answer_id_A],
            members=members,
            positive_GK=np.searchsorted(answer_id_A, answer_GK),
            weight_GK=plan.weight_BK,
            entropy_GK=self._sampler.chance_Q[question_GK],
            target_BK=targets,
            spoken_tokens=sum(len(self._tokens[answer]) for answer in answer_GK[plan.spoken_BK]),
        )

    def _suffix(self, wording: int, answer: Ints) -> Suffix:
        # The last token is predicted but never read, so it costs no place in the prompt.
        plain = self._suffixes[wording]
        return dataclasses.replace(plain, answer_ids=answer[:-1]) if len(answer) > 1 else plain


_NOTHING: Ints = np.zeros(0, np.int64)
