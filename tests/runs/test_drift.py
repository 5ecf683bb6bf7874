"""Two versions of an embedding: what agrees up to a rotation, and what does not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from instructue_feast.errors import DataError, VersionMismatchError
from instructue_feast.runs.drift import compare_versions
from instructue_feast.runs.publish import PublishedView, current_publication, publish
from instructue_feast.runs.store import OutputStore
from instructue_feast.runs.vectors import ViewVectors, published_view, read_view
from tests.fake_runs import unit_vectors, user_names, write_fake_run

VIEW = PublishedView(
    name="churn__00000000", instruction="churn", embedding_version="0" * 64, content_hash="", model_version="m",
    trained=True, embedding_dim=16, runs=[],
)  # fmt: skip


def cloud(users, seed=0):
    return unit_vectors(seed, user_names(users), "churn", dim=16)


def version(vectors, name="churn__11111111", users=None):
    names = users or user_names(len(vectors))
    return ViewVectors(dataclasses.replace(VIEW, name=name), pa.array(names), vectors.astype(np.float32))


def test_a_rotated_copy_keeps_every_neighbour_and_aligns_completely():
    vectors = cloud(300)
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    order = np.random.default_rng(1).permutation(300)
    other = version((vectors @ rotation)[order], users=[user_names(300)[row] for row in order])
    found = compare_versions(version(vectors), other)
    assert found.neighbours_kept == 1
    assert found.cosine_aligned == pytest.approx(1, abs=1e-4)
    assert found.cosine_aligned_p5 > 0.999
    assert abs(found.cosine_raw) < 0.5


def test_an_unrelated_version_keeps_neighbours_by_chance_only():
    found = compare_versions(version(cloud(400)), version(cloud(400, seed=1)))
    assert found.neighbours_kept == pytest.approx(found.by_chance, abs=0.03)
    assert abs(found.cosine_aligned) < 0.2  # measured on users the rotation was not fitted on


def test_only_users_both_versions_know_are_compared():
    found = compare_versions(version(cloud(60)), version(cloud(100)), k=5)
    assert found.users == 60
    assert found.cosine_raw == pytest.approx(1, abs=1e-4)
    assert compare_versions(version(cloud(60)), version(cloud(100)), k=5, sample=40).users == 40


def test_two_instructions_and_strangers_are_refused():
    taste = dataclasses.replace(version(cloud(60)), view=dataclasses.replace(VIEW, instruction="taste"))
    with pytest.raises(VersionMismatchError, match="not two versions"):
        compare_versions(version(cloud(60)), taste)
    with pytest.raises(DataError, match="share 0 users"):
        compare_versions(version(cloud(60)), version(cloud(60), users=[f"x{row}" for row in range(60)]))


def test_views_are_read_from_the_newest_run_of_a_publication(tmp_path):
    store = OutputStore(str(tmp_path))
    publish(store, write_fake_run(store, "2017-10-01T00:00:00Z", seed=1))
    publish(store, write_fake_run(store, "2017-11-01T00:00:00Z", seed=2, users=7))
    publication = current_publication(store)
    found = read_view(store, publication, published_view(publication, "churn"))
    users = found.user_ids.to_pylist()
    assert sorted(users) == user_names(7)
    np.testing.assert_array_equal(found.vectors, unit_vectors(2, users, "churn"))
