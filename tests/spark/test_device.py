"""A task computes on the device Spark gave it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from pyspark import TaskContext

from instructue_feast.errors import ConfigError
from instructue_spark import device
from instructue_spark.device import task_device


@pytest.fixture
def task(monkeypatch):
    """Sets what Spark gave the task."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv(device.DEVICE, raising=False)

    def give(*addresses: str) -> None:
        resources = {"gpu": SimpleNamespace(addresses=list(addresses))} if addresses else {}
        monkeypatch.setattr(TaskContext, "get", lambda: SimpleNamespace(resources=lambda: resources))

    return give


def test_a_task_takes_the_gpu_it_was_given_and_no_other(task):
    task("3")
    assert task_device() == "cuda:3"
    task("0")
    assert task_device() == "cuda:0"


def test_only_visible_gpus_are_counted(task, monkeypatch):
    task("3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert task_device() == "cuda:1"


def test_without_a_gpu_of_its_own_a_task_computes_on_the_cpu(task, monkeypatch):
    task()
    assert task_device() == "cpu"
    monkeypatch.setattr(TaskContext, "get", lambda: None)
    assert task_device() == "cpu"


def test_a_local_master_can_be_told(task, monkeypatch):
    task()
    monkeypatch.setenv(device.DEVICE, "cuda")
    assert task_device() == "cuda"


@pytest.mark.parametrize("addresses", [("0", "1"), ("GPU-1f3c",)])
def test_several_gpus_for_one_task_are_refused(task, addresses):
    task(*addresses)
    with pytest.raises(ConfigError, match=r"task\.resource\.gpu\.amount=1"):
        task_device()
