"""Cross entropy over the vocabulary at answer positions. See `README.md` in this folder."""

from instructue_kernels.next_token.op import explain_choice, next_token_loss

__all__ = ["explain_choice", "next_token_loss"]
