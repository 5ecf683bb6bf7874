"""The per-source adapter: event vectors to soft tokens. See `README.md` in this folder."""

from instructue_kernels.adapter.op import adapter, explain_choice

__all__ = ["adapter", "explain_choice"]
