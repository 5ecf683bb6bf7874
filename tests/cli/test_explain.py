"""`instructue explain`: a table per instruction, and a picture of them side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from instructue_feast.cli.explain import age_words, count_words
from instructue_feast.cli.main import main
from instructue_feast.history.buckets import AGE_EDGES_DAYS, COUNT_EDGES, NUM_AGE_BUCKETS, NUM_COUNT_BUCKETS, bucketize
from tests.evaluation.small import small_book, small_history, small_project

USER = "u001"


@pytest.fixture
def project(tmp_path, llm, encoder):
    small_project(tmp_path, llm, encoder, users=6)
    file = tmp_path / "instructue.yaml"
    words = "  - {id: churn, text: Will the user stop coming}\n"
    file.write_text(file.read_text().replace(words, words + "  - {id: taste, text: What does the user like}\n"))
    return tmp_path


def explain(folder, *arguments):
    return main(["explain", "--config", str(folder / "instructue.yaml"), *arguments])


def test_two_instructions_are_explained_side_by_side(project, capsys):
    picture = project / "out" / "why.png"
    arguments = ["--user", USER, "--instruction", "churn", "--instruction", "taste", "--picture", str(picture)]
    assert explain(project, *arguments) == 0
    shown = capsys.readouterr()
    assert "churn" in shown.out
    assert "taste" in shown.out
    assert "share of focus" in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert explain(project, *arguments, "--json", "--top", "50") == 0
    found = json.loads(capsys.readouterr().out)["instructions"]
    history, texts = small_history(6), set(small_book().texts)
    for rows in found.values():
        assert len(rows) == history.num_tokens[1]
        assert {row["text"] for row in rows} <= texts
        assert sum(row["focus"] for row in rows) == pytest.approx(1, abs=1e-4)
        sizes = [abs(row["score"]) for row in rows]
        assert sizes == sorted(sizes, reverse=True)
    assert found["churn"] != found["taste"]


def test_the_exact_scores_and_those_towards_an_answer_are_others(project, capsys):
    found = {}
    for name, more in {"gates": [], "exact": ["--method", "leave_one_out"], "answer": ["--answer", "Yes."]}.items():
        assert explain(project, "--user", USER, "--instruction", "churn", "--top", "50", "--json", *more) == 0
        rows = json.loads(capsys.readouterr().out)["instructions"]["churn"]
        found[name] = {row["text"]: row["score"] for row in rows}
    texts = sorted(found["gates"])
    vectors = {name: np.array([scores[text] for text in texts]) for name, scores in found.items()}
    assert np.corrcoef(vectors["gates"], vectors["exact"])[0, 1] > 0.9
    assert np.abs(vectors["gates"] - vectors["answer"]).max() > 1e-5


def test_an_unknown_user_is_an_error_that_does_not_repeat_the_id(project, capsys):
    assert explain(project, "--user", "somebody-else", "--instruction", "churn") == 3
    shown = capsys.readouterr()
    assert "has no such user" in shown.err
    assert "somebody-else" not in shown.err


def test_calls_that_make_no_sense_are_refused(project, capsys):
    assert explain(project, "--user", USER, "--instruction", "tase") == 2
    assert "did you mean taste" in capsys.readouterr().err
    assert explain(project, "--user", USER, "--instruction", "churn", "--run", "x", "--as-of", "y") == 2
    assert "drop --model and --as-of" in capsys.readouterr().err


def test_buckets_in_words_are_the_buckets():
    for bucket in range(NUM_COUNT_BUCKETS):
        first, _, last = count_words(bucket).rstrip("+").partition("-")
        assert bucketize([int(first), int(last or first)], COUNT_EDGES).tolist() == [bucket, bucket]
    for bucket in range(1, NUM_AGE_BUCKETS):
        first, _, last = age_words(bucket).split()[0].rstrip("+").partition("-")
        assert bucketize([int(first), int(last or first)], AGE_EDGES_DAYS).tolist() == [bucket, bucket]
