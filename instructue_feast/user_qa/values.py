"""Numbers of questions: where levels are cut, and what a pair weighs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from instructue_feast.user_qa.tables import MAX_WEIGHT


def round_edges(edges: Sequence[float]) -> list[float]:
    """Rounds quantiles to three digits, so that an edge is seldom a value somebody has.

    >>> round_edges([4.0, 123.456, 0.12345])
    [4.0, 123.0, 0.123]
    """
    return [round(edge, 2 - math.floor(math.log10(abs(edge)))) if edge else 0.0 for edge in map(float, edges)]


def answer_weights(counts: Sequence[int]) -> list[float]:
    """Weight of a pair by its answer: every answer that occurs has the same total, and the mean weight is 1.

    A weight is cut off at `MAX_WEIGHT`, which leaves very rare answers with less than their share.

    Args:
        counts: How often each answer of a question occurs.

    Example:
        >>> answer_weights([1, 3])
        [2.0, 0.6666666666666666]
    """
    occurring = sum(count > 0 for count in counts)
    return [min(sum(counts) / (occurring * count), MAX_WEIGHT) if count else 0.0 for count in counts]
