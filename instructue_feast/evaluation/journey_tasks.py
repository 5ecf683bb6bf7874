"""The tasks on The Complete Journey: what households did from 2017-10-01 to the end of the year.

Labels come from the raw tables alone. Which tasks there are was fixed by rule before any score was seen: the nine tasks
of the project's bar, questions a shop would ask about the same quarter, and the first categories by name among those
that a hash keeps out of training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from instructue_feast.config import InstructueConfig
from instructue_feast.errors import DataError
from instructue_feast.evaluation.journey import Events, Journey, seconds
from instructue_feast.evaluation.question_words import Positive, in_words_of
from instructue_feast.evaluation.tasks import LabelledTasks, Task, labelled, task_name
from instructue_feast.user_qa.questions import is_held_out, subject_text

# U = users

CUT = datetime(2017, 10, 1, tzinfo=UTC)
END = datetime(2018, 1, 1, tzinfo=UTC)
MIN_BASKETS = 3
"""Households with fewer baskets before the cut are nobody's benchmark: 2,358 of 2,469 remain."""

BAR_CATEGORIES = (
    "diapers & disposables", "dog foods", "cat food", "baby foods", "vitamins", "candy - packaged",
)  # fmt: skip
NUM_HELD_OUT = 6
"""Held-out categories besides those of the bar."""
HELD_OUT_RATES = (0.05, 0.55)
"""Bounds on the share of households that buy a held-out category."""

_DAY = 86_400
_QUARTER_DAYS = 92

Label = npt.NDArray[np.bool_]
Rule = Callable[["Window"], Label]


@dataclass(frozen=True, slots=True)
class Window:
    """What households did in the quarter before the cut and in the one after it."""

    before: Journey
    after: Journey
    cut: int

    def first_days(self, days: int) -> Journey:
        """The first days after the cut."""
        return self.after.between(self.cut, self.cut + days * _DAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Spec:
    """A task that is not about a category.

    `question` is the family of the UserQA question that asks the same, `subject` what it is about if it has one, and
    `positive` which of that question's answers means positive. Wordings and answers stand in for those of the project.
    """

    name: str
    family: str
    instruction: str
    paraphrase: str
    answers: tuple[str, ...]
    rule: Rule
    question: str
    subject: str = ""
    positive: Positive = "first"
    days: int = 90


def journey_tasks(
    journey: Journey, config: InstructueConfig | None = None, *, cut: datetime = CUT, end: datetime = END
) -> LabelledTasks:
    """All tasks with their labels.

    Args:
        journey: All tables, all users.
        config: The project; its `user_qa:` section words the questions that it asks.
        cut: The as_of.
        end: Exclusive end of what is known.

    Returns:
        The tasks over the households with `MIN_BASKETS` baskets before the cut, ascending by household number.

    Raises:
        DataError: No household has that many baskets, or no task has enough positives.
    """
    users = benchmark_users(journey, cut)
    if not len(users):
        raise DataError(
            f"no household has {MIN_BASKETS} baskets before {cut:%Y-%m-%d}", "write the data set with more households"
        )
    chosen = journey.take(users)
    start, stop = seconds(cut), seconds(end)
    window = Window(chosen.between(start - _QUARTER_DAYS * _DAY, start), chosen.between(start, stop), start)
    tasks: dict[Task, Label] = {}
    for spec in _SPECS:
        task = Task(
            name=spec.name,
            family=spec.family,
            subject=spec.subject or spec.question,
            instruction=spec.instruction,
            paraphrase=spec.paraphrase,
            answers=spec.answers,
            question_id=f"{spec.question}:{spec.subject}" if spec.subject else spec.question,
        )
        tasks[in_words_of(task, config, spec.positive, spec.days)] = spec.rule(window)
    bought = _buyers(window.after)
    for subject in [*BAR_CATEGORIES, *_held_out_categories(bought)]:
        tasks[in_words_of(_category_task(subject), config, days=90)] = bought.get(subject, np.zeros(len(users), bool))
    return labelled(tasks, chosen.user_ids)


def benchmark_users(journey: Journey, cut: datetime) -> npt.NDArray[np.int64]:
    """Positions of the households with `MIN_BASKETS` baskets before the cut."""
    baskets = journey.baskets
    early = baskets.user_E[baskets.time_E < seconds(cut)]
    return np.flatnonzero(np.bincount(early, minlength=journey.num_users) >= MIN_BASKETS)


def _category_task(subject: str) -> Task:
    return Task(
        name=task_name("buys", subject),
        family="recommendation",
        subject=subject,
        instruction=f"Will this shopper buy {subject} in the next 90 days?",
        paraphrase=f"Is {subject} something this household is going to put in the basket within 90 days?",
        answers=(f"Yes, this shopper buys {subject}.", f"No, this shopper does not buy {subject}."),
        question_id=f"buys:{subject}",
        unseen=is_held_out(subject),
    )


def _buyers(after: Journey) -> Mapping[str, Label]:
    """Who bought each category, by its name in lower case."""
    words = after.lines["product_category"].tolist()
    subjects = {word: subject_text(word) for word in set(words) if word is not None}
    names = sorted(set(subjects.values()))
    row = {word: names.index(subject) for word, subject in subjects.items()}
    code_E = np.array([row.get(word, len(names)) for word in words], np.int64)
    table = np.zeros((len(names) + 1, after.num_users), bool)
    table[code_E, after.lines.user_E] = True
    return {name: table[number] for number, name in enumerate(names)}


def _held_out_categories(bought: Mapping[str, Label]) -> list[str]:
    low, high = HELD_OUT_RATES
    wanted = [name for name in sorted(bought) if is_held_out(name) and name not in BAR_CATEGORIES]
    return [name for name in wanted if low <= bought[name].mean() <= high][:NUM_HELD_OUT]


def _count(events: Events, users: int, weight: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    weights = None if weight is None else np.asarray(weight, np.float64)
    return np.bincount(events.user_E, weights, minlength=users).astype(np.float64)


def _spend(journey: Journey) -> npt.NDArray[np.float64]:
    return _count(journey.lines, journey.num_users, journey.lines["sales_value"])


def _visits(journey: Journey) -> npt.NDArray[np.float64]:
    return _count(journey.baskets, journey.num_users)


def _share(part: npt.NDArray[np.float64], whole: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """`part / whole`; 0 for a household that bought nothing."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _top_third(value_U: npt.NDArray[np.float64]) -> Label:
    return np.asarray(value_U > np.quantile(value_U, 2 / 3))


def _absent(days: int) -> Rule:
    return lambda window: _visits(window.first_days(days)) == 0


def _redeems(kind: str | None) -> Rule:
    def rule(window: Window) -> Label:
        coupons = window.after.redeemed
        own = coupons if kind is None else coupons.where(coupons["campaign_type"] == kind)
        return _count(own, window.after.num_users) > 0

    return rule


def _private_brand(window: Window) -> Label:
    lines, users = window.after.lines, window.after.num_users
    return _top_third(_share(_count(lines, users, lines["brand"] == "Private"), _count(lines, users)))


def _large_baskets(window: Window) -> Label:
    return _top_third(_share(_spend(window.after), _visits(window.after)))


def _promoted(window: Window) -> Label:
    users = window.after.num_users
    return _top_third(_share(_count(window.after.promoted, users), _count(window.after.lines, users)))


def _discounted(window: Window) -> Label:
    lines, users = window.after.lines, window.after.num_users
    saved = sum(_count(lines, users, lines[name]) for name in ("retail_disc", "coupon_disc", "coupon_match_disc"))
    return _top_third(_share(np.asarray(saved), np.asarray(saved) + _spend(window.after)))


_SPECS = (
    _Spec(
        name="inactive_30d",
        family="user_prediction",
        question="inactive",
        instruction="Will this shopper stay away from the stores for the next 30 days?",
        paraphrase="Is this a household that makes no visit at all in the coming 30 days?",
        answers=("Yes, this shopper stays away.", "No, this shopper comes back."),
        rule=_absent(30),
        days=30,
    ),
    _Spec(
        name="inactive_14d",
        family="user_prediction",
        question="inactive_14d",
        instruction="Will this shopper stay away from the stores for the next 14 days?",
        paraphrase="Is this a household that makes no visit at all in the coming 14 days?",
        answers=("Yes, this shopper stays away.", "No, this shopper comes back."),
        rule=_absent(14),
        days=14,
    ),
    _Spec(
        name="spend_down_30",
        family="user_prediction",
        question="spend_change",
        instruction="Will this shopper spend less in the next 90 days than in the last 90 days?",
        paraphrase="How will the total of this household's receipts move over the coming 90 days?",
        answers=("Spending falls.", "Spending stays about the same.", "Spending rises."),
        rule=lambda window: _spend(window.after) < 0.7 * _spend(window.before),
    ),
    _Spec(
        name="high_spend",
        family="user_prediction",
        question="spend_level",
        instruction="How much will this shopper spend in the next 90 days?",
        paraphrase="How large will the sum of this household's receipts be over the coming 90 days?",
        answers=("High spending.", "Medium spending.", "Low spending."),
        rule=lambda window: _top_third(_spend(window.after)),
        positive="last",
    ),
    _Spec(
        name="visits_up",
        family="user_prediction",
        question="visits_change",
        instruction="Will this shopper visit the stores more often in the next 90 days than in the last 90 days?",
        paraphrase="Are the store trips of this household about to become more frequent?",
        answers=("Visits rise.", "Visits stay about the same.", "Visits fall."),
        rule=lambda window: _visits(window.after) > 1.2 * _visits(window.before),
        positive="last",
    ),
    _Spec(
        name="private_brand",
        family="user_prediction",
        question="private_share_ahead",
        instruction="Will this shopper mostly buy the store's own brand in the next 90 days?",
        paraphrase="Does this household reach for private label rather than national brands?",
        answers=("Yes, this shopper buys the store's own brand.", "No, this shopper buys national brands."),
        rule=_private_brand,
        positive="last",
    ),
    _Spec(
        name="large_baskets",
        family="user_prediction",
        question="basket_size_ahead",
        instruction="How much will this shopper spend per visit in the next 90 days?",
        paraphrase="Are the receipts of this household about to be long or short ones?",
        answers=("Large baskets.", "Medium baskets.", "Small baskets."),
        rule=_large_baskets,
        positive="last",
    ),
    _Spec(
        name="redeems_coupon_q4",
        family="marketing",
        question="redeems_coupon",
        instruction="Will this shopper redeem a coupon in the next 90 days?",
        paraphrase="Is this household going to hand in any coupon at the till within 90 days?",
        answers=("Yes, this shopper redeems a coupon.", "No, this shopper redeems no coupon."),
        rule=_redeems(None),
    ),
    _Spec(
        name="responds_type_a",
        family="marketing",
        question="responds_to_campaign",
        subject="type a",
        instruction="Will this shopper respond to a type a campaign in the next 90 days?",
        paraphrase="Does a coupon from a type a campaign get used by this household within 90 days?",
        answers=("Yes, this shopper responds to a type a campaign.", "No, this shopper ignores type a campaigns."),
        rule=_redeems("Type A"),
    ),
    _Spec(
        name="responds_type_b",
        family="marketing",
        question="responds_to_campaign",
        subject="type b",
        instruction="Will this shopper respond to a type b campaign in the next 90 days?",
        paraphrase="Does a coupon from a type b campaign get used by this household within 90 days?",
        answers=("Yes, this shopper responds to a type b campaign.", "No, this shopper ignores type b campaigns."),
        rule=_redeems("Type B"),
    ),
    _Spec(
        name="buys_promoted",
        family="marketing",
        question="promoted_share_ahead",
        instruction="Will this shopper mostly buy what is on display or in the mailer in the next 90 days?",
        paraphrase="Do displays and mailers decide what this household puts in the basket?",
        answers=("Yes, this shopper buys what is promoted.", "No, this shopper ignores promotions."),
        rule=_promoted,
        positive="last",
    ),
    _Spec(
        name="deep_discount",
        family="marketing",
        question="discount_share_ahead",
        instruction="Will this shopper mostly buy at a discount in the next 90 days?",
        paraphrase="Does this household wait for reduced prices?",
        answers=("Yes, this shopper buys at a discount.", "No, this shopper pays the full price."),
        rule=_discounted,
        positive="last",
    ),
)
