"""The embedding version changes with everything that changes a vector, and with nothing else."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch

from instructue_feast.config import (
    EventSourceConfig,
    HistoryConfig,
    InstructionConfig,
    InstructueConfig,
    ModelSettings,
    OutputConfig,
    TableConfig,
)
from instructue_feast.inference.version import embedding_version, model_version
from instructue_feast.instructions import Instruction
from instructue_feast.model.factory import load_model
from tests.tiny_models import make_tiny_encoder, make_tiny_llm

CHURN = Instruction("churn", "Will the user leave?")


def project(llm, encoder, **settings):
    source = EventSourceConfig(table=TableConfig(path="/data"), user_id="u", time="t", text="{x}")
    return InstructueConfig(
        project="p",
        sources={"bill": source},
        instructions=(InstructionConfig(id="churn", text=CHURN.text),),
        output=OutputConfig(path="/out"),
        model=ModelSettings(**{"llm": llm, "text_encoder": encoder, "embedding_dim": 16, **settings}),
    )


@pytest.fixture
def config(tiny):
    return project(*tiny)


@pytest.fixture
def base(config):
    return embedding_version(load_model(config), config, CHURN)


def version(config, instruction=CHURN):
    return embedding_version(load_model(config), config, instruction)


def test_the_version_is_64_hex_digits_and_repeatable(config, base):
    assert len(base) == 64
    assert int(base, 16) >= 0
    assert version(config) == base
    assert model_version(load_model(config), config) != base


def test_a_changed_weight_changes_the_version(config, base):
    model = load_model(config)
    with torch.no_grad():
        model.prompt.user[0, 0] += 1e-6
    assert embedding_version(model, config, CHURN) != base


def test_changed_statistics_of_the_numbers_change_the_version(tiny):
    model = load_model(project(*tiny))
    before = model.weights_digest()
    model.prompt.source_summary.rms.mul_(2)
    assert model.weights_digest() != before


def test_the_text_of_an_instruction_counts_and_its_id_does_not(config, base):
    assert version(config, Instruction("churn", "Will the user stay?")) != base
    assert version(config, Instruction("leaving", CHURN.text)) == base
    assert version(config, Instruction("churn", CHURN.text, soft_prompt="ab")) != base


def test_history_settings_change_the_version_and_table_locations_do_not(config, base):
    assert version(dataclasses.replace(config, history=HistoryConfig(days=30))) != base
    source = config.sources["bill"]
    assert version(dataclasses.replace(config, sources={"bill": dataclasses.replace(source, text="{y}")})) != base
    moved = dataclasses.replace(source, table=TableConfig(path="/elsewhere"))
    assert version(dataclasses.replace(config, sources={"bill": moved})) == base


@pytest.mark.parametrize("settings", [{"seed": 1}, {"embedding_dim": 8}, {"dtype": "bfloat16"}])
def test_model_settings_change_the_version(tiny, base, settings):
    assert version(project(*tiny, **settings)) != base


def test_other_base_models_change_the_version_and_moving_them_does_not(tiny, base, tmp_path):
    llm, encoder = tiny
    assert version(project(make_tiny_llm(tmp_path / "llm", seed=1), encoder)) != base
    assert version(project(llm, make_tiny_encoder(tmp_path / "encoder", seed=1))) != base
    moved = [str(shutil.copytree(one, tmp_path / f"moved{index}")) for index, one in enumerate(tiny)]
    assert version(project(*moved)) == base


def test_batch_size_does_not_change_the_version(tiny, base):
    assert version(project(*tiny, max_batch_tokens=64)) == base


def test_raised_render_rules_change_the_version(config, base, monkeypatch):
    monkeypatch.setattr("instructue_feast.inference.version.RENDER_VERSION", 999)
    assert version(config) != base
    monkeypatch.undo()
    monkeypatch.setattr("instructue_feast.inference.version.COUNT_EDGES", (2, 3))
    assert version(config) != base
