"""The contrastive loss sees what sets the answers to a question apart."""

from __future__ import annotations

import numpy as np
import torch

from instructue_feast.training.losses import apart


def test_answers_to_a_question_stand_apart_however_alike_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    shared, other = torch.randn(2, 1, 16, generator=generator)
    answers = torch.nn.functional.normalize(torch.cat([shared, shared, other, other, other]), dim=-1)
    answers = torch.nn.functional.normalize(answers + 0.02 * torch.randn(5, 16, generator=generator), dim=-1)
    question = np.array([7, 7, 3, 3, 3])
    assert (answers[:2] @ answers[:2].T).min() > 0.99
    found = apart(answers, question)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(5), atol=2e-3, rtol=0)
    assert found[0] @ found[1] < -0.99
    assert (found[2:] @ found[2:].T).sum().abs() < 0.5  # three directions around their middle


def test_of_two_answers_the_sign_of_the_difference_of_cosines_and_its_order_stay() -> None:
    generator = torch.Generator().manual_seed(1)
    answers = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    users = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator), dim=-1)
    found = apart(answers, np.array([0, 0, 1, 1]))
    before, after = users @ (answers[0] - answers[1]), users @ (found[0] - found[1])
    assert torch.equal(before.sign(), after.sign())
    assert torch.equal(before.argsort(), after.argsort())


def test_of_three_answers_each_is_set_against_the_mean_of_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    answers = torch.nn.functional.normalize(torch.randn(3, 16, generator=generator), dim=-1)
    users = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator), dim=-1)
    found = apart(answers, np.zeros(3, np.int64))
    for one in range(3):
        others = answers[[place for place in range(3) if place != one]].mean(0)
        score = users @ (answers[one] - others)
        assert torch.equal(score.argsort(), (users @ found[one]).argsort())


def test_equal_answers_have_nothing_apart_and_finite_gradients() -> None:
    answers = torch.nn.functional.normalize(torch.ones(3, 8), dim=-1).requires_grad_()
    found = apart(answers, np.array([0, 0, 5]))
    assert found.abs().max() < 1e-3
    (found * torch.arange(8)).sum().backward()
    assert answers.grad is not None
    assert answers.grad.isfinite().all()
