"""A tiny LLM whose random weights are large enough that its attention carries something."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from instructue_feast.training.run import add_lora
from instructue_feast.training.settings import TrainingSettings
from tests.model_data import make_model
from tests.model_fixtures import _one_thread, _scratch_cache, encoder, tiny
from tests.tiny_models import make_tiny_llm


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """As a trained LLM would, it mixes what it reads; the default initial weights pass next to nothing on."""
    folder = make_tiny_llm(tmp_path_factory.mktemp("lively") / "llama")
    causal = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, one in causal.named_parameters():
            if one.dim() == 2:
                one.mul_(40.0 if "embed" in name else 12.0)
    causal.save_pretrained(folder)
    return folder


def settings(**changes) -> TrainingSettings:
    """Small and silent."""
    small = {
        "steps": 4, "users_per_step": 4, "questions_per_user": 3, "questions_per_step": 0, "learning_rate": 5e-3,
        "lora_r": 2, "validation_fraction": 0.0, "eval_steps": 0, "report_to": (), "instruction_dropout": 0.0,
        "logging_steps": 1,
    }  # fmt: skip
    return TrainingSettings(**(small | changes))


def fresh_model(llm_folder: str, encoder_folder: str, chosen: TrainingSettings):
    """As `make_model` of training would make it, from tiny models."""
    model = make_model(llm_folder, encoder_folder)
    add_lora(model, chosen)
    return model


__all__ = ["_one_thread", "_scratch_cache", "encoder", "fresh_model", "llm", "settings", "tiny"]
