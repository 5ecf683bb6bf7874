"""The trainer: it learns, the control does not, and a resumed run is the same run."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from instructue_feast.errors import ConfigError, DataError, InvalidEmbeddingError, StorageError, VersionMismatchError
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.training import checkpoint, losses
from instructue_feast.training.losses import Learner
from instructue_feast.training.run import train
from instructue_feast.training.validation import Probe, split_rows, validate
from instructue_feast.training.vectors import TextVectors
from instructue_kernels.info_nce import info_nce
from tests.training.conftest import fresh_model, settings
from tests.training.data import make_data

LEARNS = {"users_per_step": 16, "questions_per_user": 6, "logging_steps": 10, "lora_r": 0}


def run(llm, encoder, out, data=None, *, stop_after=None, resume=False, overwrite=False, **changes):
    chosen = settings(**changes)
    model = fresh_model(llm, encoder, chosen)
    result = train(model, data or make_data(12), chosen, out, stop_after=stop_after, resume=resume, overwrite=overwrite)
    return model, result


def test_a_tiny_model_overfits_32_users(llm, encoder, tmp_path):
    data = make_data(32)
    _, result = run(
        llm, encoder, tmp_path / "m", data, steps=110, autoregressive_weight=0.02, autoregressive_pairs=1, **LEARNS
    )
    assert result.metrics["contrastive_loss"] < 0.5 * result.metrics["chance_loss"]
    saved = InstructUEModel.from_pretrained(tmp_path / "m")
    probe = Probe("auc", data.train, np.arange(len(data.train)), np.arange(6), False)
    words = TextVectors.encode(saved, data.phrasebook, [probe.wording(one) for one in probe.questions])
    assert validate(Learner(saved, words, settings()), probe, words)["auc"] > 0.95


@pytest.mark.parametrize("negatives", ["same_question", "batch"])
def test_only_same_question_negatives_keep_the_shuffled_control_at_chance(llm, encoder, tmp_path, negatives):
    """With users shuffled there is nothing to learn but the question; mixed negatives are solved by that alone."""
    _, result = run(
        llm, encoder, tmp_path / "m", make_data(32), steps=40, shuffle_users=True, negatives=negatives,
        answers_apart=negatives == "same_question", autoregressive_weight=0.0, **LEARNS,
    )  # fmt: skip
    last, chance = result.metrics["contrastive_loss"], result.metrics["chance_loss"]
    if negatives == "same_question":
        assert last > chance - 0.02
    else:
        assert last < 0.8 * math.log(12)  # of twelve answers it soon knows which two fit the question


def test_a_resumed_run_is_the_same_run(llm, encoder, tmp_path):
    data = make_data(12, as_ofs=2, drop=0.3)
    chosen = {"steps": 6, "lora_dropout": 0.1, "gradient_accumulation": 2, "users_per_step": 2}
    whole, _ = run(llm, encoder, tmp_path / "whole", data, **chosen)
    _, stopped = run(llm, encoder, tmp_path / "halves", data, stop_after=3, **chosen)
    assert (stopped.finished, stopped.step) == (False, 3)
    assert not (tmp_path / "halves").exists()
    torch.manual_seed(99)  # a new process would start from other random numbers
    halves, result = run(llm, encoder, tmp_path / "halves", data, resume=True, **chosen)
    assert (result.finished, result.step) == (True, 6)
    expected, actual = whole.state_dict(), halves.state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    for folder in ("whole", "halves"):
        assert {"README.md", "config.json", "curves.png", "lora", "model.safetensors", "training.json"} == {
            one.name for one in (tmp_path / folder).iterdir()
        }
    states = [load_file(tmp_path / f"{one}.training/checkpoint-6/optimizer.safetensors") for one in ("whole", "halves")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_checkpoints_hold_no_pickle_and_old_ones_go(llm, encoder, tmp_path):
    run(llm, encoder, tmp_path / "m", save_steps=1, keep_checkpoints=2)
    folders = checkpoint.checkpoints(tmp_path / "m.training")
    assert [one.name for one in folders] == ["checkpoint-3", "checkpoint-4"]
    assert {one.suffix for folder in folders for one in folder.iterdir()} == {".safetensors", ".json"}


def test_the_saved_model_is_the_trained_one_and_says_so(llm, encoder, tmp_path):
    model, result = run(llm, encoder, tmp_path / "m", data_terms="for tests", validation_fraction=0.3, eval_steps=2)
    saved = InstructUEModel.from_pretrained(tmp_path / "m")
    assert saved.weights_digest() == model.weights_digest()
    assert (saved.config.trained, saved.config.history_digest) == (True, "0" * 64)
    assert saved.config.trained_through == "2017-10-01T00:00:00+00:00"
    assert float(saved.numeric.std.min()) > 1  # set from the data
    record = json.loads((tmp_path / "m/training.json").read_text())
    assert record["weights_digest"] == saved.weights_digest()
    assert record["metrics"]["eval_auc_subjects"] == result.metrics["eval_auc_subjects"]
    card = (tmp_path / "m/README.md").read_text()
    assert card.startswith("---\nlibrary_name: instructue-feast\n")
    assert "for tests" in card
    assert (tmp_path / "m/curves.png").read_bytes().startswith(b"\x89PNG")
    assert any("eval_auc_users" in line for line in result.history)


def test_the_card_counts_what_was_trained_not_what_the_data_set_holds(llm, encoder, tmp_path):
    chosen = settings(validation_fraction=0.4, steps=2, gradient_accumulation=3)
    data = make_data(16, drop=0.2)
    weight_P = data.train.weight_P.copy()
    weight_P[::5] = 0
    same = data.train.question_P == 0  # a question to which everybody has one answer
    answer_P = np.where(same, 0, data.train.answer_P).astype(np.int32)
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, weight_P=weight_P, answer_P=answer_P))
    train(fresh_model(llm, encoder, chosen), data, chosen, tmp_path / "m")
    qa, (rows, held_out) = data.train, split_rows(data.train, 0.4)
    assert len(held_out)
    pairs = [
        int(qa.question_P[pair])
        for row in rows
        for pair in range(qa.offsets[row], qa.offsets[row + 1])
        if qa.weight_P[pair] > 0 and qa.question_P[pair] != 0
    ]
    found = json.loads((tmp_path / "m/training.json").read_text())["data"]
    assert found["pairs"] == len(pairs) < qa.num_pairs
    assert found["questions"] == len(set(pairs)) == 5  # of 8: two are held out, one has one answer
    assert found["unusable_questions"] == 1
    assert (found["rows"], found["held_out_rows"]) == (len(rows), len(held_out))
    drawn = 2 * 3 * chosen.users_per_step * chosen.questions_per_user
    assert found["pairs_drawn"] == drawn
    card = (tmp_path / "m/README.md").read_text()
    assert f"| pairs of trained users | {len(pairs)} over 5 questions |\n| pairs drawn | at most {drawn} |" in card


def test_bfloat16_and_gradient_checkpointing_train_our_weights_in_float32(llm, encoder, tmp_path, monkeypatch):
    contrasted = set()

    def watched(query, key, *args, **options):
        contrasted.update({query.dtype, key.dtype})
        return info_nce(query, key, *args, **options)

    monkeypatch.setattr(losses, "info_nce", watched)
    chosen = settings(gradient_checkpointing=True, user_user_weight=0.5)
    model = fresh_model(llm, encoder, chosen)
    model.llm.to(torch.bfloat16)
    for name, one in model.llm.named_parameters():
        if "lora_" in name:
            one.data = one.data.float()
    train(model, make_data(12), chosen, tmp_path / "m")
    trained = {one.dtype for one in model.parameters() if one.requires_grad}
    assert trained == {torch.float32}
    assert model.llm_dtype == torch.bfloat16
    assert contrasted == {torch.bfloat16}  # a GPU takes the fused kernels for these, and only for these


def test_gradient_checkpointing_changes_nothing(llm, encoder, tmp_path):
    plain, _ = run(llm, encoder, tmp_path / "a", steps=2)
    thrifty, _ = run(llm, encoder, tmp_path / "b", steps=2, gradient_checkpointing=True)
    for name, one in plain.state_dict().items():
        torch.testing.assert_close(thrifty.state_dict()[name], one, rtol=1e-5, atol=1e-6)


def test_loader_processes_change_nothing(llm, encoder, tmp_path):
    plain, _ = run(llm, encoder, tmp_path / "a", steps=2)
    many, _ = run(llm, encoder, tmp_path / "b", steps=2, loader_workers=2)
    assert many.weights_digest() == plain.weights_digest()


def test_resume_wants_the_same_settings_and_data(llm, encoder, tmp_path):
    out = tmp_path / "m"
    run(llm, encoder, out, stop_after=2)
    with pytest.raises(VersionMismatchError, match=r"settings\.learning_rate: 0\.005 then, 0\.1 now"):
        run(llm, encoder, out, resume=True, learning_rate=0.1)
    with pytest.raises(VersionMismatchError, match="other \\[data\\]"):
        run(llm, encoder, out, make_data(12, seed=1), resume=True)
    with pytest.raises(ConfigError, match="checkpoints of an earlier run"):
        run(llm, encoder, out)
    _, result = run(llm, encoder, out, resume=True, logging_steps=2)
    assert result.finished
    logged = [one["step"] for one in result.history if "contrastive_loss" in one]
    assert logged == [1, 2, 4], "the interval of this call, not of the one that wrote the checkpoint"


def test_a_damaged_checkpoint_is_named(llm, encoder, tmp_path):
    run(llm, encoder, tmp_path / "m", stop_after=2)
    file = tmp_path / "m.training/checkpoint-2/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"optimizer\.safetensors cannot be read"):
        run(llm, encoder, tmp_path / "m", resume=True)


def test_a_full_disk_leaves_the_last_checkpoint_intact(llm, encoder, tmp_path, monkeypatch):
    written = checkpoint.save_file

    def full(tensors, path, *_):
        if "optimizer" in path.name and checkpoint.checkpoints(tmp_path / "m.training"):
            raise OSError(28, "No space left on device")
        written(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(StorageError, match="checkpoint-2: No space left"):
        run(llm, encoder, tmp_path / "m", save_steps=1)
    assert [one.name for one in (tmp_path / "m.training").glob("checkpoint-*")] == ["checkpoint-1"]
    monkeypatch.undo()
    _, result = run(llm, encoder, tmp_path / "m", save_steps=1, resume=True)
    assert result.finished


def test_a_taken_folder_is_refused(llm, encoder, tmp_path):
    run(llm, encoder, tmp_path / "m", steps=1)
    shutil.rmtree(tmp_path / "m.training")
    with pytest.raises(ConfigError, match="holds a model already"):
        run(llm, encoder, tmp_path / "m", steps=1)
    run(llm, encoder, tmp_path / "m", steps=1, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is no model folder"):
        run(llm, encoder, tmp_path / "other", steps=1, overwrite=True)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(llm, encoder, tmp_path):
    chosen = settings(save_steps=1)
    model = fresh_model(llm, encoder, chosen)
    before = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    model.prompt.user.register_hook(lambda grad: grad * float("inf"))  # the loss itself stays finite
    with pytest.raises(InvalidEmbeddingError, match="gradient of step 1 is not finite; the weights were not changed"):
        train(model, make_data(12), chosen, tmp_path / "m")
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters() if name in before)
    assert not checkpoint.checkpoints(tmp_path / "m.training")
    assert not (tmp_path / "m").exists()


def test_a_diverging_run_stops(llm, encoder, tmp_path):
    chosen = settings()
    model = fresh_model(llm, encoder, chosen)
    model.prompt.user.data.fill_(float("nan"))
    with pytest.raises(InvalidEmbeddingError, match="lower the learning rates"):
        train(model, make_data(12), chosen, tmp_path / "m")
