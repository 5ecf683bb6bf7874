"""Publishing moves one pointer, or nothing at all."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast.errors import (
    ConfigError,
    InstructueError,
    InvalidEmbeddingError,
    PublishConflictError,
    RunConflictError,
    SchemaError,
    StorageError,
    VersionMismatchError,
)
from instructue_feast.runs import publish as publishing
from instructue_feast.runs.manifest import RunInstruction, parse_as_of
from instructue_feast.runs.publish import current_publication, pointer_lock, prune_publications, publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.writer import finish_run, write_bucket
from tests.fake_runs import bucket_table, fake_manifest, user_names, write_fake_run

OCTOBER, NOVEMBER, DECEMBER = "2017-10-01T00:00:00Z", "2017-11-01T00:00:00Z", "2017-12-01T00:00:00Z"


@pytest.fixture
def store(tmp_path):
    return OutputStore(str(tmp_path / "output"))


def _state(store):
    return current_publication(store), store.names("published")


def _runs(publication, instruction):
    return [run.run_id for run in publication.view(publication.current[instruction]).runs]


def test_a_published_run_is_what_the_pointer_names(store):
    assert current_publication(store) is None
    run_id = write_fake_run(store, OCTOBER)
    publication = publish(store, run_id)
    assert current_publication(store) == publication
    assert publication.run_id == run_id
    assert list(publication.current) == ["churn", "next_basket", "taste"]
    assert [view.name for view in publication.current_views] == list(publication.current.values())
    view = publication.view(publication.current["churn"])
    assert view.name == f"churn__{view.embedding_version[:8]}"
    assert (view.newest.rows, view.newest.files, view.embedding_dim) == (12, 3, 8)


def test_publishing_links_the_files_instead_of_copying_them(store):
    run_id = write_fake_run(store, OCTOBER)
    publication = publish(store, run_id)
    source = Path(store.path("runs", run_id, "bucket=00001", "part.parquet"))
    for view in publication.views:
        linked = Path(store.path("published", publication.id, view.name, f"{run_id}-00001.parquet"))
        assert linked.samefile(source)


def test_publishing_copies_where_the_file_system_has_no_links(store, monkeypatch):
    def no_links(*args):
        raise PermissionError("links are not allowed here")

    monkeypatch.setattr(publishing.os, "link", no_links)
    run_id = write_fake_run(store, OCTOBER)
    publication = publish(store, run_id)
    source = Path(store.path("runs", run_id, "bucket=00001", "part.parquet"))
    copied = Path(store.path("published", publication.id, publication.current["churn"], f"{run_id}-00001.parquet"))
    assert not copied.samefile(source)
    assert copied.read_bytes() == source.read_bytes()


def test_publishing_works_on_a_store_that_is_not_a_local_folder(request):
    store = OutputStore(f"memory://{request.node.name}")
    publish(store, write_fake_run(store, OCTOBER))
    second = publish(store, write_fake_run(store, NOVEMBER))
    assert current_publication(store) == second
    assert len(store.names("published", second.id, second.current["churn"])) == 6
    assert prune_publications(store, keep=1) != []
    assert store.names("published") == [second.id]


def _truncate(file: Path) -> None:
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: len(data) // 2])


def _rewrite(change):
    def damage(file: Path) -> None:
        table = pq.read_table(file, partitioning=None)
        changed = change(table)
        file.unlink()
        pq.write_table(changed, file)

    return damage


def _vectors(change):
    def rewrite(table):
        rows = np.asarray(table.column("churn").to_pylist(), dtype=np.float32)
        return table.set_column(3, "churn", pa.array(list(change(rows)), pa.list_(pa.float32())))

    return _rewrite(rewrite)


def _nan(rows):
    rows[1, 3] = np.nan
    return rows


DAMAGE = {
    "missing": (Path.unlink, StorageError),
    "truncated": (_truncate, StorageError),
    "empty": (lambda file: file.write_bytes(b""), StorageError),
    "rows lost": (_rewrite(lambda table: table.slice(1)), StorageError),
    "values changed": (_vectors(lambda rows: rows[:, ::-1].copy()), StorageError),
    "users swapped": (
        _rewrite(lambda table: table.set_column(0, "user_id", table.column(0).take([1, 0, 2, 3]))),
        StorageError,
    ),
    "other time": (_rewrite(lambda table: bucket_table(user_names(12)[1::3], parse_as_of(DECEMBER))), StorageError),
    "NaN": (_vectors(_nan), InvalidEmbeddingError),
    "infinite": (_vectors(lambda rows: rows * np.inf), InvalidEmbeddingError),
    "not unit-norm": (_vectors(lambda rows: rows * 2), InvalidEmbeddingError),
    "other size": (_vectors(lambda rows: np.eye(len(rows), 4)), InvalidEmbeddingError),
    "column lost": (_rewrite(lambda table: table.drop_columns(["taste"])), StorageError),
    "column renamed": (_rewrite(lambda table: table.rename_columns([*table.schema.names[:-1], "tast"])), StorageError),
    "time without zone": (
        _rewrite(lambda table: table.set_column(1, "event_timestamp", table.column(1).cast(pa.timestamp("us")))),
        SchemaError,
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_run_is_refused_and_the_pointer_stays(store, name):
    publish(store, write_fake_run(store, OCTOBER))
    before = _state(store)
    run_id = write_fake_run(store, NOVEMBER)
    damage, error = DAMAGE[name]
    damage(Path(store.path("runs", run_id, "bucket=00001", "part.parquet")))
    with pytest.raises(error, match="bucket 1") as raised:
        publish(store, run_id)
    assert "user-" not in str(raised.value)
    assert _state(store) == before


def test_a_run_whose_rows_carry_another_time_than_its_manifest_is_refused(store):
    run_id = write_fake_run(store, OCTOBER, finish=False)
    used = [
        RunInstruction(id=one, text="", content_hash="", embedding_version=one * 4)
        for one in ("churn", "next_basket", "taste")
    ]
    finish_run(store, fake_manifest(store, run_id, NOVEMBER, instructions=used))
    with pytest.raises(StorageError, match="event_timestamp is not the run's as_of"):
        publish(store, run_id)
    assert _state(store) == (None, [])


def test_an_unfinished_or_unknown_run_is_refused(store):
    unfinished = write_fake_run(store, OCTOBER, finish=False)
    with pytest.raises(RunConflictError, match="not finished"):
        publish(store, unfinished)
    with pytest.raises(ConfigError, match="unknown run"):
        publish(store, "20170101T000000-00000000")
    assert _state(store) == (None, [])


def test_a_run_without_users_is_refused(store):
    with pytest.raises(ConfigError, match="holds no users"):
        publish(store, write_fake_run(store, OCTOBER, users=0))


def test_a_failure_while_linking_leaves_nothing_behind(store, monkeypatch):
    publish(store, write_fake_run(store, OCTOBER))
    before = _state(store)
    run_id = write_fake_run(store, NOVEMBER)
    link, calls = publishing.os.link, []

    def full(*args):
        calls.append(args)
        if len(calls) > 4:
            raise OSError(28, "No space left on device")
        link(*args)

    monkeypatch.setattr(publishing.os, "link", full)
    monkeypatch.setattr(publishing.shutil, "copyfile", full)
    with pytest.raises(StorageError, match="No space left"):
        publish(store, run_id)
    assert _state(store) == before


def test_of_two_publishers_at_once_exactly_one_wins(store, monkeypatch):
    publish(store, write_fake_run(store, OCTOBER))
    runs = [write_fake_run(store, NOVEMBER), write_fake_run(store, DECEMBER)]
    both_have_read_the_pointer = threading.Barrier(2)
    views = publishing._views

    def wait(*args):
        both_have_read_the_pointer.wait(timeout=30)
        return views(*args)

    monkeypatch.setattr(publishing, "_views", wait)
    outcomes = {}

    def run(run_id):
        try:
            outcomes[run_id] = publish(store, run_id)
        except InstructueError as error:
            outcomes[run_id] = error

    threads = [threading.Thread(target=run, args=(run_id,)) for run_id in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lost = [one for one in outcomes.values() if isinstance(one, PublishConflictError)]
    won = [one for one in outcomes.values() if not isinstance(one, Exception)]
    assert (len(lost), len(won)) == (1, 1)
    assert current_publication(store) == won[0]
    assert won[0].id in store.names("published")
    assert len(store.names("published")) == 2  # the loser's folder is gone


def test_a_publisher_can_insist_on_what_is_current(store):
    october, november = write_fake_run(store, OCTOBER), write_fake_run(store, NOVEMBER)
    first = publish(store, october, expected=None)
    with pytest.raises(PublishConflictError, match=first.id):
        publish(store, november, expected=None)
    with pytest.raises(PublishConflictError):
        publish(store, november, expected="someone-else")
    assert publish(store, november, expected=first.id) == current_publication(store)


def test_history_grows_by_as_of_whatever_the_order_of_publishing(store):
    december, october, november = (write_fake_run(store, one) for one in (DECEMBER, OCTOBER, NOVEMBER))
    for run_id in (december, october, november):
        publication = publish(store, run_id)
    assert _runs(publication, "churn") == [october, november, december]
    assert publication.view(publication.current["churn"]).newest.run_id == december


def test_for_one_as_of_the_run_published_last_counts(store):
    first, second = write_fake_run(store, OCTOBER, seed=1), write_fake_run(store, OCTOBER, seed=2)
    publish(store, first)
    assert _runs(publish(store, second), "churn") == [second]
    again = publish(store, first)
    assert _runs(again, "churn") == [first]
    assert store.names("published", again.id, again.current["churn"]) == [f"{first}-{n:05d}.parquet" for n in range(3)]


def test_publishing_a_run_twice_changes_nothing_but_the_publication(store):
    run_id = write_fake_run(store, OCTOBER)
    first, second = publish(store, run_id), publish(store, run_id)
    assert first.id < second.id
    assert first.views == second.views


def test_a_view_keeps_only_so_many_runs(store):
    runs = [write_fake_run(store, f"2017-{month:02d}-01T00:00:00Z") for month in range(3, 8)]
    for run_id in runs[1:]:
        publication = publish(store, run_id, keep_runs=2)
    assert _runs(publication, "churn") == runs[-2:]
    with pytest.raises(ConfigError, match="raise `output") as error:
        publish(store, runs[0], keep_runs=2)
    assert "before all of the 2 runs" in str(error.value)
    assert current_publication(store) == publication


def test_keeping_no_run_at_all_is_refused(store):
    with pytest.raises(ConfigError, match="keep at least one"):
        publish(store, write_fake_run(store, OCTOBER), keep_runs=0)


def test_an_interrupt_just_after_the_pointer_moved_leaves_the_publication_whole(store, monkeypatch):
    run_id = write_fake_run(store, OCTOBER)
    move = publishing.move_pointer

    def interrupted(*args):
        move(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "move_pointer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        publish(store, run_id)
    publication = current_publication(store)
    assert publication.run_id == run_id
    assert len(store.names("published", publication.id, publication.current["churn"])) == 3


def test_a_new_version_is_a_new_view_and_the_one_before_it_stays(store):
    one = publish(store, write_fake_run(store, OCTOBER))
    two = publish(store, write_fake_run(store, NOVEMBER, versions={"churn": "v2"}))
    assert two.current["churn"] != one.current["churn"]
    assert two.current["taste"] == one.current["taste"]
    assert {view.name for view in two.views if view.instruction == "churn"} == {
        one.current["churn"],
        two.current["churn"],
    }
    assert len(_runs(two, "taste")) == 2
    assert len(_runs(two, "churn")) == 1
    same = publish(store, write_fake_run(store, DECEMBER, versions={"churn": "v2"}))
    assert one.current["churn"] in {view.name for view in same.views}
    three = publish(store, write_fake_run(store, DECEMBER, versions={"churn": "v3"}))
    assert {view.name for view in three.views if view.instruction == "churn"} == {
        two.current["churn"],
        three.current["churn"],
    }


def test_publishing_the_old_run_again_rolls_back_with_its_history(store):
    old = [write_fake_run(store, OCTOBER), write_fake_run(store, NOVEMBER)]
    for run_id in old:
        before = publish(store, run_id)
    publish(store, write_fake_run(store, NOVEMBER, versions={"churn": "v2"}))
    back = publish(store, old[1])
    assert back.current == before.current
    assert _runs(back, "churn") == old


def test_a_run_of_some_instructions_leaves_the_others_where_they_are(store):
    full = publish(store, write_fake_run(store, OCTOBER))
    part = publish(store, write_fake_run(store, NOVEMBER, instructions=["churn"], versions={"churn": "v2"}))
    assert part.current == {**full.current, "churn": part.current["churn"]}
    assert part.view(part.current["taste"]) == full.view(full.current["taste"])
    assert len(store.names("published", part.id, part.current["taste"])) == 3


def test_a_published_run_may_be_deleted(store):
    october = write_fake_run(store, OCTOBER)
    publish(store, october)
    store.remove("runs", october)
    publication = publish(store, write_fake_run(store, NOVEMBER))
    assert len(store.names("published", publication.id, publication.current["churn"])) == 6


def test_a_damaged_publication_is_not_carried_on(store):
    first = publish(store, write_fake_run(store, OCTOBER))
    folder = Path(store.path("published", first.id, first.current["churn"]))
    next(folder.iterdir()).unlink()
    november = write_fake_run(store, NOVEMBER)
    with pytest.raises(StorageError, match="has 2 files of run"):
        publish(store, november)
    assert _state(store) == (first, [first.id])


def test_two_versions_that_would_share_a_view_name_are_refused(store):
    for as_of, version in ((OCTOBER, "abcdef0100"), (NOVEMBER, "abcdef0111")):
        run_id = write_fake_run(store, as_of, instructions=["churn"], finish=False)
        used = [RunInstruction(id="churn", text="", content_hash="", embedding_version=version)]
        finish_run(store, fake_manifest(store, run_id, as_of, instructions=used))
        if as_of == OCTOBER:
            publish(store, run_id)
    with pytest.raises(VersionMismatchError, match="churn__abcdef01"):
        publish(store, run_id)


def test_buckets_without_users_are_left_out(store):
    run_id = write_fake_run(store, OCTOBER, users=2, buckets=5)
    publication = publish(store, run_id)
    assert len(store.names("published", publication.id, publication.current["churn"])) == 2


def test_pruning_keeps_the_newest_publications_and_every_run(store):
    ids = [publish(store, write_fake_run(store, f"2017-{month:02d}-01T00:00:00Z")).id for month in range(3, 8)]
    Path(store.path("published", "20010101T000000000000-crashed0")).mkdir()
    Path(store.path("published", "29990101T000000000000-atwork00")).mkdir()
    runs = store.names("runs")
    assert prune_publications(store, keep=2) == ["20010101T000000000000-crashed0", *ids[:3]]
    assert store.names("published") == [*ids[3:], "29990101T000000000000-atwork00"]
    assert store.names("runs") == runs
    with pytest.raises(ConfigError, match="keep at least one"):
        prune_publications(store, keep=0)


def test_the_pointer_never_comes_to_name_a_publication_that_is_being_pruned(store):
    first = publish(store, write_fake_run(store, OCTOBER))
    second = publish(store, write_fake_run(store, NOVEMBER))
    with pointer_lock(store):
        pruning = threading.Thread(target=prune_publications, args=(store, 1))
        pruning.start()
        pruning.join(0.1)
        assert store.names("published") == [first.id, second.id]  # whoever moves the pointer now comes first
    pruning.join()
    assert store.names("published") == [second.id]
    with pytest.raises(PublishConflictError, match="removed meanwhile"):
        publishing.move_pointer(store, second, dataclasses.asdict(first))
    assert current_publication(store) == second


def test_a_pointer_of_another_release_is_told_apart_from_a_damaged_one(store):
    store.write_json({"id": "x", "layout": 9}, "published.json")
    with pytest.raises(SchemaError, match="another release"):
        current_publication(store)
    Path(store.path("published.json")).write_text("{")
    with pytest.raises(StorageError, match="cannot read"):
        current_publication(store)


def test_a_bucket_rewritten_later_does_not_change_what_is_published(store):
    run_id = write_fake_run(store, OCTOBER)
    publication = publish(store, run_id)
    linked = Path(store.path("published", publication.id, publication.current["churn"], f"{run_id}-00000.parquet"))
    before = linked.read_bytes()
    write_bucket(store, run_id, 0, bucket_table(["other"], parse_as_of(OCTOBER)), tokens=1, seconds=1.0)
    assert linked.read_bytes() == before
