"""The plan of every pass: a pure function of seed and index, fair to users, questions and families."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from instructue_feast.errors import DataError, LeakageError
from instructue_feast.training.plan import Sampler, question_shares
from instructue_feast.training.validation import split_rows
from instructue_feast.user_qa.dataset import UserQA
from tests.training.conftest import settings
from tests.training.data import make_data


def sampler(data=None, **changes):
    train = (data or make_data(20, as_ofs=3, drop=0.3)).train
    return train, Sampler(train, np.arange(len(train)), settings(users_per_step=6, **changes))


def replace(data: UserQA, **changes) -> UserQA:
    values = {one.name: getattr(data, one.name) for one in dataclasses.fields(UserQA)}
    return UserQA(**(values | changes))


def test_a_pass_depends_on_seed_and_index_alone():
    _, one = sampler()
    _, other = sampler()
    for index in (7, 0, 3):
        for field in dataclasses.fields(one.plan(index)):
            np.testing.assert_array_equal(getattr(one.plan(index), field.name), getattr(other.plan(index), field.name))
    assert not np.array_equal(one.plan(0).pair_BK, sampler(seed=1)[1].plan(0).pair_BK)


def test_every_row_comes_once_per_epoch():
    _, one = sampler()
    rows = np.concatenate([one.plan(index).row_B for index in range(10)])
    assert np.bincount(rows).tolist() == [1] * 60
    assert not np.array_equal(rows, np.concatenate([one.plan(index).row_B for index in range(10, 20)]))


def test_a_pass_has_users_of_one_as_of():
    train, one = sampler(make_data(12, as_ofs=3))
    assert all(len(np.unique(train.history.as_of_us[one.plan(index).row_B])) == 1 for index in range(6))


def test_pairs_belong_to_their_user_and_none_is_asked_twice_with_weight():
    train, one = sampler(questions_per_user=5)
    for index in range(10):
        plan = one.plan(index)
        for user, row in enumerate(plan.row_B):
            pairs = plan.pair_BK[user]
            assert ((train.offsets[row] <= pairs) & (pairs < train.offsets[row + 1])).all()
            asked = pairs[plan.weight_BK[user] > 0]
            assert len(asked) == len(set(asked))
            np.testing.assert_array_equal(plan.weight_BK[user][: len(asked)], train.weight_P[asked])


def test_wordings_are_training_wordings_of_their_question():
    train, one = sampler(instruction_dropout=0.3)
    blank = 0
    for index in range(20):
        plan = one.plan(index)
        for pair, wording in zip(plan.pair_BK.ravel(), plan.wording_BK.ravel(), strict=True):
            assert one.wordings[wording] in ("", *train.questions[train.question_P[pair]].wordings)
            blank += wording == 0
    assert 0.2 < blank / (20 * 18) < 0.4


def test_a_pass_asks_no_more_distinct_questions_than_it_may():
    train, one = sampler(questions_per_step=2, questions_per_user=2)
    found = [set(train.question_P[one.plan(index).pair_BK[one.plan(index).weight_BK > 0]]) for index in range(20)]
    assert set.union(*found) == set(range(6))
    # A user who answered none of the pool is asked something else rather than nothing.
    assert np.mean([len(own) for own in found]) < 3.5


def test_the_next_token_loss_takes_the_asked_number_of_pairs():
    _, one = sampler(autoregressive_pairs=2)
    plan = one.plan(0)
    assert (plan.spoken_BK.sum(1) == np.minimum(2, (plan.weight_BK > 0).sum(1))).all()
    assert not sampler(autoregressive_weight=0.0)[1].plan(0).spoken_BK.any()


def test_the_shuffled_control_shows_another_user_of_the_same_as_of():
    train, one = sampler(shuffle_users=True)
    users = np.array(train.history.user_ids)
    seen = set()
    for index in range(20):
        plan = one.plan(index)
        assert (users[plan.history_B] != users[plan.row_B]).all()
        assert (train.history.as_of_us[plan.history_B] == train.history.as_of_us[plan.row_B]).all()
        seen |= set(zip(plan.row_B, plan.history_B, strict=True))
    assert len(seen) > 60  # drawn anew: a row does not keep its stranger


def test_shares_are_uniform_until_a_family_is_too_large():
    asked = np.ones(12, bool)
    families = ["big"] * 10 + ["small"] + ["tiny"]
    shares = question_shares(families, asked, 1.0, 0.5)
    assert shares.sum() == pytest.approx(1)
    assert shares[:10].sum() == pytest.approx(0.5)
    assert shares[10] == pytest.approx(0.25)
    np.testing.assert_allclose(question_shares(families, asked, 1.0, 1.0), 1 / 12)
    np.testing.assert_allclose(question_shares(["a", "b"], np.ones(2, bool), 1.0, 0.1), 0.5)
    assert question_shares(families, asked, 0.0, 1.0)[:10].sum() == pytest.approx(1 / 3)


def test_chance_of_balanced_yes_and_no_is_log_2():
    _, one = sampler(make_data(20))
    np.testing.assert_allclose(one.chance_Q[:6], math.log(2), atol=1e-6)


def test_questions_answered_alike_by_all_are_left_out():
    train = make_data(20).train
    answers = train.answer_P.copy()
    answers[train.question_P == 2] = 4
    data = replace(train, answer_P=answers)
    one = Sampler(data, np.arange(20), settings())
    assert one.unusable == 1
    assert all(2 not in data.question_P[one.plan(index).pair_BK] for index in range(10))


def test_nothing_to_learn_is_said_clearly():
    train = make_data(20).train
    with pytest.raises(DataError, match="none of the 6 questions has two different answers"):
        Sampler(replace(train, answer_P=2 * train.question_P), np.arange(20), settings())
    with pytest.raises(DataError, match="no pairs to train on"):
        Sampler(train, np.zeros(0, np.int64), settings())
    with pytest.raises(DataError, match="one user to train on"):
        Sampler(make_data(1, as_ofs=3).train, np.arange(3), settings())


def test_held_out_subjects_never_train():
    with pytest.raises(LeakageError, match="held-out subjects"):
        Sampler(make_data(20).held_out, np.arange(20), settings())


def test_held_out_users_are_the_same_at_every_as_of():
    train = make_data(100, as_ofs=3).train
    rows, held = split_rows(train, 0.2)
    users = np.array(train.history.user_ids)
    assert not set(users[rows]) & set(users[held])
    assert len(rows) + len(held) == 300
    assert 10 <= len(set(users[held])) <= 32


def test_what_a_pass_leaves_out_of_histories_depends_on_seed_and_index_alone():
    train, one = sampler(event_dropout=0.4)
    _, other = sampler(event_dropout=0.4)
    other.shown(other.plan(5))
    shown = one.shown(one.plan(2))
    np.testing.assert_array_equal(shown.text_id, other.shown(other.plan(2)).text_id)
    whole = train.history.take(one.plan(2).history_B)
    assert 0 < len(shown.text_id) < len(whole.text_id)
    _, plain = sampler()
    np.testing.assert_array_equal(plain.shown(plain.plan(2)).text_id, whole.text_id)
