"""Replacing a local folder in one step."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from instructue_feast.errors import StorageError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Gives an empty scratch folder that takes the place of `target` when the block ends without an error.

    Until then `target` stays as it was; after an error the scratch folder is gone.

    Raises:
        StorageError: The disk is full or the location is not writable.
    """
    scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex}.old")
    try:
        scratch.mkdir(parents=True)
        yield scratch
        if target.exists():
            target.rename(old)
        scratch.rename(target)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", "free disk space or mend the rights") from None
    finally:
        if old.exists() and not target.exists():  # the second rename failed: put the old folder back
            old.rename(target)
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
