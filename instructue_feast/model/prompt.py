"""From packed histories to the LLM's input: which token stands where, and the embedding of each.

preamble
<bill>  soft tokens (+ count + age)                       summary  </bill>
<app>   the learned "missing" token                       summary  </app>
<tabular>  soft tokens, one token per numeric group       summary  </tabular>
summary of the user                                              -- end of the shared prefix
Instruction: <text>   focus token   soft prompt   <USER>  [answer]  -- one suffix per instruction
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from instructue_feast.errors import DataError
from instructue_feast.history.buckets import NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.layout import Ints, PackedPrompts, pack
from instructue_feast.model.seeding import fill_normal
from instructue_kernels.prompt_slots import Events, prompt_slots
from instructue_kernels.text_pool import text_pool

# B = users, T = texts of all users, N = distinct texts, L = most texts of a user, R = sources, G = numeric groups,
# C = numeric columns, H = hidden size, K = instructions, V = rows of the embedding table, S = padded prompt length

_BUCKET_SCALE = 0.3
"""Initial size of count and age embeddings, in units of a soft token: visible, but not louder than the text."""

_FADED = 1e-6
"""A gate below counts as this, so that no logarithm or quotient is infinite."""

_NO_TOKENS = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class UserBatch:
    """B users, with the soft tokens of their texts.

    Attributes:
        history: Their packed histories.
        soft_NH: Soft tokens of texts, without count and age.
        gate_T: How much of each text is there, above 0 up to 1; None for all of all. Toward 0 a text fades from focus,
            summaries and attention; differentiable, for explanations.
        row_T: Row of each text in `soft_NH`; None if it holds one per text, in order.
    """

    history: PackedHistory
    soft_NH: torch.Tensor
    gate_T: torch.Tensor | None = None
    row_T: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Suffix:
    """One instruction, and what follows the prefix for it: focus, `<USER>`, answer.

    Attributes:
        token_ids: LLM tokens of `Instruction: <text>`, before the prefix; none for the general-purpose embedding.
        soft_prompt: Optional `[P, H]` tuned vectors behind the instruction's words.
        answer_ids: Optional LLM tokens behind `<USER>`; training only.
        vectors: `[D]` vector of the instruction from each encoder, for the focus; zero for an empty one.
    """

    token_ids: Ints
    soft_prompt: torch.Tensor | None = None
    answer_ids: Ints = field(default_factory=lambda: _NO_TOKENS)
    vectors: tuple[torch.Tensor, ...] = ()

    def __len__(self) -> int:
        """Tokens each user pays."""
        return 2 + len(self.answer_ids)

    @property
    def num_instruction_tokens(self) -> int:
        """Tokens all users share."""
        return len(self.token_ids) + (0 if self.soft_prompt is None else len(self.soft_prompt))


class SummaryToken(nn.Module):
    """One token out of the mean of others: brought to the LLM's embedding size, then projected."""

    rms: torch.Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden, hidden)
        self.register_buffer("rms", torch.ones(()))

    def forward(self, mean: torch.Tensor) -> torch.Tensor:
        """Summary of `[..., H]` means."""
        scale = torch.rsqrt(mean.pow(2).mean(-1, keepdim=True) + 1e-12)
        token: torch.Tensor = self.projection(mean * scale * self.rms)
        return token


class PromptTokens(nn.Module):
    """The learned tokens of ours, and the assembly of prompts.

    The LLM's vocabulary is untouched: markers and `<USER>` are vectors of ours, so no event text can spell them.

    Args:
        num_sources: R.
        group_sources: Source index of each numeric group.
        column_sources: Source index of each numeric column.
        hidden: H.
        prompt_texts: Newest texts of each source that stand in the prompt; 0 for all.
        summaries: Whether summary tokens say anything; without, they are constants in the same places.
    """

    def __init__(
        self,
        num_sources: int,
        group_sources: list[int],
        column_sources: list[int],
        hidden: int,
        *,
        prompt_texts: int = 0,
        summaries: bool = True,
    ) -> None:
        super().__init__()
        self.prompt_texts = prompt_texts
        self.summaries = summaries
        self.num_sources = num_sources
        self.group_sources = group_sources
        self.column_sources = column_sources
        self.count = nn.Embedding(NUM_COUNT_BUCKETS, hidden)
        self.age = nn.Embedding(NUM_AGE_BUCKETS, hidden)
        self.opening = nn.Parameter(torch.zeros(num_sources, hidden))
        self.closing = nn.Parameter(torch.zeros(num_sources, hidden))
        self.missing = nn.Parameter(torch.zeros(num_sources, hidden))
        self.user = nn.Parameter(torch.zeros(1, hidden))
        self.answer = nn.Parameter(torch.zeros(1, hidden))
        self.source_summary = SummaryToken(hidden)
        self.user_summary = SummaryToken(hidden)

    @torch.no_grad()
    def initialise(self, rms: float, *, seed: int, name: str) -> None:
        """Everything but the markers, which the model initialises from the LLM's own embeddings."""
        fill_normal(self.count.weight, rms * _BUCKET_SCALE, seed=seed, name=f"{name}.count")
        fill_normal(self.age.weight, rms * _BUCKET_SCALE, seed=seed, name=f"{name}.age")
        for summary in (self.source_summary, self.user_summary):
            nn.init.eye_(summary.projection.weight)
            nn.init.zeros_(summary.projection.bias)
            summary.rms.fill_(rms)

    def texts_per_source(self, history: PackedHistory) -> Ints:
        """`[B, R]` texts of each user by source."""
        users = np.repeat(np.arange(len(history)), history.num_tokens)
        flat = np.bincount(users * self.num_sources + history.source_index, minlength=len(history) * self.num_sources)
        return flat.reshape(len(history), self.num_sources).astype(np.int64)

    def _in_prompt(self, texts_BR: Ints) -> Ints:
        return np.minimum(texts_BR, self.prompt_texts) if self.prompt_texts else texts_BR

    def has_numbers(self, history: PackedHistory) -> npt.NDArray[np.bool_]:
        """`[B, R]` whether a source has any number that is not missing."""
        present = np.zeros((len(history), self.num_sources), bool)
        for column, source in enumerate(self.column_sources):
            present[:, source] |= np.isfinite(history.tabular_numeric[:, column])
        return present

    def prefix_lengths(self, history: PackedHistory, preamble_length: int) -> Ints:
        """`[B]` tokens of each user's prefix, without assembling it."""
        texts_BR, numbers_BR = self.texts_per_source(history), self.has_numbers(history)
        groups_R = np.bincount(np.asarray(self.group_sources, np.int64), minlength=self.num_sources)
        texts_BR = self._in_prompt(texts_BR)
        inside_BR = texts_BR + numbers_BR * groups_R + ((texts_BR == 0) & ~numbers_BR)
        lengths: Ints = preamble_length + (inside_BR + 3).sum(1) + 1
        return lengths

    def check(self, history: PackedHistory) -> None:
        """Refuses indices that no embedding stands for.

        Raises:
            DataError: A source, count or age index is out of range, or tokens are not ordered by source.
        """
        limits = {
            "source_index": (history.source_index, self.num_sources),
            "count_bucket": (history.count_bucket, NUM_COUNT_BUCKETS),
            "age_bucket": (history.age_bucket, NUM_AGE_BUCKETS),
        }
        for name, (values, limit) in limits.items():
            if len(values) and not (values.min() >= 0 and values.max() < limit):
                raise DataError(
                    f"packed history: {name} holds values outside 0..{limit - 1}",
                    "extract again with the config and release the model was made with",
                )
        if history.tabular_numeric.shape[1] != len(self.column_sources):
            raise DataError(
                f"packed history: {history.tabular_numeric.shape[1]} numeric columns, the model has "
                f"{len(self.column_sources)}",
                "extract again with the config the model was made with",
            )
        users = np.repeat(np.arange(len(history)), history.num_tokens)
        if np.any(np.diff(users * self.num_sources + history.source_index) < 0):
            raise DataError("packed history: the tokens of a user are not ordered by source", "extract again")

    def pad(self, batch: UserBatch) -> PaddedUsers:
        """Lays what is known of the texts of each user, but not their soft tokens, into rows of equal length."""
        history, device = batch.history, batch.soft_NH.device
        lengths = history.num_tokens
        longest = int(lengths.max(initial=0))
        columns = np.arange(longest)
        valid_BL = columns[None, :] < lengths[:, None]
        text_BL = np.where(valid_BL, history.offsets[:-1, None] + columns[None, :], 0)

        def on_device(values: npt.NDArray[np.generic]) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device)

        def padded(values: npt.NDArray[np.int32]) -> torch.Tensor:
            return on_device((values[text_BL] if len(values) else np.zeros(text_BL.shape)).astype(np.int64))

        texts = on_device(text_BL)
        number = len(history.text_id)
        return PaddedUsers(
            text_BL=texts,
            valid_BL=on_device(valid_BL),
            place_T=on_device(np.flatnonzero(valid_BL)),
            offsets=torch.from_numpy(history.offsets.astype(np.int64)),
            source_BL=padded(history.source_index),
            count_BL=padded(history.count_bucket),
            age_BL=padded(history.age_bucket),
            events=Events(
                batch.soft_NH,
                self.count.weight,
                self.age.weight,
                torch.arange(number, device=device) if batch.row_T is None else batch.row_T,
                on_device(history.count_bucket.astype(np.int64)),
                on_device(history.age_bucket.astype(np.int64)),
            ),
            gate_T=batch.gate_T,
            gate_BL=None if batch.gate_T is None or not longest else batch.gate_T[texts],
        )

    def assemble(
        self,
        batch: UserBatch,
        padded: PaddedUsers,
        numeric_BGH: torch.Tensor,
        focus_BKH: torch.Tensor,
        suffixes: Sequence[Sequence[Suffix]],
        preamble: Ints,
        embed: Any,
        *,
        step: int = 1,
    ) -> tuple[PromptInputs, PackedPrompts]:
        """Gathers the embeddings of all tokens, and says which stands where in every prompt.

        Args:
            batch: B users.
            padded: `pad(batch)`.
            numeric_BGH: Soft tokens of the numeric groups.
            focus_BKH: Focus token of each suffix.
            suffixes: K suffixes of each user.
            preamble: LLM tokens at the head.
            embed: The LLM's input embedding, `[n]` token ids to `[n, H]`.
            step: See `layout.pack`.

        Returns:
            What rows of prompts stand for, and the packed prompts.
        """
        table = _Table(self.user.shape[1])
        distinct = list({id(one): one for own in suffixes for one in own}.values())
        words = np.unique(np.concatenate([preamble, *(one.answer_ids for one in distinct)]))
        first_word = table.add(embed(torch.from_numpy(words).to(batch.soft_NH.device)))

        def word_rows(ids: Ints) -> Ints:
            return first_word + np.searchsorted(words, ids)

        opening, closing, missing = table.add(self.opening), table.add(self.closing), table.add(self.missing)
        user_token = table.add(self.user)
        numbers_BR = self.has_numbers(batch.history)
        texts_BR = self.texts_per_source(batch.history)
        source_BRH, user_BH = self._summaries(padded, texts_BR, numeric_BGH, numbers_BR)
        first_number = table.add(numeric_BGH)
        first_source, first_user, first_focus = table.add(source_BRH), table.add(user_BH), table.add(focus_BKH)
        inputs = PromptInputs(table.rows(), padded.events)

        head = word_rows(preamble)
        shown_BR = self._in_prompt(texts_BR)
        groups = [[g for g, owner in enumerate(self.group_sources) if owner == r] for r in range(self.num_sources)]
        num_groups, num_suffixes = numeric_BGH.shape[1], focus_BKH.shape[1]
        tails = {id(one): np.append(user_token, word_rows(one.answer_ids)) for one in distinct}
        prefixes, rows_of_suffixes, readouts = [], [], []
        for user, own in enumerate(suffixes):
            parts: list[Any] = [head]
            start = inputs.first_text + int(batch.history.offsets[user])
            for source in range(self.num_sources):
                end = start + int(texts_BR[user, source])
                parts += [[opening + source], np.arange(end - int(shown_BR[user, source]), end)]
                if numbers_BR[user, source]:
                    parts.append([first_number + user * num_groups + group for group in groups[source]])
                elif start == end:
                    parts.append([missing + source])
                parts.append([first_source + user * self.num_sources + source, closing + source])
                start = end
            parts.append([first_user + user])
            prefixes.append(np.concatenate(parts).astype(np.int64))
            focus = first_focus + user * num_suffixes
            rows_of_suffixes.append([np.append(focus + k, tails[id(one)]) for k, one in enumerate(own)])
            readouts.append([1] * len(own))
        return inputs, pack(prefixes, rows_of_suffixes, readouts, step=step)

    def _summaries(
        self,
        padded: PaddedUsers,
        texts_BR: Ints,
        numeric_BGH: torch.Tensor,
        numbers_BR: npt.NDArray[np.bool_],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Source summaries `[B, R, H]` and user summaries `[B, H]`: means of the tokens a source has in the prompt.

        Sums are matrix products within a user, so they are deterministic on every device and no user touches another.
        """
        events, shape = padded.events, texts_BR.shape
        kinds = torch.arange(self.num_sources, device=numeric_BGH.device)
        member_BLR = ((padded.source_BL[:, :, None] == kinds) & padded.valid_BL[:, :, None]).to(numeric_BGH.dtype)
        if padded.gate_BL is not None:
            member_BLR = member_BLR * padded.gate_BL[:, :, None]
        member_BRL = member_BLR.transpose(1, 2)
        gate_T = numeric_BGH.new_ones(len(events.row_T)) if padded.gate_T is None else padded.gate_T
        # A user's texts are ordered by source, so each source's are a run of their own.
        runs = torch.from_numpy(np.append(0, np.cumsum(texts_BR.ravel())))
        sum_BRH = (
            text_pool(gate_T[:, None].to(events.soft_NH.dtype), events.soft_NH, runs, rows=events.row_T).view(
                *shape, -1
            )
            + (member_BRL @ one_hot(padded.count_BL, events.count_CH)) @ events.count_CH
            + (member_BRL @ one_hot(padded.age_BL, events.age_AH)) @ events.age_AH
        )
        size_BR = member_BLR.sum(1)
        if self.group_sources:
            has_BR = torch.from_numpy(numbers_BR).to(numeric_BGH.device)
            owner_G = torch.tensor(self.group_sources, device=numeric_BGH.device)
            member_BGR = ((owner_G[:, None] == kinds) & has_BR[:, None, :]).to(numeric_BGH.dtype)
            sum_BRH = sum_BRH + member_BGR.transpose(1, 2) @ numeric_BGH
            size_BR = size_BR + member_BGR.sum(1)
        empty_BR1 = (size_BR == 0)[:, :, None]
        mean_BRH = torch.where(empty_BR1, self.missing, sum_BRH / size_BR.clamp(min=_FADED)[:, :, None])
        nothing_BH = self.missing.mean(0).expand(len(sum_BRH), -1)
        total_B1 = size_BR.sum(1, keepdim=True)
        mean_BH = torch.where(total_B1 == 0, nothing_BH, sum_BRH.sum(1) / total_B1.clamp(min=_FADED))
        if not self.summaries:
            mean_BRH, mean_BH = torch.zeros_like(mean_BRH), torch.zeros_like(mean_BH)
        return self.source_summary(mean_BRH), self.user_summary(mean_BH)


@dataclass(frozen=True, slots=True)
class PaddedUsers:
    """Texts of B users in rows of equal length.

    Attributes:
        text_BL: Position in the flat texts; 0 where there is none.
        valid_BL: True where there is a text.
        place_T: Where each text stands in `B * L`.
        offsets: `[B + 1]` where each user's texts begin, on the CPU.
        source_BL: Source index.
        count_BL: Count bucket.
        age_BL: Age bucket.
        events: The same texts without padding, with their soft tokens.
        gate_T: How much of each text is there, or None for all.
        gate_BL: The same, padded.
    """

    text_BL: torch.Tensor
    valid_BL: torch.Tensor
    place_T: torch.Tensor
    offsets: torch.Tensor
    source_BL: torch.Tensor
    count_BL: torch.Tensor
    age_BL: torch.Tensor
    events: Events
    gate_T: torch.Tensor | None = None
    gate_BL: torch.Tensor | None = None

    def log_gate(self) -> torch.Tensor | None:
        """`[B, L]` what a gate adds to the logit of each text in an attention."""
        return None if self.gate_BL is None else self.gate_BL.clamp(min=_FADED).log()


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """What the rows of packed prompts stand for: 0 is padding, then come rows of a table, then the texts.

    Attributes:
        table_VH: Embeddings of everything that is not a text.
        events: The texts.
    """

    table_VH: torch.Tensor
    events: Events

    @property
    def first_text(self) -> int:
        """Row of the first text of the first user."""
        return 1 + len(self.table_VH)

    def fill(self, row_BS: Ints, dtype: torch.dtype) -> torch.Tensor:
        """`[B, S, H]` input of the LLM."""
        return prompt_slots(
            self.table_VH, self.events, torch.from_numpy(row_BS - 1).to(self.table_VH.device), dtype=dtype
        )


def one_hot(bucket_BL: torch.Tensor, embedding_CH: torch.Tensor) -> torch.Tensor:
    """`[B, L, C]` ones where a text has a bucket: sums over texts become a product with the few embeddings."""
    buckets = torch.arange(len(embedding_CH), device=bucket_BL.device)
    return (bucket_BL[:, :, None] == buckets).to(embedding_CH.dtype)


class _Table:
    """Rows of token embeddings, added block by block; row 0 stands for padding and is not in the table."""

    def __init__(self, hidden: int) -> None:
        self._hidden = hidden
        self._blocks: list[torch.Tensor] = []
        self._length = 1

    def add(self, block: torch.Tensor) -> int:
        """Adds `[..., H]` and returns the row it starts at."""
        flat = block.reshape(-1, self._hidden).float()
        self._blocks.append(flat)
        self._length += len(flat)
        return self._length - len(flat)

    def rows(self) -> torch.Tensor:
        return torch.cat(self._blocks)
