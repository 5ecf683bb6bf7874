"""Tiny models, saved once per session; digests are remembered in a scratch cache."""

from __future__ import annotations

import pytest
import torch

from tests.model_data import make_model
from tests.tiny_models import make_tiny_models


@pytest.fixture(autouse=True)
def _scratch_cache(tmp_path, monkeypatch, request):
    if "real_models" not in request.keywords:
        monkeypatch.setenv("INSTRUCTUE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Threads that wait for each other are slower than one, at these sizes and on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Paths of the tiny LLM and the tiny encoder."""
    return make_tiny_models(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def llm(tiny):
    return tiny[0]


@pytest.fixture
def encoder(tiny):
    return tiny[1]


@pytest.fixture
def model(tiny):
    return make_model(*tiny)
