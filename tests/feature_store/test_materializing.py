"""From a published run to the online store, on SQLite and on a real Redis."""

import numpy as np
import pandas as pd
import pytest
from feast import Entity, ValueType

from instructue_feast.config import load_config
from instructue_feast.errors import ConfigError, PublishConflictError, StorageError, VersionMismatchError
from instructue_feast.feature_store import materialize as materializing
from instructue_feast.feature_store.lookup import UserEmbeddings
from instructue_feast.feature_store.materialize import apply_repo, materialize
from instructue_feast.feature_store.session import open_store
from instructue_feast.feature_store.views import feature_views
from instructue_feast.runs.publish import current_publication, publish
from instructue_feast.runs.rollback import rollback
from instructue_feast.runs.store import OutputStore
from tests.fake_runs import INSTRUCTIONS, unit_vectors, user_names, write_fake_run, write_feast_repo

OCTOBER, NOVEMBER, DECEMBER = "2017-10-01T00:00:00Z", "2017-11-01T00:00:00Z", "2017-12-01T00:00:00Z"


def output(repo):
    return OutputStore(load_config(repo / "instructue.yaml").output.path)


def publish_run(repo, as_of=OCTOBER, **options):
    publication = publish(output(repo), write_fake_run(output(repo), as_of, **options))
    apply_repo(repo)
    return publication


def history(repo, users, times):
    store = open_store(repo)
    asked = pd.DataFrame({"user_id": users, "event_timestamp": pd.to_datetime(times, utc=True)})
    service = store.get_feature_service("user_embeddings")
    frame = store.get_historical_features(entity_df=asked, features=service).to_df()
    return frame.sort_values("event_timestamp").reset_index(drop=True)


def test_the_feature_service_returns_one_vector_per_instruction_under_its_own_name(any_repo):
    publish_run(any_repo)
    materialize(any_repo)
    store = open_store(any_repo)
    rows = [{"user_id": "user-0003"}, {"user_id": "nobody"}]
    service = store.get_feature_service("user_embeddings")
    answer = store.get_online_features(features=service, entity_rows=rows).to_dict()
    assert sorted(answer) == sorted([*INSTRUCTIONS, "user_id"])
    for name in INSTRUCTIONS:
        assert answer[name][1] is None
        np.testing.assert_array_equal(
            np.float32(answer[name][0]), unit_vectors(0, ["user-0003"], name)[0], err_msg=name
        )


def test_materializing_reports_the_rows_of_each_view_as_it_goes(any_repo):
    publication = publish_run(any_repo, users=23, buckets=5)
    seen = []
    done = materialize(any_repo, on_view=seen.append)
    assert done == seen
    assert [(one.name, one.rows, one.instruction) for one in done] == [
        (view.name, 23, view.instruction) for view in publication.current_views
    ]
    assert all(one.seconds > 0 for one in done)


def test_the_newest_as_of_is_served_even_when_an_older_run_is_published_later(any_repo):
    for as_of, seed in ((NOVEMBER, 1), (OCTOBER, 2)):
        publish_run(any_repo, as_of, seed=seed)
        materialize(any_repo)
    found = UserEmbeddings(any_repo).get(["user-0001"], ["taste"])
    np.testing.assert_array_equal(found.vectors["taste"], unit_vectors(1, ["user-0001"], "taste"))
    assert found.as_of["taste"][0] == np.datetime64("2017-11-01T00:00:00")


def test_a_run_computed_again_for_the_same_as_of_replaces_what_is_served(any_repo):
    for seed in (1, 2):  # stock Redis would silently keep the first
        publish_run(any_repo, seed=seed)
        materialize(any_repo)
    found = UserEmbeddings(any_repo).get(["user-0001"], ["taste"])
    np.testing.assert_array_equal(found.vectors["taste"], unit_vectors(2, ["user-0001"], "taste"))


def test_a_new_version_moves_the_service_while_the_old_view_stays_readable(any_repo):
    first = publish_run(any_repo)
    materialize(any_repo)
    second = publish_run(any_repo, NOVEMBER, versions={"churn": "v2"}, seed=2)
    materialize(any_repo)
    store = open_store(any_repo)
    names = {one.name for one in store.get_feature_service("user_embeddings").feature_view_projections}
    assert names == set(second.current.values())
    old = store.get_online_features(
        features=[f"{first.current['churn']}:churn"], entity_rows=[{"user_id": "user-0001"}]
    ).to_dict()
    np.testing.assert_array_equal(np.float32(old["churn"][0]), unit_vectors(0, ["user-0001"], "churn")[0])
    new = UserEmbeddings(store).get(["user-0001"], ["churn"])
    np.testing.assert_array_equal(new.vectors["churn"], unit_vectors(2, ["user-0001"], "churn"))


def test_a_running_lookup_follows_a_rollback_after_refresh(repo):
    store = output(repo)
    old = write_fake_run(store, OCTOBER)
    publish(store, old)
    apply_repo(repo)
    materialize(repo)
    publish_run(repo, OCTOBER, versions=dict.fromkeys(INSTRUCTIONS, "v2"), seed=2)
    materialize(repo)
    embeddings = UserEmbeddings(repo)
    before = embeddings.get(["user-0001"], ["churn"])
    publish(store, old)
    apply_repo(repo)
    embeddings.refresh()
    after = embeddings.get(["user-0001"], ["churn"])
    np.testing.assert_array_equal(before.vectors["churn"], unit_vectors(2, ["user-0001"], "churn"))
    np.testing.assert_array_equal(after.vectors["churn"], unit_vectors(0, ["user-0001"], "churn"))


@pytest.mark.parametrize("as_of", [OCTOBER, NOVEMBER])
def test_after_a_rollback_the_online_store_goes_back_too(any_repo, as_of):
    first, second = user_names(12), [*user_names(12)[:6], "newcomer"]
    publish_run(any_repo, users=first, seed=1)
    materialize(any_repo)
    publish_run(any_repo, as_of, users=second, seed=2)
    materialize(any_repo)
    assert UserEmbeddings(any_repo).get(["newcomer"], ["churn"]).found["churn"].all()
    rollback(output(any_repo))
    apply_repo(any_repo)
    materialize(any_repo)
    found = UserEmbeddings(any_repo).get([*first, "newcomer"], ["churn"])
    assert found.found["churn"].tolist() == [True] * 12 + [False]
    np.testing.assert_array_equal(found.vectors["churn"][:12], unit_vectors(1, first, "churn"))
    publish_run(any_repo, DECEMBER, users=first, seed=3)
    materialize(any_repo)
    found = UserEmbeddings(any_repo).get(first, ["churn"])
    np.testing.assert_array_equal(found.vectors["churn"], unit_vectors(3, first, "churn"))


def test_views_older_than_the_previous_one_disappear_from_the_registry(repo):
    first = publish_run(repo)
    publish_run(repo, versions={"churn": "v2"})
    third = publish_run(repo, versions={"churn": "v3"})
    store = open_store(repo)
    names = {view.name for view in store.list_feature_views()}
    assert names == {view.name for view in third.views}
    assert first.current["churn"] not in names
    sources = {source.name for source in store.list_data_sources()}
    assert sources == {f"{name}__source" for name in names}


def test_objects_of_others_in_the_registry_are_left_alone(repo):
    store = open_store(repo)
    store.apply([Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.STRING)])
    publish_run(repo)
    assert "shop" in {entity.name for entity in open_store(repo).list_entities()}


def test_history_is_point_in_time_correct_over_two_runs(repo):
    publish_run(repo, OCTOBER, seed=1)
    publish_run(repo, NOVEMBER, seed=2)
    times = [
        "2017-09-30T23:59:59Z",
        "2017-10-01T00:00:00Z",
        "2017-10-31T23:59:59Z",
        "2017-11-01T00:00:00Z",
        "2018-03-01T00:00:00Z",
    ]
    frame = history(repo, ["user-0005"] * 5, times)
    for name in INSTRUCTIONS:
        one, two = (list(unit_vectors(seed, ["user-0005"], name)[0]) for seed in (1, 2))
        got = [None if value is None else list(np.float32(value)) for value in frame[name]]
        assert got == [None, one, one, two, two], name


def test_history_reads_runs_that_hold_different_instructions(repo):
    publish_run(repo, OCTOBER, seed=1)
    publish_run(repo, NOVEMBER, seed=2, instructions=["taste", "churn"])
    frame = history(repo, ["user-0001"] * 2, [OCTOBER, NOVEMBER])
    np.testing.assert_array_equal(np.float32(frame["churn"][1]), unit_vectors(2, ["user-0001"], "churn")[0])
    np.testing.assert_array_equal(np.float32(frame["next_basket"][1]), unit_vectors(1, ["user-0001"], "next_basket")[0])


def test_history_of_a_run_computed_again_shows_the_run_published_last(repo):
    store = output(repo)
    runs = [write_fake_run(store, OCTOBER, seed=seed) for seed in (1, 2)]
    for run_id in (*runs, runs[0]):  # back to the one that was computed first
        publish(store, run_id)
    apply_repo(repo)
    frame = history(repo, ["user-0001"], [NOVEMBER])
    np.testing.assert_array_equal(np.float32(frame["taste"][0]), unit_vectors(1, ["user-0001"], "taste")[0])


def test_more_rows_than_one_write_batch_all_arrive(repo):
    text = (repo / "feature_store.yaml").read_text()
    (repo / "feature_store.yaml").write_text(text.replace("batch_size: 10000", "batch_size: 7"))
    users = user_names(50)
    publish_run(repo, users=users, buckets=4, instructions=["churn"])
    materialize(repo)
    found = UserEmbeddings(repo).get(users)
    assert found.found["churn"].all()
    np.testing.assert_array_equal(found.vectors["churn"], unit_vectors(0, users, "churn"))


def test_another_join_key_than_user_id_works_from_apply_to_history(tmp_path):
    repo = tmp_path / "repo"
    write_feast_repo(repo)
    file = repo / "instructue.yaml"
    file.write_text(
        file.read_text().replace("ttl_days: 0", "ttl_days: 0, join_key: household, entity: home, service: all")
    )
    publish_run(repo)
    materialize(repo)
    store = open_store(repo)
    answer = store.get_online_features(
        features=store.get_feature_service("all"), entity_rows=[{"household": "user-0002"}]
    ).to_dict()
    np.testing.assert_array_equal(np.float32(answer["churn"][0]), unit_vectors(0, ["user-0002"], "churn")[0])
    assert UserEmbeddings(repo, service="all").get(["user-0002"]).found["taste"].all()


def test_an_instruction_that_left_the_config_leaves_the_service_but_not_the_registry(repo):
    publication = publish_run(repo)
    write_feast_repo(repo, instructions=["churn", "taste"], files=["instructue.yaml"])
    apply_repo(repo)
    store = open_store(repo)
    served = {one.name for one in store.get_feature_service("user_embeddings").feature_view_projections}
    assert served == {publication.current["churn"], publication.current["taste"]}
    assert publication.current["next_basket"] in {view.name for view in store.list_feature_views()}


def test_views_say_what_they_hold(repo):
    publication = publish_run(repo, model_version="model-7")
    view = feature_views(repo / "instructue.yaml")[publication.current["churn"]]
    published = publication.view(view.name)
    assert view.tags["embedding_version"] == published.embedding_version
    assert view.tags["run"] == publication.run_id
    assert view.tags["as_of"] == "2017-10-01T00:00:00+00:00"
    assert view.tags["model_version"] == "model-7"
    assert view.tags["trained"] == "false"
    registered = open_store(repo).get_feature_view(view.name)
    assert registered.features[0].vector_index
    assert registered.features[0].vector_length == 8


def test_with_nothing_published_there_is_only_the_entity_and_a_line_that_says_so(repo, capsys):
    assert list(feature_views(repo / "instructue.yaml")) == ["user"]
    assert "Nothing is published" in capsys.readouterr().err
    for step in (apply_repo, materialize):
        with pytest.raises(ConfigError, match="nothing is published yet"):
            step(repo)


def test_materializing_before_applying_is_refused(repo):
    store = output(repo)
    publish(store, write_fake_run(store))
    with pytest.raises(VersionMismatchError, match="3 of its 3 current views are missing or older"):
        materialize(repo)
    apply_repo(repo)
    publish(store, write_fake_run(store, NOVEMBER))
    with pytest.raises(VersionMismatchError, match="run `feast apply` first"):
        materialize(repo)


def test_a_folder_that_is_no_feast_repo_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no feature_store\.yaml"):
        apply_repo(tmp_path)


def test_a_wrong_feature_store_yaml_is_reported_without_a_stack_of_pydantic(repo):
    (repo / "feature_store.yaml").write_text("project: x\nonline_store: {type: nonsense}\n")
    with pytest.raises(ConfigError, match="Feast cannot open"):
        open_store(repo)


def test_rows_that_did_not_arrive_are_noticed(repo, monkeypatch):
    publish_run(repo)
    write = materializing.open_store

    def forgetful(folder):
        store = write(folder)
        monkeypatch.setattr(store, "materialize", lambda *args, **options: None)
        return store

    monkeypatch.setattr(materializing, "open_store", forgetful)
    with pytest.raises(StorageError, match="serves 12 of 12 sampled users not at all"):
        materialize(repo)


def test_a_publication_that_moves_meanwhile_is_noticed(repo):
    publish_run(repo)
    later = write_fake_run(output(repo), NOVEMBER)

    def publish_once(view):
        if current_publication(output(repo)).run_id != later:
            publish(output(repo), later)

    with pytest.raises(PublishConflictError, match="was replaced while it was materialized"):
        materialize(repo, on_view=publish_once)


def test_feast_prints_nothing_into_the_output_of_a_command(repo, capfd):
    publish_run(repo)
    materialize(repo)
    UserEmbeddings(repo).get(["user-0001"])
    assert capfd.readouterr().out == ""
