import pytest
from threadpoolctl import threadpool_limits

from tests.model_fixtures import _one_thread, _scratch_cache, encoder, llm, model, tiny  # noqa: F401


@pytest.fixture(autouse=True)
def _one_blas_thread():
    """As in `score_task`: at these sizes threads only wait for each other."""
    with threadpool_limits(1):
        yield
