"""Project folders are complete, load, and are never half-written."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from instructue_feast.config import load_config
from instructue_feast.datasets import project
from instructue_feast.datasets.project import (
    CHECKPOINT,
    STAMP,
    TEMPLATES,
    checkpoint_folder,
    has_old_checkpoint,
    is_current,
    project_files,
    read_stamp,
    render_config,
    write_project,
)
from instructue_feast.errors import ConfigError, StorageError
from instructue_feast.files import replacing
from instructue_feast.model.factory import load_model
from instructue_feast.training.settings import read_settings

FEATURE_REPO = Path(__file__).parents[2] / "feature_repo"


@pytest.mark.parametrize("name", ["instructue.yaml", "user_qa.yaml", "feature_store.yaml", "definitions.py"])
def test_the_feature_repo_is_the_template_pointed_at_the_demo(name: str) -> None:
    files = project_files("complete_journey", raw="../build/demo/raw", output="../build/demo/output", model=None)
    assert (FEATURE_REPO / name).read_text(encoding="utf-8") == files[name]


def test_a_copy_of_the_feature_repo_needs_nothing_beside_it(tmp_path: Path) -> None:
    shutil.copytree(FEATURE_REPO, tmp_path / "mine", ignore=shutil.ignore_patterns("data"))
    config = load_config(tmp_path / "mine" / "instructue.yaml")
    assert config.model.path is None  # a model of other sources would not fit
    assert config.user_qa is not None
    settings = read_settings(tmp_path / "mine" / "training.yaml")
    assert (settings.data_name, settings.data_terms) == ("", "")


def test_the_command_that_trained_the_shipped_model_names_its_data_and_can_be_repeated(tmp_path: Path) -> None:
    notes = re.findall(r"^#(.*)$", (FEATURE_REPO / "training.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    command = "\n".join(notes).partition("instructue train")[2].partition("\n\n")[0]
    commands = shlex.split(command.replace("\\\n", ""))
    changes = [after for before, after in itertools.pairwise(commands) if before == "--set"]
    settings = read_settings(FEATURE_REPO / "training.yaml", changes)
    folder = checkpoint_folder("complete_journey")
    assert folder is not None
    shipped = json.loads((folder / "training.json").read_text(encoding="utf-8"))["settings"]
    assert (settings.data_name, settings.data_terms) == (shipped["data_name"], shipped["data_terms"])
    write_project(tmp_path, "complete_journey")
    assert not (tmp_path / commands[commands.index("--out") + 1]).exists()


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_loads_with_paths_inside_its_folder(tmp_path: Path, template: str) -> None:
    config = load_config(write_project(tmp_path, template))
    assert config.project == template
    assert len(config.instructions) == 3
    assert config.output.path == str(tmp_path / "output")
    assert {source.table.path for source in config.sources.values()} == {
        str(tmp_path / "raw" / name) for name in config.sources
    }


def test_raw_tables_and_output_can_live_elsewhere(tmp_path: Path) -> None:
    config = load_config(write_project(tmp_path / "project", "synthetic", raw="../lake", output="s3://bucket/out"))
    assert config.sources["spm"].table.path == str(tmp_path / "lake" / "spm")
    assert config.users is not None
    assert config.users.table.path == str(tmp_path / "lake" / "users")
    assert config.output.path == "s3://bucket/out"


def test_the_feature_store_settings_are_accepted_by_feast(tmp_path: Path) -> None:
    from feast.repo_config import load_repo_config

    write_project(tmp_path, "complete_journey")
    settings = load_repo_config(tmp_path, tmp_path / "feature_store.yaml")
    assert settings.entity_key_serialization_version == 3
    assert settings.registry.serve_features_while_materializing is True
    assert settings.materialization_config.online_write_batch_size == 10_000
    assert settings.offline_store.type == "duckdb"
    assert settings.online_store.type.endswith("InstructueSqliteOnlineStore")
    assert settings.batch_engine.fallback == "local"


def test_a_config_somebody_changed_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    config = write_project(tmp_path, "synthetic")
    write_project(tmp_path, "synthetic")
    assert not list(tmp_path.glob("*.bak"))
    config.write_text("project: mine\n", encoding="utf-8")
    write_project(tmp_path, "synthetic")
    assert (tmp_path / "instructue.yaml.bak").read_text(encoding="utf-8") == "project: mine\n"
    assert config.read_text(encoding="utf-8") == render_config("synthetic")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        STAMP, "definitions.py", "feature_store.yaml", "instructue.yaml", "instructue.yaml.bak", "user_qa.yaml",
    ]  # fmt: skip


def test_questions_may_stand_in_a_file_of_their_own_or_in_the_config(tmp_path: Path) -> None:
    path = write_project(tmp_path, "synthetic")
    apart = load_config(path)
    assert apart.user_qa is not None
    questions = yaml.safe_load((tmp_path / "user_qa.yaml").read_text(encoding="utf-8"))
    together = yaml.safe_load(path.read_text(encoding="utf-8")) | questions
    path.write_text(yaml.safe_dump(together, sort_keys=False), encoding="utf-8")
    assert load_config(path) == apart
    path.write_text(render_config("synthetic").replace("user_qa.yaml", "nowhere.yaml"), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"user_qa: no file at .*nowhere\.yaml"):
        load_config(path)


def test_an_unknown_template_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown project template") as error:
        write_project(tmp_path, "syntetic")
    assert "did you mean synthetic?" in error.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_project_where_no_folder_can_be_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot write"):
        write_project(tmp_path / "file", "synthetic")


def test_a_project_gets_its_own_copy_of_the_trained_model_and_keeps_what_is_there(tmp_path: Path) -> None:
    config = load_config(write_project(tmp_path, "complete_journey"))
    assert config.model.path == str(tmp_path / CHECKPOINT)
    assert load_model(config).config.trained
    weights = tmp_path / CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 20e6
    weights.write_bytes(b"retrained")
    write_project(tmp_path, "complete_journey")
    assert weights.read_bytes() == b"retrained"
    assert load_config(write_project(tmp_path / "synthetic", "synthetic")).model.path is None


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_project_knows_whether_this_package_wrote_it(tmp_path: Path, template: str) -> None:
    assert not is_current(tmp_path, template)
    write_project(tmp_path, template)
    assert is_current(tmp_path, template)
    stamp = read_stamp(tmp_path)
    for other in ({"data": "of another release"}, {"checkpoint": "of another release"}):
        (tmp_path / STAMP).write_text(json.dumps(stamp | other), encoding="utf-8")
        assert not is_current(tmp_path, template)
    (tmp_path / STAMP).write_text("{", encoding="utf-8")  # cut short
    assert not is_current(tmp_path, template)


def test_an_old_copy_of_the_model_is_told_from_a_model_that_was_trained_there(tmp_path: Path) -> None:
    write_project(tmp_path, "complete_journey")
    assert not has_old_checkpoint(tmp_path, "complete_journey")
    weights = tmp_path / CHECKPOINT / "model.safetensors"
    weights.write_bytes(b"other weights")
    assert not has_old_checkpoint(tmp_path, "complete_journey")  # they are not those the project got
    (tmp_path / STAMP).unlink()  # as an older package left it
    assert has_old_checkpoint(tmp_path, "complete_journey")
    write_project(tmp_path, "complete_journey")
    assert has_old_checkpoint(tmp_path, "complete_journey")
    assert not is_current(tmp_path, "complete_journey")
    shutil.rmtree(tmp_path / CHECKPOINT)
    write_project(tmp_path, "complete_journey")
    assert not has_old_checkpoint(tmp_path, "complete_journey")
    assert is_current(tmp_path, "complete_journey")


def test_a_copy_that_an_older_package_noted_is_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = tmp_path / "newer"
    write_project(tmp_path / "project", "complete_journey")
    shutil.copytree(tmp_path / "project" / CHECKPOINT, newer)
    (newer / "model.safetensors").write_bytes(b"better weights")
    monkeypatch.setattr(project, "checkpoint_folder", lambda _template: newer)
    assert has_old_checkpoint(tmp_path / "project", "complete_journey")
    assert not is_current(tmp_path / "project", "complete_journey")


def _write_half(target: Path) -> None:
    with replacing(target) as scratch:
        (scratch / "half").touch()
        (scratch / "other half").write_text(str(1 / 0), encoding="utf-8")


def test_a_folder_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "raw"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(ZeroDivisionError):
        _write_half(target)
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "old"]
    with replacing(target) as scratch:
        (scratch / "new").touch()
        assert (target / "old").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["raw", "new"]


def test_templates_explain_themselves_and_stay_short() -> None:
    for template in TEMPLATES:
        lines = render_config(template).splitlines()
        assert lines[0].startswith("# ")
        assert len(lines) < 100
        assert yaml.safe_load("\n".join(lines))["project"] == template
