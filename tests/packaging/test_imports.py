"""What can be imported where: the serving host, the repo root, and beside Hugging Face's `kernels`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked by the test", name=name)
sys.meta_path.insert(0, Block())
"""


def python(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


def test_our_kernels_folder_does_not_shadow_hugging_faces_package():
    done = python(
        "import kernels, transformers.modeling_utils, instructue_kernels\n"
        "print(kernels.__file__); print(instructue_kernels.__file__)"
    )
    assert done.returncode == 0, done.stderr
    theirs, ours = done.stdout.split()
    assert "site-packages" in theirs
    assert ours == str(ROOT / "kernels" / "instructue_kernels" / "__init__.py")
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_command_line_starts_without_any_extra():
    done = python(
        "from instructue_feast.cli.main import main\nraise SystemExit(main(['--help']))",
        "torch", "transformers", "pyspark", "feast", "matplotlib", "sklearn", "jinja2", "duckdb",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for command in ("doctor", "data", "extract", "backfill", "publish", "materialize", "get", "demo"):
        assert command in done.stdout


def test_a_serving_host_needs_neither_spark_nor_transformers():
    done = python(
        "from instructue_feast.feature_store.lookup import UserEmbeddings\n"
        "UserEmbeddings('feature_repo')  # opens the shipped repo, as `instructue get` does",
        "torch", "transformers", "peft", "pyspark",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_model_and_inference_need_neither_feast_nor_spark():
    done = python(
        "import instructue_feast.inference.embedder, instructue_feast.model.factory, instructue_kernels",
        "feast",
        "pyspark",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["config", "schema", "instructions", "history.pack", "runs.publish"])
def test_plain_data_modules_load_without_torch(module):
    done = python(f"import instructue_feast.{module}", "torch", "transformers", "pyspark", "feast")
    assert done.returncode == 0, done.stderr
