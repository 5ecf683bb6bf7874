"""From one version to the next: nothing moves before the new one is served, and the way back is one command."""

from __future__ import annotations

import numpy as np
import pytest

from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.promote import promote
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.serving import served_views
from tests.fake_runs import INSTRUCTIONS, unit_vectors, write_fake_run, write_feast_repo

USERS = ["user-0001", "user-0005"]


@pytest.fixture
def manual(any_repo):
    """Version 1 is served; version 2 is published and applied, not materialized."""
    store = write_feast_repo(any_repo, files=["instructue.yaml"])
    file = any_repo / "instructue.yaml"
    file.write_text(file.read_text().replace("ttl_days: 0", "ttl_days: 0, promotion: manual"))
    publish(store, write_fake_run(store, instructions=INSTRUCTIONS))
    apply_repo(any_repo)
    materialize(any_repo)
    promote(any_repo)
    first = dict(current_publication(store).current)
    publish(store, write_fake_run(store, versions=dict.fromkeys(INSTRUCTIONS, "v2"), seed=2))
    apply_repo(any_repo)
    return any_repo, store, first


def serves(repo, seed):
    found = UserEmbeddings(repo).get(USERS)
    for name in INSTRUCTIONS:
        assert found.found[name].all()
        np.testing.assert_array_equal(found.vectors[name], unit_vectors(seed, USERS, name))


def test_publishing_moves_nothing_until_the_new_version_is_served_and_promoted(manual):
    repo, store, first = manual
    serves(repo, 0)
    with pytest.raises(StorageError, match=r"not at all or with another[\s\S]*instructue materialize"):
        promote(repo)
    serves(repo, 0)
    materialize(repo)
    serves(repo, 0)
    found = promote(repo)
    serves(repo, 2)
    current = current_publication(store).current
    assert found.moved == {name: (first[name], current[name]) for name in INSTRUCTIONS}
    assert set(found.checked.values()) == {12}
    assert promote(repo).moved == {}


def test_one_command_leads_back_and_forth(manual):
    repo, _, _ = manual
    materialize(repo)
    promote(repo)
    promote(repo, back=True)
    serves(repo, 0)
    promote(repo, back=True)
    serves(repo, 2)


def test_what_is_served_outlives_publications_of_other_versions(manual):
    repo, store, first = manual
    for number in (3, 4):
        publish(store, write_fake_run(store, versions=dict.fromkeys(INSTRUCTIONS, f"v{number}"), seed=number))
        apply_repo(repo)
        materialize(repo)
    serves(repo, 0)
    assert served_views(store, current_publication(store), "manual") == first


def test_one_instruction_can_move_alone(manual):
    repo, store, first = manual
    materialize(repo)
    churn = current_publication(store).current["churn"]
    assert promote(repo, {"churn": churn}).moved == {"churn": (first["churn"], churn)}
    assert UserEmbeddings(repo).get(USERS).views == {**first, "churn": churn}


def test_unpublished_views_and_a_way_back_that_never_was_are_refused(repo):
    store = write_feast_repo(repo)
    publish(store, write_fake_run(store))
    apply_repo(repo)
    with pytest.raises(ConfigError, match="there is no published view 'churn__00000000'"):
        promote(repo, {"churn": "churn__00000000"})
    with pytest.raises(ConfigError, match="nothing was promoted"):
        promote(repo, back=True)


def test_automatic_promotion_follows_a_newer_publication_even_after_a_way_back(repo):
    store = write_feast_repo(repo)
    for version, seed in (("v1", 0), ("v2", 2)):
        publish(store, write_fake_run(store, versions=dict.fromkeys(INSTRUCTIONS, version), seed=seed))
        apply_repo(repo)
        materialize(repo)
    serves(repo, 2)
    views = {view.instruction: view.name for view in current_publication(store).views
             if view.name not in current_publication(store).current.values()}  # fmt: skip
    promote(repo, views)
    serves(repo, 0)
    publish(store, write_fake_run(store, versions=dict.fromkeys(INSTRUCTIONS, "v3"), seed=3))
    apply_repo(repo)
    materialize(repo)
    serves(repo, 3)
