"""The default models, once: what tiny models show holds for them too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.model.encoders import TextEncoder
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_table

pytestmark = pytest.mark.real_models


@pytest.fixture(scope="module")
def embedder():
    model = make_model("smollm2-135m-instruct", "all-minilm-l6-v2", embedding_dim=128)
    return UserEmbedder(model, make_table(model, "all-minilm-l6-v2"))


def test_eight_instructions_in_one_pass_equal_eight_passes_with_the_default_models(embedder):
    history = make_history([(5, 3, 1)])
    together = embedder.encode(history, INSTRUCTIONS)
    alone = np.concatenate([embedder.encode(history, [one]) for one in INSTRUCTIONS], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-4)
    assert np.abs(together[:, 1] - together[:, 2]).max() > 1e-3


def test_padding_and_company_change_nothing_with_the_default_models(embedder):
    history = make_history([(12, 4, 1), (0, 0, 0)])
    together = embedder.encode(history, INSTRUCTIONS[:2])
    alone = np.concatenate([embedder.encode(history.take([user]), INSTRUCTIONS[:2]) for user in range(2)])
    assert np.abs(together - alone).max() < 1e-5


def test_the_default_encoder_knows_what_is_alike():
    vectors = TextEncoder.load("all-minilm-l6-v2").encode(["diapers", "baby care: nappies", "motor oil"])
    assert vectors.shape == (3, 384)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.2


def test_the_default_llm_is_the_whole_one(embedder):
    model = embedder.model
    assert model.config.hidden_size == 576
    assert sum(one.numel() for one in model.llm.parameters()) == 134_515_008
    assert model.tokenizer.convert_tokens_to_ids("<|im_start|>") == 1
    with torch.inference_mode():
        ids = model.tokenizer("The capital of France is", return_tensors="pt")
        logits = model.llm(**ids).logits[0, -1]
    assert model.tokenizer.decode(int(logits.argmax())).strip() == "Paris"
