"""Templates as native Spark columns."""

from __future__ import annotations

from collections.abc import Mapping

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    BooleanType,
    DataType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegralType,
    NumericType,
    StringType,
)

from instructue_feast.errors import SchemaError
from instructue_feast.history import render
from instructue_feast.template import MISSING_TEXT, Field, bucket_labels, parse_template


def column(name: str) -> Column:
    """A top-level column by its exact name, whatever characters that has."""
    return F.col("`" + name.replace("`", "``") + "`")


def template_column(template: str, types: Mapping[str, DataType], max_chars: int, where: str) -> Column:
    """Compiles a template to one string expression, never null.

    Each column is cut before anything else touches it, so that a value of a megabyte never travels. The whole is cut,
    and what is not UTF-8 in it mended, where each distinct text is looked at once (`packer.Packer`).

    Args:
        template: As in `instructue_feast.template`.
        types: Type of each column of the table.
        max_chars: Code points kept of each column.
        where: What to call the source in a message.

    Raises:
        SchemaError: A column has a type that cannot be put into text that way.
    """
    parts = [
        F.lit(part) if isinstance(part, str) else _field(part, types[part.column], max_chars, where)
        for part in parse_template(template)
    ]
    return F.concat(*parts)


def categorical_column(name: str, kind: DataType, max_chars: int, where: str) -> Column:
    """The text of a categorical value, null where the value is; the native form of `render.categorical_text`."""
    prefix = render.categorical_text(name, "")
    text = F.left(F.concat(F.lit(prefix), _as_text(name, kind, max_chars, where)), F.lit(max_chars))
    # Bytes that are not UTF-8 pass through Spark and would break a reader of JSON; they become U+FFFD here.
    return F.make_valid_utf8(text)


def broken_value(template: str, types: Mapping[str, DataType]) -> Column:
    """Whether a bucketed column holds NaN or an infinity."""
    broken = F.lit(False)
    for part in parse_template(template):
        if isinstance(part, Field) and isinstance(types[part.column], FloatType | DoubleType):
            broken = broken | F.coalesce(~is_finite(column(part.column)), F.lit(False))
    return broken


def is_finite(value: Column) -> Column:
    """Whether a float is neither NaN nor infinite; null stays null."""
    return ~(F.isnan(value) | (F.abs(value) == F.lit(float("inf"))))


def bucketize(value: Column, edges: tuple[int, ...]) -> Column:
    """The native form of `history.buckets.bucketize`: how many edges are at most the value."""
    result = F.when(value < F.lit(edges[0]), F.lit(0))
    for index, edge in enumerate(edges[1:], 1):
        result = result.when(value < F.lit(edge), F.lit(index))
    return result.otherwise(F.lit(len(edges)))


def _field(part: Field, kind: DataType, max_chars: int, where: str) -> Column:
    if part.edges:
        if not isinstance(kind, NumericType):
            raise SchemaError(
                f"{where}: column {part.column} has type {kind.simpleString()} and cannot be bucketed",
                f"write {{{part.column}}} without `bucket`, or convert the column to a number",
            )
        value, labels = column(part.column).cast("double"), bucket_labels(part.edges)
        label = F.when(value.isNull(), F.lit(MISSING_TEXT))
        for edge, name in zip(part.edges, labels, strict=False):
            label = label.when(value < F.lit(edge), F.lit(name))
        return label.otherwise(F.lit(labels[-1]))
    text = _as_text(part.column, kind, max_chars, where)
    return F.coalesce(F.lower(text) if part.lower else text, F.lit(MISSING_TEXT))


def _as_text(name: str, kind: DataType, max_chars: int, where: str) -> Column:
    if isinstance(kind, StringType):
        text = column(name)
        # Code points are counted, byte by byte, only where there may be too many.
        return F.when(F.octet_length(text) <= F.lit(max_chars), text).otherwise(F.left(text, F.lit(max_chars)))
    if isinstance(kind, IntegralType | BooleanType):
        return column(name).cast("string")
    hint = (
        f"bucket it: {{{name}|bucket:1,2,5}}"
        if isinstance(kind, FloatType | DoubleType | DecimalType)
        else "convert it to a string"
    )
    message = f"{where}: column {name} of type {kind.simpleString()} cannot be put into text as it is"
    raise SchemaError(message, f"{hint}; text columns are strings, integers or booleans")
