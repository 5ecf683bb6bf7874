"""Worked examples of a sources config: The Complete Journey (real) and a synthetic data set with six sources."""

from instructue_feast.datasets.complete_journey import DatasetSummary, write_complete_journey
from instructue_feast.datasets.project import TEMPLATES, write_project

__all__ = ["TEMPLATES", "DatasetSummary", "write_complete_journey", "write_project"]
