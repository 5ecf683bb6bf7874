"""SIGTERM to the command line reaches the job it waits for, and what the job says of it is the error."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

JOB = """
import json, signal, sys, time
def stop(*_):
    error = {"event": "error", "type": "StoppedError", "message": "told to stop", "hint": "resume"}
    print(json.dumps(error), flush=True)
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
MAIN = """
from pathlib import Path
from instructue_feast.cli.jobs import run_job
run_job("job_to_stop", [], log=Path("job.log"), quiet=True)
"""


def test_sigterm_stops_the_job_and_its_explanation_is_shown(tmp_path: Path):
    (tmp_path / "job_to_stop.py").write_text(JOB)
    process = subprocess.Popen([sys.executable, "-c", MAIN], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "job.log"
    while "ready" not in (log.read_text() if log.exists() else ""):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "StoppedError: told to stop" in error
