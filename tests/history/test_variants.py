"""Histories of ablations, against slow, obviously right versions."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.history.buckets import COUNT_EDGES
from instructue_feast.history.variants import one_token_per_event, thinned, without_source
from tests.model_data import NUMERIC, make_history

TABULAR = [place for place, (source, _, _) in enumerate(NUMERIC) if source == "tabular"]


def users(history):
    """Per user: `(source, text, count bucket, age bucket)` of every token."""
    columns = (history.source_index, history.text_id, history.count_bucket, history.age_bucket)
    tokens = list(zip(*(one.tolist() for one in columns), strict=True))
    return [tokens[start:end] for start, end in zip(history.offsets[:-1], history.offsets[1:], strict=True)]


def repeated(tokens, caps):
    """Lays out every event, then keeps the last ones of each source."""
    events = [(source, text, 0, age) for source, text, count, age in tokens for _ in range((1, *COUNT_EDGES)[count])]
    kept = []
    for source, cap in enumerate(caps):
        own = [one for one in events if one[0] == source]
        kept += own[max(0, len(own) - cap) if cap else 0 :]
    return kept


sizes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4), st.integers(0, 2)), min_size=1, max_size=5)


@settings(max_examples=40, deadline=None)
@given(sizes, st.tuples(*[st.integers(0, 40)] * 3), st.integers(0, 100))
def test_one_token_per_event_keeps_the_newest_events_of_each_source(own, caps, seed):
    history = make_history(own, seed=seed)
    changed = one_token_per_event(history, caps)
    assert users(changed) == [repeated(tokens, caps) for tokens in users(history)]
    np.testing.assert_array_equal(changed.num_events, history.num_events)
    np.testing.assert_array_equal(changed.tabular_numeric, history.tabular_numeric)


def test_a_heavy_shopper_costs_the_cap_and_not_the_events():
    history = make_history([(30, 0, 0)])
    history = dataclasses.replace(history, count_bucket=np.full(30, len(COUNT_EDGES), np.int32))
    changed = one_token_per_event(history, (1500, 0, 0))
    assert len(changed.text_id) == 1500
    assert set(changed.text_id.tolist()) == set(history.text_id[-2:].tolist())


@settings(max_examples=40, deadline=None)
@given(sizes, st.sampled_from([0, 1, 2]), st.integers(0, 100))
def test_without_a_source_the_others_stay_as_they_are(own, source, seed):
    history = make_history(own, seed=seed)
    changed = without_source(history, source, TABULAR if source == 2 else [])
    assert users(changed) == [[one for one in tokens if one[0] != source] for tokens in users(history)]
    assert not changed.num_events[:, source].any()
    others = [one for one in range(3) if one != source]
    np.testing.assert_array_equal(changed.num_events[:, others], history.num_events[:, others])
    if source == 2:
        assert np.isnan(changed.tabular_numeric).all()
    else:
        np.testing.assert_array_equal(changed.tabular_numeric, history.tabular_numeric)


@pytest.mark.parametrize(
    "change", [lambda one: without_source(one, 0), lambda one: one_token_per_event(one, (3, 3, 3))]
)
def test_the_history_that_is_given_stays_as_it_was(change):
    history = make_history([(3, 1, 1), (0, 0, 0), (2, 2, 1)], seed=5)
    before = dataclasses.replace(history, num_events=history.num_events.copy(), text_id=history.text_id.copy())
    change(history)
    np.testing.assert_array_equal(history.num_events, before.num_events)
    np.testing.assert_array_equal(history.text_id, before.text_id)
    assert change(history.take([1])).offsets.tolist() == [0, 0]


@settings(max_examples=30, deadline=None)
@given(sizes, st.integers(0, 100))
def test_thinned_histories_keep_some_tokens_in_their_order_and_nothing_else_changes(own, seed):
    history = make_history(own, seed=seed)
    changed = thinned(history, np.random.default_rng(seed), event_dropout=0.3, number_dropout=0.3)
    for before, after in zip(users(history), users(changed), strict=True):
        rest = iter(before)
        assert all(token in rest for token in after)  # a subsequence
    np.testing.assert_array_equal(changed.num_events, history.num_events)
    same = changed.tabular_numeric == history.tabular_numeric
    assert (same | np.isnan(changed.tabular_numeric)).all()
    assert changed.tabular_numeric.dtype == history.tabular_numeric.dtype


def test_thinned_histories_lose_the_share_they_are_told_and_users_differ():
    history = make_history([(30, 10, 2)] * 400)
    changed = thinned(history, np.random.default_rng(0), event_dropout=0.25, number_dropout=0.1)
    left_U = changed.num_tokens / history.num_tokens
    assert abs(left_U.mean() - 0.75) < 0.02
    assert left_U.max() > 0.95
    assert left_U.min() < 0.55
    known = np.isfinite(history.tabular_numeric)
    assert abs(np.isnan(changed.tabular_numeric[known]).mean() - 0.1) < 0.02
    whole = thinned(history, np.random.default_rng(0), event_dropout=0.0, number_dropout=0.0)
    np.testing.assert_array_equal(whole.text_id, history.text_id)
    np.testing.assert_array_equal(whole.tabular_numeric, history.tabular_numeric)
