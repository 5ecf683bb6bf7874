"""Measuring embeddings: tasks with labels, baselines, linear probes, intervals, and the report."""
