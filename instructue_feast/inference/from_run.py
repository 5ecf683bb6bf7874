"""Opens the exact model and soft-token table a run was made with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import VersionMismatchError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_prompts import FOLDER, load_run_soft_prompts
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.inference.version import model_version
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.runs.manifest import RunManifest, from_json
from instructue_feast.runs.store import OutputStore


def open_embedder(
    store: OutputStore,
    run_id: str,
    *,
    dtype: str = "float32",
    max_batch_tokens: int | None = None,
    model: InstructUEModel | None = None,
) -> UserEmbedder:
    """Loads the model, the soft-token table and the soft prompts of a run.

    Args:
        store: Where the run lives.
        run_id: The run.
        dtype: Compute type of the LLM, `float32` or `bfloat16`.
        max_batch_tokens: Upper bound on the padded tokens of one forward pass; `None` for what suits the device.
        model: The run's model where it is loaded already: another run of the same model needs its table only.

    Returns:
        An embedder for the users of that run's extract.

    Raises:
        UnsafeArtifactError: The run's model folder holds pickle weights.
        VersionMismatchError: The base LLM or an encoder is not the one the model was made with.
    """
    folder = Path(store.path("runs", run_id))
    if store.is_local:
        return open_folder(folder, dtype, max_batch_tokens, model)
    with tempfile.TemporaryDirectory() as scratch:
        if model is None:
            store.fs.get(store.path("runs", run_id, "model") + "/", f"{scratch}/model/", recursive=True)
        table = "soft_tokens.safetensors"
        store.fs.get(store.path("runs", run_id, table), f"{scratch}/{table}")
        if store.exists("runs", run_id, FOLDER):
            store.fs.get(store.path("runs", run_id, FOLDER) + "/", f"{scratch}/{FOLDER}/", recursive=True)
        return open_folder(Path(scratch), dtype, max_batch_tokens, model)


def open_model(store: OutputStore, run_id: str, *, dtype: str = "float32") -> InstructUEModel:
    """Loads the model of a run alone, for what needs no histories: answers and items.

    Raises:
        UnsafeArtifactError: The run's model folder holds pickle weights.
        VersionMismatchError: The base LLM or an encoder is not the one the model was made with.
    """
    if store.is_local:
        return _model(Path(store.path("runs", run_id)), dtype)
    with tempfile.TemporaryDirectory() as scratch:
        store.fs.get(store.path("runs", run_id, "model") + "/", f"{scratch}/model/", recursive=True)
        return _model(Path(scratch), dtype)


def _model(folder: Path, dtype: str) -> InstructUEModel:
    model = InstructUEModel.from_pretrained(folder / "model", dtype=getattr(torch, dtype), merge_lora=True)
    return model.eval()


def open_folder(
    folder: Path, dtype: str, max_batch_tokens: int | None = None, model: InstructUEModel | None = None
) -> UserEmbedder:
    """An embedder out of a folder with what a run holds: `model/`, `soft_tokens.safetensors`, soft prompts."""
    if model is None:
        model = _model(folder, dtype)
    table = SoftTokenTable.load(folder / "soft_tokens.safetensors")
    prompts = load_run_soft_prompts(folder)
    return UserEmbedder(model, table, max_batch_tokens=max_batch_tokens, soft_prompts=prompts)


def check_run_model(store: OutputStore, run_id: str, config: InstructueConfig, embedder: UserEmbedder) -> RunManifest:
    """Checks that a run was made by this model under this config.

    Returns:
        The run's manifest.

    Raises:
        VersionMismatchError: The versions differ; a vector of one must never be compared with one of the other.
    """
    manifest = from_json(RunManifest, store.read_json("runs", run_id, "manifest.json"), f"run {run_id}")
    actual = model_version(embedder.model, config)
    if actual != manifest.model_version:
        raise VersionMismatchError(
            f"run {run_id} was made by model version {manifest.model_version[:8]}, not {actual[:8]}",
            "use the config and model of that run, or make a new run with `instructue backfill`",
        )
    return manifest
