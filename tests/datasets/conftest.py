from __future__ import annotations

from pathlib import Path

import pytest

from instructue_feast.datasets import DatasetSummary, write_complete_journey


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> DatasetSummary:
    """Sixty households of The Complete Journey, as a project."""
    return write_complete_journey(Path(tmp_path_factory.mktemp("journey")), households=60)
