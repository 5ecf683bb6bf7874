"""What counts as a valid embedding, and the digest that proves a file still holds what was written."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instructue_feast.errors import InvalidEmbeddingError, SchemaError
from instructue_feast.runs.audit import bucket_digest, check_embeddings, check_vectors, combine_digests
from instructue_feast.runs.manifest import parse_as_of
from tests.fake_runs import bucket_table, unit_vectors, user_names

AS_OF = parse_as_of("2017-10-01T00:00:00Z")
USERS = user_names(9)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_broken_number_is_counted_and_located_without_naming_the_user(value):
    vectors = unit_vectors(0, USERS, "churn")
    vectors[4, 2] = value
    with pytest.raises(InvalidEmbeddingError, match="churn, bucket 3: 1 of 9 embeddings hold NaN or infinity") as error:
        check_vectors(vectors, "churn, bucket 3")
    assert "user-" not in str(error.value)


@pytest.mark.parametrize("norm", [0.0, 0.99, 1.01, 1e20])
def test_a_vector_that_is_not_unit_norm_is_refused(norm):
    vectors = unit_vectors(0, USERS, "churn")
    vectors[[1, 5]] *= norm
    with pytest.raises(InvalidEmbeddingError, match="2 of 9 embeddings are not unit-norm"):
        check_vectors(vectors, "churn")


def test_rounding_to_bfloat16_precision_is_not_a_reason_to_refuse():
    check_vectors(unit_vectors(0, USERS, "churn") * np.float32(1.0005), "churn")


@pytest.mark.parametrize(("shape", "dim"), [((9, 7), 8), ((9,), None), ((9, 0), None)])
def test_a_wrong_size_is_refused(shape, dim):
    with pytest.raises(InvalidEmbeddingError):
        check_vectors(np.ones(shape, dtype=np.float32), "churn", dim=dim)


def test_no_users_is_a_valid_bucket():
    check_embeddings(bucket_table([], AS_OF), "bucket 0", dim=8)


def _with_column(name, values):
    table = bucket_table(USERS, AS_OF)
    index = table.schema.get_field_index(name)
    field = table.schema.field(name)
    return table.set_column(index, pa.field(name, field.type), pa.array(values, field.type))


@pytest.mark.parametrize(
    ("name", "values", "error", "message"),
    [
        ("churn", [[1.0] + [0.0] * 7] * 8 + [[1.0]], InvalidEmbeddingError, "1 of 9 embeddings do not have 8 numbers"),
        ("churn", [[1.0] + [0.0] * 6 + [None]] * 9, InvalidEmbeddingError, "nulls inside embeddings"),
        ("churn", [None] * 9, SchemaError, "9 nulls"),
        ("taste", [[1.0, 0.0]] * 9, InvalidEmbeddingError, "have 2 numbers, not 8"),
        ("user_id", ["a"] * 9, SchemaError, "8 rows repeat a user"),
        ("user_id", ["", *USERS[1:]], SchemaError, "1 rows have an empty user id"),
    ],
)
def test_tables_unfit_for_a_run_are_refused(name, values, error, message):
    with pytest.raises(error, match=message):
        check_embeddings(_with_column(name, values), "run r, bucket 0")


def test_a_table_without_instructions_is_refused():
    with pytest.raises(SchemaError, match="no instruction column"):
        check_embeddings(bucket_table(USERS, AS_OF, instructions=[]), "run r, bucket 0")


@given(order=st.permutations(range(9)), cuts=st.lists(st.integers(0, 9), max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_digest_depends_neither_on_row_order_nor_on_how_the_rows_are_cut(order, cuts):
    table = bucket_table(USERS, AS_OF)
    shuffled = table.take(order)
    edges = [0, *sorted(cuts), 9]
    pieces = [shuffled.slice(low, high - low) for low, high in pairwise(edges)]
    assert combine_digests(bucket_digest(piece) for piece in pieces) == bucket_digest(table)
    assert bucket_digest(pa.concat_tables(pieces)) == bucket_digest(table)


@given(row=st.integers(0, 8), column=st.integers(0, 7), name=st.sampled_from(["churn", "next_basket", "taste"]))
@settings(max_examples=25, deadline=None)
def test_the_digest_sees_the_last_bit_of_every_number(row, column, name):
    table = bucket_table(USERS, AS_OF)
    vectors = unit_vectors(0, USERS, name)
    vectors[row, column] = np.nextafter(vectors[row, column], np.float32(2))
    assert bucket_digest(_with_column(name, list(vectors))) != bucket_digest(table)


def test_the_digest_sees_users_times_and_swapped_instructions_but_not_when_it_was_computed():
    table = bucket_table(USERS, AS_OF)
    digest = bucket_digest(table)
    assert digest.startswith("9-")
    assert bucket_digest(bucket_table(USERS, AS_OF, created=parse_as_of("2020-01-01T00:00:00Z"))) == digest
    assert bucket_digest(table.select([*table.schema.names[:3], "taste", "churn", "next_basket"])) == digest
    renamed = table.rename_columns([*table.schema.names[:3], "next_basket", "churn", "taste"])
    swapped_users = _with_column("user_id", [USERS[1], USERS[0], *USERS[2:]])
    later = bucket_table(USERS, parse_as_of("2017-10-02T00:00:00Z"))
    assert digest not in {bucket_digest(renamed), bucket_digest(swapped_users), bucket_digest(later)}
