"""Instructions, read once for all users.

An instruction stands before the user in the prompt and looks at nothing but itself. So what the LLM makes of it (its
keys and values in every layer) is the same for every user: it is computed once per set of instructions, and a user
pays two tokens per instruction, focus and `<USER>`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from instructue_feast.errors import ConfigError
from instructue_feast.model.prompt import Suffix

# M = distinct instructions, N = tokens of the longest, I = tokens of all, B = users, S = prompt length, H = hidden size

Key = tuple[bytes, int]


@dataclass(frozen=True, slots=True)
class InstructionStates:
    """M distinct instructions as the LLM sees them.

    Attributes:
        index: Number of each distinct instruction, by `key_of`.
        owner_I: `[I]` int64 number of the instruction each token belongs to.
        position_I: `[I]` int64 position ids; an instruction ends where the prefix begins.
        inputs_IH: `[I, H]` token embeddings.
        layers: Keys and values `[1, heads, I, head size]` of every layer; empty when they are computed in line.
    """

    index: dict[Key, int]
    owner_I: torch.Tensor
    position_I: torch.Tensor
    inputs_IH: torch.Tensor
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def number_of(self, suffix: Suffix) -> int:
        """Number of a suffix's instruction."""
        return self.index[key_of(suffix)]


def key_of(suffix: Suffix) -> Key:
    """What tells one instruction from another; answers do not count."""
    return suffix.token_ids.tobytes(), 0 if suffix.soft_prompt is None else id(suffix.soft_prompt)


def read_instructions(
    backbone: nn.Module,
    embed: Any,
    suffixes: Iterable[Suffix],
    *,
    prefix_start: int,
    dtype: torch.dtype,
    device: torch.device,
    in_line: bool,
) -> InstructionStates:
    """Runs the LLM over each distinct instruction alone.

    Args:
        backbone: The LLM without its head.
        embed: Its input embedding.
        suffixes: Whose instructions.
        prefix_start: Position at which every prefix begins.
        dtype: Compute type of the LLM.
        device: Where it computes.
        in_line: Leave keys and values out, because the instructions are going to be part of every user's row.

    Raises:
        ConfigError: An instruction is longer than `prefix_start`.
    """
    distinct: dict[Key, Suffix] = {}
    for one in suffixes:
        distinct.setdefault(key_of(one), one)
    lengths = [one.num_instruction_tokens for one in distinct.values()]
    longest = max(lengths, default=0)
    if longest > prefix_start:
        raise ConfigError(
            f"an instruction of {longest} tokens, the model takes {prefix_start}",
            "shorten it, or train a model with larger `instruction_tokens`",
        )
    if longest == 0:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return InstructionStates(dict.fromkeys(distinct, 0), nothing, nothing, embed(nothing).to(dtype), ())
    inputs_MNH = torch.stack([_inputs(one, embed, longest, device) for one in distinct.values()]).to(dtype)
    length_M1 = torch.tensor(lengths, device=device)[:, None]
    places = torch.arange(longest, device=device)[None, :]
    position_MN = (prefix_start - length_M1 + places).clamp(max=prefix_start - 1)
    valid_MN = places < length_M1
    owner_I = valid_MN.nonzero()[:, 0]
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    if not in_line:
        # Causal, and padded on the right only: no token sees the padding.
        past = backbone(inputs_embeds=inputs_MNH, position_ids=position_MN, use_cache=True).past_key_values
        layers = [(_flat(layer.keys, valid_MN), _flat(layer.values, valid_MN)) for layer in past.layers]
    index = {key: number for number, key in enumerate(distinct)}
    return InstructionStates(index, owner_I, position_MN[valid_MN], inputs_MNH[valid_MN], tuple(layers))


def _inputs(suffix: Suffix, embed: Any, longest: int, device: torch.device) -> torch.Tensor:
    """`[N, H]` float32: words, then the soft prompt, then zeros."""
    words: torch.Tensor = embed(torch.from_numpy(suffix.token_ids).to(device)).float()
    parts = [words] if suffix.soft_prompt is None else [words, suffix.soft_prompt.float()]
    rows = torch.cat(parts)
    return nn.functional.pad(rows, (0, 0, 0, longest - len(rows)))


def _flat(states: torch.Tensor, valid_MN: torch.Tensor) -> torch.Tensor:
    """`[M, heads, N, size]` to `[1, heads, I, size]` without the padding."""
    return states.transpose(1, 2)[valid_MN].transpose(0, 1)[None]


def asked_mask(states: InstructionStates, asks_BS: torch.Tensor) -> torch.Tensor:
    """`[B, S, I]` bool: which instruction tokens each prompt token may see.

    Args:
        states: The instructions.
        asks_BS: Number of the instruction each token belongs to; -1 for none.
    """
    return asks_BS[:, :, None] == states.owner_I


def own_mask(states: InstructionStates) -> torch.Tensor:
    """`[I, I]` bool: an instruction token sees its own instruction up to itself."""
    places = torch.arange(len(states.owner_I), device=states.owner_I.device)
    return (states.owner_I[:, None] == states.owner_I) & (places[:, None] >= places)


def numbers_of(states: InstructionStates, suffixes: Sequence[Sequence[Suffix]]) -> list[np.ndarray[Any, Any]]:
    """Number of the instruction of each suffix of each user; -1 for an empty one."""
    return [
        np.array([states.number_of(one) if one.num_instruction_tokens else -1 for one in own], np.int64)
        for own in suffixes
    ]
