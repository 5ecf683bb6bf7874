"""Our online stores and Feast's own read and write the same bytes, on SQLite and on a real Redis."""

from datetime import UTC, datetime

import numpy as np
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Value

from instructue_feast.errors import ConfigError, VersionMismatchError
from instructue_feast.feature_store.online import WireRows, to_micros, vector_column
from instructue_feast.feature_store.wire import UNKNOWN_TIME, encode_vectors, entity_keys
from tests.fake_runs import unit_vectors, user_names
from tests.feature_store.stores import embedding_view, open_pair

OCTOBER, NOVEMBER = datetime(2017, 10, 1, tzinfo=UTC), datetime(2017, 11, 1, tzinfo=UTC)
USERS = user_names(9)
VIEW = embedding_view()


def proto_rows(users, vectors, event, created=None):
    """What stock Feast hands to a store."""
    return [
        (
            EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)]),
            {"churn": Value(float_list_val=FloatList(val=vector.tolist()))},
            event,
            created or event,
        )
        for user, vector in zip(users, vectors, strict=True)
    ]


def wire_rows(users, vectors, event, revision=None, storage="float32"):
    """What our engine hands to a store."""
    times = np.full(len(users), to_micros(event), dtype=np.int64)
    revisions = np.full(len(users), to_micros(revision or event), dtype=np.int64)
    return WireRows(entity_keys("user_id", users), {"churn": encode_vectors(vectors, storage)}, times, times, revisions)


@pytest.mark.parametrize("user", ["", "17", "user-0001", "пользователь", "👩‍🚀", "\x00", "x" * 70_000])
def test_entity_keys_are_feasts_own(user):
    key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])
    assert entity_keys("user_id", ["other", user])[1] == serialize_entity_key(key, 3)


@pytest.mark.parametrize("dim", [1, 31, 32, 127, 128, 256, 4096, 20_000])
def test_vectors_are_feasts_own(dim):
    vectors = np.random.default_rng(dim).normal(size=(3, dim)).astype(np.float32)
    vectors[1, 0] = -0.0
    expected = [Value(float_list_val=FloatList(val=one.tolist())).SerializeToString() for one in vectors]
    assert encode_vectors(vectors) == expected


@pytest.fixture(params=["sqlite", "redis"])
def pair(request, tmp_path):
    """Our store and Feast's own on one database, with the view `churn__v1`."""
    place = tmp_path / "online.db" if request.param == "sqlite" else request.getfixturevalue("redis_address")
    return open_pair(request.param, place, f"p{abs(hash(tmp_path))}", [VIEW])


def contents(pair):
    """Everything that is stored, without the revision that only we keep."""
    store, config = pair.ours.store, pair.ours.config
    if pair.system == "sqlite":
        stock_columns = "entity_key, feature_name, value, value_text, vector_value, event_ts + 0, created_ts + 0"
        return sorted(store._get_conn(config).execute(f'SELECT {stock_columns} FROM "{config.project}_churn__v1"'))
    client = store._get_client(config.online_store)
    keys = sorted(client.scan_iter(b"*" + config.project.encode()))
    return [(key, {k: v for k, v in client.hgetall(key).items() if not k.startswith(b"_rev:")}) for key in keys]


def test_our_rows_are_stored_byte_for_byte_as_feast_stores_them(pair):
    vectors = unit_vectors(0, USERS, "churn")
    pair.stock.store.online_write_batch(pair.stock.config, VIEW, proto_rows(USERS, vectors, OCTOBER), None)
    stock = contents(pair)
    pair.ours.store.delete_entities(pair.ours.config, [VIEW], USERS)
    assert contents(pair) == []
    assert pair.ours.store.write_rows(pair.ours.config, VIEW, wire_rows(USERS, vectors, OCTOBER)) == len(USERS)
    assert contents(pair) == stock
    pair.ours.store.delete_entities(pair.ours.config, [VIEW], USERS)
    pair.ours.store.online_write_batch(pair.ours.config, VIEW, proto_rows(USERS, vectors, OCTOBER), None)
    assert contents(pair) == stock
    assert len(stock) == len(USERS)


def stock_read(pair, users, config=None):
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)]) for user in users]
    rows = pair.stock.store.online_read(pair.stock.config, VIEW, keys, ["churn"])
    return [list(values["churn"].float_list_val.val) if values else [] for _, values in rows], [
        time for time, _ in rows
    ]


def our_read(pair, users):
    return pair.ours.store.read_vectors(pair.ours.config, VIEW, users)


def write(pair, users, vectors, event, revision=None, storage="float32"):
    rows = wire_rows(users, vectors, event, revision, storage)
    return pair.ours.store.write_rows(pair.ours.config, VIEW, rows)


def test_stock_feast_reads_what_we_write(pair):
    vectors = unit_vectors(0, USERS, "churn")
    write(pair, USERS, vectors, OCTOBER)
    read, times = stock_read(pair, USERS)
    np.testing.assert_array_equal(np.float32(read), vectors)
    assert set(times) == {OCTOBER}


def test_we_read_what_stock_feast_writes(pair):
    vectors = unit_vectors(0, USERS, "churn")
    pair.stock.store.online_write_batch(pair.stock.config, VIEW, proto_rows(USERS, vectors, OCTOBER, NOVEMBER), None)
    asked = ["nobody", USERS[3], USERS[0], USERS[3]]
    read = our_read(pair, asked)
    np.testing.assert_array_equal(read.vectors, [np.zeros(8), vectors[3], vectors[0], vectors[3]])
    assert read.found.tolist() == [False, True, True, True]
    assert read.event_micros.tolist() == [UNKNOWN_TIME, *[to_micros(OCTOBER)] * 3]
    created = UNKNOWN_TIME if pair.system == "redis" else to_micros(NOVEMBER)  # Redis does not keep it
    assert read.created_micros.tolist() == [UNKNOWN_TIME, *[created] * 3]
    assert np.isnat(read.event_micros.view("datetime64[us]")).tolist() == [True, False, False, False]


def test_asking_for_nobody_or_for_strangers_gives_arrays_of_the_right_shape(pair):
    assert our_read(pair, []).vectors.shape == (0, 8)
    assert our_read(pair, ["nobody"] * 3).vectors.shape == (3, 8)


def test_several_columns_of_the_same_users_are_read_at_once(pair):
    other = embedding_view("taste__v1", "taste")
    config, store = pair.ours.config, pair.ours.store
    store.update(config, [], [VIEW, other], [], [], False)
    write(pair, USERS, unit_vectors(0, USERS, "churn"), OCTOBER)
    columns = [vector_column(config, VIEW), vector_column(config, other)]
    churn, taste = store.read_columns(config, columns, USERS)
    np.testing.assert_array_equal(churn.vectors, unit_vectors(0, USERS, "churn"))
    assert churn.found.all()
    assert not taste.found.any()
    assert store.read_columns(config, [], USERS) == []


def test_a_removed_user_is_gone_and_the_others_are_not(pair):
    write(pair, USERS, unit_vectors(0, USERS, "churn"), OCTOBER)
    before = contents(pair)
    gone = entity_keys("user_id", [USERS[2]])[0]
    assert pair.ours.store.delete_entities(pair.ours.config, [VIEW], [USERS[2], "nobody"]) == 1
    assert contents(pair) == [row for row in before if not row[0].startswith(gone)]
    assert our_read(pair, USERS).found.tolist() == [user != USERS[2] for user in USERS]


def test_a_vector_of_another_size_is_refused(pair):
    write(pair, USERS, unit_vectors(0, USERS, "churn", dim=4), OCTOBER)
    with pytest.raises(VersionMismatchError, match="churn__v1 holds a vector of 4 numbers, not 8"):
        our_read(pair, USERS)


def test_a_view_without_that_vector_is_refused_by_name(pair):
    with pytest.raises(ConfigError, match=r"view churn__v1 has no vector tast\nHint: .*\[churn\]"):
        pair.ours.store.read_vectors(pair.ours.config, VIEW, USERS, "tast")
