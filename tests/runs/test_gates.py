"""Gates judge a run beside the published one; a failed gate leaves the pointer where it is."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, QualityError
from instructue_feast.runs.ledger import Ledger, RunState, read_ledger, write_ledger
from instructue_feast.runs.publish import current_publication
from instructue_feast.runs.release import release
from instructue_feast.runs.sample import Sample, drift, mean_pairwise_cosine
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import user_names, write_fake_run, write_feast_repo
from tests.runs.test_ledger import PLAN

DAYS = ("2017-10-01T00:00:00Z", "2017-10-02T00:00:00Z")
USERS = 300


@pytest.fixture
def project(tmp_path):
    """A project with one published run of 300 users."""
    store = write_feast_repo(tmp_path)
    config = load_config(tmp_path / "instructue.yaml")
    run = write_fake_run(store, DAYS[0], users=USERS)
    release(store, run, config)
    return store, config, run


def report_of(store: OutputStore, run: str) -> dict:
    return store.read_json("runs", run, "quality", "gates.json")


def test_the_same_embeddings_one_day_later_pass_with_no_drift(project):
    store, config, first = project
    second = write_fake_run(store, DAYS[1], users=USERS)
    publication, report = release(store, second, config)
    assert publication.run_id == second
    assert report.base_run == first
    assert report.passed
    found = report.drift["taste"]
    assert (found.mean_shift, found.psi, found.ks, found.knn_overlap, found.common) == (0, 0, 0, 1, USERS)
    assert found.moved < 1e-6
    page = (store.fs.cat_file(store.path("runs", second, "quality", "report.html"))).decode()
    assert "All gates passed" in page
    assert "data:image/png;base64" in page
    assert not any(user in page for user in user_names(USERS))


def test_half_of_the_users_missing_moves_nothing(project):
    store, config, first = project
    second = write_fake_run(store, DAYS[1], users=USERS // 3)
    with pytest.raises(QualityError, match=r"rows_ratio is 0\.3333, at least 0\.5") as caught:
        release(store, second, config)
    assert "--accept" in caught.value.hint
    assert caught.value.exit_code == 11
    assert current_publication(store).run_id == first
    assert report_of(store, second)["passed"] is False


def test_other_embeddings_under_the_same_version_are_noticed_by_their_neighbours(project):
    store, config, first = project
    second = write_fake_run(store, DAYS[1], users=USERS, seed=1)
    with pytest.raises(QualityError, match="knn_overlap of churn"):
        release(store, second, config)
    assert current_publication(store).run_id == first


def test_another_version_is_not_compared(project):
    store, config, _ = project
    versions = dict.fromkeys(("churn", "next_basket", "taste"), "v2")
    second = write_fake_run(store, DAYS[1], users=USERS, seed=1, versions=versions)
    _, report = release(store, second, config)
    assert report.drift == {}
    assert len([note for note in report.notes if "another embedding version" in note]) == 3


def test_a_reason_overrides_a_failed_gate_and_is_kept(project):
    store, config, _ = project
    second = write_fake_run(store, DAYS[1], users=USERS // 3)
    ledger = Ledger(run_id=second, created=DAYS[1], plan=PLAN)
    for state in (RunState.PLANNED, RunState.RUNNING, RunState.WRITTEN, RunState.AUDITED):
        ledger = ledger.with_state(state)
    write_ledger(store, ledger)
    publication, _ = release(store, second, config, accept="the trial market was closed")
    assert publication.run_id == second
    assert read_ledger(store, second).steps[-1].note == "gates accepted: the trial market was closed"


def test_a_collapsed_model_is_noticed_without_anything_to_compare_with(tmp_path, monkeypatch):
    store = write_feast_repo(tmp_path)
    config = load_config(tmp_path / "instructue.yaml")
    monkeypatch.setattr(
        "tests.fake_runs.unit_vectors",
        lambda _seed, users, _name, dim=8: np.tile(np.eye(dim, dtype="f4")[0], (len(users), 1)),
    )
    run = write_fake_run(store, DAYS[0], users=USERS)
    with pytest.raises(QualityError, match=r"identical_share of churn is 0.99.*mean_pairwise_cosine of churn is 1"):
        release(store, run, config)
    assert current_publication(store) is None


def test_few_users_are_published_without_a_comparison(tmp_path):
    store = write_feast_repo(tmp_path)
    config = load_config(tmp_path / "instructue.yaml")
    release(store, write_fake_run(store, DAYS[0]), config)
    _, report = release(store, write_fake_run(store, DAYS[1], seed=1), config)
    assert any("too few to compare" in note for note in report.notes)


def test_limits_come_from_the_yaml_and_unknown_ones_are_refused(tmp_path):
    write_feast_repo(tmp_path)
    file = tmp_path / "instructue.yaml"
    text = file.read_text()
    file.write_text(text + "gates: {max_psi: 0.1}\n")
    assert load_config(file).gates.max_psi == 0.1
    file.write_text(text + "gates: {max_pssi: 0.1}\n")
    with pytest.raises(ConfigError, match=r"unknown key `gates\.max_pssi`[\s\S]*did you mean max_psi"):
        load_config(file)


def test_drift_grows_with_the_shift_and_does_not_depend_on_the_order_of_users():
    rng = np.random.default_rng(0)
    users = [f"u{number}" for number in range(1000)]
    base = rng.normal(size=(1000, 4)).astype(np.float32)

    def sample(vectors: np.ndarray) -> Sample:
        return Sample(users, {"x": vectors})

    shifts = [drift(sample(base + shift), sample(base), "x") for shift in (0.0, 0.2, 1.0)]
    assert [round(one.mean_shift, 2) for one in shifts] == [0.0, 0.2, 1.0]
    assert shifts[0].psi < shifts[1].psi < 0.25 < shifts[2].psi
    order = rng.permutation(1000)
    shuffled = drift(Sample([users[row] for row in order], {"x": base[order] + 1}), sample(base), "x")
    ordered = shifts[2]
    assert dataclasses.astuple(shuffled)[:6] == pytest.approx(dataclasses.astuple(ordered)[:6])
    assert shuffled.moved == pytest.approx(ordered.moved)
    fresh = drift(sample(rng.normal(size=(1000, 4)).astype(np.float32)), sample(base), "x")
    assert fresh.psi < 0.1
    assert fresh.knn_overlap < 0.05


def test_mean_pairwise_cosine_is_the_mean_over_pairs():
    vectors = np.random.default_rng(0).normal(size=(20, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = (vectors @ vectors.T)[~np.eye(20, dtype=bool)]
    assert mean_pairwise_cosine(vectors) == pytest.approx(pairs.mean())


def test_a_report_is_strict_json(project):
    store, _, first = project
    json.dumps(report_of(store, first), allow_nan=False)
