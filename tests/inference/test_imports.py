"""Model and inference run on a machine that has neither Feast nor Spark."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
for name in ("feast", "pyspark"):
    sys.modules[name] = None  # any import of it fails
import instructue_feast.inference.embedder
import instructue_feast.inference.soft_tokens
import instructue_feast.inference.version
import instructue_feast.model.factory
import instructue_kernels.adapter
assert "pandas" not in sys.modules
"""


def test_model_and_inference_import_without_feast_and_spark():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_config_module_is_all_that_the_package_itself_loads():
    code = "import sys, instructue_feast.model, instructue_feast.inference; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
