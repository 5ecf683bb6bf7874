"""Local folders: replaced in one step, with the rights that new files have."""

from __future__ import annotations

import shutil
import stat
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


def give_usual_rights(folder: Path) -> None:
    """Gives every file below `folder` the rights that a new file gets there.

    For files of libraries that write for their owner alone. The rights are read off a file that is made for it:
    asking for the umask means to set it, which every thread of the process would notice.

    Args:
        folder: A folder that nobody else writes into, such as the scratch folder of `replacing`.

    Raises:
        OSError: The disk is full or the folder is not writable.
    """
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.touch(mode=0o666, exist_ok=False)
        rights = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(rights)
