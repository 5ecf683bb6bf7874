"""What `explain` found, for people: buckets in words, rows of a table, and a picture that instructions share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from instructue_feast.cli.pictures import figure_class
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from instructue_feast.evaluation.extracts import Phrasebook
    from instructue_feast.history.pack import PackedHistory
    from instructue_feast.inference.explain import Attribution

_TEXT_SHOWN = 48
"""Characters of an event text beside its bar."""


def event_rows(
    source_names: Sequence[str], history: PackedHistory, book: Phrasebook, found: Attribution, top: int
) -> list[dict[str, Any]]:
    """The texts of one user that move the embedding most, either way, in words.

    Args:
        source_names: The project's sources.
        history: Packed history of the user alone.
        book: Where its texts are.
        found: The user's attribution.
        top: How many texts.

    Returns:
        `text`, `source`, `times`, `last_seen`, `score` and `focus` of each, the largest score in size first.

    Raises:
        DataError: A text is not in the phrasebook.
    """
    texts = [book.texts[row] for row in book.rows(found.text_ids)]
    order = sorted(range(len(texts)), key=lambda place: -abs(float(found.scores[place])))[:top]
    return [
        {
            "text": texts[place],
            "source": source_names[history.source_index[place]],
            "times": count_words(int(history.count_bucket[place])),
            "last_seen": age_words(int(history.age_bucket[place])),
            "score": float(found.scores[place]),
            "focus": float(found.focus_weights[place]),
        }
        for place in order
    ]


def count_words(bucket: int) -> str:
    """A count bucket in words.

    >>> [count_words(bucket) for bucket in (0, 2, 11)]
    ['1', '3-4', '1000+']
    """
    return _range((1, *COUNT_EDGES), bucket)


def age_words(bucket: int) -> str:
    """An age bucket in words.

    >>> [age_words(bucket) for bucket in (0, 1, 4, 14)]
    ['today', '1 day ago', '5-6 days ago', '365+ days ago']
    """
    if bucket == 0:
        return "today"
    words = _range((0, *AGE_EDGES_DAYS), bucket)
    return f"{words} {'day' if words == '1' else 'days'} ago"


def _range(edges: tuple[int, ...], bucket: int) -> str:
    first = edges[bucket]
    if bucket + 1 == len(edges):
        return f"{first}+"
    last = edges[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"


def events_figure(rows: Mapping[str, list[dict[str, Any]]], answer: str = "") -> Figure:
    """Bars of scores, one panel per instruction.

    Args:
        rows: `event_rows` by instruction.
        answer: The answer the scores speak for, if one was named.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    height = max(2.5, 0.4 * max(map(len, rows.values()), default=1) + 1.2)
    figure = figure_class()(figsize=(7.5 * len(rows), height), layout="constrained")
    for axis, (name, own) in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows.items(), strict=True):
        scores = [row["score"] for row in own][::-1]
        colours = ["#2166ac" if score >= 0 else "#b2182b" for score in scores]
        axis.barh(range(len(own)), scores, color=colours)
        labels = [f"{row['text'][:_TEXT_SHOWN]} ({row['source']}, {row['times']}x)" for row in own][::-1]
        # Words of users and shops, not formulas: between two dollar signs matplotlib would read mathematics.
        axis.set_yticks(range(len(own)), labels, fontsize=9, parse_math=False)
        axis.axvline(0, color="#555555", linewidth=0.8)
        axis.set_title(name, parse_math=False)
        axis.locator_params(axis="x", nbins=5)
        label = f"score towards {answer!r}" if answer else "score: what leaving it out takes back"
        axis.set_xlabel(label, parse_math=False)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    return figure
