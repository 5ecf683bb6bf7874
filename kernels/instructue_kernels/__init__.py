"""Ops of instructue-feast: each has a readable reference, a memory-bounded path and one public function.

`info_nce`: contrastive loss without the similarity matrix. `adapter`: LayerNorm -> Linear -> GELU -> Linear over event
vectors. Needs torch; Triton, where installed, on GPUs.
"""

from instructue_kernels.info_nce import InfoNceStats, info_nce, info_nce_stats

__all__ = ["InfoNceStats", "info_nce", "info_nce_stats"]
