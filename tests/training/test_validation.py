"""Validation: the AUC of a score that is known, and who is asked what."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from instructue_feast.training.losses import Learner
from instructue_feast.training.validation import make_probes, question_auc, split_rows, validate
from instructue_feast.training.vectors import TextVectors
from tests.training.conftest import fresh_model, settings
from tests.training.data import HELD_OUT, THINGS, make_data


def test_the_auc_is_the_share_of_pairs_in_the_right_order():
    rng = np.random.default_rng(0)
    score = rng.normal(size=(40, 2))
    truth = rng.choice([3, 4, -1], 40)
    gap = score[:, 0] - score[:, 1]
    yes, no = gap[truth == 3], gap[truth == 4]
    expected = np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no])
    assert question_auc(score, truth, (3, 4)) == pytest.approx(expected)


def test_three_levels_are_each_ranked_against_the_others():
    score = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    assert question_auc(score, np.array([7, 8, 9, 7, 8, 9]), (7, 8, 9)) == 1.0
    assert question_auc(score, np.array([8, 9, 7, 8, 9, 7]), (7, 8, 9)) == pytest.approx(0.25)


def test_a_question_all_answer_alike_has_no_auc():
    assert question_auc(np.zeros((3, 2)), np.array([1, 1, -1]), (1, 2)) is None
    assert question_auc(np.zeros((3, 2)), np.array([-1, -1, -1]), (1, 2)) is None


def test_probes_ask_held_out_users_only_and_cover_words_and_subjects():
    data = make_data(60, as_ofs=2)
    chosen = settings(validation_fraction=0.3, validation_rows=20, validation_questions=4)
    probes = {one.name: one for one in make_probes(data.train, data.held_out, np.arange(6), chosen)}
    assert set(probes) == {"auc_users", "auc_wordings", "auc_subjects"}
    for one in probes.values():
        assert set(one.rows) <= set(split_rows(one.data, 0.3)[1])
        assert len(one.rows) <= 20
    words = {name: [one.wording(q) for q in one.questions] for name, one in probes.items()}
    assert len(words["auc_users"]) == 4
    assert set(words["auc_users"]) <= {f"Is there {one}?" for one in THINGS}
    assert set(words["auc_wordings"]) <= {f"Do we see {one}?" for one in THINGS}
    assert set(words["auc_subjects"]) == {f"Is there {one}?" for one in HELD_OUT}


def test_nobody_held_out_is_nothing_to_ask():
    data = make_data(10)
    assert make_probes(data.train, data.held_out, np.arange(6), settings()) == []


@torch.no_grad()
def test_parts_of_the_rows_add_up(llm, encoder, monkeypatch):
    """Two processes ask half of the users each; summed, the scores are those of one."""
    data = make_data(40)
    chosen = settings(validation_fraction=0.4)
    model = fresh_model(llm, encoder, chosen)
    (probe, *_) = make_probes(data.train, None, np.arange(6), chosen)
    words = TextVectors.encode(model, data.phrasebook, [probe.wording(one) for one in probe.questions])
    learner = Learner(model, words, chosen).eval()
    parts = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda one: parts.append(one.clone()))
    for rank in range(2):
        validate(learner, probe, words, rank=rank, world=2)
    assert not ((parts[0] != 0) & (parts[1] != 0)).any()
    monkeypatch.setattr("torch.distributed.all_reduce", lambda one: one.copy_(parts[0] + parts[1]))
    assert validate(learner, probe, words, rank=0, world=2) == pytest.approx(validate(learner, probe, words))
