"""`instructue explain`: a table per instruction, and a picture of them side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest

from instructue_feast.cli.explain_view import age_words, count_words, events_figure
from instructue_feast.cli.main import main
from instructue_feast.cli.pictures import save_picture
from instructue_feast.errors import StorageError
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


DOLLARS = ("$10% off $20", "chips $2 to $5", "\\$5 coupon, a_b^c")


def rows_of(texts):
    return [
        {"text": text, "source": "bill", "times": "1", "last_seen": "today", "score": 0.1, "focus": 0.5}
        for text in texts
    ]


def test_dollars_in_event_texts_are_drawn_as_they_are(tmp_path):
    figure = events_figure({"deals for $5 to $10%": rows_of(DOLLARS)}, answer="Yes, $10% off $20.")
    save_picture(figure, tmp_path / "why.png")
    (axis,) = figure.axes
    labels = axis.get_yticklabels()
    assert [one.get_text() for one in labels] == [f"{text} (bill, 1x)" for text in reversed(DOLLARS)]
    for text in (*labels, axis.title, axis.xaxis.label):
        assert not text.get_parse_math()


def test_what_cannot_be_drawn_is_not_repeated(tmp_path, monkeypatch):
    figure = events_figure({"churn": rows_of(DOLLARS)})

    def savefig(*_, **__):
        raise ValueError(DOLLARS[0])

    monkeypatch.setattr(figure, "savefig", savefig)
    with pytest.raises(StorageError, match="ValueError in matplotlib") as error:
        save_picture(figure, tmp_path / "why.png")
    assert DOLLARS[0] not in str(error.value)


def test_a_picture_that_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"File exists|Not a directory") as error:
        save_picture(events_figure({"churn": rows_of(DOLLARS)}), tmp_path / "file" / "why.png")
    assert "rights" in error.value.hint


@pytest.mark.parametrize("name", ["why.doc", "why"])
def test_a_file_that_is_no_picture_is_refused_before_any_work(tmp_path, capsys, name):
    assert explain(tmp_path / "nowhere", "--user", USER, "--instruction", "x", "--picture", str(tmp_path / name)) == 2
    said = capsys.readouterr().err
    assert "not the name of a picture" in said
    assert ".png" in said


def test_markup_in_event_texts_is_printed_as_it_is(project, capsys, monkeypatch):
    texts = ("[bold]deal[/bold]", "[/nothing] opened")
    monkeypatch.setattr("instructue_feast.cli.explain.event_rows", lambda *_: rows_of(texts))
    assert explain(project, "--user", USER, "--instruction", "churn", "--answer", "Yes [/really].") == 0
    shown = capsys.readouterr().out
    for text in (*texts, "Yes [/really]."):
        assert text in shown


def test_buckets_in_words_are_the_buckets():
    for bucket in range(NUM_COUNT_BUCKETS):
        first, _, last = count_words(bucket).rstrip("+").partition("-")
        assert bucketize([int(first), int(last or first)], COUNT_EDGES).tolist() == [bucket, bucket]
    for bucket in range(1, NUM_AGE_BUCKETS):
        first, _, last = age_words(bucket).split()[0].rstrip("+").partition("-")
        assert bucketize([int(first), int(last or first)], AGE_EDGES_DAYS).tolist() == [bucket, bucket]
