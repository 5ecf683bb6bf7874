"""The rows of our own model: one pass per user over every instruction a suite needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from instructue_feast.errors import DataError
from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.evaluation.tasks import Task
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_prompts import require_model, require_text
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.soft_prompt_file import SoftPrompt, read_soft_prompt

# U = users, T = tasks, K = distinct instructions, E = embedding size, N = texts, D = encoder size

Matrix = npt.NDArray[np.float32]
OnUsers = Callable[[int, int], None]
"""Called with users done and users in all."""


@dataclass(frozen=True, slots=True)
class TaskEmbeddings:
    """Embeddings of U users under the instructions of T tasks.

    Attributes:
        vector_UKE: Under each distinct instruction, as float32 unit vectors.
        right: `[T]` which of them is the task's own.
        paraphrased: `[T]` which is its held-out wording; -1 without one.
        few_shot: `[T]` which is its own with a tuned soft prompt; -1 without one.
        none: Which is the empty instruction; -1 when it was not asked for.
        zero_shot_TU: Cosine to the positive answers minus cosine to the others; NaN for a task without answers.
        few_shot_TU: The same under the task's tuned instruction; NaN without one.
    """

    vector_UKE: Matrix
    right: tuple[int, ...]
    paraphrased: tuple[int, ...]
    few_shot: tuple[int, ...]
    none: int
    zero_shot_TU: Matrix
    few_shot_TU: Matrix

    def scores(self) -> dict[str, Matrix]:
        """Rows `[T, U]` that are scores already, by name; NaN where a task does not have the row."""
        return {"ours_zeroshot": self.zero_shot_TU, "ours_fewshot_cosine": self.few_shot_TU}

    def rows(self, mismatch: Sequence[int]) -> dict[str, list[Matrix | None]]:
        """Features `[U, E]` of every embedding row for each task; `None` where a task does not have the row.

        Args:
            mismatch: For each task, whose instruction it gets in the mismatched row; empty for no such row.
        """
        own = {
            "ours_none": [self.none] * len(self.right),
            "ours_mismatched": [self.right[other] for other in mismatch] or [-1] * len(self.right),
            "ours": list(self.right),
            "ours_paraphrased": list(self.paraphrased),
            "ours_fewshot": list(self.few_shot),
        }
        return {
            name: [None if one < 0 else self.vector_UKE[:, one] for one in members] for name, members in own.items()
        }


def derangement(tasks: Sequence[Task]) -> list[int]:
    """Whose instruction each task gets in the mismatched row: a fixed shift by half, across families where it can.

    No task keeps its own instruction or gets one about its own subject or question family, unless all are alike.

    Returns:
        `[T]` positions; empty for fewer than two tasks.
    """
    size = len(tasks)

    def clashes(shift: int) -> tuple[int, int]:
        pairs = [(tasks[row], tasks[(row + shift) % size]) for row in range(size)]
        alike = sum(one.subject == other.subject or one.instruction == other.instruction for one, other in pairs)
        return alike, sum(one.family == other.family for one, other in pairs)

    if size < 2:
        return []
    best = min(range(1, size), key=lambda shift: (*clashes(shift), abs(shift - size // 2)))
    return [(row + best) % size for row in range(size)]


@dataclass(slots=True)
class TaskEncoder:
    """Embeds users under the instructions of tasks.

    Attributes:
        model: The model, in evaluation mode.
        book: Every text of every history that will be embedded.
        vectors: Encoder vectors of the texts, by encoder name; see `encode_texts`.
        max_batch_tokens: Upper bound on the padded tokens of one forward pass.
    """

    model: InstructUEModel
    book: Phrasebook
    vectors: Mapping[str, Matrix]
    max_batch_tokens: int | None = None
    _table: SoftTokenTable | None = field(default=None, init=False)

    @property
    def table(self) -> SoftTokenTable:
        """Soft tokens of the phrasebook; built on first use."""
        if self._table is None:
            own = {}
            for index, source in enumerate(self.model.config.sources or []):
                encoder = (self.model.config.encoders or {})[source]
                own[source] = self.vectors[encoder][self.book.source_index == index]
            self._table = SoftTokenTable.build(self.model, self.book.text_ids, self.book.source_index, own)
        return self._table

    def embedder(self, soft_prompts: Mapping[str, SoftPrompt] | None = None) -> UserEmbedder:
        """What embeds users whose texts are in the phrasebook.

        Args:
            soft_prompts: Tuned soft prompts by `Instruction.content_hash`.
        """
        return UserEmbedder(self.model, self.table, max_batch_tokens=self.max_batch_tokens, soft_prompts=soft_prompts)

    def embed(
        self,
        history: PackedHistory,
        tasks: Sequence[Task],
        *,
        paraphrased: bool = True,
        none: bool = True,
        soft_prompts: Mapping[str, SoftPrompt] | None = None,
        on_users: OnUsers | None = None,
    ) -> TaskEmbeddings:
        """One pass per user over the instructions of all tasks.

        Args:
            history: U users.
            tasks: T tasks.
            paraphrased: Embed the held-out wordings as well.
            none: Embed the empty instruction as well.
            soft_prompts: Tuned soft prompts by task name.
            on_users: Called after each forward pass.
        """
        wanted: dict[tuple[str, str | None], int] = {}
        prompts = dict(soft_prompts or {})

        def place(text: str, prompt: str | None = None) -> int:
            return wanted.setdefault((text, prompt), len(wanted))

        right = [place(task.instruction) for task in tasks]
        held_out = [place(task.paraphrase) if paraphrased and task.paraphrase else -1 for task in tasks]
        few_shot = [
            place(task.instruction, prompts[task.name].digest) if task.name in prompts else -1 for task in tasks
        ]
        empty = place("") if none else -1
        instructions = [Instruction(f"i{row}", text, soft_prompt=prompt) for row, (text, prompt) in enumerate(wanted)]
        digests = {one.digest: one for one in prompts.values()}
        tuned = {one.content_hash: digests[one.soft_prompt] for one in instructions if one.soft_prompt}
        embedder = self.embedder(tuned)
        done = 0

        def on_batch(users: int, _tokens: int) -> None:
            nonlocal done
            done += users
            if on_users is not None:
                on_users(done, len(history))

        vector_UKE = embedder.encode(history, instructions, on_batch)
        zero_shot_TU, few_shot_TU = (self._cosines(vector_UKE, tasks, own) for own in (right, few_shot))
        return TaskEmbeddings(
            vector_UKE, tuple(right), tuple(held_out), tuple(few_shot), empty, zero_shot_TU, few_shot_TU
        )

    @torch.inference_mode()
    def _cosines(self, vector_UKE: Matrix, tasks: Sequence[Task], own: Sequence[int]) -> Matrix:
        texts = list(dict.fromkeys(answer for task in tasks for answer in task.answers))
        scores = np.full((len(tasks), len(vector_UKE)), np.nan, np.float32)
        if not texts:
            return scores
        answers_AE = self.model.answer_embeddings([self.model.answer_ids(text) for text in texts]).cpu().numpy()
        for row, task in enumerate(tasks):
            if len(task.answers) < 2 or own[row] < 0:
                continue
            cosine_UA = vector_UKE[:, own[row]] @ answers_AE[[texts.index(text) for text in task.answers]].T
            yes = cosine_UA[:, : task.num_positive_answers].mean(1)
            scores[row] = yes - cosine_UA[:, task.num_positive_answers :].mean(1)
        return scores


def encode_texts(model: InstructUEModel, book: Phrasebook) -> dict[str, Matrix]:
    """Encoder vectors `[N, D]` of a phrasebook by encoder name; rows of texts that encoder does not read are zero."""
    encoders = model.config.encoders or {}
    of_source = np.array([model.config.encoder_names.index(encoders[one]) for one in model.config.sources or []])
    vectors = {}
    for index, name in enumerate(model.config.encoder_names):
        encoder = model.text_encoder(name)
        own = np.flatnonzero(of_source[book.source_index] == index)
        # Sources share texts, of which each is encoded once.
        distinct = list(dict.fromkeys(book.texts[row] for row in own))
        place = {text: position for position, text in enumerate(distinct)}
        vectors[name] = np.zeros((len(book.texts), encoder.dim), np.float32)
        vectors[name][own] = encoder.encode(distinct)[[place[book.texts[row]] for row in own]]
    return vectors


def load_soft_prompts(
    folder: Path, tasks: Sequence[Task], model: InstructUEModel, *, required: bool = True
) -> dict[str, SoftPrompt]:
    """Reads `<task>.safetensors` of each task that has one.

    Args:
        folder: Where `instructue tune-instruction` wrote them; need not exist unless `required`.
        tasks: The tasks, in the words they are asked in.
        model: The model they must have been tuned with.
        required: Refuse a folder without any file of these tasks.

    Returns:
        Tuned soft prompts by task name; plain ones where tuning found nothing better than the words.

    Raises:
        DataError: The folder has none for any of the tasks, or a file is damaged or holds something else.
        VersionMismatchError: A soft prompt was tuned with another model, or for other words than the task's.
    """
    prompts = {}
    for task in tasks:
        file = folder / f"{task.name}.safetensors"
        if file.is_file():
            prompt = read_soft_prompt(str(file))
            require_text(prompt, Instruction(task.name, task.instruction), str(file))
            require_model(prompt, model)
            prompts[task.name] = prompt
    if required and not prompts:
        raise DataError(
            f"{folder} has no soft prompt of any of {len(tasks)} tasks",
            "name the files <task>.safetensors; `instructue tune-instruction` writes them",
        )
    return prompts
