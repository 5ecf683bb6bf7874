"""`UserEmbedder.encode`: an embedding depends on its user, its instruction and the model, and on nothing else."""

from __future__ import annotations

import dataclasses
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.errors import ConfigError, DataError, InvalidEmbeddingError, VersionMismatchError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.transfer import ask, in_turn
from instructue_feast.instructions import Instruction
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_soft_prompt, make_table

SIZES = [(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)]
HISTORY = make_history(SIZES)
CHURN, TASTE = INSTRUCTIONS[1:3]


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        yield UserEmbedder(model, make_table(model, tiny[1]))


def test_eight_instructions_in_one_pass_equal_eight_passes(embedder):
    together = embedder.encode(HISTORY, INSTRUCTIONS)
    alone = np.concatenate([embedder.encode(HISTORY, [one]) for one in INSTRUCTIONS], axis=1)
    assert together.shape == (len(SIZES), 8, embedder.embedding_dim)
    assert together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=-1), 1, atol=1e-5)


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(len(SIZES))), st.integers(1, 3000))
def test_company_padding_and_order_of_users_change_nothing(embedder, order, budget):
    whole = embedder.encode(HISTORY, INSTRUCTIONS[:3])
    other = UserEmbedder(embedder.model, embedder.table, max_batch_tokens=budget)
    part = other.encode(HISTORY.take(order), INSTRUCTIONS[:3])
    assert np.abs(part - whole[list(order)]).max() < 1e-5


def test_two_runs_give_the_same_bits(embedder):
    np.testing.assert_array_equal(embedder.encode(HISTORY, INSTRUCTIONS), embedder.encode(HISTORY, INSTRUCTIONS))


def test_order_and_company_of_instructions_change_nothing(embedder):
    forward = embedder.encode(HISTORY, INSTRUCTIONS)
    backward = embedder.encode(HISTORY, INSTRUCTIONS[::-1])
    np.testing.assert_allclose(backward[:, ::-1], forward, atol=1e-5)


def test_the_instruction_changes_the_embedding_and_its_id_does_not(embedder):
    vectors = embedder.encode(HISTORY, [CHURN, TASTE, Instruction("other_name", CHURN.text)])
    assert (np.abs(vectors[:, 0] - vectors[:, 1]).max(-1) > 1e-3).all()
    np.testing.assert_allclose(vectors[:, 0], vectors[:, 2], atol=1e-5)


def test_every_part_of_a_history_changes_the_embedding(embedder):
    base = embedder.encode(HISTORY.take([0]), [CHURN])
    for name, change in {
        "text_id": lambda x: np.concatenate([x[1:4], x[1:2] * 0 + x[0], x[4:5], x[5:]]),
        "count_bucket": lambda x: (x + 1) % 12,
        "age_bucket": lambda x: (x + 1) % 15,
        "tabular_numeric": lambda x: np.where(np.isnan(x), 5.0, np.nan).astype(np.float32),
    }.items():
        history = HISTORY.take([0])
        changed = dataclasses.replace(history, **{name: change(getattr(history, name))})
        assert np.abs(embedder.encode(changed, [CHURN]) - base).max() > 1e-4, name


def test_a_user_with_nothing_at_all_gets_an_embedding(embedder):
    nobody = embedder.encode(HISTORY.take([1]), INSTRUCTIONS)
    assert np.isfinite(nobody).all()
    np.testing.assert_allclose(np.linalg.norm(nobody, axis=-1), 1, atol=1e-5)
    assert embedder.encode(HISTORY.take([]), INSTRUCTIONS).shape == (0, 8, embedder.embedding_dim)


def test_each_users_instructions_share_one_forward_pass(embedder):
    batches = []
    with patch.object(embedder.model, "_run_llm", wraps=embedder.model._run_llm) as llm:
        embedder.encode(HISTORY, INSTRUCTIONS, lambda users, tokens: batches.append((users, tokens)))
    assert llm.call_count == len(batches)
    assert sum(users for users, _ in batches) == len(SIZES)
    suffixes = sum(len(embedder.model.suffix(one.text)) for one in INSTRUCTIONS)
    assert sum(tokens for _, tokens in batches) == embedder.model.prefix_lengths(HISTORY).sum() + suffixes * len(SIZES)


def test_similarities_are_computed_once_per_set_of_instructions(embedder):
    fresh = UserEmbedder(embedder.model, embedder.table)
    with patch.object(fresh, "_similarity", wraps=fresh._similarity) as similarity:
        for _ in range(3):
            fresh.encode(HISTORY, [CHURN, TASTE])
        assert similarity.call_count == 1
        fresh.encode(HISTORY, [TASTE])
        assert similarity.call_count == 2


def test_the_focus_looks_at_what_matches_the_instruction(embedder):
    weights = embedder.focus_weights(HISTORY, [Instruction("item", "app 3"), INSTRUCTIONS[0]])
    assert weights.shape == (len(HISTORY.text_id), 2)
    for user, size in enumerate(map(sum, SIZES)):
        own = weights[HISTORY.offsets[user] : HISTORY.offsets[user + 1]]
        np.testing.assert_allclose(own.sum(0), np.ones(2) if size else np.zeros(2), atol=1e-5)
        np.testing.assert_allclose(own[:, 1], 1 / max(1, size), atol=1e-5)  # an empty instruction looks at all alike
    own = slice(HISTORY.offsets[2], HISTORY.offsets[3])
    best = int(weights[own, 0].argmax())
    rows = embedder.table.rows(HISTORY.text_id[own])
    similarity = embedder.table.focus_keys[rows] @ embedder.model.focus_queries(["app 3"])[0, 0]
    assert best == int(similarity.argmax())


def test_a_soft_prompt_changes_the_embedding_and_is_checked(embedder):
    prompt = make_soft_prompt(embedder.model, size=0.05, shift=0.0)
    tuned = Instruction("churn", CHURN.text, soft_prompt=prompt.digest)
    own = UserEmbedder(embedder.model, embedder.table, soft_prompts={tuned.content_hash: prompt})
    both = own.encode(HISTORY, [CHURN, tuned])
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-4
    np.testing.assert_allclose(both[:, 0], embedder.encode(HISTORY, [CHURN])[:, 0], atol=1e-5)
    with pytest.raises(ConfigError, match="was not given"):
        embedder.encode(HISTORY, [tuned])
    changed = make_soft_prompt(embedder.model, size=0.05, shift=0.1)
    other = UserEmbedder(embedder.model, embedder.table, soft_prompts={tuned.content_hash: changed})
    with pytest.raises(VersionMismatchError, match="soft prompt"):
        other.encode(HISTORY, [tuned])


def test_a_shift_changes_what_the_focus_finds_and_only_for_its_own_instruction(embedder):
    prompt = make_soft_prompt(embedder.model, tokens=0, shift=1.0)
    tuned = Instruction("churn", CHURN.text, soft_prompt=prompt.digest)
    own = UserEmbedder(embedder.model, embedder.table, soft_prompts={tuned.content_hash: prompt})
    weights = own.focus_weights(HISTORY, [CHURN, tuned])
    assert np.abs(weights[:, 0] - weights[:, 1]).max() > 1e-2
    both = own.encode(HISTORY, [tuned, CHURN])
    assert np.abs(both[:, 0] - both[:, 1]).max() > 1e-3
    np.testing.assert_allclose(both[:, 1], embedder.encode(HISTORY, [CHURN])[:, 0], atol=1e-5)


def test_a_shift_of_another_size_is_refused(embedder):
    prompt = make_soft_prompt(embedder.model)
    prompt = dataclasses.replace(prompt, shift=prompt.shift[:-1])
    tuned = Instruction("churn", CHURN.text, soft_prompt=prompt.digest)
    own = UserEmbedder(embedder.model, embedder.table, soft_prompts={tuned.content_hash: prompt})
    with pytest.raises(ConfigError, match=r"shift of shape \[\d+\], the encoders want"):
        own.encode(HISTORY, [tuned])


def test_an_unknown_text_is_refused(embedder):
    history = HISTORY.take([0])
    history.text_id[2] += 1
    with pytest.raises(DataError, match="1 of 9 text ids"):
        embedder.encode(history, [CHURN])


def test_a_text_under_the_wrong_source_is_refused(embedder):
    history = dataclasses.replace(HISTORY.take([4]), source_index=np.array([1], np.int32))
    with pytest.raises(DataError, match="disagree on the source"):
        embedder.encode(history, [CHURN])


def test_no_instructions_are_refused(embedder):
    with pytest.raises(ConfigError, match="no instructions"):
        embedder.encode(HISTORY, [])


def test_a_prompt_longer_than_the_llms_positions_is_refused(embedder):
    with (
        patch.object(type(embedder.model), "max_prompt_tokens", 140),
        pytest.raises(ConfigError, match=r"LLM takes 12"),
    ):
        embedder.encode(HISTORY, INSTRUCTIONS[:1])


def test_an_instruction_too_long_for_its_room_is_refused(embedder):
    with pytest.raises(ConfigError, match=r"the model takes 128"):
        embedder.encode(HISTORY, [Instruction("long", "x" * 200)])


def test_a_table_of_another_model_is_refused(embedder, tiny):
    with pytest.raises(VersionMismatchError, match="built with model"):
        UserEmbedder(make_model(*tiny, seed=3), embedder.table)


def test_an_embedding_that_is_not_a_number_is_refused(tiny):
    model = make_model(*tiny)
    with torch.no_grad():
        model.projection.down.bias[0] = float("nan")
    with pytest.raises(InvalidEmbeddingError, match=r"\d of \d users got NaN"):
        UserEmbedder(model, make_table(model, tiny[1])).encode(HISTORY, [CHURN])


@pytest.mark.parametrize("in_flight", [0, 1, 3])
def test_answers_come_in_order_and_complete_however_many_are_awaited(in_flight):
    asked = []

    def answers():
        for number in range(5):
            asked.append(number)
            yield ask(np.array([number]), torch.full((1, 1, 2), float(number)), 7)

    for number, one in enumerate(in_turn(answers(), in_flight)):
        assert len(asked) == min(5, number + 1 + in_flight)
        assert one.users.tolist() == [number]
        np.testing.assert_array_equal(one.wait(), np.full((1, 1, 2), number))
    assert number == 4


def test_bfloat16_gives_nearly_the_same_vectors_within_one_type(tiny, embedder):
    model = make_model(*tiny, dtype=torch.bfloat16)
    halves = UserEmbedder(model, make_table(model, tiny[1]))
    assert halves.max_batch_tokens == 2 * embedder.max_batch_tokens  # the same bytes
    vectors = halves.encode(HISTORY, INSTRUCTIONS)
    assert vectors.dtype == np.float32
    assert (vectors * embedder.encode(HISTORY, INSTRUCTIONS)).sum(-1).min() > 0.995
    again = UserEmbedder(model, halves.table, max_batch_tokens=64).encode(HISTORY, INSTRUCTIONS)
    assert (vectors * again).sum(-1).min() > 0.999
