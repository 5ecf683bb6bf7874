"""What an online store needs for a user is measured by writing users."""

from __future__ import annotations

import pytest

from instructue_feast.feature_store.store_size import redis_bytes, sqlite_bytes


@pytest.mark.parametrize("measure", [sqlite_bytes, redis_bytes])
def test_bytes_grow_with_vectors_and_hold_at_least_the_numbers(measure):
    one, three, wide = (measure(dim, number, users=300) for dim, number in ((32, 1), (32, 3), (256, 1)))
    assert 4 * 32 < one < 4 * 32 + 700
    assert one < three < 3.5 * one
    assert wide - one > 0.8 * 4 * (256 - 32)
