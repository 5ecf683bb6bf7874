"""Text encoders: what a text becomes depends on the text alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from instructue_feast.errors import ConfigError, DataError, UnsafeArtifactError
from instructue_feast.model.encoders import TextEncoder, describe_encoder
from tests.tiny_models import ENCODER_DIM, make_tiny_encoder

TEXTS = ["bananas", "a much longer text about diapers and beer", "x", "café 🍌 مرحبا", "empty"]


@pytest.mark.parametrize("pooling", ["mean", "cls", None])
def test_vectors_are_pooled_as_the_model_says_and_have_unit_length(tmp_path, pooling):
    folder = make_tiny_encoder(tmp_path / "encoder", pooling=pooling)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vectors = TextEncoder.load(folder).encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), ENCODER_DIM)
    for text, actual in zip(TEXTS, vectors, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = hidden.mean(0) if pooling == "mean" else hidden[0]
        np.testing.assert_allclose(actual, expected / expected.norm(), atol=1e-5)


def test_neither_order_nor_company_changes_a_vector(encoder):
    loaded = TextEncoder.load(encoder)
    texts = [f"{'word ' * (index % 13)}{index}" for index in range(60)]
    whole = loaded.encode(texts)
    np.testing.assert_allclose(loaded.encode(texts[::-1])[::-1], whole, atol=1e-5)
    np.testing.assert_allclose(loaded.encode(texts, max_batch_tokens=1), whole, atol=1e-5)
    assert loaded.num_encoded == 180


def test_no_texts_give_no_vectors(encoder):
    assert TextEncoder.load(encoder).encode([]).shape == (0, ENCODER_DIM)


def test_special_tokens_in_a_text_are_plain_characters(encoder):
    loaded = TextEncoder.load(encoder)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    (ids,) = loaded.tokenize(["a [SEP] [CLS] b [PAD]"])
    assert ids[0] == tokenizer.cls_token_id
    assert ids[-1] == tokenizer.sep_token_id
    assert not set(ids[1:-1]) & set(tokenizer.all_special_ids)


def test_a_text_of_a_megabyte_is_cut(encoder):
    assert [len(one) for one in TextEncoder.load(encoder).tokenize(["grocery " * 125_000, "a"])] == [64, 3]


def test_the_version_follows_weights_tokenizer_and_pooling(encoder, tmp_path):
    base = describe_encoder(encoder).version
    assert len(base) == 64
    copy = shutil.copytree(encoder, tmp_path / "copy")
    assert describe_encoder(str(copy)).version == base
    (copy / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert describe_encoder(str(copy)).version != base
    other = make_tiny_encoder(tmp_path / "other", seed=1)
    assert describe_encoder(other).version != base


def test_pickled_weights_are_refused(encoder, tmp_path):
    copy = shutil.copytree(encoder, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UnsafeArtifactError, match=r"pytorch_model\.bin"):
        TextEncoder.load(str(copy))


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"no weights.*notes\.txt"):
        TextEncoder.load(str(tmp_path))


def test_a_pooling_we_do_not_know_is_refused(encoder, tmp_path):
    copy = shutil.copytree(encoder, tmp_path / "copy")
    Path(copy, "1_Pooling", "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        describe_encoder(str(copy))
