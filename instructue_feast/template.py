"""The text template of a source: `{category|lower}: {type}, {price|bucket:1,2,5}`.

A template is parsed once into literals and fields. Spark compiles the same parts to native column expressions
(`instructue_spark.render`); nothing is ever formatted row by row in Python.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from instructue_feast.errors import ConfigError

MISSING_TEXT = "unknown"
"""What a null renders to."""

_FIELD = re.compile(r"\{([^{}]*)\}")
_FILTERS = ("lower", "bucket:1,2,5")


@dataclass(frozen=True, slots=True)
class Field:
    """One column in a template.

    Args:
        column: Column of the raw table.
        lower: Lower-case the value.
        edges: Bucket edges of a numeric column, ascending; empty for no bucketing.
    """

    column: str
    lower: bool = False
    edges: tuple[float, ...] = ()


Part = str | Field


def parse_template(template: str) -> tuple[Part, ...]:
    """Parses a template into literals and fields.

    Raises:
        ConfigError: Unbalanced braces, no field, an unknown filter, or bucket edges that do not ascend.

    Example:
        >>> parse_template("{category|lower}: {price|bucket:1,2.5}")
        (Field(column='category', lower=True, edges=()), ': ', Field(column='price', lower=False, edges=(1.0, 2.5)))
    """
    parts: list[Part] = []
    position = 0
    for match in _FIELD.finditer(template):
        _literal(template, template[position : match.start()], parts)
        parts.append(_field(template, match.group(1)))
        position = match.end()
    _literal(template, template[position:], parts)
    if not any(isinstance(part, Field) for part in parts):
        raise ConfigError(f"template {template!r} names no column", "write columns as {column}")
    return tuple(parts)


def _literal(template: str, text: str, parts: list[Part]) -> None:
    if "{" in text or "}" in text:
        raise ConfigError(f"unbalanced braces in template {template!r}", "write columns as {column}")
    if text:
        parts.append(text)


def _field(template: str, body: str) -> Field:
    column, *filters = (piece.strip() for piece in body.split("|"))
    if not column:
        raise ConfigError(f"empty column name in template {template!r}", "write columns as {column}")
    lower = False
    edges: tuple[float, ...] = ()
    for one in filters:
        if one == "lower":
            lower = True
        elif one.startswith("bucket:"):
            edges = _edges(template, one.removeprefix("bucket:"))
        else:
            raise ConfigError(f"unknown filter {one!r} in template {template!r}", f"use one of {list(_FILTERS)}")
    return Field(column, lower, edges)


def _edges(template: str, text: str) -> tuple[float, ...]:
    try:
        edges = tuple(float(edge) for edge in text.split(","))
    except ValueError:
        edges = ()
    if not edges or any(a >= b for a, b in itertools.pairwise(edges)) or any(e - e != 0 for e in edges):
        raise ConfigError(f"bucket edges {text!r} in template {template!r}", "give ascending numbers: bucket:1,2,5")
    return edges


def bucket_labels(edges: tuple[float, ...]) -> tuple[str, ...]:
    """Labels of the `len(edges) + 1` buckets; bucket `i` holds `edges[i-1] <= value < edges[i]`.

    >>> bucket_labels((1.0, 2.5))
    ('under 1', '1-2.5', '2.5+')
    """
    names = [f"{edge:g}" for edge in edges]
    middle = [f"{low}-{high}" for low, high in itertools.pairwise(names)]
    return (f"under {names[0]}", *middle, f"{names[-1]}+")
