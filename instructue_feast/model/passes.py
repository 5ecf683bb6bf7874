"""How the LLM is run over packed prompts: prefixes first, then suffixes with all that went before as their past.

So no query of a prefix meets an instruction's key, and a suffix, two tokens long, is all that is paid per instruction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from instructue_feast.model import attention
from instructue_feast.model.instruction_states import InstructionStates, asked_mask, own_mask
from instructue_feast.model.layout import additive, block_mask

# B = users, S = prompt length, P = places of the prefix, Q = places of suffixes, I = tokens of all instructions,
# H = hidden size

Layers = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of every layer."""


@dataclass(frozen=True, slots=True)
class Prompts:
    """What the LLM reads.

    Attributes:
        inputs_BSH: Token embeddings in the LLM's type.
        segment_BS: See `layout.PackedPrompts`.
        position_BS: Position ids.
        asks_BS: Number of the instruction each token belongs to; -1 for none.
        prefix_places: P.
        bias_BS: What a gate adds to the logits of each token as a key; None for nothing.
    """

    inputs_BSH: torch.Tensor
    segment_BS: torch.Tensor
    position_BS: torch.Tensor
    asks_BS: torch.Tensor
    prefix_places: int
    bias_BS: torch.Tensor | None = None


def run_in_two(backbone: nn.Module, prompts: Prompts, states: InstructionStates) -> torch.Tensor:
    """Last hidden states `[B, S, H]`: a pass over the prefixes, one over the suffixes. Those of prefixes are zero.

    Nobody reads them: a suffix needs the keys and values of its prefix only.
    """
    places = prompts.prefix_places
    users = len(prompts.segment_BS)
    past = _read_prefixes(backbone, prompts)
    if states.layers:
        past = [
            (
                torch.cat([key.expand(users, -1, -1, -1), own_key], 2),
                torch.cat([value.expand(users, -1, -1, -1), own], 2),
            )
            for (key, value), (own_key, own) in zip(states.layers, past, strict=True)
        ]
    visible_BQS = block_mask(prompts.segment_BS, first_query=places)
    visible_BQK = torch.cat([asked_mask(states, prompts.asks_BS[:, places:]), visible_BQS], dim=2)
    suffix = _run(backbone, prompts, slice(places, None), visible_BQK, DynamicCache(past))
    hidden: torch.Tensor = suffix.last_hidden_state
    return nn.functional.pad(hidden, (0, 0, places, 0))


def prefix_states(backbone: nn.Module, inputs_BPH: torch.Tensor, position_BP: torch.Tensor) -> Layers:
    """Keys and values `[B, heads, P, size]` of prefixes in every layer, padded on the right.

    What stands at padding is anything; nothing that is not padding looks at it.
    """
    config: Any = backbone.config
    assert config._attn_implementation == attention.NAME, config._attn_implementation
    cache = DynamicCache()
    with attention.keys_only(config.num_hidden_layers):
        backbone(
            inputs_embeds=inputs_BPH,
            attention_mask=inputs_BPH.new_zeros(1, 1, 1, 1),  # or Transformers would make one of its own
            position_ids=position_BP,
            past_key_values=cache,
            use_cache=True,
        )
    return [(layer.keys, layer.values) for layer in cache.layers]


def _read_prefixes(backbone: nn.Module, prompts: Prompts) -> Layers:
    places = prompts.prefix_places
    if prompts.bias_BS is None:
        return prefix_states(backbone, prompts.inputs_BSH[:, :places], prompts.position_BS[:, :places])
    visible_BPP = block_mask(prompts.segment_BS[:, :places])
    output = _run(backbone, prompts, slice(0, places), visible_BPP, DynamicCache())
    return [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def run_in_line(backbone: nn.Module, prompts: Prompts, states: InstructionStates) -> torch.Tensor:
    """The same with everything in one row, instructions first, as gradient checkpointing needs: it keeps no keys."""
    users, length = prompts.segment_BS.shape
    own_BII = nn.functional.pad(own_mask(states), (0, length)).expand(users, -1, -1)
    rest_BSK = torch.cat([asked_mask(states, prompts.asks_BS), block_mask(prompts.segment_BS)], dim=2)
    shift = len(states.owner_I)
    bias_BS = prompts.bias_BS
    wider = Prompts(
        inputs_BSH=torch.cat([states.inputs_IH.expand(users, -1, -1), prompts.inputs_BSH], dim=1),
        segment_BS=prompts.segment_BS,
        position_BS=torch.cat([states.position_I.expand(users, -1), prompts.position_BS], dim=1),
        asks_BS=prompts.asks_BS,
        prefix_places=prompts.prefix_places,
        bias_BS=None if bias_BS is None else nn.functional.pad(bias_BS, (shift, 0)),
    )
    output = _run(backbone, wider, slice(0, None), torch.cat([own_BII, rest_BSK], dim=1), None)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden[:, shift:]


def _run(
    backbone: nn.Module, prompts: Prompts, queries: slice, visible_BQK: torch.Tensor, past: DynamicCache | None
) -> Any:
    inputs = prompts.inputs_BSH[:, queries]
    mask = additive(visible_BQK, inputs.dtype)
    if prompts.bias_BS is not None:
        last = prompts.bias_BS[:, : queries.stop]  # the keys of this pass are the last of all, instructions come first
        bias = nn.functional.pad(last, (mask.shape[-1] - last.shape[1], 0))
        mask = mask + bias[:, None, None].to(mask.dtype)
    return backbone(
        inputs_embeds=inputs,
        attention_mask=mask,
        position_ids=prompts.position_BS[:, queries],
        past_key_values=past,
        use_cache=past is not None,
    )
