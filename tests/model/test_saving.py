"""Model folders: complete or not there, safe to read, and tied to the base models they were made with."""

from __future__ import annotations

import json
import os
import shutil
import stat

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from instructue_feast.errors import DataError, StorageError, UnsafeArtifactError, VersionMismatchError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.model.modeling import InstructUEModel
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_table
from tests.tiny_models import make_tiny_encoder, make_tiny_llm

HISTORY = make_history([(5, 3, 1), (0, 0, 0)])


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def embed(model, encoder):
    return UserEmbedder(model, make_table(model, encoder)).encode(HISTORY, INSTRUCTIONS[:3])


def with_lora(model):
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model.llm = get_peft_model(model.llm, settings).eval()
    return model


def test_a_loaded_model_gives_identical_embeddings(model, folder, encoder):
    loaded = InstructUEModel.from_pretrained(folder)
    assert loaded.weights_digest() == model.weights_digest()
    assert loaded.config.identity() == model.config.identity()
    np.testing.assert_array_equal(embed(loaded, encoder), embed(model, encoder))


def test_only_weights_of_ours_are_written(model, folder):
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(model.own_state())
    assert not any(name.startswith("llm.") for name in names)
    assert sorted(one.name for one in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert [one.name for one in folder.parent.iterdir() if one.name.startswith(".")] == []


@pytest.mark.parametrize(("umask", "rights"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_a_model_have_the_rights_that_the_umask_leaves(model, tmp_path, umask, rights):
    model = with_lora(model)
    before = os.umask(umask)
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    files = [one for one in (tmp_path / "model").rglob("*") if one.is_file()]
    assert sorted(one.name for one in files) == [
        "adapter_config.json", "adapter_model.safetensors", "config.json", "model.safetensors",
    ]  # fmt: skip
    assert {stat.S_IMODE(one.stat().st_mode) for one in files} == {rights}


def test_weights_that_half_precision_holds_are_stored_in_half_the_space(model, folder, tmp_path):
    with torch.no_grad():
        for value in model.own_state().values():
            value.copy_(value.half().float())
    model.save_pretrained(tmp_path / "small")
    sizes = [(one / "model.safetensors").stat().st_size for one in (folder, tmp_path / "small")]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = InstructUEModel.from_pretrained(tmp_path / "small")
    assert loaded.weights_digest() == model.weights_digest()
    assert {value.dtype for value in loaded.own_state().values()} == {torch.float32}


def test_lora_travels_beside_them_and_merging_changes_nothing(model, tmp_path, encoder):
    plain = embed(model, encoder)
    digest = model.weights_digest()
    with_lora(model).save_pretrained(tmp_path / "model")
    assert model.weights_digest() != digest
    lora = tmp_path / "model" / "lora"
    assert sorted(one.name for one in lora.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    settings = json.loads((lora / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == model.config.llm
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert all(one.stat().st_mode & 0o444 == 0o444 for one in lora.parent.rglob("*.*"))
    loaded = InstructUEModel.from_pretrained(tmp_path / "model")
    merged = InstructUEModel.from_pretrained(tmp_path / "model", merge_lora=True)
    assert loaded.weights_digest() == merged.weights_digest() == model.weights_digest()
    expected = embed(model, encoder)
    np.testing.assert_array_equal(embed(loaded, encoder), expected)
    np.testing.assert_allclose(embed(merged, encoder), expected, atol=1e-5)
    assert np.abs(plain - expected).max() > 1e-3
    with pytest.raises(StorageError, match="merged LoRA"):
        merged.save_pretrained(tmp_path / "again")


def test_saving_again_replaces_the_folder_as_a_whole(model, folder):
    (folder / "old.txt").write_text("")
    with torch.no_grad():
        model.prompt.user.add_(1)
    model.save_pretrained(folder)
    assert sorted(one.name for one in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert InstructUEModel.from_pretrained(folder).weights_digest() == model.weights_digest()


def test_a_save_that_fails_leaves_the_old_model(model, folder, monkeypatch):
    before = InstructUEModel.from_pretrained(folder).weights_digest()

    def full(*_args, **_values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("instructue_feast.model.saving.save_file", full)
    with pytest.raises(StorageError, match="No space left"):
        model.save_pretrained(folder)
    assert InstructUEModel.from_pretrained(folder).weights_digest() == before
    assert [one.name for one in folder.parent.iterdir() if one.name.endswith((".tmp", ".old"))] == []


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no weights \(model\.safetensors\); it holds \[config\.json\]"):
        InstructUEModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt"])
def test_pickled_weights_are_refused_unread(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UnsafeArtifactError, match=name.replace(".", r"\.")):
        InstructUEModel.from_pretrained(folder)


def test_pickled_lora_weights_are_refused_unread(model, tmp_path):
    with_lora(model).save_pretrained(tmp_path / "model")
    lora = tmp_path / "model" / "lora"
    (lora / "adapter_model.safetensors").rename(lora / "adapter_model.bin")
    with pytest.raises(UnsafeArtifactError, match="safetensors"):
        InstructUEModel.from_pretrained(tmp_path / "model")


def test_weights_cut_short_are_refused(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cut short"):
        InstructUEModel.from_pretrained(folder)


def test_another_base_llm_is_refused(model, tmp_path, encoder):
    llm = make_tiny_llm(tmp_path / "llm")
    own = make_model(llm, encoder)
    own.save_pretrained(tmp_path / "model")
    make_tiny_llm(llm, seed=1)
    with pytest.raises(VersionMismatchError, match="LLM"):
        InstructUEModel.from_pretrained(tmp_path / "model")


def test_another_encoder_is_refused(folder, tmp_path):
    other = make_tiny_encoder(tmp_path / "other", seed=1)
    with pytest.raises(VersionMismatchError, match="text encoder"):
        InstructUEModel.from_pretrained(folder, encoders=dict.fromkeys(("bill", "app", "tabular"), other))


def test_base_models_may_have_moved(model, folder, tiny, tmp_path):
    llm, encoder = (str(shutil.copytree(one, tmp_path / f"moved{index}")) for index, one in enumerate(tiny))
    encoders = dict.fromkeys(("bill", "app", "tabular"), encoder)
    loaded = InstructUEModel.from_pretrained(folder, llm=llm, encoders=encoders)
    assert loaded.config.llm == llm
    assert loaded.config.identity() == model.config.identity()
    np.testing.assert_array_equal(embed(loaded, encoder), embed(model, encoder))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"format": 99}, VersionMismatchError, "format 99"),
        ({"model_type": "llama"}, DataError, "not the config of"),
        ({"embedding_dim": 8}, VersionMismatchError, "does not fit its config"),
        ({"sources": "bill"}, DataError, "wrong value"),
    ],
)
def test_a_config_that_does_not_belong_is_refused(folder, change, error, message):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=message):
        InstructUEModel.from_pretrained(folder)


def test_a_config_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*config\.json"):
        InstructUEModel.from_pretrained(folder)
