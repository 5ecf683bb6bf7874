"""What the model is fed, against a slow oracle: every answer token alone, one prompt at a time."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from instructue_feast.errors import DataError
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.inference.soft_tokens import SoftTokenTable
from instructue_feast.instructions import Instruction
from instructue_feast.model.encoders import TextEncoder
from instructue_feast.training.collate import Passes
from instructue_feast.training.losses import Learner, _friends, answer_places
from instructue_feast.training.plan import Sampler
from instructue_feast.training.vectors import TextVectors, embed
from tests.model_data import phrasebook as model_phrasebook
from tests.training.conftest import fresh_model, settings
from tests.training.data import make_data


def build(llm, encoder, *, rank=0, world=1, data=None, **changes):
    data = data or make_data(10, as_ofs=2, drop=0.5)
    chosen = settings(**({"instruction_dropout": 0.2, "lora_r": 0} | changes))
    sampler = Sampler(data.train, np.arange(len(data.train)), chosen)
    model = fresh_model(llm, encoder, chosen)
    learner = Learner(model, TextVectors.encode(model, data.phrasebook, sampler.wordings), chosen).eval()
    return learner, Passes(model, data.train, sampler, 4, rank=rank, world=world), data, sampler


@torch.no_grad()
def test_training_embeds_exactly_as_inference_does(llm, encoder):
    learner, passes, _, sampler = build(llm, encoder)
    batch = passes[0]
    ours = embed(learner.model, learner.vectors, batch.history, batch.suffixes, batch.wording_BK).embeddings
    ids, sources, texts = model_phrasebook()
    table = SoftTokenTable.build(learner.model, ids, sources, TextEncoder.load(encoder).encode(texts))
    embedder = UserEmbedder(learner.model, table)
    for user in range(len(batch.history)):
        for k, wording in enumerate(batch.wording_BK[user]):
            instruction = Instruction("one", sampler.wordings[wording])
            expected = embedder.encode(batch.history.take([user]), [instruction])[0, 0]
            np.testing.assert_allclose(ours[user, k], expected, atol=2e-5)


@torch.no_grad()
def test_only_answer_tokens_are_predicted_each_from_what_stands_before_it(llm, encoder):
    """The oracle asks for every next token with a prompt of its own, the answer so far behind `<USER>`."""
    learner, passes, _, sampler = build(llm, encoder, autoregressive_pairs=2)
    model, batch = learner.model, passes[1]
    output = embed(model, learner.vectors, batch.history, batch.suffixes, batch.wording_BK)
    fast = float(learner._next_token(output, batch))
    head = model.llm.get_output_embeddings().weight
    nats, spoken = [], 0
    for user in range(len(batch.history)):
        for k, ids in enumerate(batch.target_BK[user]):
            spoken += len(ids) > 0
            for length in range(len(ids)):
                suffix = dataclasses.replace(
                    model.suffix(sampler.wordings[batch.wording_BK[user, k]]), answer_ids=ids[:length]
                )
                wording = batch.wording_BK[user : user + 1, k : k + 1]
                alone = embed(model, learner.vectors, batch.history.take([user]), [[suffix]], wording)
                last = int((alone.prompts.segment_BS >= 0).sum()) - 1
                logits = alone.hidden[0, last] @ head.T
                nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[length]))))
    assert spoken > len(batch.history)
    assert batch.spoken_tokens == len(nats)
    assert fast == pytest.approx(np.mean(nats), abs=1e-4)
    eos = model.tokenizer.eos_token_id
    assert all(ids[-1] == eos for own in batch.target_BK for ids in own if len(ids))


@torch.no_grad()
def test_the_contrastive_loss_against_a_loop_over_pairs(llm, encoder):
    for negatives, answers_apart in (("same_question", True), ("batch", False)):
        learner, passes, data, _ = build(llm, encoder, negatives=negatives, answers_apart=answers_apart)
        batch = passes[0]
        losses = learner(batch)
        users = embed(learner.model, learner.vectors, batch.history, batch.suffixes, batch.wording_BK).embeddings
        plan = passes._sampler.plan(0)
        total = weights = hits = 0.0
        for user in range(len(users)):
            for k, pair in enumerate(plan.pair_BK[user]):
                weight = float(plan.weight_BK[user, k])
                asked = data.train.questions[data.train.question_P[pair]]
                pool = asked.answers
                if negatives == "batch":
                    questions = {data.train.question_P[one] for one in plan.pair_BK.ravel()}
                    pool = sorted(one for q in questions for one in data.train.questions[q].answers)
                vectors = learner.model.answer_embeddings(
                    [learner.model.answer_ids(data.train.answers[one]) for one in pool]
                )
                if answers_apart:  # only what sets them apart
                    vectors = vectors - vectors.mean(0)
                    vectors = vectors / (vectors.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
                cosines = vectors @ users[user, k]
                place = pool.index(data.train.answer_P[pair])
                loss = torch.nn.functional.cross_entropy(cosines * math.exp(learner.log_scale), torch.tensor(place))
                total += weight * float(loss)
                weights += weight
                own = [one for one, answer in zip(cosines.tolist(), pool, strict=True) if answer in asked.answers]
                hits += weight * (float(cosines[place]) == max(own))
        assert float(losses.contrastive) == pytest.approx(total / weights, abs=1e-4)
        assert float(losses.accuracy) == pytest.approx(hits / weights, abs=1e-4)
        assert losses.chance == pytest.approx(math.log(2), abs=0.05)


def test_processes_share_the_users_and_agree_on_the_answers(llm, encoder):
    _, whole, *_ = build(llm, encoder)
    parts = [build(llm, encoder, rank=rank, world=2)[1] for rank in range(2)]
    one, (left, right) = whole[2], (part[2] for part in parts)
    assert sorted([*left.history.user_ids, *right.history.user_ids]) == sorted(one.history.user_ids)
    for part in (left, right):
        np.testing.assert_array_equal(part.answer_id_A, one.answer_id_A)
        np.testing.assert_array_equal(part.positive_GK, one.positive_GK)
        assert part.spoken_tokens == one.spoken_tokens


def test_answer_places_start_at_the_readout():
    readout = np.array([[4, 9], [3, 8]])
    nothing = np.zeros(0, np.int64)
    user, place, target = answer_places(readout, [[np.array([7, 8]), nothing], [nothing, np.array([5])]])
    assert (user.tolist(), place.tolist(), target.tolist()) == ([0, 0, 1], [4, 5, 8], [7, 8, 5])


def test_friends_gave_the_same_answer_and_are_not_themselves():
    answers = np.array([1, 2, 1, 3, 1])
    friend, known = _friends(answers, np.array([True, True, True, True, False]))
    assert known.tolist() == [True, False, True, False, False]
    assert friend[[0, 2]].tolist() == [2, 0]


def test_the_user_user_loss_pulls_users_of_one_answer_together(llm, encoder):
    learner, passes, *_ = build(
        llm, encoder, contrastive_weight=0.0, autoregressive_weight=0.0, user_user_weight=1.0, questions_per_user=2,
        questions_per_step=2, users_per_step=8,
    )  # fmt: skip
    optimizer = torch.optim.Adam((one for one in learner.parameters() if one.requires_grad), 5e-3)
    first = None
    for _ in range(15):
        losses = learner(passes[0])
        first = first or float(losses.user_user)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert float(losses.user_user) < 0.7 * first


def test_a_phrasebook_without_a_text_is_refused(llm, encoder):
    data = make_data(10)
    data = dataclasses.replace(data, phrasebook=data.phrasebook.slice(0, 5))
    learner, passes, *_ = build(llm, encoder, data=data)
    with pytest.raises(DataError, match="texts are not in the phrasebook"):
        learner(passes[0])
