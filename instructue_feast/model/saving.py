"""Model folders of ours: written in one step, read without executing anything, checked against the base models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from instructue_feast.errors import (
    ConfigError,
    DataError,
    InstructueError,
    MissingDependencyError,
    StorageError,
    UnsafeArtifactError,
    VersionMismatchError,
    listed,
)
from instructue_feast.files import give_usual_rights, replacing
from instructue_feast.model import attention
from instructue_feast.model.artifacts import folder_digest, local_folder, quiet, require_safetensors
from instructue_feast.model.bundled import resolve_folder
from instructue_feast.model.config import InstructUEConfig
from instructue_feast.model.encoders import describe_encoder
from instructue_feast.model.lora import wrap_with_lora
from instructue_feast.model.small_transformer import layer_weights, small_transformer

if TYPE_CHECKING:
    from instructue_feast.model.modeling import InstructUEModel

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
LORA_FOLDER = "lora"
LORA_WEIGHTS = "adapter_model.safetensors"
TRANSFORMER_WEIGHTS = "transformer.safetensors"


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The compute type of a name.

    Raises:
        ConfigError: It is none we support.
    """
    dtype = name if isinstance(name, torch.dtype) else _DTYPES.get(name)
    if dtype is None:
        raise ConfigError(f"dtype {name}", f"use one of {listed(_DTYPES)}")
    return dtype


def load_llm(name: str, dtype: torch.dtype, layers: int = 0) -> tuple[nn.Module, Any, str]:
    """Loads the base LLM, its tokenizer, and the digest of its files.

    Args:
        name: Alias, folder or hub name.
        dtype: Compute type.
        layers: Layers to keep, from the first; 0 for all.

    Raises:
        ConfigError: The LLM has fewer layers.
        DataError: There is no such model, or no weights.
        UnsafeArtifactError: Its weights are pickled.
    """
    folder = resolve_folder(name, kind="LLM")
    with quiet():
        llm = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation=attention.NAME
        )
    if layers:
        _cut(llm, layers)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return llm.eval(), tokenizer, folder_digest(folder)


def _cut(llm: nn.Module, layers: int) -> None:
    """Keeps the first layers; the last norm and the vocabulary head stay."""
    base: Any = llm.base_model
    stack = getattr(base, "layers", None)
    if not isinstance(stack, nn.ModuleList):
        raise ConfigError(f"llm_layers: {type(llm).__name__} has no list of layers", "set llm_layers to 0")
    if layers > len(stack):
        raise ConfigError(f"llm_layers is {layers}, the LLM has {len(stack)}", "lower it, or set it to 0 for all")
    base.layers = stack[:layers]
    whole: Any = llm
    for config in {id(one): one for one in (whole.config, base.config)}.values():
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def lora_digest(model: InstructUEModel) -> str:
    """Digest of LoRA's config and weights; empty without LoRA. A merged model remembers what was merged.

    Without an LLM it is that of the small Transformer.
    """
    if model.lora_digest is not None:
        return model.lora_digest
    if model.config.transformer_dim:
        return tensors_digest(layer_weights(model.llm))
    if not hasattr(model.llm, "peft_config"):
        return ""
    from peft import get_peft_model_state_dict

    (settings,) = (one.to_dict() for one in model.llm.peft_config.values())  # type: ignore[operator]
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what the products are scaled by
    text = json.dumps({key: settings.get(key) for key in keys}, sort_keys=True, default=str)
    return hashlib.sha256(f"{text} {tensors_digest(get_peft_model_state_dict(model.llm))}".encode()).hexdigest()


def require_digest(kind: str, name: str, actual: str, expected: str) -> None:
    """Refuses a base model with other content.

    Raises:
        VersionMismatchError: The digests differ.
    """
    if actual != expected:
        raise VersionMismatchError(
            f"{kind} {name!r} has digest {actual[:12]}, the model was made with {expected[:12]}",
            "point to the files it was made with, or train it again with these",
        )


def save(model: InstructUEModel, folder: Path) -> None:
    """See `InstructUEModel.save_pretrained`."""
    if model.lora_digest is not None:
        raise StorageError("a model with merged LoRA cannot be saved", "load it again with merge_lora=False")
    with replacing(folder) as scratch:
        model.config.save_pretrained(scratch)
        # Shared storage is not allowed in safetensors, hence the copies.
        save_file(
            {name: _compact(value.detach().cpu()) for name, value in model.own_state().items()}, scratch / WEIGHTS_NAME
        )
        if model.config.transformer_dim:
            weights = {name: one.detach().cpu().clone() for name, one in layer_weights(model.llm).items()}
            save_file(weights, scratch / TRANSFORMER_WEIGHTS)
        if hasattr(model.llm, "peft_config"):
            model.llm.save_pretrained(  # type: ignore[operator]
                scratch / LORA_FOLDER, safe_serialization=True, save_embedding_layers=False
            )
            _tidy_lora(scratch / LORA_FOLDER, model.config.llm)
        give_usual_rights(scratch)  # safetensors lets nobody but the owner read


def _tidy_lora(folder: Path, name: str) -> None:
    """Makes what PEFT writes the same on every machine: the LLM's name for its path, sorted layers, no empty card."""
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = name
    if isinstance(settings.get("target_modules"), list):  # a set in PEFT, so in any order
        settings["target_modules"].sort()
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _compact(value: torch.Tensor) -> torch.Tensor:
    """A copy, in half precision if that holds every value exactly; loading gives the same values either way."""
    half = value.half()
    return half if value.dtype == torch.float32 and torch.equal(half.float(), value) else value.clone()


def load(
    cls: type[InstructUEModel],
    name: str,
    *,
    llm: str | None,
    encoders: Mapping[str, str] | None,
    dtype: torch.dtype,
    merge_lora: bool,
) -> InstructUEModel:
    """See `InstructUEModel.from_pretrained`."""
    folder = local_folder(name, kind="model")
    require_safetensors(folder, kind="model folder", weights=WEIGHTS_NAME)
    config = read_config(folder)
    _relocate(config, llm, encoders)
    causal, tokenizer, digest = load_llm(config.llm, dtype, config.llm_layers)
    require_digest("LLM", config.llm, digest, config.llm_digest)
    for encoder in config.encoder_names:
        require_digest(
            "text encoder", encoder, describe_encoder(encoder).version, (config.encoder_digests or {})[encoder]
        )
    if config.transformer_dim:
        causal = small_transformer(causal, config.transformer_dim, seed=config.seed)
        file = folder / TRANSFORMER_WEIGHTS
        _require_fit(layer_weights(causal), tensors := _read_tensors(file), file)
        causal.load_state_dict(tensors, strict=False)
    lora = folder / LORA_FOLDER
    if lora.is_dir():
        causal = _with_lora(causal, lora)
    model = cls(config, causal, tokenizer)
    _fill(model, _read_tensors(folder / WEIGHTS_NAME), folder)
    if merge_lora and lora.is_dir():
        model.lora_digest = lora_digest(model)
        model.llm = model.llm.merge_and_unload().requires_grad_(False)  # type: ignore[operator]
    return model.eval()


def read_config(folder: Path) -> InstructUEConfig:
    """Reads `config.json` of a model folder.

    Raises:
        DataError: It is missing, not JSON, or of another kind of model.
    """
    file = folder / CONFIG_NAME
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {type(error).__name__}", "save the model again") from None
    if not isinstance(values, dict) or values.get("model_type") != InstructUEConfig.model_type:
        raise DataError(f"{file} is not the config of an InstructUEModel", "give the folder save_pretrained wrote")
    try:
        config: InstructUEConfig = InstructUEConfig.from_dict(values)
    except InstructueError:
        raise
    except Exception as error:  # the config class validates types with an exception of its own
        raise DataError(f"{file} has a wrong value: {error}", "save the model again") from None
    return config


def _relocate(config: InstructUEConfig, llm: str | None, encoders: Mapping[str, str] | None) -> None:
    """Replaces the names of the base models, keeping the digests they must have."""
    config.llm = llm or config.llm
    if encoders:
        old = dict(config.encoders or {})
        config.encoders = {source: encoders.get(source, name) for source, name in old.items()}
        moved = {new: old[source] for source, new in config.encoders.items()}
        config.encoder_dims = {new: (config.encoder_dims or {})[was] for new, was in moved.items()}
        config.encoder_digests = {new: (config.encoder_digests or {})[was] for new, was in moved.items()}


def _with_lora(causal: nn.Module, folder: Path) -> nn.Module:
    if not (folder / LORA_WEIGHTS).is_file():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        kind = UnsafeArtifactError if pickled else DataError
        raise kind(f"{folder} has no {LORA_WEIGHTS}", "save the LoRA weights as safetensors")
    try:
        from peft import LoraConfig, set_peft_model_state_dict
    except ImportError:
        raise MissingDependencyError("the model has LoRA weights", "pip install 'instructue-feast[model]'") from None
    settings = LoraConfig.from_pretrained(str(folder))
    settings.inference_mode = True
    settings.base_model_name_or_path = None  # ours is checked by digest; PEFT would warn about the path
    settings.init_lora_weights = True  # values come from the file; other modes would first change the base weights
    wrapped = wrap_with_lora(causal, settings)
    result = set_peft_model_state_dict(wrapped, _read_tensors(folder / LORA_WEIGHTS))
    if result.unexpected_keys:
        raise VersionMismatchError(
            f"{folder} has LoRA weights for layers the LLM lacks", "use the LLM it was trained on"
        )
    return wrapped


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{file} cannot be read: {error}", "the file is cut short or damaged; copy it again") from None


def _fill(model: InstructUEModel, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    _require_fit(model.own_state(), tensors, folder / WEIGHTS_NAME)
    model.load_state_dict(tensors, strict=False)


def _require_fit(state: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    expected = {name: value.shape for name, value in state.items()}
    wrong = list(expected.keys() ^ tensors.keys())
    wrong += [name for name in expected.keys() & tensors.keys() if expected[name] != tensors[name].shape]
    if wrong:
        raise VersionMismatchError(
            f"{file} does not fit its config: {listed(wrong)}", "save the model again with this release"
        )
