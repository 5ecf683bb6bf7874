"""`SoftTokenTable`: the adapter as a table. At inference a text's soft token is a gather, not a computation."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from instructue_feast.errors import DataError, InvalidEmbeddingError, StorageError
from instructue_feast.model.modeling import InstructUEModel

# N = texts, D = encoder size, F = focus size, H = hidden size of the LLM

Vectors = npt.NDArray[np.float32] | Sequence[npt.NDArray[np.float32]] | Mapping[str, npt.NDArray[np.float32]]
"""Encoder vectors of texts: one array for all, one per source in order, or one per source by name."""

_CHUNK = 8192
_FORMAT = "soft-tokens-1"
_REBUILD = "build the table again with the model and phrasebook in use"


class SoftTokenTable:
    """Soft tokens and focus keys of a phrasebook under one model.

    Attributes:
        text_ids: `[N]` int64, ascending.
        source_index: `[N]` int32.
        soft_tokens: `[N, H]` float32, without count and age.
        focus_keys: `[N, F]` float32.
        model_digest: `InstructUEModel.weights_digest()` of the model it was built with.
    """

    def __init__(
        self,
        text_ids: npt.NDArray[np.int64],
        source_index: npt.NDArray[np.int32],
        soft_tokens: torch.Tensor,
        focus_keys: torch.Tensor,
        model_digest: str,
    ) -> None:
        self.text_ids = text_ids
        self.source_index = source_index
        self.soft_tokens = soft_tokens
        self.focus_keys = focus_keys
        self.model_digest = model_digest

    def __len__(self) -> int:
        return len(self.text_ids)

    @classmethod
    @torch.inference_mode()
    def build(
        cls,
        model: InstructUEModel,
        text_ids: npt.NDArray[np.int64],
        source_index: npt.NDArray[np.int32],
        vectors: Vectors,
    ) -> SoftTokenTable:
        """Runs the adapters once over a phrasebook.

        Args:
            model: The model.
            text_ids: N distinct text ids, in any order.
            source_index: Source of each text.
            vectors: `[N, D]` float32 encoder vectors in the order of `text_ids`. Where encoders differ in size: a list
                with one `[., D]` array per source, or a mapping from source name to one, each holding the vectors of
                that source's texts in the order they stand in `text_ids`.

        Raises:
            DataError: Ids occur twice, lengths differ, a source is unknown, or vectors have the wrong size.
            InvalidEmbeddingError: A vector or soft token is NaN or infinite.
        """
        text_ids = np.asarray(text_ids, np.int64)
        source_index = np.asarray(source_index, np.int32)
        sources = list(model.config.sources or [])
        if len(text_ids) != len(source_index):
            raise DataError(f"{len(text_ids)} text ids, but {len(source_index)} source indices", "pass one per text")
        if len(source_index) and not (source_index.min() >= 0 and source_index.max() < len(sources)):
            raise DataError(f"phrasebook: a source index is outside 0..{len(sources) - 1}", _REBUILD)
        order = np.argsort(text_ids, kind="stable")
        if np.any(np.diff(text_ids[order]) == 0):
            raise DataError("phrasebook: a text id occurs twice", "pass distinct texts")
        place = np.empty(len(order), np.int64)  # where each given text goes in the sorted table
        place[order] = np.arange(len(order))
        soft_NH = torch.empty(len(text_ids), model.config.hidden_size)
        keys_NF = torch.empty(len(text_ids), model.focus_dim)
        for index, source in enumerate(sources):
            members = np.flatnonzero(source_index == index)
            own = _vectors_of(vectors, source, index, members, len(text_ids))
            expected = (model.config.encoder_dims or {})[(model.config.encoders or {})[source]]
            if len(members) and (own.ndim != 2 or own.shape != (len(members), expected)):
                raise DataError(
                    f"source {source}: vectors of shape {list(own.shape)}, expected [{len(members)}, {expected}]",
                    "encode its texts with the encoder of the config",
                )
            for start in range(0, len(members), _CHUNK):
                chunk = torch.from_numpy(np.ascontiguousarray(own[start : start + _CHUNK], np.float32)).to(model.device)
                rows = torch.from_numpy(place[members[start : start + _CHUNK]])
                soft_NH[rows] = model.soft_tokens(source, chunk).cpu()
                keys_NF[rows] = model.focus_keys(source, chunk).cpu()
        if not (bool(soft_NH.isfinite().all()) and bool(keys_NF.isfinite().all())):
            raise InvalidEmbeddingError("soft tokens hold NaN or infinity", "check the event vectors and the model")
        return cls(text_ids[order], source_index[order], soft_NH, keys_NF, model.weights_digest())

    def rows(self, text_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row of each text id.

        Raises:
            DataError: An id is not in the table.
        """
        text_ids = np.asarray(text_ids, np.int64)
        rows = np.searchsorted(self.text_ids, text_ids)
        known = rows < len(self.text_ids)
        known[known] = self.text_ids[rows[known]] == text_ids[known]
        if not known.all():
            raise DataError(
                f"{int((~known).sum())} of {len(text_ids)} text ids are not in the table of {len(self)} soft tokens",
                "encode the phrasebook of this extract first",
            )
        return rows

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, complete or not at all.

        Raises:
            StorageError: It cannot be written.
        """
        target = Path(path)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        tensors = {
            "text_ids": torch.from_numpy(np.ascontiguousarray(self.text_ids)),
            "source_index": torch.from_numpy(np.ascontiguousarray(self.source_index)),
            "soft_tokens": self.soft_tokens.contiguous(),
            "focus_keys": self.focus_keys.contiguous(),
        }
        header = json.dumps({"format": _FORMAT, "model_digest": self.model_digest})
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, scratch, metadata={"soft_tokens": header})
            scratch.replace(target)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"cannot write {target}: {error}", "free disk space or mend the rights") from None
        finally:
            with contextlib.suppress(OSError):
                scratch.unlink()

    @classmethod
    def load(cls, path: str | Path) -> SoftTokenTable:
        """Maps a saved table into memory; only rows that are used are read from disk.

        Raises:
            DataError: The file is missing, damaged, or something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("soft_tokens", "{}"))
                if header.get("format") != _FORMAT:
                    raise DataError(f"{path} is not a soft-token table of this release", _REBUILD)
                names = ("text_ids", "source_index", "soft_tokens", "focus_keys")
                text_ids, source_index, soft, keys = (file.get_tensor(name) for name in names)
        except (OSError, SafetensorError) as error:
            raise DataError(f"soft-token table {path} cannot be read: {error}", _REBUILD) from None
        return cls(text_ids.numpy(), source_index.numpy(), soft, keys, str(header["model_digest"]))


def _vectors_of(
    vectors: Vectors,
    source: str,
    index: int,
    members: npt.NDArray[np.int64],
    total: int,
) -> npt.NDArray[np.float32]:
    if isinstance(vectors, Mapping):
        if source in vectors:
            return vectors[source]
        if len(members):
            raise DataError(f"no vectors for source {source}, which has {len(members)} texts", "encode its texts")
        return np.zeros((0, 0), np.float32)
    if not isinstance(vectors, np.ndarray):
        return vectors[index]
    if len(vectors) != total:
        raise DataError(f"{total} text ids, but {len(vectors)} vectors", "pass one per text")
    return vectors[members]
