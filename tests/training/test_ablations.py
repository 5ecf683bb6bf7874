"""Each variant changes what it says, and nothing about who is asked what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, VersionMismatchError
from instructue_feast.history.render import text_id
from instructue_feast.model.modeling import InstructUEModel
from instructue_feast.model.saving import TRANSFORMER_WEIGHTS
from instructue_feast.model.small_transformer import layer_weights
from instructue_feast.training.ablations import FULL, ablations, chosen
from instructue_feast.training.collate import Passes
from instructue_feast.training.losses import Learner
from instructue_feast.training.plan import Sampler
from instructue_feast.training.run import make_model, train
from instructue_feast.training.vectors import TextVectors, embed
from tests.model_data import PHRASES
from tests.training.conftest import settings
from tests.training.data import make_data
from tests.training.test_train_command import CONFIG

NAMES = [
    "full", "no_focus_token", "no_llm", "no_summary_tokens", "no_centre", "no_contrastive", "no_autoregressive",
    "answers_as_they_are", "batch_negatives", "batch_negatives_no_mask", "without_bill", "without_app",
    "without_tabular", "one_token_per_event", "shuffled_users",
]  # fmt: skip


@pytest.fixture
def project(tmp_path, llm, encoder):
    file = tmp_path / "instructue.yaml"
    file.write_text(CONFIG.format(llm=llm, encoder=encoder))
    return load_config(file)


def variant(project, name, **changes):
    """A variant by name, with its settings."""
    base = settings(**changes)
    (found,) = (one for one in ablations(base, project)[0] if one.name == name)
    return found, found.settings(base)


def embeddings(project, name, history, data, **changes):
    """Of every user, under two instructions, from the untrained model of a variant."""
    found, own = variant(project, name, **changes)
    model = make_model(project, own).eval()
    model.numeric.set_statistics(torch.from_numpy(data.train.history.tabular_numeric))
    words = TextVectors.encode(model, data.phrasebook, ["Is there grocery item 1?", "Is there app 1?"])
    suffixes = [model.suffix(text) for text in ("Is there grocery item 1?", "Is there app 1?")]
    history = found.history(history, project)
    asked = np.tile([0, 1], (len(history), 1))
    with torch.no_grad():
        return embed(model, words, history, [suffixes] * len(history), asked).embeddings


def with_other_texts(history, source, name):
    """The same histories with other texts of one source, or other numbers where `source` is the tabular one."""
    ids = np.array([text_id(name, one) for one in PHRASES[name]])
    own = history.source_index == source
    changed = history.text_id.copy()
    changed[own] = ids[(np.searchsorted(np.sort(ids), changed[own]) + 1) % len(ids)]
    numeric = history.tabular_numeric + (100 if name == "tabular" else 0)
    return dataclasses.replace(history, text_id=changed, tabular_numeric=numeric.astype(np.float32))


def test_the_table_has_the_rows_of_the_issue(project):
    found, same = ablations(settings(), project)
    assert [one.name for one in found] == NAMES
    assert not same
    assert {one.name: one.beside for one in found if one.beside} == {"batch_negatives_no_mask": "batch_negatives"}


def test_what_full_lacks_is_no_variant(project):
    base = settings(
        focus_token=False, autoregressive_weight=0.0, negatives="batch", false_negative_margin=0.1, shuffle_users=True
    )
    found, same = ablations(base, project)
    assert {one.name for one in same} == {"no_focus_token", "no_autoregressive", "batch_negatives", "shuffled_users"}
    assert "same_question_negatives" in {one.name for one in found}
    (margin,) = (one.settings(base) for one in found if one.name == "batch_negatives_no_mask")
    assert (margin.false_negative_mask, margin.false_negative_margin) == (False, None)
    only_words = settings(contrastive_weight=0.0)
    assert "no_autoregressive" not in {one.name for one in ablations(only_words, project)[0]}


def test_full_is_in_every_choice_and_unknown_names_are_explained(project):
    found, _ = ablations(settings(), project)
    assert [one.name for one in chosen(found, ["without_bill"])] == [FULL, "without_bill"]
    assert chosen(found, None) == found
    with pytest.raises(ConfigError, match="unknown variant 'no_lm'") as caught:
        chosen(found, ["no_lm"])
    assert "no_llm" in caught.value.hint


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_asks_the_same_users_the_same_questions_in_the_same_words(project, name):
    data = make_data(12, as_ofs=2, drop=0.3)
    (found, own), (_, base) = variant(project, name), variant(project, FULL)
    changed = found.data(data, project)
    rows = np.arange(len(data.train))
    samplers = Sampler(changed.train, rows, own, changed.lengths), Sampler(data.train, rows, base)
    for index in range(7):
        plan, full = (one.plan(index) for one in samplers)
        for field in ("row_B", "pair_BK", "wording_BK", "weight_BK"):
            np.testing.assert_array_equal(getattr(plan, field), getattr(full, field))
        shuffled = name == "shuffled_users"
        assert (plan.history_B != plan.row_B).all() if shuffled else (plan.history_B == plan.row_B).all()
        assert plan.spoken_BK.any() == (name != "no_autoregressive")


@pytest.mark.parametrize(("source", "name"), [(0, "bill"), (1, "app"), (2, "tabular")])
def test_a_source_left_out_changes_nothing_in_the_embedding(project, source, name):
    data = make_data(6)
    history = data.train.history
    other = with_other_texts(history, source, name)
    torch.testing.assert_close(
        embeddings(project, f"without_{name}", history, data), embeddings(project, f"without_{name}", other, data),
        rtol=0, atol=1e-6,
    )  # fmt: skip
    moved = embeddings(project, FULL, history, data) - embeddings(project, FULL, other, data)
    assert moved.abs().max() > 1e-3
    changed = variant(project, f"without_{name}")[0].data(data, project)
    for part in (changed.train, changed.held_out):
        assert not (part.history.source_index == source).any()


def test_without_a_focus_token_two_instructions_differ_by_their_words_alone(project):
    """Of the prompt, only the words of the instruction are left to differ: none differ, so do the embeddings not."""
    data = make_data(6)
    changed = {}
    for name in (FULL, "no_focus_token"):
        own = variant(project, name)[1]
        model = make_model(project, own).eval()
        words = TextVectors.encode(model, data.phrasebook, ["Is there grocery item 1?", "Is there app 1?"])
        suffix = model.suffix("the same words")
        with torch.no_grad():
            asked = np.tile([0, 1], (len(data.train), 1))
            found = embed(model, words, data.train.history, [[suffix, suffix]] * len(data.train), asked).embeddings
        changed[name] = float((found[:, 0] - found[:, 1]).abs().max())
    assert changed["no_focus_token"] < 1e-6
    assert changed[FULL] > 1e-3


@pytest.mark.parametrize("name", [FULL, "no_centre"])
def test_without_centres_nothing_is_taken_away_in_training(project, name):
    data = make_data(8)
    own = variant(project, name)[1]
    model = make_model(project, own)
    sampler = Sampler(data.train, np.arange(len(data.train)), own)
    learner = Learner(model, TextVectors.encode(model, data.phrasebook, sampler.wordings), own).train()
    learner(Passes(model, data.train, sampler, 1)[0])
    for centre in (model.user_centre, model.answer_centre):
        assert bool(centre.mean.any()) == (name == FULL)


def test_without_summary_tokens_texts_outside_the_prompt_reach_the_focus_only(project):
    data = make_data(6)
    history = data.train.history
    oldest = history.offsets[:-1]  # each user has at least two texts of the first source
    ids = np.array([text_id("bill", one) for one in PHRASES["bill"]])
    text = history.text_id.copy()
    text[oldest] = np.where(text[oldest] == ids[20], ids[21], ids[20])
    other = dataclasses.replace(history, text_id=text)
    kept = np.flatnonzero(np.bincount(np.repeat(np.arange(6), history.num_tokens)[history.source_index == 0]) > 1)
    moved = {
        name: (
            embeddings(project, name, history, data, prompt_texts=1, focus_token=False)
            - embeddings(project, name, other, data, prompt_texts=1, focus_token=False)
        )[kept].abs().max()
        for name in (FULL, "no_summary_tokens")
    }  # fmt: skip
    assert len(kept)
    assert moved["no_summary_tokens"] < 1e-6
    assert moved[FULL] > 1e-4


def test_one_token_per_event_takes_the_counts_out_and_leaves_the_caps_in(project):
    found, _ = variant(project, "one_token_per_event")
    changed = found.data(make_data(8), project)
    history, before = changed.train.history, make_data(8).train.history
    assert not history.count_bucket.any()
    assert len(history.text_id) > len(before.text_id)
    np.testing.assert_array_equal(changed.lengths, before.num_tokens)
    sources = dict(project.sources)
    sources["bill"] = dataclasses.replace(sources["bill"], max_texts=2)
    capped = found.history(before, dataclasses.replace(project, sources=sources))
    assert capped.num_tokens.max() > 2  # the other sources keep their own bounds
    user = np.repeat(np.arange(len(capped)), capped.num_tokens)
    assert np.bincount(user[capped.source_index == 0]).max() == 2


def test_no_llm_trains_a_small_transformer_of_its_own_and_nothing_of_the_llm(project, tmp_path):
    _, own = variant(project, "no_llm", steps=2)
    own = dataclasses.replace(own, transformer_dim=48)
    model = make_model(project, own)
    assert model.config.hidden_size == 48
    words = model.llm.get_input_embeddings().weight
    before = {name: one.detach().clone() for name, one in layer_weights(model.llm).items()}
    start = words.detach().clone()
    assert not hasattr(model.llm, "peft_config")
    assert {name for name, one in model.llm.named_parameters() if one.requires_grad} == set(before)
    data = make_data(8)
    train(model, data, own, tmp_path / "m")
    assert all(not torch.equal(before[name], one) for name, one in layer_weights(model.llm).items())
    assert torch.equal(start, model.llm.get_input_embeddings().weight)

    saved = InstructUEModel.from_pretrained(tmp_path / "m", merge_lora=True)
    assert saved.weights_digest() == model.weights_digest()
    for name, one in layer_weights(saved.llm).items():
        assert torch.equal(one, layer_weights(model.llm)[name])
    torch.testing.assert_close(saved.llm.get_input_embeddings().weight, start)
    answers = [saved.answer_ids(text) for text in ("Yes.", "No.")]
    torch.testing.assert_close(saved.answer_embeddings(answers), model.answer_embeddings(answers))
    with_llm = make_model(project, settings())
    assert with_llm.config.identity() != model.config.identity()
    (tmp_path / "m" / TRANSFORMER_WEIGHTS).write_bytes((tmp_path / "m" / "model.safetensors").read_bytes())
    with pytest.raises(VersionMismatchError, match="does not fit its config"):
        InstructUEModel.from_pretrained(tmp_path / "m")


def test_a_small_transformer_has_no_llm_for_lora():
    with pytest.raises(ConfigError, match="no LLM for LoRA"):
        settings(transformer_dim=48, lora_r=4)


def test_runs_with_an_llm_are_resumed_as_before():
    assert "transformer_dim" not in settings().learning()
    assert settings(transformer_dim=48, lora_r=0).learning()["transformer_dim"] == 48


def losses(project, name, data, **changes):
    """Of the first pass of a variant, on the same untrained model."""
    _, own = variant(project, name, **changes)
    torch.manual_seed(0)
    model = make_model(project, own)
    sampler = Sampler(data.train, np.arange(len(data.train)), own)
    learner = Learner(model, TextVectors.encode(model, data.phrasebook, sampler.wordings), own)
    return learner, learner(Passes(model, data.train, sampler, 1)[0])


def test_each_loss_can_be_left_out(project):
    data = make_data(8)
    _, full = losses(project, FULL, data)
    assert full.contrastive > 0 < full.autoregressive
    learner, words = losses(project, "no_contrastive", data)
    assert (float(words.contrastive), float(words.autoregressive)) == (0.0, pytest.approx(float(full.autoregressive)))
    words.total.backward()
    assert all(one.grad is None or not one.grad.any() for one in learner.model.projection.parameters())
    learner, cosine = losses(project, "no_autoregressive", data)
    assert (float(cosine.autoregressive), learner.to_head) == (0.0, None)
    assert float(cosine.contrastive) == pytest.approx(float(full.contrastive), abs=1e-5)


def test_the_mask_takes_equal_answers_of_other_questions_out_of_the_negatives(project):
    data = make_data(8)
    alike = tuple("Yes." if index % 2 == 0 else "No." for index in range(len(data.train.answers)))
    data = dataclasses.replace(data, train=dataclasses.replace(data.train, answers=alike))
    found = {
        name: float(losses(project, name, data)[1].contrastive)
        for name in (FULL, "batch_negatives", "batch_negatives_no_mask")
    }
    assert found["batch_negatives_no_mask"] > found["batch_negatives"] + 0.1
    assert found["batch_negatives"] != pytest.approx(found[FULL], abs=1e-3)
