"""Irrelevant events, added to packed histories: what a log of everything would bring along.

A grocery shopper's history gets events about weather apps and train tickets, in the same sources, as often and as
recent as the real ones. A model that follows its instruction should not care.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import ConfigError
from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.history.pack import PackedHistory
from instructue_feast.history.render import normalise, text_id

# T = tokens of all users, A = added tokens, N = both

LEVELS = (0.5, 1.0)
"""Irrelevant texts per real text of an event source."""

_ACTIONS = (
    "opened the {} app", "page view: {}", "read an article about {}", "tapped a banner for {}", "watched a clip on {}",
    "joined a group about {}", "muted notifications of {}", "rated a {} service", "shared a link on {}",
    "searched for {}", "left the {} page", "compared offers for {}", "asked a question about {}", "followed {} news",
    "downloaded a guide to {}", "set an alert for {}", "saved {} for later", "paid for {} online",
    "scrolled past an advert for {}", "opened a message about {}",
)  # fmt: skip
_TOPICS = (
    "weather", "train tickets", "football scores", "city maps", "online banking", "horoscopes", "chess puzzles",
    "job offers", "used cars", "language lessons", "photo filters", "mobile plans", "stock quotes", "dating",
    "podcasts", "home insurance", "concert tickets", "tax returns", "video calls", "air travel", "apartment rents",
    "yoga classes", "electric scooters", "crossword puzzles", "bicycle repair", "chess lessons", "ski resorts",
    "guitar tabs", "museum tours", "video games",
)  # fmt: skip
IRRELEVANT_TEXTS = tuple(normalise(action.format(topic)) for action, topic in itertools.product(_ACTIONS, _TOPICS))
"""600 made-up texts, none about groceries: many more than a source keeps, so that users differ in their noise."""


def add_noise(
    history: PackedHistory, config: InstructueConfig, level: float, *, seed: int = 0
) -> tuple[PackedHistory, Phrasebook]:
    """Adds irrelevant texts to every event source of every user; nothing real is dropped for them.

    Args:
        history: U users.
        config: The project the history belongs to.
        level: Added texts per real text and source, rounded; at most one of each irrelevant text.
        seed: Which texts, counts and ages.

    Returns:
        The noisy histories, and the irrelevant texts.

    Raises:
        ConfigError: The level is not above 0.
    """
    if not level > 0:
        raise ConfigError(f"a noise level of {level}", "choose one above 0, such as 0.5")
    rng = np.random.default_rng(seed)
    book = irrelevant_phrasebook(config)
    ids_of = {source: book.text_ids[book.source_index == source] for source in range(len(config.source_names))}
    user_T = np.repeat(np.arange(len(history)), history.num_tokens)
    parts: list[tuple[int, int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for user in range(len(history)):
        tokens = np.arange(history.offsets[user], history.offsets[user + 1])
        for source in np.unique(history.source_index[tokens]).tolist():
            own = tokens[history.source_index[tokens] == source]
            pool = ids_of[source]
            size = min(len(pool), round(level * len(own)))
            if size:
                like = rng.choice(own, size)  # count and age of a real event, so noise is as frequent and as recent
                parts.append((user, source, rng.choice(pool, size, replace=False), like))
    if not parts:
        return history, book
    sizes = [len(like) for *_, like in parts]
    user_A = np.repeat([user for user, *_ in parts], sizes).astype(np.int64)
    source_A = np.repeat([source for _, source, *_ in parts], sizes).astype(np.int32)
    text_A = np.concatenate([ids for _, _, ids, _ in parts])
    like_A = np.concatenate([like for *_, like in parts])
    user_N = np.concatenate([user_T, user_A])
    source_N = np.concatenate([history.source_index, source_A])
    count_N = np.concatenate([history.count_bucket, history.count_bucket[like_A]])
    age_N = np.concatenate([history.age_bucket, history.age_bucket[like_A]])
    # Within a source from old to new; inside an age bucket noise lands anywhere, and real events keep their order.
    order = np.lexsort((rng.random(len(user_N)), -age_N, source_N, user_N))
    order[order < len(user_T)] = np.arange(len(user_T))
    num_events = history.num_events.copy()
    np.add.at(num_events, (user_A, source_A), 1)
    noisy = dataclasses.replace(
        history,
        offsets=np.concatenate([[0], np.cumsum(np.bincount(user_N, minlength=len(history)))]).astype(np.int64),
        source_index=source_N[order],
        text_id=np.concatenate([history.text_id, text_A])[order],
        count_bucket=count_N[order],
        age_bucket=age_N[order],
        num_events=num_events,
    )
    return noisy, book


def irrelevant_phrasebook(config: InstructueConfig) -> Phrasebook:
    """The irrelevant texts, once per event source."""
    rows = sorted(
        (text_id(name, text), source, text)
        for source, name in enumerate(config.source_names)
        if name in config.event_sources
        for text in IRRELEVANT_TEXTS
    )
    ids, sources, texts = zip(*rows, strict=True)
    return Phrasebook(np.array(ids, np.int64), np.array(sources, np.int32), tuple(texts))
