"""From a project's config to a model that fits it."""

from __future__ import annotations

import dataclasses

import fsspec
import pytest
import torch

from instructue_feast.config import (
    EventSourceConfig,
    InstructionConfig,
    InstructueConfig,
    ModelSettings,
    OutputConfig,
    TableConfig,
    TabularSourceConfig,
)
from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.model.factory import load_model
from tests.tiny_models import make_tiny_encoder


def project(llm, encoder, **settings):
    table = TableConfig(path="/data")
    event = EventSourceConfig(table=table, user_id="u", time="t", text="{x}")
    tabular = TabularSourceConfig(kind="tabular", table=table, user_id="u", numeric={"money": ("spend",)})
    return InstructueConfig(
        project="p",
        sources={"bill": event, "app": event, "tabular": tabular},
        instructions=(InstructionConfig(id="churn", text="Will the user leave?"),),
        output=OutputConfig(path="/out"),
        model=ModelSettings(**{"llm": llm, "text_encoder": encoder, "embedding_dim": 16, **settings}),
    )


@pytest.fixture
def config(tiny):
    return project(*tiny)


@pytest.fixture
def saved(config, tmp_path):
    load_model(config).save_pretrained(tmp_path / "saved")
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "saved")))


def test_without_a_path_the_model_is_seeded_and_says_it_is_untrained(config, tiny):
    model = load_model(config)
    assert not model.config.trained
    assert not model.training
    assert model.config.sources == ["bill", "app", "tabular"]
    assert model.config.numeric_columns == [["tabular", "money", "spend"]]
    assert model.weights_digest() == load_model(config).weights_digest()
    assert model.weights_digest() != load_model(project(*tiny, seed=7)).weights_digest()


def test_the_compute_type_of_the_config_is_used(tiny):
    assert load_model(project(*tiny, dtype="bfloat16")).llm_dtype == torch.bfloat16


def test_a_saved_model_that_fits_is_loaded(config, saved):
    assert load_model(saved).weights_digest() == load_model(config).weights_digest()


def test_a_model_on_another_file_system_is_loaded_and_a_missing_one_named(saved):
    memory = fsspec.filesystem("memory")
    memory.put(f"{saved.model.path}/", "/models/mine/", recursive=True)
    try:
        there = dataclasses.replace(saved, model=dataclasses.replace(saved.model, path="memory://models/mine"))
        local, remote = load_model(saved).state_dict(), load_model(there).state_dict()
        assert all(torch.equal(local[name], remote[name]) for name in local)
        missing = dataclasses.replace(saved, model=dataclasses.replace(saved.model, path="memory://models/other"))
        with pytest.raises(DataError, match="no model at memory://models/other"):
            load_model(missing)
    finally:
        memory.rm("/models", recursive=True)


def test_other_sources_are_refused_with_both_sides(saved):
    sources = {name: one for name, one in saved.sources.items() if name != "app"}
    with pytest.raises(VersionMismatchError, match=r"'bill', 'app', 'tabular'.*\['bill', 'tabular'\]"):
        load_model(dataclasses.replace(saved, sources=sources))


def test_other_numeric_columns_are_refused_with_both_sides(saved):
    tabular = dataclasses.replace(saved.sources["tabular"], numeric={"money": ("visits",)})
    with pytest.raises(VersionMismatchError, match=r"spend.*visits"):
        load_model(dataclasses.replace(saved, sources={**saved.sources, "tabular": tabular}))


def test_another_encoder_is_refused_with_both_sides(saved, tmp_path):
    other = make_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(VersionMismatchError, match=r"source bill was trained with encoder .*tiny-bert.*other"):
        load_model(dataclasses.replace(saved, model=dataclasses.replace(saved.model, text_encoder=other)))


def test_another_embedding_size_is_refused(saved):
    with pytest.raises(VersionMismatchError, match="embedding_dim 16, the config declares 32"):
        load_model(dataclasses.replace(saved, model=dataclasses.replace(saved.model, embedding_dim=32)))


def test_a_model_trained_on_other_history_settings_is_refused(config, tmp_path):
    model = load_model(config)
    model.config.history_digest = "0" * 64
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(VersionMismatchError, match="history digest"):
        load_model(dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "saved"))))
