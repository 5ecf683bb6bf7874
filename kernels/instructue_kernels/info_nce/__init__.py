"""InfoNCE with groups, false-negative masks and gathered negatives. See `README.md` in this folder."""

from instructue_kernels.info_nce.gather import gather_rows
from instructue_kernels.info_nce.op import InfoNceStats, explain_choice, info_nce, info_nce_stats

__all__ = ["InfoNceStats", "explain_choice", "gather_rows", "info_nce", "info_nce_stats"]
