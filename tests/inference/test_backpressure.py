"""Memory of a forward pass is bounded by the token budget, whatever a bucket holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.inference.embedder import UserEmbedder
from tests.largest_tensor import LargestTensor
from tests.model_data import INSTRUCTIONS, make_history, make_model, make_table

BUDGET = 256
CHOSEN = INSTRUCTIONS[:3]


@pytest.fixture(scope="module")
def embedder(tiny):
    model = make_model(*tiny)
    return UserEmbedder(model, make_table(model, tiny[1]), max_batch_tokens=BUDGET)


def shapes_and_bytes(embedder, history):
    """`[batches, 2]` users and tokens of every forward pass, and the bytes of the largest tensor."""
    batches = []
    embedder.encode(history.take([0]), CHOSEN)  # reads the instructions
    with LargestTensor() as largest:
        embedder.encode(history, CHOSEN, lambda users, tokens: batches.append((users, tokens)))
    return np.array(batches), largest.bytes


def test_a_bucket_of_many_users_needs_no_more_than_a_bucket_of_few(embedder):
    few, few_bytes = shapes_and_bytes(embedder, make_history([(5, 3, 1)] * 20))
    many, many_bytes = shapes_and_bytes(embedder, make_history([(5, 3, 1)] * 200))
    assert len(many) > 8 * len(few)
    assert many[:, 1].max() <= BUDGET
    assert many_bytes <= few_bytes


def test_a_whale_goes_alone_and_the_others_keep_to_the_budget(embedder):
    usual = [(5, 3, 1)] * 40
    _, usual_bytes = shapes_and_bytes(embedder, make_history(usual))
    history = make_history([*usual, (900, 0, 0)])
    batches, _ = shapes_and_bytes(embedder, history)
    whale = batches[batches[:, 1] > BUDGET]
    assert whale[:, 0].tolist() == [1]
    rest, rest_bytes = shapes_and_bytes(embedder, history.take(range(40)))
    assert rest[:, 1].max() <= BUDGET
    assert rest_bytes == usual_bytes


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_no_batch_of_two_or_more_is_over_the_budget(embedder, sizes):
    history = make_history([(size, 0, 0) for size in sizes])
    batches, _ = shapes_and_bytes(embedder, history)
    assert all(tokens <= BUDGET for users, tokens in batches if users > 1)
    assert batches[:, 0].sum() == len(sizes)
