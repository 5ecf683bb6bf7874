"""`explain`: a score is what removing the text does, and the estimate agrees with it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.explain import METHODS, explain, without_each_text, without_texts
from instructue_feast.instructions import Instruction
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_soft_prompt, make_table

HISTORY = make_history([(9, 3, 1), (0, 0, 0), (20, 6, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])
CHURN, TASTE = INSTRUCTIONS[1:3]


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        yield UserEmbedder(model, make_table(model, tiny[1]))


def test_leave_one_out_is_the_difference_that_removing_a_text_makes(embedder):
    user = HISTORY.take([0])
    (found,) = explain(embedder, user, CHURN, method="leave_one_out")
    whole = embedder.encode(user, [CHURN])[0, 0]
    blank = embedder.encode(without_texts(user), [CHURN])[0, 0]
    texts = list(user.text_id)
    for place, score in enumerate(found.scores):
        left = without_each_text(user, 0).take([place])
        assert list(left.text_id) == texts[:place] + texts[place + 1 :]
        alone = embedder.encode(left, [CHURN])[0, 0]
        assert score == pytest.approx(alone @ blank - whole @ blank, abs=1e-5)
    np.testing.assert_array_equal(found.text_ids, user.text_id)


def test_the_estimate_ranks_texts_as_leaving_them_out_does(embedder):
    for method, least in (("gates", 0.9), ("path", 0.8)):
        agreement = [
            spearmanr(fast.scores, slow.scores).statistic
            for instruction in (CHURN, TASTE)
            for fast, slow in zip(
                explain(embedder, HISTORY, instruction, method=method),
                explain(embedder, HISTORY, instruction, method="leave_one_out"),
                strict=True,
            )
            if len(slow.scores) > 4
        ]
        assert np.mean(agreement) > least, method


def test_an_older_text_that_moves_up_into_the_prompt_is_counted(llm, encoder):
    model = make_model(llm, encoder, prompt_texts=4)
    embedder = UserEmbedder(model, make_table(model, encoder))
    exact = explain(embedder, HISTORY, CHURN, method="leave_one_out")
    fast = explain(embedder, HISTORY, CHURN)
    without = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("instructue_feast.inference.explain._full_sources", lambda *_: iter(()))
        without = explain(embedder, HISTORY, CHURN)
    for user in (0, 2, 5):
        errors = [np.abs(one[user].scores - exact[user].scores).mean() for one in (fast, without)]
        assert errors[0] < errors[1]
        assert spearmanr(fast[user].scores, exact[user].scores).statistic > 0.6
    for user in (3, 4):  # nothing to move up
        np.testing.assert_array_equal(fast[user].scores, without[user].scores)


def test_a_target_is_what_the_scores_speak_for(embedder):
    user = HISTORY.take([0])
    target = np.random.default_rng(0).normal(size=embedder.embedding_dim).astype(np.float32)
    target /= np.linalg.norm(target)
    fast, slow, away = (
        explain(embedder, user, CHURN, method=method, target=sign * target)[0].scores
        for method, sign in (("gates", 1), ("leave_one_out", 1), ("gates", -1))
    )
    assert spearmanr(fast, slow).statistic > 0.8
    np.testing.assert_allclose(fast, -away, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_users_are_explained_alone_or_together_alike(embedder, method):
    together = explain(embedder, HISTORY, CHURN, method=method)
    assert [len(one.scores) for one in together] == HISTORY.num_tokens.tolist()
    for user in range(len(HISTORY)):
        (alone,) = explain(embedder, HISTORY.take([user]), CHURN, method=method)
        np.testing.assert_allclose(alone.scores, together[user].scores, atol=1e-5)
        np.testing.assert_allclose(alone.focus_weights, together[user].focus_weights, atol=1e-6)
        if len(alone.scores):
            assert alone.focus_weights.sum() == pytest.approx(1, abs=1e-5)


def test_instructions_look_at_different_texts(embedder):
    (churn,), (taste,) = (explain(embedder, HISTORY.take([2]), one) for one in (CHURN, TASTE))
    assert np.abs(churn.scores - taste.scores).max() > 1e-5


def test_a_tuned_instruction_is_explained_like_any_other(embedder):
    prompt = make_soft_prompt(embedder.model, size=1.0)
    tuned = Instruction("tuned", CHURN.text, soft_prompt=prompt.digest)
    own = UserEmbedder(embedder.model, embedder.table, soft_prompts={tuned.content_hash: prompt})
    (found,) = explain(own, HISTORY.take([2]), tuned)
    (plain,) = explain(own, HISTORY.take([2]), CHURN)
    assert np.isfinite(found.scores).all()
    assert np.abs(found.scores - plain.scores).max() > 1e-6


def test_explaining_leaves_the_model_as_it_was(embedder):
    before = [one.requires_grad for one in embedder.model.parameters()]
    digest = embedder.model.weights_digest()
    explain(embedder, HISTORY, CHURN)
    assert [one.requires_grad for one in embedder.model.parameters()] == before
    assert all(one.grad is None for one in embedder.model.parameters())
    assert embedder.model.weights_digest() == digest


def test_nonsense_is_refused(embedder):
    with pytest.raises(ConfigError, match="unknown method 'gate'"):
        explain(embedder, HISTORY, CHURN, method="gate")
    with pytest.raises(DataError, match="embeddings have 16 numbers"):
        explain(embedder, HISTORY, CHURN, target=np.zeros(3, np.float32))
