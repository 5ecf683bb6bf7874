"""Between sums over negatives and gradients: what every memory-bounded implementation computes per anchor.

Everything is of one direction; `logit = scale * cosine`. Computed in float64: at scale 150 a float32 logarithm is known
to 1e-5 only, and by that the pull of a positive would differ from the sum of what it is pulled against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from instructue_kernels.info_nce.reference import shares

# N = anchors, P = positives of an anchor


def losses(log_sum_N: torch.Tensor, positive_NP: torch.Tensor, place_NP: torch.Tensor) -> torch.Tensor:
    """`[N]` means over an anchor's positives of `log(1 + sum over negatives / exp(positive logit))`.

    Args:
        log_sum_N: Logarithm of the sum of `exp(logit)` over an anchor's negatives; -inf without any.
        positive_NP: Logits of the positives.
        place_NP: Their places; -1 is none.
    """
    # softplus is log1p(exp()) up to the threshold, so a tiny loss keeps its digits.
    losses_NP = F.softplus(log_sum_N.double()[:, None] - positive_NP.double(), threshold=40.0)
    return (losses_NP * shares(place_NP, torch.float64)).sum(dim=1).to(positive_NP.dtype)


def gradient_factors(
    grad_N: torch.Tensor, log_sum_N: torch.Tensor, positive_NP: torch.Tensor, place_NP: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What turns logits into gradients by logit.

    Returns:
        `[N]` float64 normaliser: the gradient by a negative's logit is `grad * exp(logit - normaliser)`, and that
        exponential is at most 1. `[N, P]` minus the gradient by each positive's logit; 0 for places that hold none.
    """
    share_NP, positive_NP = shares(place_NP, torch.float64), positive_NP.double()
    excess_NP = log_sum_N.double()[:, None] - positive_NP
    pull_NP = grad_N[:, None] * share_NP * excess_NP.sigmoid()
    normaliser_NP = positive_NP + F.softplus(excess_NP, threshold=40.0)
    return -torch.logsumexp(share_NP.log() - normaliser_NP, dim=1), pull_NP
