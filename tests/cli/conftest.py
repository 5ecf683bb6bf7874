from tests.model_fixtures import _one_thread, _scratch_cache, encoder, llm, tiny  # noqa: F401
