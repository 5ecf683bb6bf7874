"""Few-shot tuning: it learns what the words do not say, never ends worse than it began, and is served like the rest."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.linear_model import Ridge

from instructue_feast.errors import ConfigError, DataError, VersionMismatchError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_prompts import (
    load_run_soft_prompts,
    model_digest,
    require_model,
    save_run_soft_prompts,
    save_soft_prompt,
)
from instructue_feast.instructions import Instruction
from instructue_feast.soft_prompt_file import read_soft_prompt
from instructue_feast.training.instruction_tuning import (
    InstructionTuner,
    TuningJob,
    TuningSettings,
    answer_scores,
    draw_shots,
    initial_soft_prompt,
    probe_loss,
    ranking_loss,
    shared_users,
    untuned_prompt,
)
from instructue_feast.training.user_prefixes import InstructionReader, UserPrefixes
from tests.model_data import make_model, make_soft_prompt, make_table
from tests.training.data import make_histories

WORDS = Instruction("things", "What does the user like?")
USERS = 120


@pytest.fixture(scope="module")
def shop():
    """Users whose histories show who is positive: those with the first thing."""
    history, has = make_histories(USERS, 1, np.random.default_rng(0))
    return history, has[:, 0].astype(np.int8)


@pytest.fixture
def world(shop, llm, encoder):
    history, labels = shop
    model = make_model(llm, encoder)
    return model, make_table(model, encoder), history, labels


def tuned_in(world, **changes):
    model, table, history, labels = world
    chosen = TuningSettings(
        **({"steps": 30, "tokens": 3, "eval_steps": 5, "shots_per_step": 16, "learning_rate": 0.3} | changes)
    )
    shots = draw_shots(history.user_ids, labels, 40, settings=chosen, name="things")
    job = TuningJob(instruction=WORDS, shots=shots, answers=("Yes, it is there.", "No, it is not."))
    return InstructionTuner(UserPrefixes(model, table, history), chosen).tune(job)


def test_tuning_lowers_the_loss_and_moves_nothing_but_the_soft_prompt(world):
    model = world[0]
    before = model.weights_digest()
    found = tuned_in(world, patience=100, shots_per_step=60)  # all that are not held: every step has the same loss
    losses = [loss for _, loss, _ in found.history[1:]]
    assert losses[-1] < losses[0] - 0.05
    assert model.weights_digest() == before
    assert found.prompt.model_digest == model_digest(model)
    assert found.prompt.labels == {"shots": 80, "positive": 40, "held": 20}


def test_the_result_is_never_worse_than_the_words_alone(world):
    found = tuned_in(world)
    assert found.auc >= max(found.auc_untuned, found.auc_start)
    hopeless = tuned_in(world, learning_rate=1e3, steps=5, eval_steps=1)
    assert hopeless.auc >= hopeless.auc_untuned


def test_a_gain_that_may_be_noise_leaves_the_words_as_they_are(world):
    found = tuned_in(world, least_gain=0.0)
    assert found.auc > found.auc_untuned
    modest = tuned_in(world, least_gain=found.auc - found.auc_untuned + 0.01)
    assert modest.prompt.is_plain
    assert (modest.auc, modest.step) == (modest.auc_untuned, 0)


def test_the_shift_changes_what_the_instruction_looks_at(world):
    model, table, history, _ = world
    found = tuned_in(world, least_gain=0.0, patience=100, shots_per_step=60)
    tuned = dataclasses.replace(WORDS, soft_prompt=found.prompt.digest)
    embedder = UserEmbedder(model, table, soft_prompts={tuned.content_hash: found.prompt})
    weights = embedder.focus_weights(history, [WORDS, tuned])
    assert np.abs(weights[:, 0] - weights[:, 1]).max() > 0.01


def test_words_that_tuning_cannot_better_stay_as_they_are(world):
    model, table, history, _ = world
    prompt = untuned_prompt(WORDS, model)
    tuned = dataclasses.replace(WORDS, soft_prompt=prompt.digest)
    embedder = UserEmbedder(model, table, soft_prompts={tuned.content_hash: prompt})
    np.testing.assert_array_equal(embedder.encode(history, [tuned]), embedder.encode(history, [WORDS]))


def test_the_same_seed_gives_the_same_bits_and_another_seed_other_shots(world):
    one, two, other = tuned_in(world), tuned_in(world), tuned_in(world, seed=1)
    assert one.prompt.digest == two.prompt.digest
    assert one.history[1:] == two.history[1:]
    assert other.history != one.history


def test_a_saved_soft_prompt_is_served_as_it_was_tuned(world, tmp_path):
    model, table, history, _ = world
    found = tuned_in(world).prompt
    save_soft_prompt(found, tmp_path / "things.safetensors")
    back = read_soft_prompt(str(tmp_path / "things.safetensors"))
    np.testing.assert_array_equal(back.vectors, found.vectors)
    np.testing.assert_array_equal(back.shift, found.shift)
    assert dataclasses.replace(back, vectors=found.vectors, shift=found.shift) == found
    assert back.digest == found.digest
    require_model(back, model)
    tuned = dataclasses.replace(WORDS, soft_prompt=back.digest)
    save_run_soft_prompts({tuned.content_hash: back}, tmp_path)
    served = UserEmbedder(model, table, soft_prompts=load_run_soft_prompts(tmp_path)).encode(history, [tuned])
    prefixes = UserPrefixes(model, table, history)
    reader = InstructionReader(prefixes, model.suffix(WORDS.text), len(found.vectors))
    users, arrays = np.arange(len(history)), (torch.from_numpy(found.vectors), torch.from_numpy(found.shift))
    with torch.inference_mode():
        direct = reader.embed(users, *arrays)
    np.testing.assert_allclose(served[:, 0], direct, atol=1e-5)


def test_a_soft_prompt_of_another_model_is_refused(world, llm, encoder):
    with pytest.raises(VersionMismatchError, match="was tuned with model"):
        require_model(tuned_in(world, steps=1).prompt, make_model(llm, encoder, seed=1))


def test_damaged_files_are_refused(world, tmp_path):
    file = tmp_path / "x.safetensors"
    save_soft_prompt(tuned_in(world, steps=1).prompt, file)
    content = file.read_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        read_soft_prompt(str(tmp_path / "nothing.safetensors"))
    for damaged in (
        content[:-4],
        content[:-1] + b"\x7f",
        content[:30],
        b"",
        json.dumps({"a": 1}).encode(),
        b"\xff" * 64,
    ):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match="damaged or something else"):
            read_soft_prompt(str(file))


def test_the_start_is_the_instructions_last_words(world):
    model = world[0]
    ids = model.suffix(WORDS.text).token_ids
    embed = model.llm.get_input_embeddings()
    torch.testing.assert_close(initial_soft_prompt(model, ids, 3), embed(torch.from_numpy(ids[-3:])))
    assert initial_soft_prompt(model, ids[:2], 5).shape == (5, model.config.hidden_size)
    torch.testing.assert_close(initial_soft_prompt(model, ids[:0], 2), model.prompt.user.expand(2, -1))


@hypothesis_settings(max_examples=30, deadline=None)
@given(st.integers(2, 7), st.integers(2, 7), st.integers(0, 1000))
def test_the_probe_loss_against_ridge_regression_of_scikit_learn(positives, negatives, seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([1, 0], [positives, negatives]))
    vectors = rng.normal(size=(len(labels), 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    fitted = np.zeros(len(labels), bool)
    for one in (0, 1):
        fitted[np.flatnonzero(labels == one)[::2]] = True
    expected = []
    for own in (fitted, ~fitted):
        probe = Ridge(alpha=3.0 * own.sum()).fit(2 * vectors[own], 2 * labels[own] - 1)
        score = probe.predict(2 * vectors[~own]) - probe.intercept_
        spread = max(score.std(ddof=1), 1e-6)
        pairs = score[labels[~own] == 1][:, None] - score[labels[~own] == 0][None]
        expected.append(np.log1p(np.exp(-pairs / spread)).mean())
    found = probe_loss(torch.from_numpy(vectors), torch.from_numpy(labels))
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-6)


def test_the_probe_loss_moves_vectors_so_that_a_new_probe_ranks_better():
    torch.manual_seed(0)
    labels = torch.arange(40) % 2
    vectors = torch.nn.Parameter(torch.randn(40, 6, dtype=torch.float64))
    optimizer, losses = torch.optim.SGD([vectors], lr=2.0), []
    for _ in range(60):
        loss = probe_loss(torch.nn.functional.normalize(vectors, dim=1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_the_score_by_answers_takes_all_answers_of_a_class():
    users = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    answers = torch.nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    found = answer_scores(users, answers, torch.tensor([True, False, False]))
    cosines = users @ answers.T
    torch.testing.assert_close(found, cosines[:, 0] - (cosines[:, 1] + cosines[:, 2]) / 2)


def test_the_ranking_loss_falls_as_positives_rise_and_does_not_know_scale():
    labels = torch.tensor([1, 0, 1, 0])
    worst, better = torch.tensor([0.0, 2.0, 1.0, 3.0]), torch.tensor([2.0, 0.0, 3.0, 1.0])
    assert float(ranking_loss(better, labels)) < np.log(2) < float(ranking_loss(worst, labels))
    torch.testing.assert_close(ranking_loss(better * 100 + 5, labels), ranking_loss(better, labels))


def test_shots_are_balanced_and_shared_between_tasks():
    ids = [f"user-{number}" for number in range(400)]
    first = draw_shots(ids, np.arange(400) % 2, 50, settings=TuningSettings(), name="a")
    second = draw_shots(ids, (np.arange(400) // 2) % 2, 50, settings=TuningSettings(), name="b")
    assert first.labels.sum() == second.labels.sum() == 50
    assert first.held.sum() == 24
    assert len(np.unique(first.users)) == 100
    assert len(np.intersect1d(first.users, second.users)) > 60
    more = draw_shots(ids, np.arange(400) % 2, 60, settings=TuningSettings(), name="a")
    assert set(first.users) <= set(more.users)
    users, (one, two) = shared_users([TuningJob(instruction=WORDS, shots=shots) for shots in (first, second)])
    np.testing.assert_array_equal(users[one.shots.users], first.users)
    np.testing.assert_array_equal(users[two.shots.users], second.users)


def test_too_few_labels_are_refused():
    ids, settings = [str(number) for number in range(40)], TuningSettings()
    rare = (np.arange(40) < 10).astype(np.int8)
    with pytest.raises(DataError, match="all 40 labels are 0"):
        draw_shots(ids, np.zeros(40, np.int8), 10, settings=settings, name="a")
    with pytest.raises(DataError, match="10 positive and 30 negative labels, 20 of each are needed"):
        draw_shots(ids, rare, 20, settings=settings, name="a")
    with pytest.raises(ConfigError, match="at least 8"):
        draw_shots(ids, rare, 4, settings=settings, name="a")
    assert len(draw_shots(ids, rare, 20, settings=settings, name="a", fewer=True)) == 30


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"tokens": 0}, {"shots_per_step": 5}, {"validation_share": 1.0}, {"least_gain": -0.1}],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TuningSettings(**wrong)


def test_every_number_counts_in_the_digest(world):
    prompt = make_soft_prompt(world[0])
    other = make_soft_prompt(world[0], shift=0.2)
    assert len({prompt.digest, other.digest, dataclasses.replace(prompt, vectors=prompt.vectors[:2]).digest}) == 3
    assert not prompt.is_plain
    assert untuned_prompt(WORDS, world[0]).is_plain


def test_a_file_of_an_older_format_says_so(world, tmp_path):
    file = tmp_path / "old.safetensors"
    header = json.dumps({"format": "soft-prompt-1"})
    save_file({"soft_prompt": torch.zeros(2, 8)}, file, metadata={"soft_prompt": header})
    with pytest.raises(DataError, match="format 'soft-prompt-1', this release reads 'soft-prompt-2'") as error:
        read_soft_prompt(str(file))
    assert "tune it again" in error.value.hint
