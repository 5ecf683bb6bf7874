"""Our online stores and Feast's own read and write the same bytes, on SQLite and on a real Redis."""

import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import numpy as np
import pytest
from feast import FeatureView, Field
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import FloatList, Value
from feast.types import Bytes, String
from redis import Redis

from instructue_feast.errors import VersionMismatchError
from instructue_feast.feature_store.lookup import ServedView, read_stored
from instructue_feast.feature_store.online import WireRows, to_micros
from instructue_feast.feature_store.readers import reader_of, stored_feature
from instructue_feast.feature_store.wire import UNKNOWN_TIME, as_stored, encode_bytes, encode_vectors, entity_keys
from tests.fake_runs import unit_vectors, user_names
from tests.feature_store.stores import USER, embedding_view, open_pair, redis_server

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


def test_a_table_that_another_process_made_anew_is_written_too(tmp_path):
    pair = open_pair("sqlite", tmp_path / "online.db", "p", [VIEW])
    vectors = unit_vectors(0, USERS, "churn")
    write(pair, USERS, vectors, OCTOBER)
    pair.stock.store.update(pair.stock.config, [VIEW], [], [], [], False)
    pair.stock.store.update(pair.stock.config, [], [VIEW], [], [], False)
    write(pair, USERS, vectors, OCTOBER)
    np.testing.assert_array_equal(our_read(pair, USERS).vectors, vectors)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_with_feasts_vector_search_switched_on_vectors_and_bytes_are_kept_as_it_expects(tmp_path, storage):
    view = FeatureView(
        name="packed_history__v1",
        entities=[USER],
        schema=[Field(name="user_id", dtype=String), Field(name="packed_history", dtype=Bytes)],
        source=VIEW.batch_source,
    )
    pair = open_pair("sqlite", tmp_path / "online.db", "p", [VIEW, view], vector_enabled=True)
    vectors = unit_vectors(0, ["u"], "churn").astype(np.float16).astype(np.float32)
    write(pair, ["u"], vectors, OCTOBER, storage=storage)
    rows = replace(wire_rows(["u"], vectors, OCTOBER), values={"packed_history": encode_bytes([b"abc"])})
    pair.ours.store.write_rows(pair.ours.config, view, rows)
    connection = pair.ours.store._get_conn(pair.ours.config)
    kept = [
        connection.execute(f'SELECT vector_value FROM "p_{one}"').fetchone()[0]
        for one in ("churn__v1", "packed_history__v1")
    ]
    assert kept == [vectors.tobytes(), b"abc"]


def stock_read(pair, users, config=None):
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)]) for user in users]
    rows = pair.stock.store.online_read(pair.stock.config, VIEW, keys, ["churn"])
    return [list(values["churn"].float_list_val.val) if values else [] for _, values in rows], [
        time for time, _ in rows
    ]


def our_read(pair, users, view=VIEW):
    """What a lookup reads, whatever its age."""
    store = namespace_of_store(pair.ours)
    served = ServedView("churn__v1", "churn", view.features[0].vector_length, timedelta(0), "user_id", "", None)
    served = replace(served, stored=stored_feature(store, view))
    vectors, found, as_of = read_stored(store, {"churn": served}, users)["churn"]
    return SimpleNamespace(vectors=vectors, found=found, event_micros=as_of.view(np.int64))


def namespace_of_store(one):
    """As much of a `FeatureStore` as reading takes."""
    provider = SimpleNamespace(online_store=one.store)
    return SimpleNamespace(config=one.config, project=one.config.project, _get_provider=lambda: provider)


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
    assert np.isnat(read.event_micros.view("datetime64[us]")).tolist() == [True, False, False, False]


def test_asking_for_nobody_or_for_strangers_gives_arrays_of_the_right_shape(pair):
    assert our_read(pair, []).vectors.shape == (0, 8)
    assert our_read(pair, ["nobody"] * 3).vectors.shape == (3, 8)


def test_several_columns_of_the_same_users_are_read_at_once(pair):
    other = embedding_view("taste__v1", "taste")
    config, store = pair.ours.config, pair.ours.store
    store.update(config, [], [VIEW, other], [], [], False)
    write(pair, USERS, unit_vectors(0, USERS, "churn"), OCTOBER)
    feast_store = namespace_of_store(pair.ours)
    features = [stored_feature(feast_store, one) for one in (VIEW, other)]
    churn, taste = reader_of(feast_store, "user_id").read(features, USERS)
    assert sorted(churn.rows) == list(range(len(USERS)))
    expected = encode_vectors(unit_vectors(0, USERS, "churn"))
    assert churn.values == [expected[row] for row in churn.rows]
    assert taste.rows == []


def test_of_many_rows_in_any_order_those_with_something_newer_are_kept_and_counted(pair):
    users = [f"u{number}" for number in range(47)]
    shuffled = users[::-2] + users[1::2]
    old, new = (unit_vectors(seed, users, "churn") for seed in (0, 1))
    place = {user: number for number, user in enumerate(users)}
    write(pair, users[::3], new[::3], NOVEMBER)
    assert write(pair, shuffled, old[[place[user] for user in shuffled]], OCTOBER) == 47 - len(users[::3])
    np.testing.assert_array_equal(our_read(pair, users).vectors, [(old if n % 3 else new)[n] for n in range(47)])


def test_feasts_second_index_is_not_kept_and_not_missed(tmp_path):
    pair = open_pair("sqlite", tmp_path / "online.db", "p", [VIEW])
    connection = pair.ours.store._get_conn(pair.ours.config)
    statement = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    assert connection.execute(statement).fetchall() == []
    vectors = unit_vectors(0, USERS, "churn")
    write(pair, USERS, vectors, OCTOBER)
    np.testing.assert_array_equal(np.float32(stock_read(pair, USERS)[0]), vectors)
    pair.stock.store.update(pair.stock.config, [], [VIEW], [], [], False)  # stock `feast apply` makes it
    assert connection.execute(statement).fetchall() == [("p_churn__v1_ek",)]
    write(pair, USERS, vectors, NOVEMBER)
    assert set(stock_read(pair, USERS)[1]) == {NOVEMBER}


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


@pytest.mark.parametrize("by", ["engine", "push"])
def test_nothing_older_replaces_what_is_stored(pair, by):
    old, new, again = (unit_vectors(seed, USERS, "churn") for seed in (1, 2, 3))

    def put(vectors, event, created):
        if by == "engine":
            return write(pair, USERS, vectors, event, created)
        return pair.ours.store.online_write_batch(
            pair.ours.config, VIEW, proto_rows(USERS, vectors, event, created), None
        )

    put(new, NOVEMBER, NOVEMBER)
    put(old, OCTOBER, NOVEMBER)  # computed later, of an earlier time
    np.testing.assert_array_equal(our_read(pair, USERS).vectors, new)
    put(again, NOVEMBER, datetime(2017, 11, 2, tzinfo=UTC))
    np.testing.assert_array_equal(our_read(pair, USERS).vectors, again)
    put(new, NOVEMBER, NOVEMBER)  # the same time, computed before
    read = our_read(pair, USERS)
    np.testing.assert_array_equal(read.vectors, again)
    assert set(read.event_micros) == {to_micros(NOVEMBER)}


def test_the_newest_of_several_rows_of_a_user_in_one_batch_stays(pair):
    vectors = unit_vectors(0, USERS[:3], "churn")
    rows = [
        *proto_rows(["u"], vectors[:1], OCTOBER),
        *proto_rows(["u"], vectors[1:2], NOVEMBER),
        *proto_rows(["u"], vectors[2:], OCTOBER),
    ]
    pair.ours.store.online_write_batch(pair.ours.config, VIEW, rows, None)
    np.testing.assert_array_equal(our_read(pair, ["u"]).vectors, vectors[1:2])


def test_rows_of_stock_feast_give_way_to_the_same_time_and_not_to_an_earlier_one(pair):
    vectors = unit_vectors(0, USERS, "churn")
    pair.stock.store.online_write_batch(pair.stock.config, VIEW, proto_rows(USERS, vectors, NOVEMBER), None)
    assert write(pair, USERS, vectors[::-1], OCTOBER) == 0
    assert write(pair, USERS, vectors[::-1], NOVEMBER) == len(USERS)
    np.testing.assert_array_equal(our_read(pair, USERS).vectors, vectors[::-1])


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_times_do_not_move_with_the_time_zone(pair, name, monkeypatch):
    one = getattr(pair, name)
    key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=USERS[0])])

    def in_zone(zone):
        monkeypatch.setenv("TZ", zone)
        time.tzset()

    try:
        in_zone("Asia/Tokyo")
        one.store.online_write_batch(
            one.config, VIEW, proto_rows(USERS[:1], unit_vectors(0, USERS[:1], "churn"), OCTOBER), None
        )
        in_zone("America/New_York")
        ((read, _),) = one.store.online_read(one.config, VIEW, [key], ["churn"])
        ours = our_read(pair, USERS[:1]).event_micros[0]
    finally:
        in_zone("UTC")
    moved = timedelta(hours=13) if name == "stock" and pair.system == "sqlite" else timedelta(0)
    assert read == OCTOBER - moved
    if name == "ours":
        assert ours == to_micros(OCTOBER)


@pytest.mark.parametrize(("storage", "size", "error"), [("float16", 0.55, 5e-4), ("int8", 0.35, 5e-3)])
def test_vectors_stored_smaller_are_read_as_floats_and_never_wrongly_by_stock_feast(pair, storage, size, error):
    wide = embedding_view("wide__v1", "churn", dim=128)
    pair.ours.store.update(pair.ours.config, [], [VIEW, wide], [], [], False)
    vectors = unit_vectors(0, USERS, "churn", dim=128)
    rows = wire_rows(USERS, vectors, OCTOBER, storage=storage)
    assert len(rows.values["churn"][0]) < size * len(encode_vectors(vectors)[0])
    pair.ours.store.write_rows(pair.ours.config, wide, rows)
    read = our_read(pair, USERS, wide).vectors
    np.testing.assert_allclose(read, vectors, atol=error)
    np.testing.assert_array_equal(read, as_stored(vectors, storage))
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=USERS[0])])]
    ((_, ours),) = pair.ours.store.online_read(pair.ours.config, wide, keys, ["churn"])
    np.testing.assert_array_equal(np.float32(ours["churn"].float_list_val.val), read[0])
    ((_, stock),) = pair.stock.store.online_read(pair.stock.config, wide, keys, ["churn"])
    assert stock["churn"].WhichOneof("val") == "bytes_val"


def test_storages_can_be_mixed_in_one_view(pair):
    vectors = unit_vectors(0, USERS, "churn")
    for place, storage in enumerate(("float32", "float16", "int8")):
        part = slice(3 * place, 3 * place + 3)
        write(pair, USERS[part], vectors[part], OCTOBER, storage=storage)
    np.testing.assert_allclose(our_read(pair, USERS).vectors, vectors, atol=5e-3)


@pytest.mark.parametrize(("storage", "least"), [("float16", 0.995), ("int8", 0.95)])
def test_smaller_vectors_find_nearly_the_same_neighbours(storage, least):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, 128))
    vectors = centres[rng.integers(50, size=3000)] + 0.5 * rng.normal(size=(3000, 128))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    stored = as_stored(vectors, storage)

    def neighbours(among):
        return np.argsort(-(vectors[:200] @ among.T), axis=1)[:, :10]

    pairs = zip(neighbours(vectors), neighbours(stored), strict=True)
    recall = np.mean([len(set(exact) & set(found)) / 10 for exact, found in pairs])
    assert recall >= least


def test_redis_forgets_a_user_with_the_time_to_live_that_stock_feast_uses(tmp_path, redis_address):
    pair = open_pair("redis", redis_address, f"p{abs(hash(tmp_path))}", [VIEW], key_ttl_seconds=1000)
    write(pair, USERS, unit_vectors(0, USERS, "churn"), OCTOBER)
    client = pair.ours.store._get_client(pair.ours.config.online_store)
    key = entity_keys("user_id", USERS[:1])[0] + pair.ours.config.project.encode()
    assert 990 <= client.ttl(key) <= 1000


def test_a_batch_is_seen_whole_or_not_at_all_by_other_threads(pair):
    users = user_names(400)
    vectors = {seed: unit_vectors(seed, users, "churn") for seed in (1, 2)}
    write(pair, users, vectors[1], OCTOBER)
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(len({*our_read(pair, users).event_micros.tolist()}) if pair.system == "sqlite" else whole())

    def whole():  # one command reads one user of Redis, so the block is looked at with a transaction
        client = pair.ours.store._get_client(pair.ours.config.online_store)
        with client.pipeline(transaction=True) as pipe:
            for key in entity_keys("user_id", users):
                pipe.hget(key + pair.ours.config.project.encode(), "_ts:churn__v1")
            return len(set(pipe.execute()))

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for day in range(2, 12):
            write(pair, users, vectors[1 + day % 2], datetime(2017, 11, day, tzinfo=UTC))
    finally:
        stop.set()
        reader.join()
    assert set(seen) == {1}


def test_redis_can_forget_a_user_when_the_last_of_their_embeddings_has_outlived_its_ttl(tmp_path, redis_address):
    pair = open_pair("redis", redis_address, f"p{abs(hash(tmp_path))}", [VIEW], expire_with_ttl=True)
    store, config = pair.ours.store, pair.ours.config
    client, key = (
        store._get_client(config.online_store),
        entity_keys("user_id", ["u"])[0] + config.project.encode(),
    )
    today = datetime.now(UTC).replace(microsecond=0)
    vectors = unit_vectors(0, ["u"], "churn")

    def days_left(view, event):
        store.write_rows(config, view, wire_rows(["u"], vectors, event))
        left = client.pttl(key)
        return left if left < 0 else round(left / 86_400_000)

    short, long = (embedding_view(f"churn__{days}", ttl_days=days) for days in (10, 30))
    assert days_left(short, today - timedelta(days=4)) == 6
    assert days_left(short, today) == 10
    assert days_left(long, today) == 30
    assert days_left(short, today + timedelta(days=1)) == 30  # never shortened
    assert days_left(VIEW, today) == -1  # a view without ttl keeps the user
    assert days_left(long, today + timedelta(days=1)) == -1
    client.delete(key)
    assert days_left(short, today - timedelta(days=11)) == -2  # gone at once


def test_a_redis_cluster_is_written_and_read_too(tmp_path):
    cluster = ["--cluster-enabled", "yes", "--dir", str(tmp_path), "--cluster-config-file", "nodes.conf"]
    with redis_server(*cluster) as server:
        node = Redis(port=server.port)
        node.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        while b"cluster_state:ok" not in node.execute_command("CLUSTER", "INFO"):
            time.sleep(0.05)
        pair = open_pair("redis", server.address, "cluster", [VIEW], redis_type="redis_cluster")
        old, new = (unit_vectors(seed, USERS, "churn") for seed in (1, 2))
        assert write(pair, USERS, new, NOVEMBER) == len(USERS)
        assert write(pair, USERS, old, OCTOBER) == 0
        np.testing.assert_array_equal(our_read(pair, USERS).vectors, new)
        assert pair.ours.store.delete_entities(pair.ours.config, [VIEW], USERS[:2]) == 2
        assert our_read(pair, USERS).found.tolist() == [False] * 2 + [True] * 7
