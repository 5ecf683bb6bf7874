"""Questions that a generator words end up in the data set only where the data support them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from instructue_feast.question_specs import GeneratorConfig
from instructue_feast.user_qa.proposals import Fact, Proposal
from instructue_feast.user_qa.questions import is_held_out
from instructue_spark import user_qa
from tests.oracles.lake import AS_OF
from tests.spark.test_user_qa_leakage import SUBJECTS, config_of, make_tables
from tests.spark.test_user_qa_oracle import DAY, YES_NO, answers_of, build, family, load

pytestmark = pytest.mark.spark

AS_OFS = [AS_OF - 12 * DAY, AS_OF - 9 * DAY]
USERS = 7


class Chatty:
    """Says everything in other words, lies about every fact, and repeats what is known."""

    name = "chatty"
    parallel = 3

    def __init__(self) -> None:
        self.seen: list[Sequence[Fact]] = []

    def propose(self, facts: Sequence[Fact]) -> list[Proposal]:
        self.seen.append(facts)
        found = []
        for one in facts:
            claim = ((one.question_id, one.answer),)
            found.append(Proposal(f"Put differently: {one.question}", f"Well: {one.answer}", claim))
            found.append(Proposal(f"Or so: {one.question}", "Lie.", ((one.question_id, one.others[0]),)))
            found.append(Proposal(one.question, one.answer, claim))
        return found


def test_supported_proposals_become_questions_and_lies_do_not(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    families = [family("has", "occurs", **SUBJECTS, max_rate=0.9), family("gone", "inactive", days=1, **YES_NO)]
    config = config_of(tmp_path, make_tables(), families)
    assert config.user_qa is not None
    settings = GeneratorConfig(kind="hf", model="any", users=USERS, facts=5)
    config = dataclasses.replace(config, user_qa=dataclasses.replace(config.user_qa, generator=settings))
    chatty = Chatty()
    monkeypatch.setattr(user_qa, "make_generator", lambda _: chatty)
    manifest = build(spark, config, AS_OFS, AS_OF)

    facts = [one for some in chatty.seen for one in some]
    assert len(chatty.seen) == USERS
    assert all(len(some) == 5 for some in chatty.seen)
    assert {one.question_id.split(":")[0] for one in facts} == {"has", "gone"}, "facts come from every family"
    subjects = {one.question_id.partition(":")[2] or one.question_id for one in facts}
    assert not any(map(is_held_out, subjects))

    qa = load(config)
    made = [one for one in qa.questions if one.kind == "generated"]
    assert len(made) == len({one.question_id for one in facts})
    assert all(one.wordings[0].startswith("Put differently: ") for one in made)
    assert all(len(one.answers) >= 2 for one in made), "somebody must be able to answer otherwise"
    assert not any(one.held_out for one in made)
    by_wording = {one.wordings[0]: one.id for one in qa.questions}
    number = 0
    for mine in answers_of(qa).values():
        for one in made:
            if one.id in mine:
                number += 1
                known = by_wording[one.wordings[0].removeprefix("Put differently: ")]
                assert mine[one.id][0] == f"Well: {mine[known][0]}"
    assert number == len(facts) == manifest.families["generated"].pairs
    assert manifest.families["generated"].dropped == {
        "claim not supported": len(facts), "wording of a known question": len(facts),
    }  # fmt: skip
    assert manifest.generator == "chatty"
    assert manifest.num_questions == len(qa.questions)
    assert manifest.pairs["train"] == qa.num_pairs
