"""Packed histories and the phrasebook: pure Arrow and NumPy, no torch, no Spark."""
