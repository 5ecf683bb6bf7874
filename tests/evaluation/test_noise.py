from __future__ import annotations

import itertools

import numpy as np
import pytest

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError
from instructue_feast.evaluation.noise import IRRELEVANT_TEXTS, add_noise, irrelevant_phrasebook
from tests.evaluation.small import small_book, small_config, small_history


@pytest.fixture
def config(tmp_path):
    return load_config(small_config(tmp_path, "x", "y"))


def tokens_of(history, user, keep):
    span = range(history.offsets[user], history.offsets[user + 1])
    names = ("source_index", "text_id", "count_bucket", "age_bucket")
    return [
        tuple(int(getattr(history, name)[token]) for name in names) for token in span if keep(history.text_id[token])
    ]


@pytest.mark.parametrize("level", [0.5, 1.0, 3.0])
def test_every_real_token_stays_in_its_order_and_noise_comes_in_proportion(config, level):
    history = small_history(40, seed=2)
    noisy, book = add_noise(history, config, level)
    added = set(book.text_ids.tolist())
    for user in range(len(history)):
        real = tokens_of(history, user, lambda _: True)
        assert tokens_of(noisy, user, lambda text: int(text) not in added) == real
        noise = tokens_of(noisy, user, lambda text: int(text) in added)
        for source in (0, 1):
            expected = round(level * sum(token[0] == source for token in real))
            assert sum(token[0] == source for token in noise) == expected
        assert all(token[0] != 2 for token in noise)  # nothing is added to a snapshot
        assert len(set(noise)) == len(noise)


def test_noisy_histories_are_valid_histories(config):
    noisy, _ = add_noise(small_history(30, seed=3), config, 1.0)
    for start, end in itertools.pairwise(noisy.offsets):
        source, age = noisy.source_index[start:end], noisy.age_bucket[start:end]
        assert (np.diff(source) >= 0).all()
        for index in range(2):
            assert (np.diff(age[source == index]) <= 0).all()  # oldest first
    assert noisy.offsets[-1] == len(noisy.text_id)


def test_noise_depends_on_its_seed_alone(config):
    history = small_history(10)
    first, again, other = (add_noise(history, config, 1.0, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first.text_id, again.text_id)
    assert not np.array_equal(first.text_id, other.text_id)


def test_users_differ_in_their_noise_and_a_user_without_events_gets_none(config):
    history = small_history(12, seed=4)
    noisy, book = add_noise(history, config, 1.0)
    added = set(book.text_ids.tolist())
    own = [frozenset(text for _, text, *_ in tokens_of(noisy, user, lambda t: int(t) in added)) for user in range(12)]
    assert len(set(own)) == 12
    empty = small_history(12).take([]).take([])
    assert len(add_noise(empty, config, 1.0)[0]) == 0


def test_no_irrelevant_text_stands_twice_or_is_a_real_one(config):
    book = irrelevant_phrasebook(config)
    assert len(set(IRRELEVANT_TEXTS)) == len(IRRELEVANT_TEXTS) == 600
    assert len(book.texts) == 600 * 2  # once per event source
    assert not set(book.text_ids.tolist()) & set(small_book().text_ids.tolist())
    both = small_book().with_texts(book.text_ids, book.source_index, book.texts)
    assert (np.diff(both.text_ids) > 0).all()
    for ids, texts in ((book.text_ids, book.texts), (small_book().text_ids, small_book().texts)):
        assert [both.texts[row] for row in both.rows(ids)] == list(texts)


def test_a_level_of_nothing_is_refused(config):
    with pytest.raises(ConfigError, match="noise level"):
        add_noise(small_history(3), config, 0.0)
