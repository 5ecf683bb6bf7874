"""LoRA on the base LLM: nothing changes before training, and only its own weights train."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from instructue_feast.model.lora import wrap_with_lora


def fresh(llm):
    return AutoModelForCausalLM.from_pretrained(llm).requires_grad_(False).eval()


def wrapped(llm, **settings):
    torch.manual_seed(0)
    return wrap_with_lora(fresh(llm), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **settings))


def test_a_wrapped_llm_computes_what_it_did(llm):
    ids = torch.arange(6)[None]
    with torch.no_grad():
        torch.testing.assert_close(wrapped(llm)(input_ids=ids).logits, fresh(llm)(input_ids=ids).logits)


def test_only_lora_trains_and_nothing_of_it_in_inference_mode(llm):
    names = {name for name, one in wrapped(llm).named_parameters() if one.requires_grad}
    assert names
    assert all("lora_" in name for name in names)
    assert not any(one.requires_grad for one in wrapped(llm, inference_mode=True).parameters())


def test_one_seed_gives_the_same_weights_without_a_warning(llm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second = wrapped(llm).state_dict(), wrapped(llm).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
