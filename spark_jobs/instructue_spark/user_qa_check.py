"""A sample of the answers, computed again from raw events by `instructue_feast.user_qa.check`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from instructue_feast.errors import DataError
from instructue_feast.question_specs import AttributeSpec
from instructue_feast.user_qa.check import Asked, UserEvents, answers_again
from instructue_feast.user_qa.tables import SPLITS
from instructue_spark.user_qa_events import Columns, Events
from instructue_spark.user_qa_labels import Family

SAMPLE_USERS = 40
"""Users whose every answer is computed again; chosen by a hash of their id."""


def check_sample(asked: DataFrame, labels: DataFrame, families: list[Family], events: Mapping[str, Events]) -> int:
    """Compares the answers of some users with a second computation.

    Args:
        asked: `user_id, i` of everybody who was asked.
        labels: `user_id, i, train, held_out` of everybody with an answer.
        families: All families, in the order their questions are numbered.
        events: The sources they are about.

    Returns:
        How many answers were compared.

    Raises:
        DataError: An answer differs, is missing, or should not be there.
    """
    order = F.xxhash64("user_id", F.lit("check"))
    users = [
        row[0] for row in asked.select("user_id").distinct().orderBy(order, "user_id").limit(SAMPLE_USERS).collect()
    ]
    mine = F.col("user_id").isin(users)
    keys = [(row["user_id"], row["i"]) for row in asked.where(mine).collect()]
    given = {
        (row["user_id"], row["i"]): {pair["question"]: pair["answer"] for split in SPLITS for pair in row[split]}
        for row in labels.where(mine).collect()
    }
    rows = {name: _by_user(one.frame.where(mine)) for name, one in events.items()}
    checked = question = answer = 0
    for family in families:
        if not family.drafts:
            continue
        again = _attributes(family, mine) if isinstance(family.spec, AttributeSpec) else None
        wrong = 0
        for user, i in keys:
            if i not in family.moments:
                continue
            if again is not None:
                expected = {0: {again[user, i]}} if (user, i) in again else {}
            else:
                source = events[family.spec.source]
                mine_here = rows[family.spec.source].get(user, [])
                expected = _expected(family, _user_events(mine_here, source.columns[family.spec.id]), i)
            actual = {place: given.get((user, i), {}).get(question + place) for place in range(len(family.drafts))}
            for place, chosen in actual.items():
                first = answer + sum(len(draft.answers) for draft in family.drafts[:place])
                checked += chosen is not None
                wrong += (None if chosen is None else chosen - first) not in expected.get(place, {None})
        if wrong:
            message = f"question family {family.spec.id}: {wrong} answers of a sample of {len(users)} users differ"
            raise DataError(
                f"{message} from a second computation", "did the raw table change meanwhile? else report it"
            )
        question += len(family.drafts)
        answer += sum(len(draft.answers) for draft in family.drafts)
    return checked


def _expected(family: Family, events: UserEvents, i: int) -> dict[int, set[int]]:
    asked = Asked(family.spec, family.places, len(family.drafts), family.edges)
    return answers_again(asked, events, family.moments[i], family.before.get(i))


def _by_user(frame: DataFrame) -> dict[str, list[Any]]:
    found = defaultdict(list)
    for row in frame.collect():
        found[row["user_id"]].append(row)
    return found


def _user_events(rows: list[Any], names: Columns) -> UserEvents:
    def column(name: str | None) -> list[Any]:
        return [] if name is None else [row[name] for row in rows]

    return UserEvents(
        t=np.array([row["t"] for row in rows], dtype=np.int64),
        event_id=np.array([row["event_id"] for row in rows], dtype=np.int64),
        subject=column(names.subject),
        value=column(names.value),
        key=column(names.key),
    )


def _attributes(family: Family, mine: Any) -> dict[tuple[str, int], int]:
    """Place of the answer by user and `i`, from the snapshots themselves."""
    assert family.snapshots is not None
    result = {}
    for user, rows in _by_user(family.snapshots.where(mine)).items():
        for i, (_, end) in family.moments.items():
            earlier = [(row["t"], -row["row_hash"], row["value"]) for row in rows if row["t"] < end]
            value = max(earlier, key=lambda one: one[:2])[2] if earlier else None
            if value in family.places:
                result[user, i] = family.places[value]
    return result
