"""A rollback moves the pointer: what was served before is served again, bit by bit, and nothing is computed."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast.errors import ConfigError, DataError
from instructue_feast.runs.manifest import parse_as_of
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.rollback import rollback
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.tombstones import Tombstones
from instructue_feast.schema import PACKED_HISTORY
from tests.fake_runs import write_fake_run

DAYS = [f"2017-10-0{day}T00:00:00Z" for day in range(1, 6)]


@pytest.fixture
def store(tmp_path) -> OutputStore:
    return OutputStore(str(tmp_path))


def served(store: OutputStore) -> dict[str, list]:
    """What the newest run of every current view holds, by instruction."""
    publication = current_publication(store)
    found = {}
    for view in publication.current_views:
        names = store.names("published", publication.id, view.name)
        mine = [name for name in names if name.startswith(view.newest.run_id)]
        tables = [pq.read_table(store.path("published", publication.id, view.name, name)) for name in mine]
        found[view.instruction] = [table.to_pylist() for table in tables]
    return found


def published(store: OutputStore, day: str, **values) -> str:
    run = write_fake_run(store, day, **values)
    publish(store, run)
    return run


def write_histories(store: OutputStore, users: list[str]) -> None:
    """The extract fake runs name, with an empty history for each user."""
    rows = {"user_id": users, "as_of": [parse_as_of(DAYS[0])] * len(users)}
    rows |= {name: [[]] * len(users) for name in PACKED_HISTORY.names[2:]}
    folder = store.path("extracts", "extract", "history", "bucket=0")
    store.fs.makedirs(folder)
    pq.write_table(pa.table(rows, schema=PACKED_HISTORY), f"{folder}/part-0.parquet")
    store.write_json({"users": len(users)}, "extracts", "extract", "manifest.json")


def test_going_back_serves_what_was_served_before(store):
    first = published(store, DAYS[0])
    before, document = served(store), store.read_json("published.json")
    published(store, DAYS[1], seed=9)
    assert served(store) != before
    assert rollback(store).run_id == first
    assert served(store) == before
    assert store.read_json("published.json") == document


def test_forward_again_by_name(store):
    published(store, DAYS[0])
    second = published(store, DAYS[1], seed=9)
    after = served(store)
    rollback(store)
    assert rollback(store, second).run_id == second
    assert served(store) == after


def test_a_run_whose_publication_is_gone_is_published_without_what_came_later(store):
    first = published(store, DAYS[0])
    second = published(store, DAYS[1], seed=1)
    wanted = served(store)
    for seed, day in enumerate(DAYS[2:]):
        published(store, day, seed=seed + 2)
    for name in store.names("published")[:3]:
        store.remove("published", name)
    rolled = rollback(store, second)
    assert served(store) == wanted
    assert [run.run_id for run in rolled.current_views[0].runs] == [first, second]


def test_what_cannot_be_gone_back_to_is_refused_and_nothing_moves(store):
    with pytest.raises(ConfigError, match="nothing is published"):
        rollback(store)
    first = published(store, DAYS[0])
    pointer = store.read_json("published.json")
    with pytest.raises(ConfigError, match="no earlier publication"):
        rollback(store)
    with pytest.raises(ConfigError, match="current already"):
        rollback(store, first)
    with pytest.raises(ConfigError, match="not on disk"):
        rollback(store, "nosuch")
    assert store.read_json("published.json") == pointer


def test_erased_users_do_not_come_back_by_publishing_or_rolling_back(store):
    first = published(store, DAYS[0], users=["anna", "otto"], buckets=1)
    second = published(store, DAYS[1], users=["otto"], buckets=1)
    third = write_fake_run(store, DAYS[2], users=["anna"], buckets=1)
    Tombstones(store).add(["anna"])
    for move in (lambda: rollback(store, first), lambda: publish(store, third)):
        with pytest.raises(DataError, match="users who were erased since") as caught:
            move()
        assert "anna" not in str(caught.value)
    assert current_publication(store).run_id == second


def test_packed_histories_go_back_with_the_run(store):
    users = ["anna", "otto"]
    write_histories(store, users)
    runs = [published(store, day, users=users, seed=seed) for seed, day in enumerate(DAYS[:3])]
    for name in store.names("published")[:2]:
        store.remove("published", name)
    assert [one.run_id for one in current_publication(store).histories] == [runs[2]]
    rolled = rollback(store, runs[1])
    assert [one.run_id for one in rolled.histories] == [runs[1]]
    assert rolled.current_history == rolled.histories[0].name
