"""Weighted sums over each user's own texts. See `README.md` in this folder."""

from instructue_kernels.text_pool.op import explain_choice, text_pool

__all__ = ["explain_choice", "text_pool"]
