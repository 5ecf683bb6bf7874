"""Several processes train as one does: answers are embedded once between them, and gradients find their way back."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from instructue_feast.errors import ConfigError
from instructue_feast.training.collate import Passes
from instructue_feast.training.losses import Learner
from instructue_feast.training.plan import Sampler
from instructue_feast.training.run import train
from instructue_feast.training.validation import split_rows
from instructue_feast.training.vectors import TextVectors
from tests.training.conftest import fresh_model, settings
from tests.training.data import make_data

CASES = {
    "same_question": {"user_user_weight": 0.5},
    "batch": {"negatives": "batch", "questions_per_step": 2, "questions_per_user": 2},
    "fewer_answers_than_processes": {"questions_per_step": 1, "questions_per_user": 1, "users_per_step": 6},
}
WORLD = {"fewer_answers_than_processes": 3}  # the third embeds no answer of a yes/no question; 2 for the others


def data_of(case):
    return make_data(12, as_ofs=2, drop=0.0 if case in WORLD else 0.4)


def learner_and_passes(llm, encoder, case, rank, world):
    data, chosen = data_of(case), settings(**CASES[case])
    sampler = Sampler(data.train, split_rows(data.train, 0.0)[0], chosen)
    model = fresh_model(llm, encoder, chosen)
    learner = Learner(model, TextVectors.encode(model, data.phrasebook, sampler.wordings), chosen)
    return learner.train(), Passes(model, data.train, sampler, 2, rank=rank, world=world)


def gradients(module, learner):
    return {name: one.grad.clone() for name, one in learner.named_parameters() if one.grad is not None}


def worker(rank, port, llm, encoder, case, folder):
    world = WORLD.get(case, 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"LOCAL_RANK": str(rank), "INSTRUCTUE_CACHE": f"{folder}/cache{rank}"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    learner, passes = learner_and_passes(llm, encoder, case, rank, world)
    wrapped = torch.nn.parallel.DistributedDataParallel(learner, find_unused_parameters=True)
    losses = wrapped(passes[0])
    losses.total.backward()
    torch.save(
        {"loss": losses.total.detach(), "accuracy": losses.accuracy, "grads": gradients(wrapped, learner)},
        f"{folder}/rank{rank}.pt",
    )
    whole = settings(steps=3, validation_fraction=0.3, **CASES[case])
    model = fresh_model(llm, encoder, whole)
    result = train(model, data_of(case), whole, f"{folder}/several")
    torch.save([result.metrics[name] for name in ("contrastive_loss", "eval_auc_users")], f"{folder}/metrics{rank}.pt")
    dist.destroy_process_group()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.mark.parametrize("case", CASES)
def test_several_processes_equal_one(llm, encoder, tmp_path, case):
    world = WORLD.get(case, 2)
    mp.spawn(worker, (free_port(), llm, encoder, case, str(tmp_path)), nprocs=world)
    learner, passes = learner_and_passes(llm, encoder, case, 0, 1)
    losses = learner(passes[0])
    losses.total.backward()
    assert world == 2 or len(passes[0].answers) < world
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world)]
    mean = {name: sum(one[name] for one in ranks) / world for name in ("loss", "accuracy")}
    torch.testing.assert_close(mean["loss"], losses.total.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean["accuracy"], losses.accuracy)
    expected = gradients(learner, learner)
    # What is nearly zero is a difference of large terms, and has their rounding.
    floor = 1e-3 * max(1.0, *(float(one.norm()) for one in expected.values()))
    for rank in ranks:
        assert rank["grads"].keys() >= expected.keys()
        wrong = {
            name: float((rank["grads"][name] - one).norm() / one.norm().clamp(min=floor))
            for name, one in expected.items()
        }
        assert max(wrong.values()) < 1e-5, {name: one for name, one in wrong.items() if one >= 1e-5}

    whole = settings(steps=3, validation_fraction=0.3, **CASES[case])
    single = train(fresh_model(llm, encoder, whole), data_of(case), whole, tmp_path / "one")
    for rank in range(world):
        expected_metrics = [single.metrics[name] for name in ("contrastive_loss", "eval_auc_users")]
        assert torch.load(tmp_path / f"metrics{rank}.pt") == pytest.approx(expected_metrics, rel=1e-4)


def test_users_that_cannot_be_divided_are_refused(llm, encoder, tmp_path, monkeypatch):
    import instructue_feast.training.run as module

    real = module.training_arguments

    def two(*arguments):
        made = real(*arguments)
        monkeypatch.setattr(type(made), "world_size", 2)
        return made

    monkeypatch.setattr(module, "training_arguments", two)
    chosen = settings(users_per_step=3)
    with pytest.raises(ConfigError, match="cannot be divided among 2 processes"):
        train(fresh_model(llm, encoder, chosen), make_data(8), chosen, tmp_path / "m")
