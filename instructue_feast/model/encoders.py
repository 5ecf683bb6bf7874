"""`TextEncoder`: the frozen model that turns an event text or an instruction into one vector."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from instructue_feast.errors import ConfigError, InvalidEmbeddingError
from instructue_feast.model.artifacts import folder_digest, quiet
from instructue_feast.model.bundled import resolve_folder

_ENCODE_RULES = "encode-1"
"""Part of every encoder version. Raise it when the same files would give other vectors."""

_MAX_TEXTS_PER_BATCH = 256
_TOKENIZE_CHUNK = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderInfo:
    """What is known about an encoder without loading its weights.

    Attributes:
        folder: Where its files are.
        dim: Size of its vectors.
        pooling: `mean` or `cls`.
        version: 64 hex digits over weights, config, tokenizer and pooling.
    """

    folder: Path
    dim: int
    pooling: str
    version: str


def describe_encoder(name: str) -> EncoderInfo:
    """Reads an encoder's config and digests its files.

    Raises:
        ConfigError: It pools in a way we do not support.
        DataError: There is no such encoder.
        UnsafeArtifactError: Its weights are pickled.
    """
    folder = resolve_folder(name, kind="text encoder")
    pooling = _pooling(folder)
    dim = int(AutoConfig.from_pretrained(folder, trust_remote_code=False).hidden_size)
    return EncoderInfo(
        folder=folder, dim=dim, pooling=pooling, version=folder_digest(folder, extra=(_ENCODE_RULES, pooling))
    )


class TextEncoder:
    """A frozen Hugging Face text encoder.

    A model with a sentence-transformers pooling config is pooled the way that says (mean or CLS); a plain BERT by its
    CLS token, as in the paper. Vectors always have unit length. Special-token text such as `[SEP]` inside a text is
    read as plain characters. Texts beyond the model's length are cut.

    Attributes:
        dim: Size of the vectors.
        version: 64 hex digits over weights, config, tokenizer and pooling.
        num_encoded: Texts encoded so far; what proves that a text is encoded once.

    Example:
        >>> encoder = TextEncoder.load("all-minilm-l6-v2")  # doctest: +SKIP
        >>> encoder.encode(["bananas", "diapers"]).shape  # doctest: +SKIP
        (2, 384)
    """

    def __init__(self, info: EncoderInfo, model: torch.nn.Module, tokenizer: Any, max_length: int) -> None:
        self.info = info
        self.dim = info.dim
        self.version = info.version
        self.num_encoded = 0
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._max_length = max_length

    @classmethod
    def load(cls, name: str, *, device: str | torch.device = "cpu") -> TextEncoder:
        """Loads an encoder in float32.

        Args:
            name: A bundled alias, a folder, or a Hugging Face name.
            device: Where it computes.

        Raises:
            ConfigError: It pools in a way we do not support.
            DataError: There is no such encoder.
            UnsafeArtifactError: Its weights are pickled.
        """
        info = describe_encoder(name)
        with quiet():
            model = AutoModel.from_pretrained(
                info.folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            ).to(device)
        tokenizer = AutoTokenizer.from_pretrained(info.folder, trust_remote_code=False)
        return cls(info, model, tokenizer, _max_length(info.folder, model.config, tokenizer))

    @torch.inference_mode()
    def encode(self, texts: Sequence[str], *, max_batch_tokens: int = 8192) -> npt.NDArray[np.float32]:
        """Encodes texts in token-budget batches sorted by length.

        Args:
            texts: N texts.
            max_batch_tokens: Upper bound on the padded tokens of one forward pass.

        Returns:
            `[N, dim]` float32 of unit length, in the order of `texts`.

        Raises:
            InvalidEmbeddingError: The encoder gave NaN or infinity.
        """
        vectors = np.empty((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), _TOKENIZE_CHUNK):  # bounds the memory of the token lists
            chunk = self.tokenize(texts[start : start + _TOKENIZE_CHUNK])
            for members in _batches([len(one) for one in chunk], max_batch_tokens):
                vectors[start + members] = self._forward([chunk[member] for member in members])
        if not np.isfinite(vectors).all():
            raise InvalidEmbeddingError(f"text encoder {self.info.folder} gave NaN or infinity", "check its weights")
        self.num_encoded += len(texts)
        return vectors

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids per text, as the encoder sees them."""
        if not texts:
            return []
        ids = self._tokenizer(list(texts), truncation=True, max_length=self._max_length, split_special_tokens=True)[
            "input_ids"
        ]
        return [list(one) for one in ids]

    def _forward(self, ids: list[list[int]]) -> npt.NDArray[np.float32]:
        device = next(self._model.parameters()).device
        longest = max(len(one) for one in ids)
        tokens_BS = torch.full((len(ids), longest), self._tokenizer.pad_token_id or 0)
        mask_BS = torch.zeros((len(ids), longest), dtype=torch.long)
        for row, one in enumerate(ids):
            tokens_BS[row, : len(one)] = torch.tensor(one)
            mask_BS[row, : len(one)] = 1
        mask_BS = mask_BS.to(device)
        hidden_BSD = self._model(input_ids=tokens_BS.to(device), attention_mask=mask_BS).last_hidden_state.float()
        if self.info.pooling == "cls":
            pooled_BD = hidden_BSD[:, 0]
        else:
            weights_BS1 = mask_BS[:, :, None].float()
            pooled_BD = (hidden_BSD * weights_BS1).sum(1) / weights_BS1.sum(1)
        unit: npt.NDArray[np.float32] = torch.nn.functional.normalize(pooled_BD, dim=-1).cpu().numpy()
        return unit


def _batches(lengths: list[int], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    order = np.argsort(np.asarray(lengths), kind="stable")[::-1]
    start = 0
    while start < len(order):
        size = max(1, min(_MAX_TEXTS_PER_BATCH, budget // max(1, lengths[order[start]])))
        yield order[start : start + size]
        start += size


def _pooling(folder: Path) -> str:
    """`mean` or `cls`, by the sentence-transformers pooling config; `cls` without one."""
    configs = sorted(folder.glob("*_Pooling/config.json"))
    if not configs:
        return "cls"
    if list(folder.glob("*_Dense")):
        raise ConfigError(
            f"text encoder {folder} has a dense layer after pooling", "use an encoder that ends in pooling"
        )
    flags = json.loads(configs[0].read_text(encoding="utf-8"))
    mode = flags.get("pooling_mode")  # how newer releases write it
    modes = [mode] if mode else [key for key, on in flags.items() if key.startswith("pooling_mode_") and on]
    names = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "mean": "mean", "cls": "cls"}
    if len(modes) != 1 or modes[0] not in names:
        raise ConfigError(f"text encoder {folder} pools by {modes}", "use an encoder with mean or CLS pooling")
    return names[modes[0]]


def _max_length(folder: Path, config: Any, tokenizer: Any) -> int:
    limits = [int(tokenizer.model_max_length)]
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        # RoBERTa-style models number their positions from the padding id onwards.
        offset = (config.pad_token_id or 0) + 1 if "roberta" in str(config.model_type) else 0
        limits.append(int(positions) - offset)
    settings = folder / "sentence_bert_config.json"
    if settings.is_file():
        limits.append(int(json.loads(settings.read_text(encoding="utf-8")).get("max_seq_length") or limits[0]))
    return min(limits)
