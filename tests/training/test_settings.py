"""Settings: from YAML and key=value, with clear complaints."""

from __future__ import annotations

import pytest

from instructue_feast.errors import ConfigError
from instructue_feast.training.settings import TrainingSettings, read_settings


def test_a_file_and_overrides_make_settings(tmp_path):
    file = tmp_path / "training.yaml"
    file.write_text("training:\n  steps: 7\n  learning_rate: 1e-3\n  lora_targets: [q_proj, v_proj]\n")
    made = read_settings(file, ["steps=9", "report_to=[]", "lora_r=0", "learning_rate=2e-4"])
    assert (made.steps, made.learning_rate, made.lora_targets) == (9, 2e-4, ("q_proj", "v_proj"))
    assert (made.report_to, made.lora_r) == ((), 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step=5"], "unknown setting `step`"),
        (["steps=0"], "`steps`: Input should be greater"),
        (["steps"], "is not key=value"),
        (["negatives=random"], "`negatives`"),
        (["false_negative_margin=0.1"], "would drop exactly the answers that teach"),
        (["contrastive_weight=0", "autoregressive_weight=0"], "all three losses have weight 0"),
        (["autoregressive_pairs=0"], "autoregressive_weight without autoregressive_pairs"),
        (["steps=[1"], "not valid YAML"),
        (["learning_rate=.inf"], "`learning_rate`: Input should be a finite number"),
        (["contrastive_weight=.nan"], "`contrastive_weight`: Input should be a finite number"),
        (["seed=4294967296"], "`seed`: Input should be less than"),
    ],
)
def test_a_wrong_setting_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(overrides=overrides)


def test_an_unknown_setting_suggests_the_right_one():
    with pytest.raises(ConfigError, match="did you mean learning_rate"):
        read_settings(overrides=["learning_rat=1"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_settings(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="no mapping"):
        read_settings(tmp_path / "list.yaml")


def test_how_often_to_log_does_not_change_what_is_learned():
    plain = TrainingSettings()
    assert plain.digest() == TrainingSettings(logging_steps=3, threads=2, report_to=()).digest()
    assert plain.digest() != TrainingSettings(seed=1).digest()
