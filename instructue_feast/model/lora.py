"""LoRA on the base LLM: what training may change of it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig


def wrap_with_lora(causal: Any, settings: LoraConfig) -> nn.Module:
    """Puts LoRA on the layers that PEFT's settings name, for training or to load weights into it.

    The layers are changed in place: `causal` is not what it was, and is reached through the result from then on. The
    first factors are drawn from Torch's global generator, so seed it for weights that can be made again; the second
    ones are zero, and the LLM computes what it did before, unless `settings.init_lora_weights` says otherwise.

    Args:
        causal: A causal LM of Transformers with its own weights alone.
        settings: Rank, scale and target layers.

    Returns:
        The LLM in PEFT's wrapper. Only LoRA's weights train, in float32 also where the LLM is in a lower precision;
        none of them with `settings.inference_mode`.

    Raises:
        ValueError: The LLM has none of the layers that the settings name.

    Source: LoRA (arXiv 2106.09685).

    Example:
        >>> from peft import LoraConfig  # doctest: +SKIP
        >>> model.llm = wrap_with_lora(model.llm, LoraConfig(r=8, target_modules=["q_proj"]))  # doctest: +SKIP
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # PEFT asks by the old name
        wrapped: nn.Module = get_peft_model(causal, settings)
    return wrapped
