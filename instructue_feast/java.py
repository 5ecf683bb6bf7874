"""Finding the Java that Spark will start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from instructue_feast.errors import MissingDependencyError

MIN_JAVA = 17


def require_java() -> int:
    """Returns the major version of the Java that Spark will start: below `JAVA_HOME` if that is set, else on the path.

    Raises:
        MissingDependencyError: There is none, or it is older than 17.
    """
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    hint = f"install a Java {MIN_JAVA} or newer runtime (Debian: openjdk-17-jre-headless), or set JAVA_HOME"
    if java is None:
        place = f"below JAVA_HOME={home}" if home else "on the PATH"
        raise MissingDependencyError(f"Spark needs Java {MIN_JAVA}, and there is no java {place}", hint)
    try:
        done = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False)
        found = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    except (OSError, subprocess.TimeoutExpired):
        found = None
    if found is None:
        raise MissingDependencyError(f"{java} does not run", hint)
    version = int(found.group(1))
    if version < MIN_JAVA:
        raise MissingDependencyError(f"{java} is Java {version}, Spark needs {MIN_JAVA}", hint)
    return version
