"""The prompt layout: who stands where and who may look at whom."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.model.layout import additive, block_mask, pack, token_budget_batches

sizes = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=2, max_size=2)), min_size=1, max_size=4
)


def packed(users):
    counter = iter(range(1, 10_000))
    take = lambda n: np.array([next(counter) for _ in range(n)], np.int64)  # noqa: E731
    prefixes = [take(prefix) for prefix, _ in users]
    suffixes = [[take(one) for one in own] for _, own in users]
    return prefixes, suffixes, pack(prefixes, suffixes, [[one - 1 for one in own] for _, own in users])


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_every_query_sees_exactly_its_prefix_and_its_own_suffix(users):
    prefixes, suffixes, prompts = packed(users)
    visible = block_mask(torch.from_numpy(prompts.segment_BS)).numpy()
    for user, (prefix, own) in enumerate(zip(prefixes, suffixes, strict=True)):
        row = prompts.row_BS[user]
        for query in range(len(row)):
            # The oracle asks what the query would see were its suffix alone behind the prefix.
            sees = {row[key] for key in range(len(row)) if visible[user, query, key]}
            alone = [list(prefix)] + [list(prefix) + list(one) for one in own]
            place = next((line for line in alone if row[query] in line), None)
            expected = set(place[: place.index(row[query]) + 1]) if place else {0}
            assert sees == expected
            if not place:
                assert visible[user, query].sum() == 1


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_positions_of_every_suffix_go_on_where_the_users_own_prefix_ends(users):
    prefixes, suffixes, prompts = packed(users)
    for user, (prefix, own) in enumerate(zip(prefixes, suffixes, strict=True)):
        place = dict(zip(prompts.row_BS[user], prompts.position_BS[user], strict=True))
        for one in own:
            line = [*prefix, *one]
            assert [place[row] for row in line] == list(range(len(line)))
        assert prompts.row_BS[user][prompts.readout_BK[user]].tolist() == [one[-1] for one in own]


def test_no_suffix_is_padded_to_the_longest():
    _, _, prompts = packed([(3, [1, 9]), (3, [5, 5])])
    assert prompts.row_BS.shape == (2, 13)
    assert prompts.num_tokens == 26
    assert (prompts.segment_BS >= 0).all()


def test_the_additive_mask_leaves_no_row_without_a_key():
    _, _, prompts = packed([(1, [1, 1]), (6, [5, 5])])
    mask = additive(block_mask(torch.from_numpy(prompts.segment_BS)), torch.float32)
    assert mask.shape == (2, 1, 16, 16)
    assert ((mask == 0).sum(-1) >= 1).all()
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float32).min}


def test_few_users_of_many_lengths_are_not_padded_to_the_longest():
    lengths = np.array([50, 120, 160, 200, 240, 300])
    batches = token_budget_batches(lengths, [f"user-{index}" for index in range(6)], 2_000)
    assert sum(len(one) * lengths[one].max() for one in batches) < 1.35 * lengths.sum()  # in one batch 1.68
    assert len(batches) < 4


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 1000), st.randoms())
def test_batches_hold_every_user_once_within_the_budget_whatever_the_order(lengths, budget, random):
    names = [f"user-{index}" for index in range(len(lengths))]
    batches = token_budget_batches(np.array(lengths), names, budget)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[user] for user in batch) <= budget
    order = list(range(len(lengths)))
    random.shuffle(order)
    shuffled = token_budget_batches(np.array(lengths)[order], [names[one] for one in order], budget)
    assert [[names[order[one]] for one in batch] for batch in shuffled] == [[names[one] for one in b] for b in batches]
