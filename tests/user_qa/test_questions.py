"""Specs become questions; mistakes in the config are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from instructue_feast.config import load_config
from instructue_feast.datasets.project import TEMPLATES, write_project
from instructue_feast.errors import ConfigError
from instructue_feast.question_specs import AnySpec, QuestionSpec
from instructue_feast.user_qa.questions import draft_question, is_held_out, require_distinct_wordings
from instructue_feast.user_qa.tables import MAX_WEIGHT
from instructue_feast.user_qa.values import answer_weights, round_edges

SPECS: TypeAdapter[QuestionSpec] = TypeAdapter(AnySpec)
SOURCES = {
    "bill": {"table": {"path": "raw/bill"}, "user_id": "u", "time": "t", "text": "{word}"},
    "profile": {"kind": "tabular", "table": {"path": "raw/p"}, "user_id": "u", "time": "t", "categorical": ["city"]},
}


def config_with(folder: Path, *questions: Any, **settings: Any) -> Path:
    document = {
        "project": "p", "sources": SOURCES, "instructions": [{"id": "a", "text": "b"}], "output": {"path": "out"},
        "user_qa": {"questions": list(questions), **settings},
    }  # fmt: skip
    file = folder / "instructue.yaml"
    file.write_text(yaml.safe_dump(document, sort_keys=False))
    return file


GONE = {"id": "gone", "kind": "inactive", "source": "bill"}
HAS = {"id": "has", "kind": "occurs", "source": "bill", "subject": "word"}


@pytest.mark.parametrize(
    ("question", "message", "hint"),
    [
        (GONE | {"source": "bil"}, "family gone: unknown source 'bil'", "did you mean bill?"),
        (GONE | {"source": "profile"}, "kind inactive cannot be asked about source profile", "bill"),
        (HAS | {"kind": "attribute", "column": "x"} | {"subject": None}, "user_qa.questions.0.subject", "column"),
        (HAS | {"wordingz": ["x"]}, "unknown key `user_qa.questions.0.wordingz`", "did you mean wordings?"),
        (HAS | {"wordings": ["Is {subjekt}?"]}, r"names \[subjekt\]", "subject"),
        (GONE | {"wordings": ["Is {subject}?"]}, r"names \[subject\]", "days"),
        (GONE | {"wordings": ["Gone?"], "held_out_wordings": ["Gone?"]}, "stands there twice", "remove"),
        (GONE | {"wordings": [" "]}, "empty template", "leave it out"),
        (GONE | {"id": "Gone!"}, "family id 'Gone!'", "lower-case"),
        (GONE | {"days": 0}, "user_qa.questions.0.days", "mend"),
        (GONE | {"kind": "inactiv"}, "user_qa.questions.0", "mend"),
        (HAS | {"min_rate": 0.5, "max_rate": 0.2}, "min_rate is not below", "widen"),
        (GONE | {"kind": "amount", "measure": "sum"}, "measure sum needs `column`", "column"),
        (GONE | {"kind": "amount", "column": "x"}, "measure count takes no `column`", "nothing else"),
        (GONE | {"kind": "amount", "edges": [3, 1]}, "edges", "ascending"),
        (GONE | {"kind": "amount", "levels": ["a"]}, "1 levels", "two or three"),
        (GONE | {"kind": "amount", "levels": ["a", "a"]}, "same answer", "apart"),
        (GONE | {"yes": "Gone.", "no": " gone. "}, "`yes` and `no` are the same answer", "differently"),
        (HAS | {"yes": "Buys {subject}", "no": "buys {subject}"}, "family has: `yes` and `no` are the same", "word"),
        (GONE | {"kind": "change", "window": "past"}, "looks ahead", "window"),
        (GONE | {"kind": "favourite"}, "family gone", "exactly one"),
        (GONE | {"kind": "favourite", "clock": "weekday", "zone": "Europe/Berlim"}, "time zone", "Europe/Berlin"),
        (GONE | {"kind": "favourite", "subject": "x", "answer": "Yes."}, "does not name the value", "{value}"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_would_be_right(
    tmp_path: Path, question: dict[str, Any], message: str, hint: str
):
    question = {key: value for key, value in question.items() if value is not None or key == "subject"}
    with pytest.raises(ConfigError, match=message) as error:
        load_config(config_with(tmp_path, question))
    assert hint in error.value.hint


def test_a_section_needs_families_with_ids_of_their_own(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"`user_qa.questions` is empty"):
        load_config(config_with(tmp_path))
    with pytest.raises(ConfigError, match=r"families \[gone\] stand there twice"):
        load_config(config_with(tmp_path, GONE, GONE))
    with pytest.raises(ConfigError, match=r"unknown key `user_qa.min_event`"):
        load_config(config_with(tmp_path, GONE, min_event=2))
    with pytest.raises(ConfigError, match=r"unknown key `user_qa.generator.modell`"):
        load_config(config_with(tmp_path, GONE, generator={"kind": "hf", "modell": "x"}))
    with pytest.raises(ConfigError, match="hf needs a `model`"):
        load_config(config_with(tmp_path, GONE, generator={"kind": "hf"}))
    with pytest.raises(ConfigError, match="openai needs a `base_url`"):
        load_config(config_with(tmp_path, GONE, generator={"kind": "openai", "model": "m", "base_url": "file:///x"}))


def test_yes_and_no_need_no_quotes(tmp_path: Path):
    file = config_with(tmp_path, GONE | {"yes": "Gone.", "no": "Here."})
    file.write_text(file.read_text().replace("'yes':", "yes:").replace("'no':", "no:"))
    assert "\n    yes: Gone." in file.read_text()
    config = load_config(file)
    assert config.user_qa is not None
    assert draft_question(config.user_qa.questions[0]).answers == ("Gone.", "Here.")


def test_two_questions_in_the_same_words_are_refused():
    """Else one text had two answers, or a wording kept for tests were trained under another name."""

    def draft(name: str, source: str, **words: Any):
        return draft_question(SPECS.validate_python({**GONE, "id": name, "source": source, **words}))

    bill = draft("gone", "bill", wordings=["Gone for {days} days?"], held_out_wordings=["Absent?"])
    require_distinct_wordings([bill, draft("silent", "search", wordings=["Silent?"], held_out_wordings=["Quiet?"])])
    for words in ({"wordings": ["gone for  30 days?"]}, {"wordings": ["Silent?", "absent?"]}):
        with pytest.raises(ConfigError, match="families gone and silent ask in the same words: '"):
            require_distinct_wordings([bill, draft("silent", "search", held_out_wordings=["Quiet?"], **words)])
    require_distinct_wordings([bill, draft("other", "bill", wordings=["Silent?", "silent?"], held_out_wordings=["Q?"])])


def test_the_questions_do_not_change_what_a_history_is(tmp_path: Path):
    before = load_config(config_with(tmp_path, GONE)).history_digest()
    assert load_config(config_with(tmp_path, GONE, HAS)).history_digest() == before


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_example_projects_ask_in_several_ways_and_keep_some_for_tests(tmp_path: Path, template: str):
    config = load_config(write_project(tmp_path, template))
    assert config.user_qa is not None
    everything: list[str] = []
    for spec in config.user_qa.questions:
        subject = "tea" if getattr(spec, "subject", None) and spec.kind == "occurs" else None
        draft = draft_question(spec, subject=subject, values=["red", "blue"])
        assert len(draft.wordings) >= 3, spec.id
        assert draft.held_out_wordings, spec.id
        assert not set(draft.wordings) & set(draft.held_out_wordings)
        assert len(set(draft.answers)) == len(draft.answers) >= 2, spec.id
        assert all(len(one) < 60 for one in draft.answers), "answers are what the LLM learns to say: short"
        everything += [*draft.wordings, *draft.held_out_wordings, *draft.answers]
    assert not [text for text in everything if "{" in text or "}" in text]


@pytest.mark.parametrize("kind", ["occurs", "inactive", "amount", "change", "favourite", "attribute"])
@pytest.mark.parametrize("window", ["past", "future"])
@pytest.mark.parametrize("subject", [None, "word"])
def test_every_kind_has_wordings_of_its_own(kind: str, window: str, subject: str | None):
    if kind == "change" and window == "past":
        window = "future"
    values: dict[str, Any] = {"kind": kind, "id": "f", "source": "mini_program", "window": window, "days": 9}
    if kind in ("occurs", "favourite") and subject:
        values["subject"] = subject
    elif kind == "favourite":
        values["clock"] = "weekday"
    if kind == "attribute":
        values["column"] = "home_town"
    about = "TEA" if kind == "occurs" and subject else None
    draft = draft_question(SPECS.validate_python(values), subject=about, values=["a", "b"])
    texts = [*draft.wordings, *draft.held_out_wordings]
    assert len(set(texts)) == len(texts) >= 4
    if kind != "attribute":
        assert all("9 days" in one for one in texts)
        assert all("mini program" in one for one in texts)
    if about:
        assert all("tea" in one for one in texts)
        assert draft.id == "f:tea"
    assert draft.days == {"past": -9, "future": 9}[window] or (kind == "attribute" and draft.days == 0)
    assert len(set(draft.answers)) == len(draft.answers) >= 2
    assert all(one[0].isupper() for one in draft.answers)


def test_a_fixed_tenth_of_the_subjects_is_held_out_whatever_their_case():
    subjects = [f"subject {number}" for number in range(4000)]
    share = sum(map(is_held_out, subjects)) / len(subjects)
    assert 0.08 < share < 0.12
    assert [is_held_out(one.upper()) for one in subjects] == [is_held_out(one) for one in subjects]


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=8).filter(lambda counts: sum(map(bool, counts)) > 1))
def test_weights_balance_the_answers(counts: list[int]):
    weights = answer_weights(counts)
    totals = [weight * count for weight, count in zip(weights, counts, strict=True) if count]
    assert all(0 < weight <= MAX_WEIGHT for weight, count in zip(weights, counts, strict=True) if count)
    if max(weights) < MAX_WEIGHT:
        assert sum(totals) == pytest.approx(sum(counts))
        assert max(totals) == pytest.approx(min(totals))


@given(st.lists(st.floats(-1e9, 1e9, allow_subnormal=False), min_size=1, max_size=5))
def test_edges_keep_three_digits(edges: list[float]):
    for edge, rounded in zip(edges, round_edges(edges), strict=True):
        assert rounded == pytest.approx(edge, rel=6e-3, abs=1e-300)
