"""How the LLM is run: prefixes for their keys and values only, and never more logits than fit."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
import torch

from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.model import attention
from instructue_feast.model.layout import PREFIX
from tests.largest_tensor import LargestTensor
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_table

HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (12, 0, 1)])
NOTHING = Instruction("nothing", "")


@pytest.fixture(scope="module")
def embedder(tiny):
    model = make_model(*tiny)
    return UserEmbedder(model, make_table(model, tiny[1]))


def plain_forward(embedder, history):
    """The vector without an instruction, user by user, by the LLM with the attention Transformers takes itself."""
    model, vectors = embedder.model, []
    backbone = model.backbone
    for user in range(len(history)):
        batch, suffix, similarity = embedder.inputs(history.take([user]), NOTHING)
        padded = model.prompt.pad(batch)
        numbers = torch.from_numpy(batch.history.tabular_numeric)
        focus = model.focus_tokens(batch, [[suffix]], similarity)
        inputs, prompts = model.prompt.assemble(
            batch, padded, model.numeric(numbers), focus, [[suffix]], model._preamble, model.llm.get_input_embeddings()
        )
        assert (prompts.segment_BS >= PREFIX).all()
        backbone.set_attn_implementation("sdpa")
        try:
            hidden = backbone(inputs_embeds=inputs.fill(prompts.row_BS, model.llm_dtype)).last_hidden_state
        finally:
            backbone.set_attn_implementation(attention.NAME)
        vectors.append(model.projection(model.user_centre(hidden[:, -1])))
    return torch.cat(vectors).detach().numpy()


def test_the_vector_without_an_instruction_is_what_a_plain_loop_computes(embedder):
    ours = embedder.encode(HISTORY, [NOTHING])[:, 0]
    np.testing.assert_allclose(ours, plain_forward(embedder, HISTORY), atol=1e-5)


def test_the_last_layer_sees_suffixes_only(embedder):
    seen = {"first": 0, "last": 0}

    def count(name):
        return lambda _module, args: seen.__setitem__(name, seen[name] + args[0].shape[0] * args[0].shape[1])

    embedder.encode(HISTORY, INSTRUCTIONS)  # reads the instructions
    layers = embedder.model.backbone.layers
    hooks = [
        layers[0].mlp.register_forward_pre_hook(count("first")),
        layers[-1].mlp.register_forward_pre_hook(count("last")),
    ]
    embedder.encode(HISTORY, INSTRUCTIONS)
    for hook in hooks:
        hook.remove()
    assert seen["last"] == 2 * len(INSTRUCTIONS) * len(HISTORY)
    assert seen["first"] >= seen["last"] + embedder.model.prefix_lengths(HISTORY).sum()


def test_leaving_the_last_layer_is_forgotten_afterwards(embedder):
    with attention.keys_only(1), pytest.raises(RuntimeError, match="mine"):
        raise RuntimeError("mine")
    plain = torch.nn.Linear(2, 2)
    query = torch.zeros(1, 2, 3, 4)
    attention.attention(plain, query, query, query, None)  # without a layer_idx it would fail inside keys_only


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention_is_the_same_by_every_path(dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 37, 8, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, 37, 8, generator=generator).to(dtype) for _ in range(2))
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = 3, True
    mask = torch.full((37, 37), torch.finfo(dtype).min, dtype=dtype).triu(1)[None, None]
    masked, _ = attention.attention(layer, query, key, value, mask)
    causal, _ = attention.attention(layer, query, key, value, None)
    with patch.object(attention, "MOST_LOGITS", 1):
        fused, _ = attention.attention(layer, query, key, value, mask)
    tolerance = {"atol": 1e-5 if dtype == torch.float32 else 2e-2, "rtol": 0}
    torch.testing.assert_close(causal, masked, **tolerance)
    torch.testing.assert_close(fused, masked, **tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whale_needs_memory_in_proportion_to_its_length(tiny, dtype):
    """No tensor of a pass grows with the square of a prompt, whichever way attention is computed."""
    model = make_model(*tiny, dtype=getattr(torch, dtype))
    own = UserEmbedder(model, make_table(model, tiny[1]))
    largest = []
    # So little that both whales are over it; the largest tensor is then one of tokens times hidden or inner size.
    with patch.object(attention, "MOST_LOGITS", 1 << 12):
        for texts in (400, 800):
            history = make_history([(texts, 0, 0)])
            own.encode(history, [NOTHING])
            with LargestTensor() as mode:
                own.encode(history, [NOTHING])
            largest.append(mode.bytes)
    assert largest[1] < 2.2 * largest[0]
    widest = model.backbone.config.intermediate_size
    assert largest[1] <= own.model.prefix_lengths(history).max() * widest * 4 * 2
