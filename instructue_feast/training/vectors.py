"""Frozen encoder vectors of everything a training run reads: event texts and wordings, each encoded once."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from instructue_feast import schema
from instructue_feast.errors import DataError, listed
from instructue_feast.history.pack import PackedHistory
from instructue_feast.model.adapter import packed_soft_tokens
from instructue_feast.model.artifacts import cache_root
from instructue_feast.model.modeling import InstructUEModel, ModelOutput
from instructue_feast.model.prompt import Suffix, UserBatch

# N = texts of a batch, T = texts of all its users, W = wordings, D = encoder size, B = users, K = questions per user,
# H = hidden size, E = encoders

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TextVectors:
    """Vectors of a phrasebook and of wordings.

    Attributes:
        text_ids: Text ids, ascending.
        source_index: Source of each.
        row: Place of each in the vectors of its source's encoder.
        events: Per encoder, `[., D]` float32 vectors of event texts.
        wordings: Per encoder, `[W, D]` float32 vectors; the vector of an empty wording is zero.
    """

    text_ids: Ints
    source_index: npt.NDArray[np.int32]
    row: Ints
    events: tuple[torch.Tensor, ...]
    wordings: tuple[torch.Tensor, ...]

    @classmethod
    def encode(cls, model: InstructUEModel, phrasebook: pa.Table, wordings: Sequence[str]) -> TextVectors:
        """Encodes every distinct text once per encoder.

        Args:
            model: Names the sources and their encoders.
            phrasebook: `schema.PHRASEBOOK`; sources the model lacks are refused.
            wordings: W texts.

        Raises:
            SchemaError: The phrasebook has other columns.
            DataError: A source is unknown to the model.
        """
        schema.check(phrasebook, schema.PHRASEBOOK, "phrasebook")
        sources = list(model.config.sources or [])
        names = phrasebook.column("source").to_pylist()
        unknown = set(names) - set(sources)
        if unknown:
            raise DataError(f"phrasebook: unknown sources {listed(unknown)}", f"the model has {listed(sources)}")
        ids = phrasebook.column("text_id").to_numpy()
        order = np.argsort(ids, kind="stable")
        source_index = np.array([sources.index(one) for one in names], np.int32)[order]
        texts = np.array(phrasebook.column("text").to_pylist(), dtype=object)[order]
        encoder_of = np.array([model.encoder_index(one) for one in sources], np.int64)
        row = np.zeros(len(ids), np.int64)
        events = []
        for index, name in enumerate(model.config.encoder_names):
            members = np.flatnonzero(encoder_of[source_index] == index)
            distinct, row[members] = np.unique(texts[members].astype(str), return_inverse=True)
            events.append(_encode(model, name, distinct.tolist()))
        vectors = tuple(_encode_wordings(model, name, wordings) for name in model.config.encoder_names)
        return cls(ids[order], source_index, row, tuple(events), vectors)

    def asking(self, model: InstructUEModel, wordings: Sequence[str]) -> TextVectors:
        """The same event texts with other wordings."""
        vectors = tuple(_encode_wordings(model, name, wordings) for name in model.config.encoder_names)
        return dataclasses.replace(self, wordings=vectors)

    def places(self, text_ids: Ints) -> Ints:
        """Where text ids stand.

        Raises:
            DataError: An id is not in the phrasebook.
        """
        places = np.searchsorted(self.text_ids, text_ids)
        known = places < len(self.text_ids)
        known[known] = self.text_ids[places[known]] == text_ids[known]
        if not known.all():
            raise DataError(
                f"{int((~known).sum())} of {len(text_ids)} texts are not in the phrasebook", "build the data set again"
            )
        return places


def _encode_wordings(model: InstructUEModel, encoder: str, wordings: Sequence[str]) -> torch.Tensor:
    vectors = _encode(model, encoder, list(wordings)).clone()
    vectors[torch.tensor([not one for one in wordings], dtype=torch.bool)] = 0.0
    return vectors


def _encode(model: InstructUEModel, name: str, texts: list[str]) -> torch.Tensor:
    """Encodes texts, or reads what an earlier run encoded: the next run on the same data starts minutes sooner.

    The cache holds vectors under a hash of encoder and texts, never the texts.
    """
    encoder = model.text_encoder(name)
    key = hashlib.sha256("\0".join([encoder.version, *texts]).encode()).hexdigest()
    file = cache_root() / "vectors" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):
        return load_file(file)["vectors"]
    vectors = torch.from_numpy(encoder.encode(texts))
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError, SafetensorError):  # a cache that cannot be written only costs time
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": vectors}, scratch)
        scratch.replace(file)
    with contextlib.suppress(OSError):
        scratch.unlink(missing_ok=True)
    return vectors


def embed(
    model: InstructUEModel,
    vectors: TextVectors,
    history: PackedHistory,
    suffixes: Sequence[Sequence[Suffix]],
    wording_BK: Ints,
) -> ModelOutput:
    """One pass over B users and their K questions, with gradients down to adapters and focus.

    At inference the same is read from tables (`inference.UserEmbedder`); here adapters and focus still move, so every
    distinct text of the batch goes through them once.

    Args:
        model: The model.
        vectors: Vectors of all texts.
        history: B users.
        suffixes: Their suffixes.
        wording_BK: Wording of each suffix, for the focus.
    """
    ids, inverse_T = np.unique(history.text_id, return_inverse=True)
    places = vectors.places(ids)
    source_N = vectors.source_index[places]
    sources = list(model.config.sources or [])
    encoder_R = np.array([model.encoder_index(one) for one in sources], np.int64)
    order = np.lexsort((source_N, encoder_R[source_N]))  # what one encoder made goes through the adapters at once
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    wordings, wording_of = np.unique(wording_BK, return_inverse=True)
    soft, similarity = [], []
    for encoder, (events, own_wordings) in enumerate(zip(vectors.events, vectors.wordings, strict=True)):
        members = places[order][encoder_R[source_N[order]] == encoder]
        part_ND = events[torch.from_numpy(vectors.row[members])].to(model.device)
        own = np.flatnonzero(encoder_R == encoder)
        texts_of = np.bincount(vectors.source_index[members], minlength=len(sources))[own]
        soft.append(packed_soft_tokens([model.adapters[sources[one]] for one in own], part_ND, texts_of.tolist()))  # type: ignore[misc]
        # No bias: the query of an empty wording, whose vector is zero, is zero.
        similarity.append(
            model.focus.similarity(encoder, part_ND, own_wordings[torch.from_numpy(wordings)].to(model.device))
        )
    row_T = torch.from_numpy(position[inverse_T]).to(model.device)
    user_T = np.repeat(np.arange(len(history)), history.num_tokens)
    asked_TK = torch.from_numpy(wording_of.reshape(wording_BK.shape)[user_T]).to(model.device)
    batch = UserBatch(history, torch.cat(soft), row_T=row_T)
    output: ModelOutput = model(batch, suffixes, torch.cat(similarity)[row_T[:, None], asked_TK])
    return output
