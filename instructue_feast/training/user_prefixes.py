"""What the LLM makes of users, kept while only an instruction changes.

A user's prefix looks at no instruction, so its keys and values are the same for every soft prompt. They are computed
once; a step of tuning then costs the soft prompt's own tokens and two tokens of each user, focus and `<USER>`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache

from instructue_feast.errors import ConfigError
from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.model.layout import Ints, additive, token_budget_batches
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.passes import prefix_states
from instructue_feast.model.prompt import Suffix, UserBatch

# U = users, B = users of a batch, S = longest prefix, W = words of an instruction, P = tokens of its soft prompt,
# I = W + P, H = hidden size, E = embedding size, R = embeddings of users in a batch

Layers = tuple[tuple[torch.Tensor, torch.Tensor], ...]
"""Keys and values of every layer."""

OnUsers = Callable[[int, int], None]
"""Called with users done and users in all."""

BATCH_TOKENS = 2_048
DEFAULT_MAX_BYTES = 8 << 30


class UserPrefixes:
    """Keys and values of U prefixes.

    Args:
        model: The model; put into evaluation mode and frozen.
        table: Soft tokens of all texts.
        history: U users.
        max_bytes: Refuse to keep more than this.
        on_users: Called as users are read.

    Raises:
        ConfigError: The keys and values take more than `max_bytes`.
        DataError: A text is not in the table, or the history was made with another config.
    """

    def __init__(
        self,
        model: InstructUEModel,
        table: SoftTokenTable,
        history: PackedHistory,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        on_users: OnUsers | None = None,
    ) -> None:
        model.prompt.check(history)
        self.model = model.eval().requires_grad_(False)
        self.table = table
        self.history = history
        self.length_U = torch.from_numpy(model.prefix_lengths(history)).to(model.device)
        self.layers: Layers = ()
        self._read(max_bytes, on_users)

    def __len__(self) -> int:
        return len(self.history)

    @torch.no_grad()
    def _read(self, max_bytes: int, on_users: OnUsers | None) -> None:
        lengths = self.length_U.cpu().numpy()
        longest, done = int(lengths.max(initial=0)), 0
        for users in token_budget_batches(lengths, self.history.user_ids, BATCH_TOKENS):
            own = self._prefix_layers(self.history.take(users))
            if not self.layers:
                keys = own[0][0]
                size = 2 * len(own) * len(self) * keys.shape[1] * longest * keys.shape[3] * keys.element_size()
                if size > max_bytes:
                    raise ConfigError(
                        f"the prefixes of {len(self):,} users take {size / 2**30:.1f} GiB, {max_bytes / 2**30:.1f} "
                        "are allowed",
                        "take fewer shots, or a model with fewer layers or a smaller `prompt_texts`",
                    )
                shape = (len(self), keys.shape[1], longest, keys.shape[3])
                self.layers = tuple((keys.new_zeros(shape), keys.new_zeros(shape)) for _ in own)
            rows = torch.from_numpy(users).to(self.model.device)
            for (all_keys, all_values), (keys, values) in zip(self.layers, own, strict=True):
                all_keys[rows, :, : keys.shape[2]] = keys
                all_values[rows, :, : values.shape[2]] = values
            done += len(users)
            if on_users is not None:
                on_users(done, len(self))

    def _prefix_layers(self, history: PackedHistory) -> Layers:
        """Keys and values `[B, heads, S, size]` of some users' prefixes; what stands at padding is never looked at."""
        model = self.model
        batch = self._batch(history)
        numeric_BGH = model.numeric(torch.from_numpy(np.ascontiguousarray(history.tabular_numeric)).to(model.device))
        nothing = batch.soft_NH.new_zeros(len(history), 0, batch.soft_NH.shape[1])
        inputs, prompts = model.prompt.assemble(
            batch,
            model.prompt.pad(batch),
            numeric_BGH,
            nothing,
            [[] for _ in range(len(history))],
            model._preamble,
            model.llm.get_input_embeddings(),  # type: ignore[operator]
        )
        layers = prefix_states(
            model.backbone,
            inputs.fill(prompts.row_BS, model.llm_dtype),
            torch.from_numpy(prompts.position_BS).to(model.device) + model.config.instruction_tokens,
        )
        return tuple(layers)

    def _batch(self, history: PackedHistory) -> UserBatch:
        rows = torch.from_numpy(self.table.rows(history.text_id))
        return UserBatch(history, self.table.soft_tokens[rows].to(self.model.device))

    def focus_tokens(self, vectors: Sequence[torch.Tensor], users: Ints | None = None) -> torch.Tensor:
        """`[B, H]` focus token of some users for an instruction, with gradients down to its vectors.

        Args:
            vectors: `[D]` vector of the instruction from each encoder.
            users: B positions; all users for None.
        """
        model = self.model
        history = self.history if users is None else self.history.take(users)
        suffix = Suffix(np.zeros(0, np.int64), vectors=tuple(vectors))
        queries_EF = model.queries([one[None] for one in vectors])[:, 0]
        encoder_of = torch.tensor([model.encoder_index(one) for one in model.config.sources or []])
        tokens_BH = torch.empty(len(history), model.config.hidden_size, device=model.device)
        for members in token_budget_batches(history.num_tokens, history.user_ids, 1 << 16):
            part = history.take(members)
            rows = torch.from_numpy(self.table.rows(part.text_id))
            query_TF = queries_EF[encoder_of[torch.from_numpy(part.source_index).long()]]
            similarity_T1 = (self.table.focus_keys[rows].to(model.device) * query_TF).sum(-1, keepdim=True)
            found = model.focus_tokens(self._batch(part), [[suffix]] * len(part), similarity_T1)
            tokens_BH = tokens_BH.index_copy(0, torch.from_numpy(members).to(model.device), found[:, 0])
        return tokens_BH


class InstructionReader:
    """Embeds users under one instruction whose soft prompt and shift change.

    Args:
        prefixes: The users.
        suffix: The instruction, without either.
        num_tokens: P.

    Raises:
        ConfigError: Instruction and soft prompt together are longer than `config.instruction_tokens`.
    """

    def __init__(self, prefixes: UserPrefixes, suffix: Suffix, num_tokens: int) -> None:
        self.prefixes = prefixes
        self.vectors = tuple(one.to(prefixes.model.device) for one in suffix.vectors)
        self.num_tokens = num_tokens
        self._focus_UH: torch.Tensor | None = None
        model = prefixes.model
        start, words = model.config.instruction_tokens, len(suffix.token_ids)
        if words + num_tokens > start:
            raise ConfigError(
                f"an instruction of {words} tokens and a soft prompt of {num_tokens}, the model takes {start} together",
                "shorten the instruction, or take fewer tokens",
            )
        first = start - words - num_tokens
        self._position_1P = torch.arange(first + words, start, device=model.device)[None]
        self._words: Layers = ()
        if words:
            with torch.no_grad():
                embed = model.llm.get_input_embeddings()  # type: ignore[operator]
                past = model.backbone(
                    inputs_embeds=embed(torch.from_numpy(suffix.token_ids).to(model.device)).to(model.llm_dtype)[None],
                    position_ids=torch.arange(first, first + words, device=model.device)[None],
                    use_cache=True,
                ).past_key_values
            self._words = tuple((layer.keys, layer.values) for layer in past.layers)

    def embed(self, users: Ints, soft_PH: torch.Tensor | None, shift_D: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, E]` embeddings of some users, with gradients down to soft prompt and shift.

        Equal to `InstructUEModel.forward` with both, at two tokens a user, and the texts of a user once more for a
        shift.

        Args:
            users: B positions.
            soft_PH: The soft prompt; none when the reader was made for no tokens.
            shift_D: What is added to the instruction's encoder vectors; none for nothing.
        """
        prefixes, model = self.prefixes, self.prefixes.model
        own = self._instruction(soft_PH)
        rows = torch.from_numpy(users).to(model.device)
        length_B = prefixes.length_U[rows]
        longest, shared = int(length_B.max()), own[0][0].shape[2] if own else 0
        layers = []
        for index, (keys, values) in enumerate(prefixes.layers):
            pair = [keys[rows, :, :longest], values[rows, :, :longest]]
            if own:
                pair = [
                    torch.cat([one.expand(len(users), -1, -1, -1), prefix], dim=2)
                    for one, prefix in zip(own[index], pair, strict=True)
                ]
            layers.append(tuple(pair))
        tail_BT = torch.tensor([[True, False], [True, True]], device=model.device).expand(len(users), -1, -1)
        prefix_BS = torch.arange(longest, device=model.device) < length_B[:, None]
        seen_B2S = torch.nn.functional.pad(prefix_BS, (shared, 0), value=True)[:, None].expand(-1, 2, -1)
        user_B1H = model.prompt.user.expand(len(users), 1, -1)
        hidden_B2H = model.backbone(
            inputs_embeds=torch.cat([self._focus(users, shift_D)[:, None], user_B1H], dim=1).to(model.llm_dtype),
            attention_mask=additive(torch.cat([seen_B2S, tail_BT], dim=-1), model.llm_dtype),
            position_ids=model.config.instruction_tokens
            + length_B[:, None]
            + torch.arange(2, device=model.device)[None],
            past_key_values=DynamicCache(layers),
            use_cache=False,
        ).last_hidden_state
        embeddings: torch.Tensor = model.projection(model.user_centre(hidden_B2H[:, 1]))
        return embeddings

    def _focus(self, users: Ints, shift_D: torch.Tensor | None) -> torch.Tensor:
        """`[B, H]` focus tokens; those of the words alone are the same in every step."""
        if shift_D is None:
            if self._focus_UH is None:
                with torch.no_grad():
                    self._focus_UH = self.prefixes.focus_tokens(self.vectors)
            return self._focus_UH[torch.from_numpy(users).to(self._focus_UH.device)]
        parts = torch.split(shift_D, [len(one) for one in self.vectors])
        return self.prefixes.focus_tokens([one + part for one, part in zip(self.vectors, parts, strict=True)], users)

    def _instruction(self, soft_PH: torch.Tensor | None) -> Layers:
        """Keys and values `[1, heads, I, size]` of the instruction; those of its words are the same in every step."""
        if soft_PH is None or not self.num_tokens:
            return self._words
        model = self.prefixes.model
        words = self._words[0][0].shape[2] if self._words else 0
        causal_PP = torch.ones(self.num_tokens, self.num_tokens, dtype=torch.bool, device=model.device).tril()
        visible_1PI = torch.nn.functional.pad(causal_PP, (words, 0), value=True)[None]
        past = model.backbone(
            inputs_embeds=soft_PH.to(model.llm_dtype)[None],
            attention_mask=additive(visible_1PI, model.llm_dtype),
            position_ids=self._position_1P,
            past_key_values=DynamicCache(self._words) if self._words else None,
            use_cache=True,
        ).past_key_values
        return tuple((layer.keys, layer.values) for layer in past.layers)
