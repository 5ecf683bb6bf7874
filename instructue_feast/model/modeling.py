"""`InstructUEModel`: packed histories and instructions in, user embeddings out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from instructue_feast.errors import ConfigError
from instructue_feast.model import saving
from instructue_feast.model.adapter import NumericAdapter, ProjectionHead, SourceAdapter
from instructue_feast.model.centre import Centre
from instructue_feast.model.config import InstructUEConfig
from instructue_feast.model.encoders import TextEncoder
from instructue_feast.model.focus import Focus, FocusResult, NumberFocus
from instructue_feast.model.instruction_states import InstructionStates, numbers_of, read_instructions
from instructue_feast.model.layout import Ints, PackedPrompts
from instructue_feast.model.passes import Prompts, run_in_line, run_in_two
from instructue_feast.model.prompt import PaddedUsers, PromptInputs, PromptTokens, Suffix, UserBatch

# B = users, T = texts of all users, L = most texts of a user, N = texts, D = encoder size, F = focus size,
# H = hidden size, K = instructions, S = padded prompt length

_STEP_OF_HALVES = 8
"""Prefixes of bfloat16 are padded to a multiple of this. A CPU compiles a matrix product for every shape it meets,
which takes as long as several products; fewer shapes, and all of them stay compiled."""


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a forward pass gives.

    Attributes:
        embeddings: `[B, K, embedding_dim]` float32 unit vectors.
        hidden: `[B, S, H]` last hidden states of the LLM, for the next-token loss.
        prompts: Where everything stands in S.
        focus_weights: `[B, L, K]` attention of each instruction over the user's texts.
    """

    embeddings: torch.Tensor
    hidden: torch.Tensor
    prompts: PackedPrompts
    focus_weights: torch.Tensor


class InstructUEModel(nn.Module):
    """The base LLM with adapters, focus, learned tokens and projection around it.

    Args:
        config: Settings.
        llm: A causal LM of Transformers, optionally wrapped by PEFT. Frozen; only LoRA weights may train.
        tokenizer: Its tokenizer.

    Source: InstructUE (arXiv 2510.11016), Q-Anchor (arXiv 2602.14492); the focus token is ours.
    """

    lora_digest: str | None = None

    def __init__(self, config: InstructUEConfig, llm: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.config = config
        self.llm = llm.requires_grad_(False)
        self.tokenizer = tokenizer
        sources, hidden = list(config.sources or []), config.hidden_size
        encoders, dims = config.encoders or {}, config.encoder_dims or {}
        self.adapters = nn.ModuleDict(
            {
                name: SourceAdapter(dims[encoders[name]], config.adapter_dim or dims[encoders[name]], hidden)
                for name in sources
            }
        )
        groups = config.numeric_groups
        self.numeric = NumericAdapter([one for _, _, one in groups], len(config.numeric_columns or []), hidden)
        encoder_dims = [dims[name] for name in config.encoder_names]
        self.focus = Focus(encoder_dims, self.focus_dim, hidden)
        column_encoders = [self.encoder_index(source) for source, _, _ in config.numeric_columns or []]
        columns = [np.flatnonzero(np.array(column_encoders) == one).tolist() for one in range(len(encoder_dims))]
        self.number_focus = NumberFocus(columns, encoder_dims, hidden) if column_encoders else None
        self.prompt = PromptTokens(
            len(sources),
            [sources.index(source) for source, _, _ in groups],
            [sources.index(source) for source, _, _ in config.numeric_columns or []],
            hidden,
            prompt_texts=config.prompt_texts,
            summaries=config.summary_tokens,
        )
        self.user_centre, self.answer_centre = Centre(hidden), Centre(hidden)
        self.projection = ProjectionHead(hidden, config.projection_dim, config.embedding_dim)
        self._preamble: Ints = np.asarray(tokenizer(config.preamble, split_special_tokens=True)["input_ids"], np.int64)
        self._encoders: dict[str, TextEncoder] = {}

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.prompt.user.device

    @property
    def llm_dtype(self) -> torch.dtype:
        """Compute type of the LLM; everything of ours is float32."""
        dtype: torch.dtype = self.llm.get_input_embeddings().weight.dtype  # type: ignore[operator]
        return dtype

    @property
    def focus_dim(self) -> int:
        """F."""
        return self.config.focus_dim or max((self.config.encoder_dims or {"": 1}).values())

    @property
    def backbone(self) -> nn.Module:
        """The LLM without its vocabulary head."""
        causal: Any = self.llm
        base: nn.Module = (causal.get_base_model() if hasattr(causal, "peft_config") else causal).base_model
        return base

    @property
    def max_prompt_tokens(self) -> int:
        """Longest prefix plus suffix the LLM's positions allow."""
        return int(getattr(self.backbone.config, "max_position_embeddings", None) or 1 << 30)

    def own_state(self) -> dict[str, torch.Tensor]:
        """Our weights and buffers by name, without the base LLM and LoRA."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("llm.")}

    def weights_digest(self) -> str:
        """SHA-256 over our weights and LoRA's; the base models are identified by `config`'s digests."""
        return hashlib.sha256(
            f"{saving.tensors_digest(self.own_state())} {saving.lora_digest(self)}".encode()
        ).hexdigest()

    def text_encoder(self, name: str) -> TextEncoder:
        """One of the frozen encoders, loaded on first use.

        Raises:
            VersionMismatchError: Its files are not those the model was made with.
        """
        if name not in self._encoders:
            encoder = TextEncoder.load(name, device=self.device)
            saving.require_digest("text encoder", name, encoder.version, (self.config.encoder_digests or {})[name])
            self._encoders[name] = encoder
        return self._encoders[name]

    # -- saving --------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json`, `model.safetensors` and, with LoRA, `lora/`; the folder appears complete or not at all.

        Raises:
            StorageError: The folder cannot be written.
        """
        saving.save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        llm: str | None = None,
        encoders: Mapping[str, str] | None = None,
        dtype: torch.dtype | str = torch.float32,
        merge_lora: bool = False,
    ) -> InstructUEModel:
        """Reads a saved model.

        Args:
            folder: A folder, or a Hugging Face name.
            llm: Where the base LLM is, if not where it was when the model was saved.
            encoders: Where the encoder of each source is, likewise.
            dtype: Compute type of the LLM, `float32` or `bfloat16`.
            merge_lora: Add LoRA's products to the LLM's weights: faster, but no longer trainable or savable.

        Raises:
            DataError: There are no weights, or they are cut short.
            UnsafeArtifactError: The weights are pickled.
            VersionMismatchError: The base LLM or an encoder is not the one the model was made with.
        """
        return saving.load(
            cls, str(folder), llm=llm, encoders=encoders, dtype=saving.torch_dtype(dtype), merge_lora=merge_lora
        )

    # -- pieces --------------------------------------------------------------------------------------------------

    def soft_tokens(self, source: str, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Soft tokens `[N, H]` of texts of a source, from their encoder vectors."""
        tokens: torch.Tensor = self.adapters[source](vectors_ND)
        return tokens

    def encoder_index(self, source: str) -> int:
        """Position of a source's encoder in `config.encoder_names`."""
        return self.config.encoder_names.index((self.config.encoders or {})[source])

    def focus_keys(self, source: str, vectors_ND: torch.Tensor) -> torch.Tensor:
        """Focus keys `[N, F]` of texts of a source, from their encoder vectors."""
        return self.focus.key(self.encoder_index(source), vectors_ND)

    def focus_queries(self, texts: Sequence[str]) -> torch.Tensor:
        """Focus queries `[encoders, K, F]` of instructions.

        An empty text gives a zero query: all similarities are equal, and the focus is the user's mean.
        """
        return self.queries(self.instruction_vectors(texts))

    def queries(self, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """Focus queries `[encoders, K, F]` of `instruction_vectors`."""
        # No bias: the query of a zero vector is zero.
        return torch.stack([self.focus.query(index, one.to(self.device)) for index, one in enumerate(vectors)])

    def instruction_vectors(
        self, texts: Sequence[str], shifts: Sequence[npt.NDArray[np.float32] | None] = ()
    ) -> tuple[torch.Tensor, ...]:
        """`[K, D]` vectors of instructions from each encoder; zero for an empty text.

        Args:
            texts: K instructions.
            shifts: What tuning adds to each, over all encoders; None for nothing.

        Raises:
            ConfigError: A shift does not have the encoders' size.
        """
        blank = torch.tensor([not text for text in texts])[:, None]
        encoders = [self.text_encoder(name) for name in self.config.encoder_names]
        found = [torch.from_numpy(one.encode(texts)).masked_fill(blank, 0.0) for one in encoders]
        dims = [one.dim for one in encoders]
        for row, shift in enumerate(shifts):
            if shift is None:
                continue
            if shift.shape != (sum(dims),):
                raise ConfigError(
                    f"shift of shape {list(shift.shape)}, the encoders want [{sum(dims)}]", "tune it for this model"
                )
            for own, part in zip(found, torch.split(torch.from_numpy(shift), dims), strict=True):
                own[row] += part
        return tuple(found)

    def suffix(
        self,
        text: str,
        *,
        soft_prompt: torch.Tensor | None = None,
        answer_ids: Ints | None = None,
        vectors: tuple[torch.Tensor, ...] | None = None,
    ) -> Suffix:
        """The suffix of an instruction text.

        Args:
            text: The instruction.
            soft_prompt: Tuned `[P, H]` vectors.
            answer_ids: LLM tokens behind `<USER>`; training only.
            vectors: `[D]` vector of the text from each encoder, if they are at hand.

        Raises:
            ConfigError: The soft prompt does not have the LLM's hidden size.
        """
        if soft_prompt is not None and (soft_prompt.dim() != 2 or soft_prompt.shape[1] != self.config.hidden_size):
            raise ConfigError(
                f"soft prompt of shape {list(soft_prompt.shape)}, the LLM wants [any, {self.config.hidden_size}]",
                "tune it for this model",
            )
        ids = self.word_ids(f"Instruction: {text}") if text else np.zeros(0, np.int64)
        answer = np.zeros(0, np.int64) if answer_ids is None else answer_ids
        if vectors is None:
            vectors = tuple(one[0] for one in self.instruction_vectors([text]))
        return Suffix(ids, None if soft_prompt is None else soft_prompt.to(self.device), answer, vectors)

    def prefix_lengths(self, batch_history: Any) -> Ints:
        """`[B]` tokens of each user's prefix."""
        return self.prompt.prefix_lengths(batch_history, len(self._preamble))

    def word_ids(self, text: str) -> Ints:
        """LLM tokens of a text; markup in it is read as plain characters."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return np.asarray(ids, np.int64)

    def answer_ids(self, text: str) -> Ints:
        """LLM tokens of an answer, its end included: what the next-token loss predicts and the answer tower reads."""
        return np.append(self.word_ids(text), np.int64(self.tokenizer.eos_token_id))

    def answer_embeddings(self, answers: Sequence[Ints]) -> torch.Tensor:
        """Embeds answers in the space of the users: same LLM, last token, same projection.

        Args:
            answers: A answers, each as `answer_ids` gives it.

        Returns:
            `[A, embedding_dim]` float32 unit vectors.

        Source: Q-Anchor (arXiv 2602.14492).
        """
        longest = max(len(one) for one in answers)
        ids_AS = np.zeros((len(answers), longest + 1), np.int64)
        for row, ids in enumerate(answers):
            ids_AS[row, : len(ids)] = ids
        last_A = torch.tensor([len(one) for one in answers], device=self.device)
        embed = self.llm.get_input_embeddings()  # type: ignore[operator]
        words_ASH = embed(torch.from_numpy(ids_AS).to(self.device)).float()
        readout_AS1 = (torch.arange(longest + 1, device=self.device) == last_A[:, None])[:, :, None]
        inputs_ASH = torch.where(readout_AS1, self.prompt.answer, words_ASH).to(self.llm_dtype)
        # Causal, and padded on the right only: nothing before the readout sees the padding.
        hidden_ASH = self.backbone(inputs_embeds=inputs_ASH, use_cache=False).last_hidden_state
        rows = torch.arange(len(answers), device=self.device)
        embeddings: torch.Tensor = self.projection(self.answer_centre(hidden_ASH[rows, last_A]))
        return embeddings

    # -- the pass ------------------------------------------------------------------------------------------------

    def instruction_states(self, suffixes: Iterable[Suffix]) -> InstructionStates:
        """Reads instructions once, to be shared by any number of forward passes.

        Raises:
            ConfigError: An instruction is longer than `config.instruction_tokens`.
        """
        return read_instructions(
            self.backbone,
            self.llm.get_input_embeddings(),  # type: ignore[operator]
            suffixes,
            prefix_start=self.config.instruction_tokens,
            dtype=self.llm_dtype,
            device=self.device,
            in_line=self._checkpoints,
        )

    def forward(
        self,
        batch: UserBatch,
        suffixes: Sequence[Sequence[Suffix]],
        similarity_TK: torch.Tensor,
        states: InstructionStates | None = None,
    ) -> ModelOutput:
        """One pass of the LLM over B users and all their suffixes.

        Args:
            batch: B users.
            suffixes: K suffixes of each user.
            similarity_TK: Similarity of each text and its user's k-th instruction.
            states: `instruction_states` of all suffixes, if they are at hand.
        """
        states = states or self.instruction_states(one for own in suffixes for one in own)
        history = batch.history
        padded = self.prompt.pad(batch)
        values_BC = torch.from_numpy(np.ascontiguousarray(history.tabular_numeric)).to(self.device)
        focus = self._focus(padded, similarity_TK)
        tokens_BKH = self._focus_tokens(focus, values_BC, suffixes)
        numeric_BGH = self.numeric(values_BC)
        inputs, prompts = self.prompt.assemble(
            batch,
            padded,
            numeric_BGH,
            tokens_BKH,
            suffixes,
            self._preamble,
            self.llm.get_input_embeddings(),  # type: ignore[operator]
            step=_STEP_OF_HALVES if self.llm_dtype == torch.bfloat16 else 1,
        )
        log_gate_BL, log_gate_BS = padded.log_gate(), None
        if log_gate_BL is not None:
            text_BS = torch.from_numpy(prompts.row_BS).to(self.device) - inputs.first_text
            log_gate_T = log_gate_BL.flatten()[padded.place_T]
            log_gate_BS = torch.where(text_BS >= 0, log_gate_T[text_BS.clamp(min=0)], 0.0)
        hidden_BSH = self._run_llm(inputs, prompts, states, numbers_of(states, suffixes), log_gate_BS)
        users = torch.arange(len(history), device=self.device)[:, None]
        readout_BKH = hidden_BSH[users, torch.from_numpy(prompts.readout_BK).to(self.device)]
        return ModelOutput(self.projection(self.user_centre(readout_BKH)), hidden_BSH, prompts, focus.weights)

    def focus_tokens(
        self, batch: UserBatch, suffixes: Sequence[Sequence[Suffix]], similarity_TK: torch.Tensor
    ) -> torch.Tensor:
        """`[B, K, H]` focus tokens, as `forward` puts them into the prompt."""
        values_BC = torch.from_numpy(np.ascontiguousarray(batch.history.tabular_numeric)).to(self.device)
        return self._focus_tokens(self._focus(self.prompt.pad(batch), similarity_TK), values_BC, suffixes)

    def _focus_tokens(
        self, focus: FocusResult, values_BC: torch.Tensor, suffixes: Sequence[Sequence[Suffix]]
    ) -> torch.Tensor:
        if not self.config.focus_token:  # says nothing, but keeps its place
            return self.focus.nothing.expand_as(focus.tokens)
        if self.number_focus is None or not focus.tokens.shape[1]:
            return focus.tokens
        distinct = {id(one.vectors): one.vectors for own in suffixes for one in own}
        place = {key: number for number, key in enumerate(distinct)}
        weights_MC = self.number_focus.weights(
            [torch.stack(own).to(self.device) for own in zip(*distinct.values(), strict=True)]
        )
        number_BK = torch.tensor([[place[id(one.vectors)] for one in own] for own in suffixes], device=self.device)
        tokens: torch.Tensor = focus.tokens + self.number_focus(
            weights_MC[number_BK], *self.numeric.standardised(values_BC)
        )
        return tokens

    def _focus(self, padded: PaddedUsers, similarity_TK: torch.Tensor) -> FocusResult:
        similarity_BLK = similarity_TK.new_zeros(*padded.text_BL.shape, similarity_TK.shape[1])
        if len(similarity_TK):
            similarity_BLK = similarity_TK[padded.text_BL]
        result: FocusResult = self.focus(similarity_BLK, padded)
        return result

    @property
    def _checkpoints(self) -> bool:
        """Whether layers are recomputed in the backward pass, which Transformers does not do with cached keys."""
        return self.training and any(getattr(one, "gradient_checkpointing", False) for one in self.backbone.modules())

    def _run_llm(
        self,
        inputs: PromptInputs,
        prompts: PackedPrompts,
        states: InstructionStates,
        numbers: list[Ints],
        log_gate_BS: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Last hidden states `[B, S, H]`."""
        asks = np.stack([np.append(own, -1) for own in numbers])  # the last for prefix and padding
        asks_BS = np.take_along_axis(asks, np.maximum(prompts.segment_BS, 0) - 1, axis=1)
        laid = Prompts(
            inputs_BSH=inputs.fill(prompts.row_BS, self.llm_dtype),
            segment_BS=torch.from_numpy(prompts.segment_BS).to(self.device),
            position_BS=torch.from_numpy(prompts.position_BS).to(self.device) + self.config.instruction_tokens,
            asks_BS=torch.from_numpy(asks_BS).to(self.device),
            prefix_places=prompts.prefix_places,
            bias_BS=log_gate_BS,
        )
        return (run_in_line if self._checkpoints else run_in_two)(self.backbone, laid, states)

    def focus_weights(self, batch: UserBatch, similarity_TK: torch.Tensor) -> npt.NDArray[np.float32]:
        """`[T, K]` what each instruction looks at, over each user's texts a distribution; needs no LLM."""
        padded = self.prompt.pad(batch)
        result = self._focus(padded, similarity_TK)
        weights: npt.NDArray[np.float32] = result.weights[padded.valid_BL].detach().cpu().numpy()
        return weights
