"""Two processes that gather their keys are one process that holds all rows."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from instructue_kernels.info_nce import info_nce, info_nce_stats

LABELS = ("query_ids", "query_group", "weight", "key_ids", "key_group")
IMPLS = ("chunked", "reference")

# Queries and keys of the two ranks, the labels given, further options.
CASES = {
    "equal ranks": ([4, 4], [4, 4], LABELS, {}),
    "unequal ranks": ([5, 2], [2, 4], LABELS, {}),
    "one rank without queries": ([7, 0], [4, 2], LABELS, {}),
    "one rank without anything": ([0, 7], [0, 6], LABELS, {"symmetric": False}),
    "one way": ([4, 3], [3, 3], LABELS, {"symmetric": False}),
    "queries too": ([3, 4], [3, 3], LABELS, {"include_query_query": True, "margin": 0.25}),
    "answers once": ([3, 4], [5, 4], LABELS, {"include_query_query": True, "unique_keys": True}),
    "no labels": ([3, 4], [3, 4], (), {}),
    "answers without ids": ([5, 4], [3, 4], ("weight",), {"include_query_query": True}),
}


def problem(queries, keys):
    """All rows; each rank's queries point at that rank's own keys."""
    generator = torch.Generator().manual_seed(5)
    n, m = sum(queries), sum(keys)
    query, key = (torch.randn(rows, 3, generator=generator, dtype=torch.float64) for rows in (n, m))
    positives = [torch.randint(0, max(k, 1), (own,), generator=generator) for own, k in zip(queries, keys, strict=True)]
    integers = lambda rows, top: torch.randint(0, top, (rows,), generator=generator)  # noqa: E731
    weight = torch.rand(n, generator=generator, dtype=torch.float64)
    labels = (integers(n, 9), integers(n, 2), weight, integers(m, 4), integers(m, 2))
    return query, key, positives, dict(zip(LABELS, labels, strict=True))


def run_rank(rank, address, results):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2, timeout=timeout)
    try:
        found = {name: one_rank(rank, *case) for name, case in CASES.items()}
        results.put((rank, found, refusal(rank), closed_set(rank)))
    finally:
        dist.destroy_process_group()


def one_rank(rank, queries, keys, given, options):
    query, key, positives, labels = problem(queries, keys)
    own_queries = slice(sum(queries[:rank]), sum(queries[: rank + 1]))
    own_keys = slice(sum(keys[:rank]), sum(keys[: rank + 1]))
    own = {name: labels[name][own_keys if name.startswith("key") else own_queries] for name in given}
    leaves = (
        query[own_queries].requires_grad_(),
        key[own_keys].requires_grad_(),
        torch.tensor(1.5, dtype=torch.float64, requires_grad=True),
    )
    found = {}
    for impl in IMPLS:
        loss = info_nce(*leaves, **own, **options, positives=positives[rank], group=dist.group.WORLD, impl=impl)
        found[impl] = [one.tolist() for one in (loss.detach(), *torch.autograd.grad(loss, leaves))]
    options = {name: value for name, value in options.items() if name != "symmetric"}
    stats = info_nce_stats(*leaves[:2], **own, **options, positives=positives[rank], group=dist.group.WORLD)
    return found | {"stats": [one.item() for one in stats]}


ANSWERS = {"key_ids": torch.arange(4), "key_group": torch.tensor([0, 0, 1, 1]), "symmetric": False}
GIVEN = torch.tensor([0, 1, 2, 3, 3, 0])


def closed_set(rank):
    """Every rank holds all answers; the queries are shared out."""
    query, answers, _, _ = problem([6, 0], [4, 0])
    own = slice(0, 2) if rank == 0 else slice(2, 6)
    answers.requires_grad_()
    loss = info_nce(
        query[own],
        answers,
        torch.tensor(1.5),
        positives=GIVEN[own],
        query_group=GIVEN[own] // 2,
        unique_keys=True,
        group=dist.group.WORLD,
        **ANSWERS,
    )
    loss.backward()
    return loss.item(), answers.grad.tolist()


def refusal(rank):
    query = torch.eye(3)
    ids = torch.arange(3) if rank else None
    try:
        info_nce(query, query, torch.tensor(0.0), query_ids=ids, group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both ranks found in all cases; one start of two processes, since that takes most of the time."""
    results = mp.get_context("spawn").SimpleQueue()
    address = f"file://{tmp_path_factory.mktemp('ranks') / 'meeting'}"
    mp.spawn(run_rank, (address, results), nprocs=2)
    found = {rank: rest for rank, *rest in (results.get(), results.get())}
    return found[0], found[1]


def one_process(case):
    queries, keys, given, options = CASES[case]
    query, key, positives, labels = problem(queries, keys)
    everything = options | {name: labels[name] for name in given}
    return query, key, torch.cat([positives[0], positives[1] + keys[0]]), everything


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_process(ranks, case, impl):
    query, key, positives, everything = one_process(case)
    leaves = (query.requires_grad_(), key.requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True))
    loss = info_nce(*leaves, **everything, positives=positives, impl="reference")
    expected = [loss.detach(), *torch.autograd.grad(loss, leaves)]

    (loss_0, query_0, key_0, scale_0), (loss_1, query_1, key_1, scale_1) = (found[case][impl] for found, *_ in ranks)
    # DistributedDataParallel averages the gradients of parameters; each row lives on one rank, hence the halves.
    actual = [(loss_0 + loss_1) / 2, query_0 + query_1, key_0 + key_1, (scale_0 + scale_1) / 2]
    for place, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        halved = torch.tensor(ours, dtype=torch.float64) / (2 if place in (1, 2) else 1)
        torch.testing.assert_close(halved, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_counts_the_negatives_of_all_ranks(ranks, case):
    query, key, positives, everything = one_process(case)
    everything.pop("symmetric", None)
    expected = info_nce_stats(query, key, **everything, positives=positives)
    assert sum(found[case]["stats"][3] for found, *_ in ranks) == expected.without_negatives.item()
    queries, weight = CASES[case][0], everything.get("weight", torch.ones(len(query), dtype=torch.float64))
    weights = [weight[: queries[0]].sum().item(), weight[queries[0] :].sum().item()]
    by_rank = [found[case]["stats"][2] for found, *_ in ranks]
    mean = sum(one * own for one, own in zip(by_rank, weights, strict=True) if own) / sum(weights)
    assert mean == pytest.approx(expected.negatives.item())


def test_answers_that_every_rank_encodes_count_once(ranks):
    query, answers, _, _ = problem([6, 0], [4, 0])
    answers.requires_grad_()
    expected = info_nce(query, answers, torch.tensor(1.5), positives=GIVEN, query_group=GIVEN // 2, **ANSWERS)
    expected.backward()
    (_, _, (loss_0, grad_0)), (_, _, (loss_1, grad_1)) = ranks
    assert (loss_0 + loss_1) / 2 == pytest.approx(expected.item())
    # Parameters behind the answers get both ranks' gradients.
    grad = (torch.tensor(grad_0, dtype=torch.float64) + torch.tensor(grad_1, dtype=torch.float64)) / 2
    torch.testing.assert_close(grad, answers.grad)


def test_ranks_that_disagree_are_told_so_instead_of_hanging(ranks):
    for _, message, _ in ranks:
        assert "the ranks disagree" in message
        assert "give every rank the same arguments" in message
