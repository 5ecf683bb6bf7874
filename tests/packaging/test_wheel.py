"""The wheel ships three import packages and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_wheel_holds_the_three_packages_with_their_data_files(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", "data", "build")
    for folder in ("instructue_feast", "kernels", "spark_jobs", "feature_repo", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=skip)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"instructue_feast", "instructue_kernels", "instructue_spark"}
    assert "instructue_feast/cli/report.html.jinja" in names
    assert "instructue_feast/datasets/complete_journey.yaml" in names
    assert "instructue_feast/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    shipped = {name for name in names if name.endswith(".py")}
    folders = (ROOT / "instructue_feast", ROOT / "kernels/instructue_kernels", ROOT / "spark_jobs/instructue_spark")
    written = {path.relative_to(one.parent).as_posix() for one in folders for path in one.rglob("*.py")}
    assert shipped == written
