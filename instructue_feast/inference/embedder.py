"""`UserEmbedder.encode`: the one function that makes user embeddings, in batch jobs and online."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from instructue_feast.errors import ConfigError, DataError, InvalidEmbeddingError, VersionMismatchError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.inference.transfer import IN_FLIGHT, Answer, ask, in_turn, to_device
from instructue_feast.instructions import Instruction
from instructue_feast.model.instruction_states import InstructionStates
from instructue_feast.model.layout import token_budget_batches
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.prompt import Suffix, UserBatch
from instructue_feast.soft_prompt_file import SoftPrompt

# U = users, T = texts of all users, N = texts of the table, F = focus size, H = hidden size, K = instructions

OnBatch = Callable[[int, int], None]
"""Called after each forward pass with the number of users and of real tokens in it."""

CPU_BATCH_BYTES = 4_096
"""Tokens of a CPU's batches times bytes of the compute type. What a layer holds should stay in the cache, and its
weights should serve many tokens; measured in `docs/throughput.md`."""

GPU_BATCH_TOKENS = 32_768
"""Enough to fill an accelerator; not tuned."""

_CHUNK = 65_536
_KEPT = 8
"""Sets of instructions whose similarities are kept."""


@dataclass(frozen=True, slots=True)
class _Prepared:
    suffixes: tuple[Suffix, ...]
    similarity_NK: torch.Tensor
    states: InstructionStates


class UserEmbedder:
    """Makes user embeddings from packed histories.

    Args:
        model: The model; put into evaluation mode.
        table: Soft tokens of the texts, built with this model.
        max_batch_tokens: Upper bound on the padded tokens of one forward pass; a longer user goes alone. `None` takes
            what suits the device.
        soft_prompts: Tuned soft prompts by `Instruction.content_hash`.

    Raises:
        VersionMismatchError: The table was built with another model.

    Example:
        >>> embedder = UserEmbedder(model, table)  # doctest: +SKIP
        >>> embedder.encode(history, registry.select(["churn", "taste"])).shape  # doctest: +SKIP
        (1000, 2, 128)
    """

    def __init__(
        self,
        model: InstructUEModel,
        table: SoftTokenTable,
        *,
        max_batch_tokens: int | None = None,
        soft_prompts: Mapping[str, SoftPrompt] | None = None,
    ) -> None:
        if table.model_digest != model.weights_digest():
            raise VersionMismatchError(
                f"the soft-token table was built with model {table.model_digest[:12]}, this is "
                f"{model.weights_digest()[:12]}",
                "build the table again with this model",
            )
        self.model = model.eval()
        self.table = table
        on_cpu = self.model.device.type == "cpu"
        self.max_batch_tokens = max_batch_tokens or (
            CPU_BATCH_BYTES // self.model.llm_dtype.itemsize if on_cpu else GPU_BATCH_TOKENS
        )
        self._soft_prompts = dict(soft_prompts or {})
        self._prepared: dict[tuple[str, ...], _Prepared] = {}

    @property
    def embedding_dim(self) -> int:
        """Size of the embeddings."""
        return self.model.config.embedding_dim

    @torch.inference_mode()
    def encode(
        self, history: PackedHistory, instructions: Sequence[Instruction], on_batch: OnBatch | None = None
    ) -> npt.NDArray[np.float32]:
        """Embeds users, all instructions of a user in one forward pass; instructions are read once for all users.

        Users are batched by length, ties by user id, so a batch wastes little on padding and the result is the same
        however the users are ordered.

        Args:
            history: U users.
            instructions: K instructions.
            on_batch: Called after each forward pass.

        Returns:
            `[U, K, embedding_dim]` float32 unit vectors, in the order of `history` and `instructions`.

        Raises:
            ConfigError: No instructions, a missing soft prompt, or a prompt longer than the LLM's positions.
            DataError: A text is not in the table, or the history was made with another config.
            InvalidEmbeddingError: An embedding is NaN or infinite.
        """
        prepared = self._prepare(instructions)
        self.model.prompt.check(history)
        lengths = self.model.prefix_lengths(history)
        self._check_length(history, lengths, prepared)
        rows_T = self.table.rows(history.text_id)
        self._check_sources(history, rows_T)
        out = np.empty((len(history), len(instructions), self.model.config.embedding_dim), np.float32)
        totals = lengths + sum(len(one) for one in prepared.suffixes)
        batches = token_budget_batches(totals, history.user_ids, self.max_batch_tokens)
        answers = (self._ask(history, users, prepared) for users in batches)
        for answer in in_turn(answers, IN_FLIGHT if self.model.device.type == "cuda" else 0):
            vectors, users = answer.wait(), answer.users
            out[users] = vectors
            if not np.isfinite(vectors).all():
                raise InvalidEmbeddingError(
                    f"{int((~np.isfinite(vectors)).any((1, 2)).sum())} of {len(users)} users got NaN or infinity",
                    "check the model's weights, or use dtype float32",
                )
            if on_batch is not None:
                on_batch(len(users), answer.num_tokens)
        return out

    @torch.inference_mode()
    def focus_weights(self, history: PackedHistory, instructions: Sequence[Instruction]) -> npt.NDArray[np.float32]:
        """What each instruction looks at in each user's history.

        Returns:
            `[T, K]` in the order of `history.text_id`; over a user's texts, each column sums to one.

        Raises:
            ConfigError: No instructions.
            DataError: A text is not in the table, or the history was made with another config.
        """
        prepared = self._prepare(instructions)
        self.model.prompt.check(history)
        batch, similarity_TK = self._gather(history, prepared)
        return self.model.focus_weights(batch, similarity_TK)

    def inputs(self, history: PackedHistory, instruction: Instruction) -> tuple[UserBatch, Suffix, torch.Tensor]:
        """What the model's forward pass takes for one instruction, ready for gradients.

        Returns:
            The users, the instruction's suffix, and `[T, 1]` similarity of each text to the instruction.

        Raises:
            ConfigError: A missing soft prompt.
            DataError: A text is not in the table, or the history was made with another config.
        """
        prepared = self._prepare([instruction])
        self.model.prompt.check(history)
        batch, similarity_T1 = self._gather(history, prepared)
        # What was prepared in inference mode must not meet autograd; a clone may.
        return batch, prepared.suffixes[0], similarity_T1.clone()

    @torch.inference_mode()  # a generator does not inherit it
    def _ask(self, history: PackedHistory, users: npt.NDArray[np.int64], prepared: _Prepared) -> Answer:
        """Starts one forward pass."""
        part = history.take(users)
        batch, similarity_TK = self._gather(part, prepared)
        output = self.model(batch, [prepared.suffixes] * len(part), similarity_TK, prepared.states)
        return ask(users, output.embeddings, output.prompts.num_tokens)

    def _gather(self, history: PackedHistory, prepared: _Prepared) -> tuple[UserBatch, torch.Tensor]:
        rows = self.table.rows(history.text_id)
        distinct_N, row_T = np.unique(rows, return_inverse=True)  # users share texts: each goes to the device once
        device = self.model.device
        soft_NH = to_device(self.table.soft_tokens[torch.from_numpy(distinct_N)], device)
        batch = UserBatch(history, soft_NH, row_T=to_device(torch.from_numpy(row_T), device))
        return batch, to_device(prepared.similarity_NK[torch.from_numpy(rows)], device)

    def _prepare(self, instructions: Sequence[Instruction]) -> _Prepared:
        """What all users share of a set of instructions: suffixes, similarity of every text, states in the LLM."""
        if not instructions:
            raise ConfigError("no instructions to encode", "pass at least one")
        key = tuple(one.content_hash for one in instructions)
        if key not in self._prepared:
            if len(self._prepared) == _KEPT:
                self._prepared.pop(next(iter(self._prepared)))
            prompts = [self._soft_prompt(one) for one in instructions]
            vectors = self.model.instruction_vectors(
                [one.text for one in instructions], [None if one is None else one.shift for one in prompts]
            )
            suffixes = tuple(
                self.model.suffix(
                    one.text,
                    soft_prompt=None if prompt is None else torch.from_numpy(prompt.vectors),
                    vectors=tuple(own[row] for own in vectors),
                )
                for row, (one, prompt) in enumerate(zip(instructions, prompts, strict=True))
            )
            similarity_NK = self._similarity(vectors)
            self._prepared[key] = _Prepared(suffixes, similarity_NK, self.model.instruction_states(suffixes))
        return self._prepared[key]

    def _similarity(self, vectors: tuple[torch.Tensor, ...]) -> torch.Tensor:
        queries_EKF = self.model.queries(vectors)
        encoder_of_source = [self.model.encoder_index(name) for name in self.model.config.sources or []]
        encoder_N = np.asarray(encoder_of_source, np.int64)[self.table.source_index]
        similarity_NK = torch.empty(len(self.table), queries_EKF.shape[1])
        for index, queries_KF in enumerate(queries_EKF):
            members = np.flatnonzero(encoder_N == index)
            for start in range(0, len(members), _CHUNK):  # bounds what is held of a memory-mapped table
                rows = torch.from_numpy(members[start : start + _CHUNK])
                similarity_NK[rows] = (self.table.focus_keys[rows].to(self.model.device) @ queries_KF.T).cpu()
        return similarity_NK

    def _soft_prompt(self, instruction: Instruction) -> SoftPrompt | None:
        if instruction.soft_prompt is None:
            return None
        prompt = self._soft_prompts.get(instruction.content_hash)
        if prompt is None:
            raise ConfigError(
                f"instruction {instruction.id!r} wants soft prompt {instruction.soft_prompt[:12]}, which was not given",
                "pass it in `soft_prompts`",
            )
        if prompt.digest != instruction.soft_prompt:
            raise VersionMismatchError(
                f"the soft prompt of instruction {instruction.id!r} is not {instruction.soft_prompt[:12]}",
                "use the one the instruction was tuned to",
            )
        return prompt

    def _check_sources(self, history: PackedHistory, rows_T: npt.NDArray[np.int64]) -> None:
        if np.any(self.table.source_index[rows_T] != history.source_index):
            raise DataError(
                "packed history and soft-token table disagree on the source of a text",
                "use the phrasebook of this extract",
            )

    def _check_length(self, history: PackedHistory, lengths: npt.NDArray[np.int64], prepared: _Prepared) -> None:
        limit = self.model.max_prompt_tokens - self.model.config.instruction_tokens
        longest = int(lengths.max(initial=0)) + max(len(one) for one in prepared.suffixes)
        if longest > limit:
            raise ConfigError(
                f"a prompt of {longest} tokens (user {int(lengths.argmax())} of {len(history)}), the LLM takes {limit}",
                "lower `max_texts` of the sources, or use an LLM with more positions",
            )
