"""The centre follows what hidden states share, in training mode only."""

from __future__ import annotations

import torch

from instructue_feast.model.centre import Centre


def _states(seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 30.0 + shift + 0.1 * torch.randn(64, 3, 8, generator=generator)


def test_a_new_centre_is_the_identity_in_evaluation_mode() -> None:
    states = _states(0)
    assert torch.equal(Centre(8).eval()(states), states)


def test_after_one_pass_states_are_spread_at_unit_size() -> None:
    centre = Centre(8)
    states = _states(0)
    found = centre(states)
    assert found.mean().abs() < 0.1
    torch.testing.assert_close(found.pow(2).mean().sqrt(), torch.tensor(1.0), atol=0.05, rtol=0)
    centre.eval()
    assert torch.equal(centre(states), found)


def test_it_follows_a_drift_and_stands_still_in_evaluation_mode() -> None:
    centre = Centre(8)
    for seed in range(20):
        centre(_states(seed))
    for seed in range(60):
        centre(_states(seed, shift=5.0))
    centre.eval()
    before = centre.mean.clone()
    centre(_states(1))
    assert torch.equal(centre.mean, before)
    torch.testing.assert_close(centre.mean, torch.full((8,), 35.0), atol=0.1, rtol=0)


def test_no_gradient_goes_through_what_is_taken_away() -> None:
    states = _states(0).requires_grad_()
    centre = Centre(8)
    (gradient,) = torch.autograd.grad(centre(states).sum(), states)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 1 / float(centre.rms)))
