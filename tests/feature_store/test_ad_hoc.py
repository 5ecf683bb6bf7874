"""Instructions nobody planned for: answered online from packed histories, as the batch would have."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from instructue_feast.errors import ConfigError, VersionMismatchError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.session import open_store
from instructue_feast.inference.embedder import UserEmbedder
from instructue_feast.instructions import Instruction
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import use_redis, write_fake_run, write_feast_repo
from tests.feature_store.real_runs import AS_OF, write_real_run
from tests.model_data import make_history, make_model, make_table

HISTORY = make_history([(5, 3, 1), (0, 0, 0), (30, 10, 2), (0, 2, 0), (1, 0, 0), (12, 0, 1)])
CHURN = Instruction("churn", "Will the user stop coming?")
TASTE = Instruction("taste", "What food does the user like?")
USERS = HISTORY.user_ids


@pytest.fixture(scope="module")
def embedder(tiny, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("INSTRUCTUE_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = make_model(*tiny)
        yield UserEmbedder(model, make_table(model, tiny[1]))


@pytest.fixture(scope="module")
def published(embedder, tmp_path_factory):
    """A project whose run holds `churn` only, served from SQLite."""
    repo = tmp_path_factory.mktemp("adhoc") / "repo"
    store = write_feast_repo(repo, instructions=["churn", "taste"])
    vectors = write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    apply_repo(repo)
    done = materialize(repo)
    assert [one.instruction for one in done] == ["churn", "packed_history"]
    assert done[-1].rows == len(USERS)
    return repo, vectors


def cosine(left, right):
    return (left * right).sum(-1)


def test_an_instruction_of_the_batch_gives_the_batch_s_embedding(published):
    repo, vectors = published
    embeddings = UserEmbeddings(repo)
    got = embeddings.embed(USERS, CHURN.text)
    assert got.found.all()
    assert cosine(got.vectors, vectors[:, 0]).min() >= 1 - 1e-5
    stored = embeddings.get(USERS, ["churn"])
    assert cosine(got.vectors, stored.vectors["churn"]).min() >= 1 - 1e-5
    np.testing.assert_array_equal(got.as_of, stored.as_of["churn"])
    assert got.tokens > 0


def test_an_instruction_nobody_planned_for_gives_what_a_backfill_would(published, embedder):
    repo, _ = published
    text = "Would this user buy a telescope?"
    got = UserEmbeddings(repo).embed([USERS[4], "nobody", USERS[0], USERS[4]], text)
    assert got.found.tolist() == [True, False, True, True]
    expected = embedder.encode(HISTORY.take([4, 0, 4]), [Instruction("x", text)])[:, 0]
    assert cosine(got.vectors[[0, 2, 3]], expected).min() >= 1 - 1e-5
    assert not got.vectors[1].any()
    assert np.isnat(got.as_of[1])


def test_requests_that_come_together_share_a_pass_and_stay_apart(published, embedder, monkeypatch):
    repo, _ = published
    embeddings = UserEmbeddings(repo)
    embeddings.embed(USERS[:1], "warm up")
    embeddings.ad_hoc._window = 0.2
    passes, encode = [], UserEmbedder.encode

    def counted(self, history, instructions, on_batch=None):
        passes.append(sorted(history.user_ids))
        return encode(self, history, instructions, on_batch)

    monkeypatch.setattr(UserEmbedder, "encode", counted)
    texts = ["Is this user fond of cats?", "Does this user ski?"]
    with ThreadPoolExecutor(12) as pool:
        jobs = [(user, text, pool.submit(embeddings.embed, [user], text)) for user in USERS for text in texts]
        got = {(user, text): job.result().vectors[0] for user, text, job in jobs}
    assert len(passes) < len(jobs)
    monkeypatch.undo()
    for text in texts:
        expected = embedder.encode(HISTORY, [Instruction("x", text)])[:, 0]
        assert cosine(np.stack([got[user, text] for user in USERS]), expected).min() >= 1 - 1e-5


def test_one_bad_request_does_not_spoil_its_company(published, embedder):
    repo, _ = published
    embeddings = UserEmbeddings(repo)
    embeddings.embed(USERS[:1], "warm up")
    embeddings.ad_hoc._window = 0.2
    tuned = Instruction("x", "What now?", soft_prompt="0" * 64)

    async def both():
        return await asyncio.gather(
            embeddings.embed_async(USERS[:2], "What now?"),
            embeddings.embed_async(USERS[:1], tuned),
            return_exceptions=True,
        )

    good, bad = asyncio.run(both())
    assert good.found.all()
    assert isinstance(bad, ConfigError)


def test_whoever_stops_waiting_takes_nobody_else_s_answer_away(published, embedder):
    repo, _ = published
    embeddings = UserEmbeddings(repo)
    embeddings.embed(USERS[:1], "warm up")
    embeddings.ad_hoc._window = 0.3

    async def both():
        impatient = asyncio.create_task(embeddings.embed_async(USERS[:2], "What now?"))
        patient = asyncio.create_task(embeddings.embed_async(USERS[:1], "What now?"))
        await asyncio.sleep(0.1)
        impatient.cancel()
        return await asyncio.wait_for(patient, 20)

    found = asyncio.run(both())
    expected = embedder.encode(HISTORY.take([0]), [Instruction("x", "What now?")])[:, 0]
    assert cosine(found.vectors, expected).min() >= 1 - 1e-5


@pytest.mark.parametrize("text", ["What about <USER>?", "x" * 3000])
def test_prompt_markup_and_endless_instructions_are_refused(published, text):
    with pytest.raises(ConfigError):
        UserEmbeddings(published[0]).embed(USERS[:1], text)


def test_bad_ids_are_refused_by_position(published):
    with pytest.raises(ConfigError, match="position 1 is blank"):
        UserEmbeddings(published[0]).embed([USERS[0], " "], "What?")


def test_strangers_alone_need_no_model(published, monkeypatch):
    monkeypatch.setattr("instructue_feast.inference.from_run.open_embedder", None)
    got = UserEmbeddings(published[0]).embed(["nobody"], "What?")
    assert got.vectors.shape == (1, 16)
    assert not got.found.any()


def test_packed_histories_are_in_no_feature_service(published):
    store = open_store(published[0])
    names = [one.name for one in store.get_feature_service("user_embeddings").feature_view_projections]
    assert all(name.startswith("churn__") for name in names)


def test_histories_of_the_run_before_are_read_with_its_own_table(published, embedder, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(published[0], repo)
    store = OutputStore(str(repo / "data" / "output"))
    write_real_run(store, embedder, HISTORY.take([0, 1]), [CHURN], run_id="night-2", as_of=AS_OF + timedelta(days=1))
    publish(store, "night-2")
    apply_repo(repo)
    embeddings = UserEmbeddings(repo)  # published, not yet materialized
    got = embeddings.embed(USERS, CHURN.text)
    assert cosine(got.vectors, published[1][:, 0]).min() >= 1 - 1e-5
    materialize(repo)
    got = embeddings.embed(USERS[:3], CHURN.text)
    assert got.as_of.astype("datetime64[D]").astype(str).tolist() == ["2017-10-02", "2017-10-02", "2017-10-01"]
    assert cosine(got.vectors, published[1][:3, 0]).min() >= 1 - 1e-5
    shutil.rmtree(repo / "data" / "output" / "runs" / "night-1")
    with pytest.raises(VersionMismatchError, match="histories of a run that is gone"):
        UserEmbeddings(repo).embed(USERS[2:3], CHURN.text)


def test_another_model_reads_from_a_view_of_its_own_and_a_rollback_finds_the_first(published, tiny, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(published[0], repo)
    store = OutputStore(str(repo / "data" / "output"))
    model = make_model(*tiny, seed=7)
    other = UserEmbedder(model, make_table(model, tiny[1]))
    vectors = write_real_run(store, other, HISTORY, [CHURN], run_id="night-2", model_version="cd" * 32)
    for run_id, expected in (("night-2", vectors), ("night-1", published[1])):
        publish(store, run_id)
        apply_repo(repo)
        materialize(repo)
        got = UserEmbeddings(repo).embed(USERS, CHURN.text)
        assert cosine(got.vectors, expected[:, 0]).min() >= 1 - 1e-5
    assert {one.name for one in current_publication(store).histories} == {
        "packed_history__abababab", "packed_history__cdcdcdcd",
    }  # fmt: skip


def test_a_history_that_has_outlived_its_ttl_is_not_embedded(published, tmp_path):
    repo = tmp_path / "repo"
    shutil.copytree(published[0], repo)
    file = repo / "instructue.yaml"
    file.write_text(file.read_text().replace("ttl_days: 0", "ttl_days: 30"))
    apply_repo(repo)
    embeddings = UserEmbeddings(repo)
    assert embeddings.embed(USERS[:1], "What?", now=datetime(2017, 10, 31, tzinfo=UTC)).found.all()
    late = embeddings.embed(USERS[:1], "What?", now=datetime(2017, 10, 31, 1, tzinfo=UTC))
    assert not late.found.any()
    assert late.as_of[0] == np.datetime64("2017-10-01")


def test_redis_serves_packed_histories_too(published, embedder, tmp_path, redis_address):
    repo = tmp_path / "repo"
    store = write_feast_repo(repo, instructions=["churn"])
    use_redis(repo, redis_address, project="adhoc")
    vectors = write_real_run(store, embedder, HISTORY, [CHURN])
    publish(store, "night-1")
    apply_repo(repo)
    materialize(repo)
    got = UserEmbeddings(repo).embed(USERS, CHURN.text)
    assert cosine(got.vectors, vectors[:, 0]).min() >= 1 - 1e-5


def test_a_run_without_its_extract_is_published_without_histories(repo):
    store = OutputStore(str(repo / "data" / "output"))
    publish(store, write_fake_run(store))
    apply_repo(repo)
    materialize(repo)
    with pytest.raises(ConfigError, match="has no packed histories"):
        UserEmbeddings(repo).embed(["user-0001"], "What?")
