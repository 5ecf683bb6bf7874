"""Instruction-conditioned user embeddings (InstructUE, arXiv 2510.11016) served as Feast features."""

__version__ = "0.1.0"
