"""What goes wrong in stock Feast, shown on stock Feast, and what happens here instead."""

import sqlite3
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, InvalidEmbeddingError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.online import online_store
from instructue_feast.feature_store.session import open_store, quiet
from instructue_feast.feature_store.sqlite import InstructueSqliteOnlineStore
from instructue_feast.runs.publish import publish
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import unit_vectors, use_stock, user_names, write_fake_run, write_feast_repo

OCTOBER, NOVEMBER = "2017-10-01T00:00:00Z", "2017-11-01T00:00:00Z"


def publish_run(repo, as_of=OCTOBER, **options):
    output = OutputStore(load_config(repo / "instructue.yaml").output.path)
    publication = publish(output, write_fake_run(output, as_of, **options))
    apply_repo(repo)
    return publication


@pytest.fixture(params=["ours", "stock"])
def kind(request):
    """Which engine and online store the repo uses; the data and the registry are the same."""
    return request.param


@pytest.fixture
def repo_of_kind(any_repo, kind):
    """A repo on SQLite and on Redis, once with our engine and store and once with Feast's."""
    if kind == "stock":
        use_stock(any_repo)
    return any_repo


def feast_materialize(repo, first, last):
    """What `feast materialize` does, in this process."""
    with quiet():
        open_store(repo).materialize(*(datetime.fromisoformat(one) for one in (first, last)))


def served(repo, users, instruction="churn"):
    """What stock `get_online_features` answers: a list of vectors or None."""
    store = open_store(repo)
    service = store.get_feature_service("user_embeddings")
    answer = store.get_online_features(features=service, entity_rows=[{"user_id": one} for one in users])
    return answer.to_dict()[instruction]


def seed_served(repo, user="user-0001"):
    """The seed of the run whose vector a user gets."""
    value = served(repo, [user])[0]
    seeds = [seed for seed in range(5) if np.array_equal(np.float32(value), unit_vectors(seed, [user], "churn")[0])]
    return seeds[0] if seeds else None


def test_an_embedding_that_has_outlived_its_ttl_is_not_served(repo_of_kind, kind):
    write_feast_repo(repo_of_kind, ttl_days=30, files=["instructue.yaml"])
    fresh = (datetime.now(UTC) - timedelta(days=29)).isoformat()
    publish_run(repo_of_kind, OCTOBER, users=["old"])
    publish_run(repo_of_kind, fresh, users=["new"])
    feast_materialize(repo_of_kind, OCTOBER, fresh)
    old, new = served(repo_of_kind, ["old", "new"])
    assert new is not None
    assert (old is not None) == (kind == "stock")


def test_a_run_published_again_for_the_same_time_is_served_after_feast_materialize(repo_of_kind, kind):
    for seed in (1, 2):
        publish_run(repo_of_kind, seed=seed)
        feast_materialize(repo_of_kind, OCTOBER, OCTOBER)
    skips = kind == "stock" and isinstance(online_store(open_store(repo_of_kind)), RedisOnlineStore)
    assert seed_served(repo_of_kind) == (1 if skips else 2)


def test_an_earlier_time_never_replaces_a_later_one(repo_of_kind, kind):
    publish_run(repo_of_kind, NOVEMBER, seed=1)
    publish_run(repo_of_kind, OCTOBER, seed=2)
    feast_materialize(repo_of_kind, NOVEMBER, NOVEMBER)
    feast_materialize(repo_of_kind, OCTOBER, OCTOBER)
    overwrites = kind == "stock" and isinstance(online_store(open_store(repo_of_kind)), SqliteOnlineStore)
    assert seed_served(repo_of_kind) == (2 if overwrites else 1)


def test_an_unknown_user_is_told_by_the_value_because_the_status_differs(any_repo):
    publish_run(any_repo)
    materialize(any_repo)
    store = open_store(any_repo)
    proto = store.get_online_features(
        features=store.get_feature_service("user_embeddings"), entity_rows=[{"user_id": "nobody"}]
    ).proto
    status = dict(zip(proto.metadata.feature_names.val, [one.statuses[0] for one in proto.results], strict=True))
    on_redis = isinstance(online_store(store), RedisOnlineStore)
    assert status["churn"] == (FieldStatus.PRESENT if on_redis else FieldStatus.NOT_FOUND)  # the trap
    assert not UserEmbeddings(store).get(["nobody"]).found["churn"].any()


@pytest.mark.parametrize("setting", [True, False])
def test_users_can_be_looked_up_while_their_view_is_materialized_again(repo, monkeypatch, setting):
    if not setting:
        file = repo / "feature_store.yaml"
        file.write_text(file.read_text().replace("while_materializing: true", "while_materializing: false"))
    publish_run(repo)
    materialize(repo)
    write, seen = InstructueSqliteOnlineStore.write_rows, []

    def read_then_write(self, *args):
        seen.append(UserEmbeddings(repo).get(["user-0001"], ["churn"]).found["churn"].tolist())
        try:
            seen.append(served(repo, ["user-0001"])[0] is not None)
        except ValueError as error:  # the trap: without the setting, stock Feast refuses
            seen.append("MATERIALIZING" in str(error) and "refused")
        return write(self, *args)

    monkeypatch.setattr(InstructueSqliteOnlineStore, "write_rows", read_then_write)
    materialize(repo)
    assert seen[:2] == [[True], True if setting else "refused"]


def test_materialize_incremental_picks_up_a_run_published_late(repo_of_kind, kind):
    publish_run(repo_of_kind, NOVEMBER, users=["early"])
    with quiet():
        open_store(repo_of_kind).materialize(datetime.fromisoformat(OCTOBER), datetime.fromisoformat(NOVEMBER))
    publish_run(repo_of_kind, OCTOBER, users=["late"])
    with quiet():
        open_store(repo_of_kind).materialize_incremental(datetime.fromisoformat("2017-12-01T00:00:00Z"))
    early, late = served(repo_of_kind, ["early", "late"])
    assert early is not None
    assert (late is None) == (kind == "stock")


def test_materialize_incremental_starts_with_whatever_is_published(repo_of_kind, kind):
    publish_run(repo_of_kind)  # years ago, and the views have no ttl: stock Feast looks one year back
    with quiet():
        open_store(repo_of_kind).materialize_incremental(datetime.now(UTC))
    assert (seed_served_or_none(repo_of_kind) is None) == (kind == "stock")


def seed_served_or_none(repo):
    return served(repo, ["user-0001"])[0]


def test_a_value_computed_after_the_asked_time_is_left_out_of_history_on_demand(repo):
    publish_run(repo, OCTOBER, created=datetime.fromisoformat(NOVEMBER))
    store = open_store(repo)
    asked = pd.DataFrame({"user_id": ["user-0001"], "event_timestamp": pd.to_datetime(["2017-10-15"], utc=True)})
    service = store.get_feature_service("user_embeddings")
    known = {
        filtered: store.get_historical_features(asked, service, filter_by_created_timestamp=filtered).to_df()["churn"][
            0
        ]
        for filtered in (False, True)
    }
    assert known[False] is not None  # the trap: nobody could have known it then
    assert known[True] is None


@pytest.mark.parametrize("offline", ["dask", "duckdb"])
def test_history_keeps_every_row_that_was_asked_for(repo, offline):
    """Ranking needs several candidates for one user at one time."""
    file = repo / "feature_store.yaml"
    file.write_text(file.read_text().replace("type: duckdb", f"type: {offline}"))
    publish_run(repo)
    store = open_store(repo)
    asked = pd.DataFrame(
        {
            "user_id": ["user-0001"] * 3 + ["nobody"],
            "event_timestamp": pd.to_datetime([NOVEMBER] * 4, utc=True),
            "item": ["a", "b", "c", "d"],
        }
    )
    frame = store.get_historical_features(asked, store.get_feature_service("user_embeddings")).to_df()
    assert (sorted(frame["item"]) == ["a", "b", "c", "d"]) == (offline == "duckdb")


def test_every_chunk_of_a_table_is_written(any_repo):
    """Published files, read by pandas as Arrow holds them: a chunk a file."""
    file = any_repo / "feature_store.yaml"
    text = file.read_text()
    file.write_text(text[: text.index("materialization:")] + text[text.index("data_quality_monitoring:") :])
    publication = publish_run(any_repo, users=50, buckets=5)
    view = publication.current["churn"]
    folder = any_repo / "data" / "output" / "published" / publication.id / view
    frame = pd.read_parquet(folder, dtype_backend="pyarrow")
    assert frame["user_id"].array.__arrow_array__().num_chunks == 5
    with quiet():
        open_store(any_repo).write_to_online_store(view, frame)
    written = UserEmbeddings(any_repo).get(user_names(50), ["churn"]).found["churn"].sum()
    assert written == len(pq.read_table(sorted(folder.glob("*.parquet"))[0])) < 50  # the trap: without a word
    feast_materialize(any_repo, OCTOBER, OCTOBER)
    assert UserEmbeddings(any_repo).get(user_names(50)).found["churn"].all()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([0.0] * 7 + [float("nan")], "NaN or infinity"),
        ([0.0] * 7 + [float("inf")], "NaN or infinity"),
        ([0.5] * 7, "do not have 8 numbers"),
        ([0.5] * 7 + [None], "nulls inside"),
    ],
)
def test_a_broken_vector_is_refused(any_repo, kind, broken, message):
    publication = publish_run(any_repo)
    view = publication.current["churn"]
    folder = any_repo / "data" / "output" / "published" / publication.id / view
    file = next(iter(sorted(folder.glob("*.parquet"))))
    table = pq.read_table(file)
    vectors = [broken, *table["churn"].to_pylist()[1:]]
    place, field = table.schema.get_field_index("churn"), table.schema.field("churn").with_nullable(True)
    field = field.with_type(pa.list_(pa.float32()))
    file.unlink()  # a link to the run's own file
    pq.write_table(table.set_column(place, field, pa.array(vectors, field.type)), file)
    if kind == "ours":
        with pytest.raises(InvalidEmbeddingError, match=message):
            feast_materialize(any_repo, OCTOBER, OCTOBER)
        return
    use_stock(any_repo)
    if broken[-1] is not None and len(broken) == 8:  # the trap: not a number, and served as one
        feast_materialize(any_repo, OCTOBER, OCTOBER)
        value = served(any_repo, [table["user_id"][0].as_py()])[0]
        assert not np.isfinite(value).all()


def test_a_lookup_without_a_user_is_refused(any_repo):
    publish_run(any_repo)
    materialize(any_repo)
    assert served(any_repo, [""]) == [None]  # the trap: nobody notices
    with pytest.raises(ConfigError, match="position 0 is blank"):
        UserEmbeddings(any_repo).get([""])


def test_stock_vector_search_on_sqlite_does_not_run_here(repo):
    publish_run(repo)
    materialize(repo)
    use_stock(repo)
    file = repo / "feature_store.yaml"
    file.write_text(file.read_text().replace("type: sqlite\n", "type: sqlite\n  vector_enabled: true\n"))
    store = open_store(repo)
    view = store.get_feature_service("user_embeddings").feature_view_projections[0]
    query = unit_vectors(0, ["user-0001"], "churn")[0].tolist()
    with pytest.raises((sqlite3.OperationalError, ModuleNotFoundError, AttributeError)):  # 3.10 only
        store.retrieve_online_documents_v2(features=[f"{view.name}:{view.features[0].name}"], query=query, top_k=1)
