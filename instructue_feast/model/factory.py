"""From a project's config to a model: a saved one, checked against the config, or a seeded untrained one."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.model.adapter import SourceAdapter
from instructue_feast.model.config import InstructUEConfig
from instructue_feast.model.encoders import describe_encoder
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.saving import load_llm, torch_dtype
from instructue_feast.model.small_transformer import layer_weights, small_transformer
from instructue_feast.runs.store import OutputStore


def load_model(config: InstructueConfig) -> InstructUEModel:
    """Loads `model.path`, or makes an untrained model from `model.llm`, `model.text_encoder` and `model.seed`.

    Args:
        config: A project.

    Returns:
        The model in evaluation mode; `model.config.trained` says whether it was ever trained.

    Raises:
        VersionMismatchError: The saved model has other sources, numeric columns, encoders or embedding size.
        DataError: There is no such model, or it has no weights.
        UnsafeArtifactError: Weights are pickled.
    """
    settings = config.model
    encoders = {source: config.encoder_of(source) for source in config.source_names}
    dtype = torch_dtype(settings.dtype)
    if settings.path is None:
        return untrained(
            encoders=encoders,
            numeric_columns=config.numeric_columns,
            llm=settings.llm,
            embedding_dim=settings.embedding_dim,
            seed=settings.seed,
            dtype=dtype,
        )
    with _local_copy(settings.path) as folder:
        model = InstructUEModel.from_pretrained(folder, dtype=dtype)
    _require_match(model.config, config, encoders)
    return model


@contextmanager
def _local_copy(path: str) -> Iterator[str]:
    """The folder of a saved model; what an fsspec URL names is there for the block only.

    Raises:
        DataError: There is nothing at the URL.
        MissingDependencyError: Its protocol needs a package that is not installed.
    """
    if "://" not in path:
        yield path
        return
    store = OutputStore(path)
    if not store.fs.isdir(store.path().rstrip("/")):
        raise DataError(f"there is no model at {path}", "check `model.path`")
    with tempfile.TemporaryDirectory() as scratch:
        store.fs.get(store.path().rstrip("/") + "/", f"{scratch}/model/", recursive=True)
        yield f"{scratch}/model"


def untrained(
    *,
    encoders: Mapping[str, str],
    numeric_columns: tuple[tuple[str, str, str], ...] = (),
    llm: str = "smollm2-135m-instruct",
    embedding_dim: int = 128,
    adapter_dim: int = 0,
    focus_dim: int = 0,
    projection_dim: int = 512,
    llm_layers: int = 0,
    prompt_texts: int = 0,
    focus_token: bool = True,
    summary_tokens: bool = True,
    transformer_dim: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> InstructUEModel:
    """Makes a model with seeded weights around frozen base models; the same arguments give the same weights.

    Args:
        encoders: Text encoder by source, in source order.
        numeric_columns: `(source, group, column)` of each numeric position.
        llm: Base LLM.
        embedding_dim: Size of the user embedding.
        adapter_dim: Middle size of the adapters; 0 for the encoder's.
        focus_dim: Size of the focus keys; 0 for the largest encoder's.
        projection_dim: Middle size of the projection.
        llm_layers: Layers of the LLM to keep; 0 for all.
        prompt_texts: Newest texts of each source in the prompt; 0 for all.
        focus_token: Whether instructions get a focus token.
        summary_tokens: Whether there are summary tokens.
        transformer_dim: Hidden size of a small Transformer in place of the LLM's layers; 0 for the LLM.
        seed: Seed of all weights of ours.
        dtype: Compute type of the LLM.
    """
    described = {name: describe_encoder(name) for name in set(encoders.values())}
    causal, tokenizer, digest = load_llm(llm, dtype, llm_layers)
    if transformer_dim:
        causal = small_transformer(causal, transformer_dim, seed=seed)
    embedding_VH = causal.get_input_embeddings().weight.detach()  # type: ignore[operator]
    model_config = InstructUEConfig(
        sources=list(encoders),
        numeric_columns=[list(one) for one in numeric_columns],
        encoders=dict(encoders),
        encoder_dims={name: one.dim for name, one in described.items()},
        encoder_digests={name: one.version for name, one in described.items()},
        llm=llm,
        llm_digest=digest,
        hidden_size=embedding_VH.shape[1],
        embedding_dim=embedding_dim,
        adapter_dim=adapter_dim,
        focus_dim=focus_dim,
        projection_dim=projection_dim,
        llm_layers=llm_layers,
        prompt_texts=prompt_texts,
        focus_token=focus_token,
        summary_tokens=summary_tokens,
        transformer_dim=transformer_dim,
        seed=seed,
    )
    model = InstructUEModel(model_config, causal, tokenizer)
    _initialise(model, embedding_VH.float(), seed)
    if transformer_dim:
        for one in layer_weights(model.llm).values():
            one.requires_grad_(True)
    return model.eval()


@torch.no_grad()
def _initialise(model: InstructUEModel, embedding_VH: torch.Tensor, seed: int) -> None:
    rms = math.sqrt(float(embedding_VH.pow(2).mean()))

    def mean_of(text: str) -> torch.Tensor:
        return embedding_VH[torch.from_numpy(model.word_ids(text))].mean(0)

    for index, (source, adapter) in enumerate(model.adapters.items()):
        cast(SourceAdapter, adapter).initialise(rms, seed=seed, name=f"adapters.{source}")
        words = source.replace("_", " ")
        model.prompt.opening[index] = mean_of(f"<{words}>")
        model.prompt.closing[index] = mean_of(f"</{words}>")
        model.prompt.missing[index] = mean_of(f"no {words}")
    model.prompt.user[0] = mean_of("<USER>")
    model.prompt.answer[0] = mean_of("<ANSWER>")
    model.prompt.initialise(rms, seed=seed, name="prompt")
    model.numeric.initialise(rms, seed=seed, name="numeric")
    model.focus.initialise(mean_of("nothing"), rms, seed=seed, name="focus")
    if model.number_focus is not None:
        names = [column.replace("_", " ") for _, _, column in model.config.numeric_columns or []]
        model.number_focus.initialise(list(model.instruction_vectors(names)), rms, seed=seed, name="number_focus")
    model.projection.initialise(seed=seed, name="projection")


def _require_match(saved: InstructUEConfig, config: InstructueConfig, encoders: Mapping[str, str]) -> None:
    """Compares what the model was made for with what the project declares.

    Raises:
        VersionMismatchError: The first departure, with both sides.
    """
    named = {source: (saved.encoder_digests or {})[name] for source, name in (saved.encoders or {}).items()}
    pairs: list[tuple[str, object, object]] = [
        ("sources", saved.sources, list(config.source_names)),
        ("numeric columns", saved.numeric_columns, [list(one) for one in config.numeric_columns]),
        ("embedding_dim", saved.embedding_dim, config.model.embedding_dim),
        ("history digest", saved.history_digest, saved.history_digest and config.history_digest()),
    ]
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise VersionMismatchError(
                f"model {config.model.path} was made for {what} {theirs}, the config declares {ours}",
                "use the config the model was trained with, or train a model for this one",
            )
    for source, name in encoders.items():
        version = describe_encoder(name).version
        if version != named[source]:
            raise VersionMismatchError(
                f"model {config.model.path}: source {source} was trained with encoder {(saved.encoders or {})[source]} "
                f"({named[source][:12]}), the config declares {name} ({version[:12]})",
                "set that encoder in the config, or train a model for this one",
            )
