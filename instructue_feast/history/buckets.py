"""How often and how long ago: the count and age buckets of a packed history.

Spark builds its CASE expressions from the same edges, so the two can only agree.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

COUNT_EDGES = (2, 3, 5, 8, 12, 20, 35, 60, 100, 300, 1000)
"""Bucket 0 is one event, bucket 1 is two, bucket 2 is three or four, and so on."""

AGE_EDGES_DAYS = (1, 2, 3, 5, 7, 10, 14, 21, 30, 45, 60, 90, 180, 365)
"""Whole days between `as_of` and the last sight; bucket 0 is less than a day."""

NUM_COUNT_BUCKETS = len(COUNT_EDGES) + 1
NUM_AGE_BUCKETS = len(AGE_EDGES_DAYS) + 1


def bucketize(values: npt.ArrayLike, edges: tuple[int, ...]) -> npt.NDArray[np.int32]:
    """Index of each value's bucket: the number of edges that are at most the value.

    >>> bucketize([1, 2, 4, 5000], COUNT_EDGES).tolist()
    [0, 1, 2, 11]
    """
    return np.searchsorted(np.asarray(edges), np.asarray(values), side="right").astype(np.int32)
