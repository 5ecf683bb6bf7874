from __future__ import annotations

import dataclasses
from datetime import UTC, datetime

import numpy as np
import pytest

from instructue_feast.config import load_config
from instructue_feast.datasets.project import write_project
from instructue_feast.errors import ConfigError, DataError
from instructue_feast.evaluation import journey_tasks as module
from instructue_feast.evaluation.journey import read_journey
from instructue_feast.evaluation.journey_features import compressed, hand_features
from instructue_feast.evaluation.journey_tasks import BAR_CATEGORIES, CUT, END, benchmark_users, journey_tasks
from instructue_feast.evaluation.tasks import FAMILIES
from instructue_feast.user_qa.questions import is_held_out
from tests.evaluation.small import DAY, random_journey

START, STOP = int(CUT.timestamp()), int(END.timestamp())
USERS = 240


@pytest.fixture(scope="module")
def journey():
    return random_journey(USERS, seed=1, lines=14)


@pytest.fixture(scope="module")
def found(journey):
    return journey_tasks(journey)


def label_of(found, name):
    row = [task.name for task in found.tasks].index(name)
    return dict(zip(found.user_ids, found.labels[row].tolist(), strict=True))


def rows_of(journey, user):
    """Purchases of a user as plain tuples: time, basket, amount, category."""
    lines, number = journey.lines, journey.user_ids.index(user)
    columns = (lines.time_E, lines["basket_id"], lines["sales_value"], lines["product_category"])
    return [tuple(column[row] for column in columns) for row in np.flatnonzero(lines.user_E == number)]


def replace_lines(journey, keep, **extra):
    """The journey with some purchase lines only, or with other values in them."""
    lines = journey.lines.where(keep)
    return dataclasses.replace(
        journey, lines=dataclasses.replace(lines, columns={**lines.columns, **{k: v[keep] for k, v in extra.items()}})
    )


def test_labels_are_what_plain_python_counts(journey, found):
    first_time = {basket: min(t for t, b, *_ in rows_of(journey, user) if b == basket)
                  for user in found.user_ids for _, basket, *_ in rows_of(journey, user)}  # fmt: skip
    quarter = STOP - START
    assert quarter == 92 * DAY
    for user in found.user_ids:
        rows = rows_of(journey, user)
        assert len({basket for t, basket, *_ in rows if first_time[basket] < START}) >= 3
        after = [row for row in rows if START <= row[0] < STOP]
        before = [row for row in rows if START - quarter <= row[0] < START]
        spent, spent_before = sum(row[2] for row in after), sum(row[2] for row in before)
        for days, name in ((30, "inactive_30d"), (14, "inactive_14d")):
            seen = any(START <= row[0] < START + days * DAY for row in after)
            assert label_of(found, name)[user] == (not seen), name
        assert label_of(found, "spend_down_30")[user] == (spent < 0.7 * spent_before)
        assert label_of(found, "buys_vitamins")[user] == any(row[3] == "VITAMINS" for row in after)
        assert label_of(found, "buys_dog_foods")[user] == any(row[3] == "DOG FOODS" for row in after)


def test_coupon_labels_are_what_plain_python_counts(journey, found):
    coupons = journey.redeemed
    for user in found.user_ids:
        own = [
            coupons["campaign_type"][row]
            for row in np.flatnonzero(coupons.user_E == journey.user_ids.index(user))
            if START <= coupons.time_E[row] < STOP
        ]
        assert label_of(found, "redeems_coupon_q4")[user] == bool(own)
        assert label_of(found, "responds_type_a")[user] == ("Type A" in own)


def test_a_third_of_the_households_is_in_the_top_third(found):
    for name in ("high_spend", "large_baskets"):
        assert np.mean(list(label_of(found, name).values())) == pytest.approx(1 / 3, abs=0.01)


def test_nothing_after_the_end_and_nothing_older_than_a_quarter_changes_a_label(journey, found):
    time = journey.lines.time_E
    # Only the amounts and categories of old lines: their baskets decide who takes part.
    old, late = time < START - 92 * DAY, time >= STOP
    changed = replace_lines(
        journey,
        ~late,
        sales_value=np.where(old, 999.0, journey.lines["sales_value"]),
        product_category=np.where(old, "VITAMINS", journey.lines["product_category"]),
    )
    again = journey_tasks(changed)
    assert again.user_ids == found.user_ids
    assert again.tasks == found.tasks
    assert np.array_equal(again.labels, found.labels)


def test_the_quarter_before_matters_only_to_what_compares_with_it(journey, found):
    before = (journey.lines.time_E >= START - 92 * DAY) & (journey.lines.time_E < START)
    changed = journey_tasks(
        replace_lines(
            journey,
            np.ones(len(before), bool),
            sales_value=np.where(before, 1.5, 1.0) * journey.lines["sales_value"],
            product_category=np.where(before, "VITAMINS", journey.lines["product_category"]),
        )
    )
    different = {task.name for task in found.tasks if label_of(found, task.name) != label_of(changed, task.name)}
    assert different == {"spend_down_30"}


def test_hand_features_know_nothing_at_or_after_the_cut(journey):
    users = benchmark_users(journey, CUT)
    past = journey.take(users).between(0, START)
    before = hand_features(past, START)
    late = journey.lines.time_E >= START
    changed = replace_lines(
        journey,
        np.ones(len(late), bool),
        sales_value=np.where(late, 999.0, journey.lines["sales_value"]),
        product_category=np.where(late, "NEW THINGS", journey.lines["product_category"]),
        brand=np.where(late, "Private", journey.lines["brand"]),
    )
    changed = dataclasses.replace(
        changed, redeemed=journey.redeemed.between(0, START), promoted=journey.promoted.between(0, START)
    )
    after = hand_features(changed.take(users).between(0, START), START)
    assert after.names == before.names
    np.testing.assert_array_equal(after.values, before.values)
    np.testing.assert_array_equal(after.recency_counts, before.recency_counts)


def test_hand_features_say_what_happened(journey):
    users = benchmark_users(journey, CUT)
    past = journey.take(users).between(0, START)
    features = hand_features(past, START)
    for position in range(0, len(users), 17):
        rows = [row for row in rows_of(journey, past.user_ids[position]) if row[0] < START]
        recent = [row for row in rows if row[0] >= START - 30 * DAY]
        own = {name: float(features.values[position, at]) for at, name in enumerate(features.names)}
        assert own["spend_total"] == pytest.approx(sum(row[2] for row in rows), rel=1e-5)
        assert own["spend_30d"] == pytest.approx(sum(row[2] for row in recent), rel=1e-5)
        assert own["baskets_total"] == len({row[1] for row in rows})
        assert own["lines GRAPES"] == sum(row[3] == "GRAPES" for row in rows)
        assert own["spend MILK"] == pytest.approx(sum(row[2] for row in rows if row[3] == "MILK"), rel=1e-5)
        newest_basket = max(min(t for t, b, *_ in rows if b == basket) for _, basket, *_ in rows)
        assert own["recency_days"] == pytest.approx((START - newest_basket) / DAY, rel=1e-4)
    assert len(features.names) == features.values.shape[1] == len(set(features.names))
    assert features.counts.sum() == (past.lines["product_category"] != None).sum()  # noqa: E711


def test_compressing_keeps_sign_and_order():
    values = np.array([[-100.0, -1.0, 0.0, 1.0, 1e6]], np.float32)
    assert (np.diff(compressed(values)) > 0).all()
    np.testing.assert_allclose(compressed(values), -compressed(-values))


def test_only_households_with_three_baskets_before_the_cut_take_part(journey, found):
    assert journey.user_ids[-1] not in found.user_ids  # never bought anything
    assert list(found.user_ids) == [journey.user_ids[user] for user in benchmark_users(journey, CUT)]
    with pytest.raises(DataError, match="no household has 3 baskets"):
        journey_tasks(journey.between(START, STOP))
    with pytest.raises(DataError, match=r"none of \d+ tasks has 40 positives and negatives among 20 users"):
        journey_tasks(journey.take(np.arange(20)))


def test_held_out_categories_are_chosen_by_hash_rate_and_name(journey, found, monkeypatch):
    names = [task.subject for task in found.tasks if task.family == "recommendation"]
    extra = names[len([name for name in names if name in BAR_CATEGORIES]) :]
    assert extra == sorted(extra)
    assert all(is_held_out(name) for name in extra)
    assert "milk" not in names  # neither in the bar nor held out
    monkeypatch.setattr(module, "HELD_OUT_RATES", (0.999, 1.0))
    fewer = [task.subject for task in journey_tasks(journey).tasks if task.family == "recommendation"]
    assert not set(extra) & set(fewer)


def test_a_task_is_unseen_when_its_subject_is_kept_out_of_training(found):
    unseen = {task.name: task.unseen for task in found.tasks}
    assert unseen["buys_vitamins"]
    assert not unseen["buys_dog_foods"]


def test_only_held_out_categories_count_as_unseen_in_the_project_that_comes_with_the_data(journey, tmp_path):
    tasks = journey_tasks(journey, load_config(write_project(tmp_path, "complete_journey"))).tasks
    unseen = {task.name for task in tasks if task.unseen}
    assert unseen == {task.name for task in tasks if task.family == "recommendation" and is_held_out(task.subject)}
    assert "buys_vitamins" in unseen
    families = {task.question_id for task in tasks if ":" not in task.question_id and is_held_out(task.question_id)}
    assert families == {"spend_level", "discount_share_ahead"}  # kept out of training, but near twins of theirs are not


def test_tasks_are_asked_in_the_words_of_the_projects_questions(journey, tmp_path):
    file = tmp_path / "instructue.yaml"
    file.write_text(
        "project: p\n"
        "sources:\n  bill: {table: {path: raw}, user_id: u, time: t, text: '{a}'}\n"
        "instructions:\n  - {id: churn, text: Will they leave}\n"
        "output: {path: out}\n"
        "user_qa:\n  questions:\n"
        "    - {id: buys, kind: occurs, source: bill, subject: a, days: 60,\n"
        "       yes: 'Yes, {subject}.', no: 'No, {subject}.',\n"
        "       wordings: ['Is {subject} bought in {days} days?'], held_out_wordings: ['{days} days of {subject}?']}\n"
        "    - {id: spend_level, kind: amount, source: bill, measure: sum, column: s, days: 90,\n"
        "       levels: [Little., Some., Much.]}\n"
    )
    tasks = {task.name: task for task in journey_tasks(journey, load_config(file)).tasks}
    grapes = tasks["buys_grapes"]
    assert grapes.instruction == "Is grapes bought in 90 days?"  # the task's own window, not the question's
    assert grapes.paraphrase == "90 days of grapes?"
    assert grapes.answers == ("Yes, grapes.", "No, grapes.")
    assert tasks["high_spend"].answers == ("Much.", "Some.", "Little.")
    assert is_held_out("spend_level")  # a hash keeps the whole family out of training, but it has trained twins
    assert not tasks["high_spend"].unseen
    assert tasks["buys_vitamins"].unseen
    assert tasks["inactive_30d"].instruction == "Will this shopper stay away from the stores for the next 30 days?"


def test_every_task_has_what_a_row_needs(found):
    assert {task.family for task in found.tasks} == set(FAMILIES)
    assert len({task.name for task in found.tasks}) == len(found.tasks) >= 12
    assert len({task.instruction for task in found.tasks}) == len(found.tasks)
    for task in found.tasks:
        assert task.instruction != task.paraphrase != ""
        assert len(set(task.answers)) >= 2
    with pytest.raises(ConfigError, match="buys_dog_foods"):
        found.select(["buys_dog_food"])
    assert [task.name for task in found.select(["high_spend", "inactive_14d"]).tasks] == ["inactive_14d", "high_spend"]


def test_windows_are_half_open(journey):
    part = journey.between(START, STOP)
    assert part.lines.time_E.min() == START  # there are events on every edge
    assert part.lines.time_E.max() == STOP - 1
    assert datetime.fromtimestamp(START, UTC) == CUT


def test_another_project_is_refused(tmp_path):
    file = tmp_path / "instructue.yaml"
    file.write_text(
        "project: other\n"
        "sources:\n  bill: {table: {path: raw}, user_id: u, time: t, text: '{a}'}\n"
        "instructions:\n  - {id: churn, text: Will they leave}\n"
        "output: {path: out}\n"
    )
    with pytest.raises(ConfigError, match="project other has no spm"):
        read_journey(load_config(file))
