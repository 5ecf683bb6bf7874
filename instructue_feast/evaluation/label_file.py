"""Reading a label file: who is positive, by the project's own user ids. Messages hold counts, never an id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from instructue_feast.errors import DataError, did_you_mean, listed
from instructue_feast.evaluation.metrics import Labels

USER_COLUMN, LABEL_COLUMN = "user_id", "label"
_VALUES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}


@dataclass(frozen=True, slots=True)
class LabelFile:
    """Labels of U users.

    Attributes:
        user_ids: U distinct user ids, in the order of the file.
        labels: `[U]` 0 or 1.
    """

    user_ids: tuple[str, ...]
    labels: Labels


def read_labels(path: Path, known_users: Sequence[str]) -> LabelFile:
    """Reads a CSV or Parquet file with the columns `user_id` and `label`, or with two columns of any name.

    Args:
        path: The file; `.csv` or `.parquet`.
        known_users: The users of the project.

    Returns:
        The labels, one per user; a user that stands there twice with the same label counts once.

    Raises:
        DataError: The file cannot be read, has other columns, is empty, holds nulls or labels that are not binary,
            names users nobody knows, or contradicts itself.
    """
    table = _read(path)
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows", "label at least some users")
    user, label = _columns(path, table)
    users = table[user].cast(pa.string()).to_pylist()
    words = [None if one is None else str(one).strip().lower() for one in table[label].to_pylist()]
    missing = sum(one is None or word in (None, "") for one, word in zip(users, words, strict=True))
    if missing:
        raise DataError(f"{path}: {missing} of {len(users)} rows lack a user id or a label", "complete or drop them")
    wrong = {word for word in words if word not in _VALUES}
    if wrong:
        count = sum(word in wrong for word in words)
        raise DataError(
            f"{path}: {count} of {len(words)} labels in column {label} are not binary ({len(wrong)} other values)",
            "write 0 and 1",
        )
    found: dict[str, int] = {}
    contradicted: set[str] = set()
    for one, word in zip(users, words, strict=True):
        value = _VALUES[str(word)]
        if found.setdefault(one, value) != value:
            contradicted.add(one)
    if contradicted:
        raise DataError(f"{path}: {len(contradicted)} users are labelled both 0 and 1", "keep one label per user")
    unknown = len(set(found) - set(known_users))
    if unknown:
        raise DataError(
            f"{path}: {unknown} of {len(found)} users are not among the {len(set(known_users))} of the project",
            "use the ids of the project's users table, or drop those rows",
        )
    return LabelFile(tuple(found), np.array(list(found.values()), np.int8))


def _read(path: Path) -> pa.Table:
    if not path.is_file():
        raise DataError(f"no label file at {path}", "pass a .csv or .parquet file with --labels")
    if path.suffix not in (".csv", ".parquet"):
        raise DataError(f"label file {path} is {path.suffix or 'without a suffix'}", "pass a .csv or .parquet file")
    try:
        if path.suffix == ".parquet":
            return pq.ParquetFile(path).read()
        names = pyarrow.csv.open_csv(path).schema.names
        # As text, so that an id such as 007 stays what it is.
        as_text = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        return pyarrow.csv.read_csv(path, convert_options=as_text)
    except (OSError, pa.ArrowException) as error:
        reason = "it is empty" if path.stat().st_size == 0 else type(error).__name__
        raise DataError(f"label file {path} cannot be read: {reason}", "write it as CSV or Parquet") from None


def _columns(path: Path, table: pa.Table) -> tuple[str, str]:
    names = table.column_names
    if USER_COLUMN in names and LABEL_COLUMN in names:
        return USER_COLUMN, LABEL_COLUMN
    if len(names) == 2:
        return names[0], names[1]
    missing = USER_COLUMN if USER_COLUMN not in names else LABEL_COLUMN
    raise DataError(f"{path} has the columns {listed(names)} and no {missing!r}", did_you_mean(missing, names))
