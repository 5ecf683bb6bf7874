"""The commands of a serving host, over a run made by a tiny model."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from instructue_feast.cli.main import main
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs.publish import publish
from tests.fake_runs import write_feast_repo
from tests.feature_store.real_runs import write_real_run
from tests.model_data import make_history, make_model, make_table

CHURN = Instruction("churn", "What about churn?")
HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])


@pytest.fixture(scope="module")
def shop(tiny, tmp_path_factory):
    """A served repo."""
    repo = tmp_path_factory.mktemp("serving") / "repo"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        embedder = UserEmbedder(model, make_table(model, tiny[1]))
        store = write_feast_repo(repo, instructions=["churn"])
        write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    apply_repo(repo)
    materialize(repo)
    return repo


def run(capsys, *arguments):
    code = main([*map(str, arguments)])
    return code, capsys.readouterr()


def test_embed_answers_any_instruction(shop, capsys):
    user = HISTORY.user_ids[0]
    code, shown = run(capsys, "embed", user, "nobody", "--instruction", CHURN.text, "--repo", shop, "--json")
    assert code == 0, shown.err
    found = json.loads(shown.out)
    assert found["tokens"] > 0
    known, unknown = found["users"]
    assert unknown["embedding"] is None
    _, shown = run(capsys, "get", user, "--repo", shop, "--json")
    batch = json.loads(shown.out)[0]["embeddings"]["churn"]
    assert np.dot(known["embedding"], batch) >= 1 - 1e-5
    code, shown = run(capsys, "embed", user, "--instruction", "Does this user ski?", "--repo", shop)
    assert code == 0
    assert "prompt tokens" in shown.out


def test_erase_says_where_and_proves_it(shop, capsys, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(shop, repo)
    user, other = HISTORY.user_ids[:2]
    listed = tmp_path / "users.txt"
    listed.write_text(f"{user}\n\n")
    code, shown = run(capsys, "erase", "--users-file", listed, "--repo", repo)
    assert code == 0, shown.err
    assert "packed" not in shown.err
    assert user not in shown.out + shown.err
    assert "Found 0." in " ".join(shown.out.split())
    code, shown = run(capsys, "erase", "--user", user, "--repo", repo, "--json")
    assert code == 0
    assert json.loads(shown.out)["absent"] is True
    _, shown = run(capsys, "get", user, other, "--repo", repo, "--json")
    assert [one["found"]["churn"] for one in json.loads(shown.out)] == [False, True]


@pytest.mark.parametrize("arguments", [[], ["--sweep", "--user", "u"], ["--users-file", "nowhere.txt"]])
def test_erase_refuses_an_unclear_question(shop, capsys, arguments):
    code, shown = run(capsys, "erase", *arguments, "--repo", shop)
    assert code == 2
    assert "Hint" in shown.err


def test_search_commands_answer_in_json(shop, capsys, tmp_path):
    user = HISTORY.user_ids[0]
    code, shown = run(capsys, "similar", user, "--instruction", "churn", "-k", "3", "--repo", shop, "--json")
    assert code == 0, shown.err
    assert len(json.loads(shown.out)["hits"]) == 3
    assert user not in shown.out
    code, shown = run(capsys, "target", "Likes coffee.", "--instruction", "churn", "--repo", shop)
    assert code == 0
    assert "The audience" in shown.out
    listed = tmp_path / "items.csv"
    listed.write_text("item_id,text\n001,coffee\n002,soap\n")
    code, shown = run(capsys, "items", listed, "--repo", shop, "--json")
    assert code == 0, shown.err
    code, shown = run(capsys, "recommend", user, "--instruction", "churn", "--repo", shop, "--json")
    assert sorted(one["item_id"] for one in json.loads(shown.out)["hits"]) == ["001", "002"]
    listed.write_text("item_id,words\n001,coffee\n")
    code, shown = run(capsys, "items", listed, "--repo", shop)
    assert code == 3
    assert "no column text" in shown.err


def test_index_and_promote_say_what_they_did(shop, capsys):
    code, shown = run(capsys, "index", "--repo", shop, "--json")
    assert code == 0, shown.err
    assert json.loads(shown.out)[0]["users"] == len(HISTORY.user_ids)
    code, shown = run(capsys, "similar", HISTORY.user_ids[0], "--instruction", "churn", "--approximate", "--repo", shop)
    assert code == 0, shown.err
    code, shown = run(capsys, "promote", "--repo", shop)
    assert code == 0, shown.err
    assert "there already" in shown.out
    code, shown = run(capsys, "drift", "churn", "--config", shop / "instructue.yaml")
    assert code == 2
    assert "one published version" in shown.err


def test_check_exits_with_its_verdict(shop, capsys, tmp_path):
    code, shown = run(capsys, "check", "--repo", shop, "--json")
    assert code == 0, shown.out
    assert json.loads(shown.out)["ok"] is True
    code, shown = run(capsys, "check", "--repo", shop, "--max-age-days", "1", "--encode", "0")
    assert code == 11
    assert "failed" in shown.out
    assert "1 of" in shown.err


def test_an_id_that_looks_like_markup_is_shown_as_it_is(shop, capsys):
    code, shown = run(capsys, "get", "[/odd]", "[red]17", "--repo", shop)
    assert code == 0, shown.err
    assert "[/odd]" in shown.out
    assert "[red]17" in shown.out
