"""Kept prefixes: what they give is what the model gives, however the soft prompt changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instructue_feast.errors import ConfigError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.training.user_prefixes import InstructionReader, UserPrefixes
from tests.model_data import make_history, make_model, make_soft_prompt, make_table

SIZES = [(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)]
HISTORY = make_history(SIZES)
TEXTS = ("Will the user stop coming?", "")
WORDS = Instruction("plain", TEXTS[0])


def soft_prompt(model, tokens=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, model.config.hidden_size, generator=generator) * 0.5


def reader_of(model, encoder, text, tokens, **changes):
    prefixes = UserPrefixes(model, make_table(model, encoder), HISTORY, **changes)
    return InstructionReader(prefixes, model.suffix(text), tokens)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("settings", [{}, {"prompt_texts": 3}, {"focus_token": False}, {"llm_layers": 1}], ids=str)
def test_kept_prefixes_give_what_the_model_gives(llm, encoder, text, settings):
    model = make_model(llm, encoder, **settings)
    model.user_centre.mean.normal_(generator=torch.Generator().manual_seed(3))  # as in a trained model
    model.user_centre.rms.fill_(1.7)
    prompt = make_soft_prompt(model, shift=0.3)
    tuned = Instruction("tuned", text, soft_prompt=prompt.digest)
    embedder = UserEmbedder(model, make_table(model, encoder), soft_prompts={tuned.content_hash: prompt})
    soft, shift = torch.from_numpy(prompt.vectors), torch.from_numpy(prompt.shift)
    with_prompt = reader_of(model, encoder, text, 3).embed(np.arange(len(SIZES)), soft, shift)
    without = reader_of(model, encoder, text, 0).embed(np.arange(len(SIZES)), None)
    np.testing.assert_allclose(with_prompt.detach(), embedder.encode(HISTORY, [tuned])[:, 0], atol=1e-5)
    np.testing.assert_allclose(without, embedder.encode(HISTORY, [Instruction("plain", text)])[:, 0], atol=1e-5)
    assert (with_prompt - without).abs().max() > 1e-3


def test_the_gradient_of_the_soft_prompt_is_that_of_the_full_pass(llm, encoder):
    model = make_model(llm, encoder)
    table = make_table(model, encoder)
    direction = torch.randn(model.config.embedding_dim, generator=torch.Generator().manual_seed(1))
    fast = soft_prompt(model).requires_grad_()
    slow = soft_prompt(model).requires_grad_()
    (reader_of(model, encoder, TEXTS[0], 3).embed(np.arange(len(SIZES)), fast) @ direction).sum().backward()
    embedder = UserEmbedder(model, table)
    batch, similarity = embedder._gather(HISTORY, embedder._prepare([Instruction("plain", TEXTS[0])]))
    suffix = model.suffix(TEXTS[0], soft_prompt=slow)
    (model(batch, [[suffix]] * len(SIZES), similarity.clone()).embeddings @ direction).sum().backward()
    assert fast.grad.abs().max() > 1e-3
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-4)


def test_the_gradient_of_the_shift_is_that_of_the_full_pass(llm, encoder):
    model = make_model(llm, encoder)
    table = make_table(model, encoder)
    direction = torch.randn(model.config.embedding_dim, generator=torch.Generator().manual_seed(1))
    start = torch.from_numpy(make_soft_prompt(model, shift=0.3).shift)
    fast, slow = (start.clone().requires_grad_() for _ in range(2))
    (reader_of(model, encoder, TEXTS[0], 0).embed(np.arange(len(SIZES)), None, fast) @ direction).sum().backward()
    batch, _ = UserEmbedder(model, table)._gather(HISTORY, UserEmbedder(model, table)._prepare([WORDS]))
    vectors = (model.instruction_vectors([TEXTS[0]])[0][0] + slow,)
    keys = table.focus_keys[torch.from_numpy(table.rows(HISTORY.text_id))]
    similarity = keys @ model.queries([vectors[0][None]])[0].T
    suffix = model.suffix(TEXTS[0], vectors=vectors)
    (model(batch, [[suffix]] * len(SIZES), similarity).embeddings @ direction).sum().backward()
    assert fast.grad.abs().max() > 1e-4
    torch.testing.assert_close(fast.grad, slow.grad, atol=1e-5, rtol=1e-4)


def test_some_users_in_any_order_are_those_users(llm, encoder):
    model = make_model(llm, encoder)
    reader, soft = reader_of(model, encoder, TEXTS[0], 3), soft_prompt(model)
    whole = reader.embed(np.arange(len(SIZES)), soft)
    torch.testing.assert_close(reader.embed(np.array([4, 0, 4]), soft), whole[[4, 0, 4]], atol=1e-5, rtol=0)


def test_too_much_to_keep_is_refused(llm, encoder):
    with pytest.raises(ConfigError, match="fewer shots"):
        reader_of(make_model(llm, encoder), encoder, TEXTS[0], 3, max_bytes=1000)


def test_a_soft_prompt_that_does_not_fit_beside_the_instruction_is_refused(llm, encoder):
    with pytest.raises(ConfigError, match="fewer tokens"):
        reader_of(make_model(llm, encoder), encoder, TEXTS[0], 120)
