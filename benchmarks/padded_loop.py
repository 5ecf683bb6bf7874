"""The peer of our embedding path: what a user of Transformers would write.

One prompt per user and instruction, `history, instruction, <USER>`, as token embeddings; batches of 16 in the order
they arrive, padded to the longest, with an attention mask; the LLM without its head; the last token's hidden state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from instructue_feast.history.pack import PackedHistory
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.model.layout import PREFIX

BATCH = 16
_USERS = 64


class PaddedLoop:
    """The same LLM with the attention Transformers takes by default, and the prompts of some users.

    The embeddings of a user's history and of an instruction's words are made here, beforehand: the loop gets them for
    nothing. Its instructions stand behind the history, as nothing is shared between its prompts.

    Args:
        embedder: Our path, whose LLM and token embeddings are taken.
        prefixes: `[P, H]` token embeddings of each user's history.
        left: Pad on the left, as for generation.
    """

    def __init__(self, embedder: UserEmbedder, prefixes: list[torch.Tensor], *, left: bool = False) -> None:
        self._model, self._prefixes, self._left = embedder.model, prefixes, left
        self.backbone = copy.deepcopy(embedder.model.backbone)
        self.backbone.set_attn_implementation("sdpa")

    @torch.inference_mode()
    def encode(self, instructions: Sequence[Instruction]) -> np.ndarray:
        """`[U, K, D]` unit vectors; the K prompts of a user follow one another, which pads less than K rounds would."""
        tails = [self._tail(one) for one in instructions]
        vectors = self.encode_behind([tail for _ in self._prefixes for tail in tails])
        return vectors.reshape(len(self._prefixes), len(tails), -1)

    @torch.inference_mode()
    def encode_behind(self, tails: Sequence[torch.Tensor]) -> np.ndarray:
        """`[n, D]` unit vectors of prompts: each history with its share of the given tails `[., H]`, in order."""
        each = len(tails) // len(self._prefixes)
        prompts = [torch.cat([self._prefixes[row // each], tail]) for row, tail in enumerate(tails)]
        return np.concatenate(list(self._batches(prompts)))

    def num_tokens(self, instructions: Sequence[Instruction]) -> int:
        """Tokens of all prompts, without padding."""
        tails = sum(len(self._tail(one)) for one in instructions)
        return len(instructions) * sum(map(len, self._prefixes)) + len(self._prefixes) * tails

    def _batches(self, prompts: list[torch.Tensor]) -> Iterator[np.ndarray]:
        side = "left" if self._left else "right"
        for start in range(0, len(prompts), BATCH):
            own = prompts[start : start + BATCH]
            length_B = torch.tensor([len(one) for one in own], device=own[0].device)
            inputs_BSH = pad_sequence(own, batch_first=True, padding_side=side)
            places = torch.arange(inputs_BSH.shape[1], device=length_B.device)
            if self._left:
                mask_BS = places >= len(places) - length_B[:, None]
                last_B = torch.full_like(length_B, len(places) - 1)
                position_BS = (mask_BS.long().cumsum(1) - 1).clamp(min=0)
            else:
                mask_BS, last_B = places < length_B[:, None], length_B - 1
                position_BS = places.expand(len(own), -1)
            hidden_BSH = self.backbone(
                inputs_embeds=inputs_BSH, attention_mask=mask_BS.long(), position_ids=position_BS, use_cache=False
            ).last_hidden_state
            last_BH = hidden_BSH[torch.arange(len(own), device=last_B.device), last_B]
            yield self._model.projection(self._model.user_centre(last_BH)).cpu().numpy()

    def _tail(self, instruction: Instruction) -> torch.Tensor:
        """Words of the instruction, then `<USER>`."""
        words = self._model.word_ids(f"Instruction: {instruction.text}")
        embedded = self._model.llm.get_input_embeddings()(torch.from_numpy(words).to(self._model.device))
        user = self._model.prompt.user.to(embedded.dtype)
        return torch.cat([embedded, user])


@torch.inference_mode()
def prompt_embeddings(
    embedder: UserEmbedder, history: PackedHistory, instruction: Instruction
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token embeddings as our path lays them, in the LLM's type.

    Returns:
        `[P, H]` of each user's history, and `[2, H]` of each user's focus token and `<USER>`.
    """
    model = embedder.model
    prefixes: list[torch.Tensor] = []
    suffixes: list[torch.Tensor] = []
    for start in range(0, len(history), _USERS):
        part = history.take(range(start, min(start + _USERS, len(history))))
        batch, suffix, similarity_T1 = embedder.inputs(part, instruction)
        own = [[suffix]] * len(part)
        values_BC = torch.from_numpy(part.tabular_numeric).to(model.device)
        focus_B1H = model.focus_tokens(batch, own, similarity_T1)
        inputs, prompts = model.prompt.assemble(
            batch, model.prompt.pad(batch), model.numeric(values_BC), focus_B1H, own,
            model.word_ids(model.config.preamble), model.llm.get_input_embeddings(),
        )  # fmt: skip
        rows_BSH = inputs.fill(prompts.row_BS, model.llm_dtype)
        for row_SH, segment_S in zip(rows_BSH, prompts.segment_BS, strict=True):
            prefixes.append(row_SH[torch.from_numpy(segment_S == PREFIX)].clone())
            suffixes.append(row_SH[torch.from_numpy(segment_S > PREFIX)].clone())
    return prefixes, suffixes
