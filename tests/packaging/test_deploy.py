"""The deployment examples, as far as they can be checked without their services: every command and extra exists."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import typer
import yaml

from instructue_feast.cli.main import app

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs" / "deploy"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check_command(words: list[str]) -> None:
    """Parses `instructue ...` as the command line does, without running it."""
    assert words[0] == "instructue"
    command, rest = typer.main.get_command(app), words[1:]
    while hasattr(command, "commands"):
        name, *rest = rest
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    command.make_context(command.name, list(rest), resilient_parsing=False)


def commands(text: str) -> list[list[str]]:
    """The `instructue` commands of a shell text or a document, with continued lines joined."""
    text = text.replace("\\\n", " ")
    found = [re.split(r"\s(?:\|\||&&|#|>|\|)\s?", line.strip())[0] for line in text.splitlines()]
    return [shlex.split(line) for line in found if line.startswith("instructue ")]


def check_job(arguments: list[str], module: str, monkeypatch) -> None:
    """Parses the arguments of a Spark job as its `main` does."""
    parsed = []

    def parse(self, args=None):
        parsed.append(argparse.ArgumentParser.parse_known_args(self, args))
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main(arguments)
    assert stopped.value.code == 0
    assert parsed[0][1] == []


def test_a_wrong_command_is_noticed():
    with pytest.raises(Exception, match="no-such-option"):
        check_command(shlex.split("instructue backfill --no-such-option"))
    with pytest.raises(AssertionError):
        check_command(["instructue", "no-such-command"])


def test_the_cron_job_runs_commands_that_exist():
    spec = yaml.safe_load((DEPLOY / "cronjob.yaml").read_text())["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    pod = spec["jobTemplate"]["spec"]["template"]["spec"]
    (backfill,), (materialize,) = pod["initContainers"], pod["containers"]
    found = commands(backfill["args"][0])
    assert [one[1] for one in found] == ["backfill"]
    for one in [*found, materialize["command"]]:
        check_command(one)
    mounted = {one["name"] for container in (backfill, materialize) for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in pod["volumes"]}


def test_the_spark_application_starts_a_job_with_one_task_per_gpu(monkeypatch):
    spec = yaml.safe_load((DEPLOY / "sparkapplication.yaml").read_text())["spec"]
    module = re.search(r"(instructue_spark/\w+)\.py$", spec["mainApplicationFile"]).group(1)
    assert (ROOT / "spark_jobs" / f"{module}.py").is_file()
    check_job(spec["arguments"], module.replace("/", "."), monkeypatch)
    conf = spec["sparkConf"]
    assert conf["spark.speculation"] == "false"
    assert conf["spark.task.resource.gpu.amount"] == conf["spark.executor.resource.gpu.amount"] == "1"
    assert spec["executor"]["gpu"]["quantity"] == 1
    assert (
        f"COPY docs/deploy/gpus.sh {conf['spark.executor.resource.gpu.discoveryScript']}"
        in (DEPLOY / "Dockerfile").read_text()
    )


def test_the_airflow_dag_runs_commands_that_exist_in_order(monkeypatch):
    tasks, order = {}, []

    class Operator:
        def __init__(self, *, task_id: str, bash_command: str, **_):
            self.name = task_id
            tasks[task_id] = bash_command

        def __rshift__(self, other):
            order.append((self.name, other.name))
            return other

    class Dag:
        def __init__(self, dag_id: str, **values):
            assert values["max_active_runs"] == 1

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    stubs = {
        "airflow": {"DAG": Dag}, "airflow.operators": {}, "airflow.operators.bash": {"BashOperator": Operator}
    }  # fmt: skip
    for name, values in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(values)
        monkeypatch.setitem(sys.modules, name, module)
    file = DEPLOY / "airflow_dag.py"
    ast.parse(file.read_text())
    spec = importlib.util.spec_from_file_location("airflow_dag", file)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert order == [("backfill", "publish"), ("publish", "materialize")]
    for command in tasks.values():
        words = shlex.split(re.sub(r"\{\{.*?\}\}", "2026-01-01", command))
        check_command(words)


def test_the_image_installs_extras_and_copies_files_that_exist():
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    assert re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE) == ["base", "cpu", "cuda"]
    asked = [one.split(",") for one in re.findall(r"'\.\[([\w,]+)\]'", text)]
    assert len(asked) == 2
    for extras in asked:
        assert set(extras) <= set(EXTRAS)
        assert {"spark", "model", "serve"} <= set(extras)
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((ROOT / one).exists() for one in sources), line


def test_the_discovery_script_answers_in_sparks_form(tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["sh", DEPLOY / "gpus.sh"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == '{"name": "gpu", "addresses": ["0", "1"]}'


@pytest.mark.parametrize("document", ["clusters.md", "operations.md"])
def test_the_commands_of_a_document_exist(document):
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)
    found = [one for block in blocks for one in commands(block)]
    assert found
    for one in found:
        check_command(one)
