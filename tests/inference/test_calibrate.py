"""A calibration measures what a backfill does, on users that are like the real ones."""

from __future__ import annotations

import numpy as np

from instructue_feast.inference.calibrate import measure_model, random_history, random_table
from instructue_feast.inference.embedder import UserEmbedder
from tests.model_data import INSTRUCTIONS, NUMERIC, SOURCES, make_history, make_model

HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (12, 0, 1)] * 8)


def test_every_rate_is_measured(tiny):
    rates = measure_model(
        make_model(*tiny), HISTORY, ["grocery item 1", "app 3"], INSTRUCTIONS[:3], workers=1, seconds=0.2
    )
    assert rates.prefix_tokens == make_model(*tiny).prefix_lengths(HISTORY).mean()
    for one in (rates.embed_seconds, rates.write_seconds, rates.run_bytes):
        assert 0 < one.at(1) <= one.at(8)
    assert min(rates.load_seconds, rates.encode_seconds) > 0
    assert 16 * 4 * 0.8 < rates.run_bytes.slope < 16 * 4 * 1.5  # random vectors of 16 numbers barely compress


def test_a_random_table_serves_the_users_it_was_made_for(tiny):
    model = make_model(*tiny)
    vectors = UserEmbedder(model, random_table(model, HISTORY)).encode(HISTORY, INSTRUCTIONS[:2])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-4)


def test_made_up_users_have_as_many_texts_as_asked_for(tiny):
    history = random_history([10, 4, 2], len(NUMERIC), users=400)
    assert abs(history.num_tokens.mean() - 16) < 1
    assert len(SOURCES) == history.num_events.shape[1]
    model = make_model(*tiny)
    UserEmbedder(model, random_table(model, history)).encode(history.take(range(5)), INSTRUCTIONS[:1])
