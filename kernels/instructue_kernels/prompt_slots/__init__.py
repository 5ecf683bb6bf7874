"""Tokens of a prompt, gathered from where they are. See `README.md` in this folder."""

from instructue_kernels.prompt_slots.op import explain_choice, prompt_slots
from instructue_kernels.prompt_slots.reference import Events

__all__ = ["Events", "explain_choice", "prompt_slots"]
