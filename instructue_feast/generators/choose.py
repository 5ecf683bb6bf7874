"""The generator a config asks for."""

from __future__ import annotations

from instructue_feast.errors import MissingDependencyError
from instructue_feast.question_specs import GeneratorConfig
from instructue_feast.user_qa.proposals import Generator, TemplateGenerator


def make_generator(config: GeneratorConfig) -> Generator:
    """Makes the generator; loads its model, if it has one.

    Raises:
        ConfigError: A setting or environment variable is missing.
        DataError: There is no such model.
        MissingDependencyError: `hf` needs torch and transformers.

    Example:
        >>> make_generator(GeneratorConfig()).name
        'templates'
    """
    if config.kind == "templates":
        return TemplateGenerator()
    if config.kind == "openai":
        from instructue_feast.generators.openai import OpenAIGenerator

        return OpenAIGenerator(
            config.model,
            config.base_url,
            key_env=config.key_env,
            max_new_tokens=config.max_new_tokens,
            timeout_seconds=config.timeout_seconds,
            retries=config.retries,
        )
    try:
        from instructue_feast.generators.huggingface import HuggingFaceGenerator
    except ImportError as error:
        raise MissingDependencyError(
            f"the hf generator needs {error.name}", "pip install 'instructue-feast[model]'"
        ) from None
    return HuggingFaceGenerator(config.model, max_new_tokens=config.max_new_tokens)
