"""Tiny random models with real file formats, so that tests exercise the true loading code in milliseconds.

The LLM is a Llama of 2 layers and hidden size 32 with a byte-level tokenizer; the encoder is a BERT of 2 layers and
hidden size 24 with a character-level WordPiece tokenizer, which knows `[SEP]` and friends as special tokens.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

LLM_HIDDEN = 32
ENCODER_DIM = 24


def make_tiny_models(folder: str | Path) -> tuple[str, str]:
    """Saves a tiny Llama and a tiny BERT below `folder`; same weights every time.

    Args:
        folder: Where to; created when missing.

    Returns:
        Paths of the LLM and of the encoder, usable wherever a model name is (`model.llm`, `model.text_encoder`).
    """
    return make_tiny_llm(Path(folder) / "tiny-llama"), make_tiny_encoder(Path(folder) / "tiny-bert")


def make_tiny_llm(folder: str | Path, *, family: str = "llama", seed: int = 0) -> str:
    """Saves a tiny causal LM of a family (`llama`, `qwen2` or `gpt_neox`) and its tokenizer."""
    tokenizer = _llm_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": LLM_HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
        elif family == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_tiny_encoder(
    folder: str | Path, *, dim: int = ENCODER_DIM, pooling: str | None = "mean", seed: int = 0
) -> str:
    """Saves a tiny BERT; `pooling` is `mean` or `cls` in the way of sentence-transformers, `None` for a plain BERT."""
    tokenizer = _encoder_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertModel(
            BertConfig(
                vocab_size=len(tokenizer), hidden_size=dim, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        root = Path(folder)
        (root / "1_Pooling").mkdir(exist_ok=True)
        flags = {"pooling_mode_cls_token": pooling == "cls", "pooling_mode_mean_tokens": pooling == "mean"}
        (root / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": dim, **flags}))
        (root / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
    return str(folder)


def _llm_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def _encoder_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    characters = [chr(code) for code in range(33, 127)]
    pieces = [*specials, *characters, *(f"##{one}" for one in characters)]
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=128,
    )  # fmt: skip
