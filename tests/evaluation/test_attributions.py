"""Checks of `explain`: who is drawn, what is compared, and what the suites write about it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from instructue_feast.cli.main import main
from instructue_feast.evaluation import attributions
from instructue_feast.evaluation.attributions import (
    MIN_TEXTS,
    TOP,
    Attributions,
    draw_by_interest,
    draw_in_turn,
    measure_agreement,
    measure_own_interest,
)
from instructue_feast.evaluation.extracts import Phrasebook
from instructue_feast.evaluation.ours import TaskEncoder, encode_texts
from instructue_feast.evaluation.report import recovery_markdown
from instructue_feast.inference.explain import Attribution, explain
from instructue_feast.instructions import Instruction
from tests.evaluation.small import small_book, small_history, small_project
from tests.model_data import make_history

TEXTS = ("Does the user like apples?", "Does the user like bread?", "Does the user like cars?")


def scored(monkeypatch, score, focus=np.zeros_like):
    """Replaces `explain`; `score(text_ids, method)` and `focus(text_ids)` are what it finds. Returns what was asked."""
    asked = []

    def fake(_embedder, history, instruction, *, method):
        asked.extend((user, instruction.text, method) for user in history.user_ids)
        parts = [
            history.text_id[start:end] for start, end in zip(history.offsets[:-1], history.offsets[1:], strict=True)
        ]
        return [Attribution(ids, score(ids, method).astype(np.float32), focus(ids).astype(float)) for ids in parts]

    monkeypatch.setattr(attributions, "explain", fake)
    return asked


def ranks(ids, method):
    """The same ranks by either method, other values."""
    ranked = np.argsort(np.argsort(ids)).astype(float)
    return ranked**3 if method == "gates" else ranked - 7


def backwards(ids, method):
    return ranks(ids, method) * (1 if method == "gates" else -1)


def alike(ids, _method):
    return np.full(len(ids), 0.5)


LONG = make_history([(12, 2, 1)] * 20)


@pytest.mark.parametrize(("score", "expected"), [(ranks, 1.0), (backwards, -1.0), (alike, 0.0)])
def test_agreement_is_the_rank_correlation_of_the_two_scores(monkeypatch, score, expected):
    scored(monkeypatch, score)
    found = measure_agreement(None, LONG, TEXTS, users=10)
    np.testing.assert_allclose(found.correlation_U, expected, atol=1e-9)
    document = found.document()
    assert document["mean"] == document["mean_low"] == document["mean_high"] == document["median"] == expected
    assert document["share_above_0.6"] == (1.0 if expected == 1 else 0.0)
    assert (document["users"], document["instructions"]) == (10, 3)


def test_agreement_is_what_explain_says_about_each_user(model):
    book = small_book()
    embedder = TaskEncoder(model, book, encode_texts(model, book)).embedder()
    found = measure_agreement(embedder, LONG, TEXTS, users=4, seed=3)
    asked = draw_in_turn(LONG, len(TEXTS), 4, seed=3)
    for value, row, own in zip(found.correlation_U, asked.row_U, asked.instruction_U, strict=True):
        user, instruction = LONG.take([row]), Instruction("own", TEXTS[own])
        (quick,), (exact,) = (explain(embedder, user, instruction, method=one) for one in ("gates", "leave_one_out"))
        assert value == pytest.approx(attributions.rank_correlation(quick.scores, exact.scores), abs=0.05)
    assert found.mean.value == pytest.approx(found.correlation_U.mean())
    assert found.mean.low <= found.mean.value <= found.mean.high


def test_instructions_are_given_in_turn_and_one_that_comes_again_counts_once(monkeypatch):
    asked, steps = scored(monkeypatch, ranks), []
    measure_agreement(None, LONG, [*TEXTS, TEXTS[0]], users=20, on_users=lambda *step: steps.append(step))
    quick = [(user, text) for user, text, method in asked if method == "gates"]
    assert sorted(quick) == sorted((user, text) for user, text, method in asked if method == "leave_one_out")
    assert len({user for user, _ in quick}) == len(quick) == 20
    assert sorted([text for _, text in quick].count(text) for text in TEXTS) == [6, 7, 7]
    assert steps[-1] == (20, 20)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


def test_only_users_with_enough_texts_are_drawn_by_seed():
    history = make_history([(MIN_TEXTS - 2, 0, 1), (MIN_TEXTS, 0, 0), (0, 0, 0), (MIN_TEXTS - 1, 0, 1)] * 5)
    asked = draw_in_turn(history, 3, 100)
    assert sorted(asked.row_U) == [row for row in range(20) if row % 4 in (1, 3)]
    np.testing.assert_array_equal(asked.instruction_U, np.arange(10) % 3)
    draws = [draw_in_turn(history, 3, 6, seed=seed).row_U.tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]


def test_users_are_spread_over_the_interests_they_have_beside_another():
    rng = np.random.default_rng(0)
    strength = (rng.random((400, 4)) < 0.5) * 0.6
    history = make_history([(12 if user % 3 else 5, 0, 0) for user in range(400)])
    asked = draw_by_interest(history, strength, [0, 1, 3], 60)
    assert np.bincount(asked.instruction_U).tolist() == [20, 20, 0, 20]  # nobody is asked about interest 2
    assert len(set(asked.row_U.tolist())) == 60
    assert (strength[asked.row_U, asked.instruction_U] > 0).all()
    assert ((strength[asked.row_U] > 0).sum(1) >= 2).all()
    assert (history.num_tokens[asked.row_U] >= MIN_TEXTS).all()
    everybody = draw_by_interest(history, strength, [0, 1, 3], 1000)
    fit = (history.num_tokens >= MIN_TEXTS) & ((strength > 0).sum(1) > 1) & (strength[:, [0, 1, 3]] > 0).any(1)
    assert sorted(everybody.row_U) == np.flatnonzero(fit).tolist()


def test_the_share_of_the_own_interest_is_counted_by_hand(monkeypatch):
    phrases = ["an Apple a day", "apple pie", "bread, 2-5", "rye bread", "petrol", *(f"thing {i}" for i in range(7))]
    book = Phrasebook(np.arange(12), np.zeros(12, np.int32), tuple(phrases))
    history = make_history([(12, 0, 0), (12, 0, 0)])
    history.text_id[:] = [*range(12), *range(12)]
    # The five highest: three things, then what either user is asked about or not.
    value = {0: 9, 4: 8, 11: 7, 10: 6, 1: 5, 2: 4, 3: 3}
    # By focus: both breads, no apple.
    scored(
        monkeypatch,
        lambda ids, _: np.array([value.get(one, -1) for one in ids.tolist()]),
        lambda ids: np.isin(ids, [2, 3, 4, 5, 6]),
    )
    strength = np.array([[1.0, 0.6, 0.0], [0.4, 1.0, 0.0]])
    words = [["APPLE", "pear"], ["bread"], []]
    found = measure_own_interest(None, history, book, TEXTS, words, strength, users=2)
    asked = draw_by_interest(history, strength, [0, 1], 2)
    assert sorted(asked.instruction_U) == [0, 1]
    by_gates, by_focus = {0: 2 / TOP, 1: 0.0}, {0: 0.0, 1: 2 / TOP}  # the first asks about apples, the second bread
    np.testing.assert_allclose(found.share_U["gates"], [by_gates[own] for own in asked.instruction_U])
    np.testing.assert_allclose(found.share_U["focus"], [by_focus[own] for own in asked.instruction_U])
    np.testing.assert_allclose(found.share_U["chance"], 2 / 12)
    document = found.document()
    assert document["gates"] == document["focus"] == pytest.approx(0.2)
    assert document["chance"] == pytest.approx(2 / 12, abs=1e-5)
    for name in ("focus", "gates"):
        one = document["differences"][f"{name}-chance"]
        assert one["difference"] == pytest.approx(0.2 - 2 / 12, abs=1e-5)
        assert one["difference_low"] < one["difference"] < one["difference_high"]
    assert (document["users"], document["texts"]) == (2, 5)


def test_without_anybody_to_explain_there_are_no_figures(monkeypatch):
    asked = scored(monkeypatch, ranks)
    history = make_history([(3, 1, 0)] * 4)
    agreement = measure_agreement(None, history, TEXTS, users=10)
    own = measure_own_interest(None, history, small_book(), TEXTS, [["a"]] * 3, np.ones((4, 3)), users=10)
    assert not asked
    assert Attributions(agreement, own).document() == {"agreement": {"users": 0}, "own_interest": {"users": 0}}


INTERESTS = ("travel", "cooking", "cars")
WORDS = {"travel": ["item 1"], "cooking": ["item 2"], "cars": ["app"]}


@pytest.fixture
def project(tmp_path, llm, encoder):
    """A project with truth and vocabulary as the synthetic data set has them."""
    users = small_project(tmp_path, llm, encoder, users=60) and small_history(60).user_ids
    strength = np.random.default_rng(0).permuted(np.tile([1.0, 0.6, 0.0], (60, 1)), axis=1)
    tables = {
        "truth": {
            "user_id": users,
            "strengths": strength.tolist(),
            "top_interest": [INTERESTS[one] for one in strength.argmax(1)],
            "cold": [False] * 60,
        },
        "vocabulary": {
            "interest": [name for name, own in WORDS.items() for _ in own],
            "word": [word for own in WORDS.values() for word in own],
        },
    }
    for name, columns in tables.items():
        (tmp_path / "raw" / name).mkdir(parents=True)
        pq.write_table(pa.table(columns), tmp_path / "raw" / name / "part-0.parquet")
    return tmp_path


def evaluate(folder, *more):
    arguments = ["eval", "--suite", "synthetic", "--config", str(folder / "instructue.yaml"), "--jobs", "1"]
    return main([*arguments, "--as-of", "2017-10-01T00:00:00Z", "--json", str(folder / "out" / "x.json"), *more])


def test_the_synthetic_suite_writes_both_checks(project):
    assert evaluate(project, "--explain-users", "6") == 0
    document = json.loads((project / "out" / "x.json").read_text())
    found = document["attributions"]
    assert (found["agreement"]["users"], found["agreement"]["instructions"]) == (6, 3)
    assert (found["own_interest"]["users"], found["own_interest"]["texts"]) == (6, 5)
    assert 0 < found["own_interest"]["chance"] < 1
    assert {"attributions", "own interests"} < set(document["seconds"])
    assert {"attributions", "own_interest"} < set(document["protocol"])
    report = (project / "out" / "x.md").read_text()
    assert "under 3 instructions in turn" in report
    assert "asks about, 6 users:" in report
    assert "most of the focus token" in report
    assert "No user has enough texts" in recovery_markdown(document | {"attributions": {"agreement": {"users": 0}}})


def test_an_older_project_has_no_vocabulary_and_is_told_before_anything_slow_starts(project, capsys):
    (project / "raw" / "vocabulary" / "part-0.parquet").unlink()
    (project / "raw" / "vocabulary").rmdir()
    assert evaluate(project) == 3
    assert "write the data set again with `instructue data synthetic`" in " ".join(capsys.readouterr().err.split())
    assert not (project / "out").exists()
    assert evaluate(project, "--explain-users", "0") == 0
    document = json.loads((project / "out" / "x.json").read_text())
    assert not {"attributions", "own_interest"} & {*document, *document["protocol"], *document["seconds"]}
    assert "Attributions" not in (project / "out" / "x.md").read_text()
