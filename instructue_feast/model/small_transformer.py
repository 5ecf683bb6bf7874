"""A small Transformer in the place of the LLM: what remains of the model without one. For ablations.

The layers of the LLM go; theirs is what was learned from text. A random Llama takes their place and trains with
everything else. Words still need vectors, or instructions would be noise: they are those of the LLM's embedding table,
brought to the smaller size by fixed orthonormal directions, and stay frozen, also as the vocabulary head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from instructue_feast.model import attention
from instructue_feast.model.seeding import orthonormal

# V = vocabulary, D = hidden size of the LLM, H = hidden size of the small Transformer

MAX_LAYERS = 6
"""It has as many layers as the LLM, up to this."""

_HEAD_SIZES = (64, 48, 32, 16)
_WORDS = ("model.embed_tokens.", "lm_head.")


def small_transformer(llm: nn.Module, hidden: int, *, seed: int) -> nn.Module:
    """A random Llama that reads the words of an LLM; always float32, as all its weights train.

    Args:
        llm: The LLM whose embedding table it reads; only that is used.
        hidden: H, a multiple of 16.
        seed: Seed of the layers.
    """
    source: Any = llm
    words_VD = source.get_input_embeddings().weight.detach().float()
    config = LlamaConfig(
        vocab_size=len(words_VD),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=min(source.config.num_hidden_layers, MAX_LAYERS),
        num_attention_heads=hidden // next(size for size in _HEAD_SIZES if hidden % size == 0),
        max_position_embeddings=source.config.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        small: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME)
    with torch.no_grad():
        directions_HD = orthonormal(hidden, words_VD.shape[1], seed=seed, name="words").to(words_VD.device)
        small.get_input_embeddings().weight.copy_(words_VD @ directions_HD.T)
    network: nn.Module = small.eval()
    return network


def layer_weights(small: nn.Module) -> dict[str, torch.Tensor]:
    """Its own weights by name: everything but the words."""
    return {name: one for name, one in small.named_parameters() if not name.startswith(_WORDS)}
