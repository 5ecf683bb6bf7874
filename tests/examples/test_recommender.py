"""The worked recommender: its metrics, that its features know no future, and that its rankers learn what is there."""

import dataclasses
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow.parquet as pq
import pytest

from instructue_feast.evaluation.journey import Events, Journey, seconds

FOLDER = Path(__file__).parents[2] / "examples" / "recommender"
NOW = datetime(2017, 11, 30, tzinfo=UTC)
CATEGORIES = ("BREAD", "CHEESE", "SOAP")


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    """`run.py`, imported as Python does when the script is started."""
    sys.path.insert(0, str(FOLDER))
    import run

    yield run
    sys.path.remove(str(FOLDER))
    for name in ("run", "ranker", "feature_tables"):
        sys.modules.pop(name)


def journey(days_before: list[int], users: int = 4) -> Journey:
    """Everybody buys something, so and so many days before NOW."""
    rng = np.random.default_rng(0)
    rows = len(days_before)
    time_E = np.array([seconds(NOW - timedelta(days=day)) for day in days_before])
    of_lines = {
        "product_category": np.array(rng.choice(CATEGORIES, rows), dtype=object),
        "brand": np.array(["Private"] * rows, dtype=object),
        "basket_id": np.arange(rows),
        **{name: np.ones(rows) for name in ("sales_value", "retail_disc", "coupon_disc", "coupon_match_disc")},
    }
    lines = Events(np.arange(rows) % users, time_E, of_lines)
    none = Events(np.zeros(0, np.int64), np.zeros(0, np.int64), {})
    words = np.zeros(0, dtype=object)

    def empty(*names: str) -> Events:
        return dataclasses.replace(none, columns=dict.fromkeys(names, words))

    profile = empty(
        "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count"
    )
    received = dataclasses.replace(empty("campaign_type"), columns={"campaign_type": words, "ends_at": none.time_E})
    return Journey(
        user_ids=tuple(str(one) for one in range(users)),
        lines=lines,
        promoted=empty("product_category"),
        received=received,
        redeemed=empty("campaign_type", "product_category"),
        profile=profile,
    )


def test_features_of_a_moment_know_nothing_after_it(example: ModuleType, tmp_path: Path) -> None:
    past = list(range(1, 80))
    for name, days in (("past", past), ("both", past + list(range(-30, 1)))):
        example.feature_tables.write_tables(tmp_path / name, journey(days), CATEGORIES, [NOW])
    for table in ("household_stats.parquet", "category_stats.parquet"):
        assert pq.read_table(tmp_path / "past" / table).equals(pq.read_table(tmp_path / "both" / table))


def test_labels_are_the_days_from_the_moment_on(example: ModuleType) -> None:
    bought = example.feature_tables.bought
    assert not bought(journey([1, 2, 3]), CATEGORIES, NOW, 30).any()
    assert bought(journey([0, -29, -30]), CATEGORIES, NOW, 30).sum() == 2


def test_candidates_are_chosen_from_the_past_of_the_first_moment(example: ModuleType) -> None:
    assert set(example.feature_tables.candidates(journey(list(range(1, 60))), NOW)) == set(CATEGORIES)
    assert example.feature_tables.candidates(journey([-1, -2]), NOW) == ()


def test_ndcg_and_recall_equal_their_definition(example: ModuleType) -> None:
    rng = np.random.default_rng(1)
    score, label = rng.normal(size=(30, 25)).astype(np.float32), rng.random((30, 25)) < 0.2
    label[0] = False
    found_ndcg, found_recall = example.ranker.ndcg(score, label), example.ranker.recall(score, label)
    assert np.isnan(found_ndcg[0])
    assert np.isnan(found_recall[0])
    for user in range(1, 30):
        order = sorted(range(25), key=lambda item: -score[user, item])[:10]
        gain = sum(1 / np.log2(place + 2) for place, item in enumerate(order) if label[user, item])
        best = sum(1 / np.log2(place + 2) for place in range(min(10, label[user].sum())))
        assert found_ndcg[user] == pytest.approx(gain / best, rel=1e-5)
        assert found_recall[user] == pytest.approx(label[user, order].sum() / min(10, label[user].sum()))


def test_new_categories_are_ranked_among_themselves(example: ModuleType) -> None:
    score, label = np.array([[3.0, 2.0, 1.0]], np.float32), np.array([[True, False, True]])
    among = np.array([[False, True, True]])
    assert example.ranker.ndcg(score, label, among)[0] == pytest.approx(1 / np.log2(3))


def test_rankers_gain_by_embeddings_that_know_more_and_not_by_noise(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example.ranker, "EPOCHS", 40)
    rng = np.random.default_rng(2)
    items, users, size = 20, 240, 8
    item = rng.normal(size=(items, size)).astype(np.float32)
    taste = rng.normal(size=(users, size)).astype(np.float32)
    labels = [rng.random((users, items)) < 1 / (1 + np.exp(2 - taste @ item.T)) for _ in range(3)]

    def moment(vector: np.ndarray) -> object:
        popular = np.broadcast_to(rng.normal(size=(1, items)), (users, items)).astype(np.float32)
        columns = {"lines_90d_by_category": np.zeros((users, items), np.float32), "buyers_30d": popular}
        return example.Moment(
            columns=columns,
            hand_UX=rng.normal(size=(users, 3)).astype(np.float32),
            stats_CS=popular[0, :, None],
            vector_UKD=np.repeat(vector[:, None], 3, axis=1),
            item_CD=item - item.mean(0),
        )

    gains = {}
    for name, vector in (("knows", taste), ("noise", rng.normal(size=taste.shape).astype(np.float32))):
        moments = [moment(vector) for _ in range(3)]
        scores, _, _ = example.fit_and_score(moments, labels, 0)
        gains[name] = np.nanmean(example.ranker.ndcg(scores["all"], labels[-1])) - np.nanmean(
            example.ranker.ndcg(scores["hand"], labels[-1])
        )
    assert gains["knows"] > 0.1
    assert gains["noise"] < 0.05


def test_auc_is_a_mean_over_categories_with_enough_buyers(example: ModuleType) -> None:
    label = np.zeros((60, 3), bool)
    label[:30, 0], label[::2, 1], label[:5, 2] = True, True, True
    score = np.column_stack([label[:, 0], np.zeros(60), label[:, 2]]).astype(np.float32)
    assert example.ranker.auc(score, label) == pytest.approx((1.0 + 0.5) / 2)  # the last has five buyers
    assert np.isnan(example.ranker.auc(score, label, np.zeros_like(label)))
