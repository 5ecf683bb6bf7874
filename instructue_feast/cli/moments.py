"""Points in time on the command line: one, a list, a file of them, or one every so many days."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from instructue_feast.errors import ConfigError
from instructue_feast.runs.manifest import parse_as_of

_EVERY = re.compile(r"^(\d+)([dw])$")


def moments(
    start: str | None,
    end: str | None,
    every: str | None,
    as_ofs: Sequence[str] | None,
    file: Path | None = None,
) -> list[datetime]:
    """All points in time that were asked for, ascending, each once.

    Args:
        start: The first of a series.
        end: The last possible one of it.
        every: Its step, `14d` or `4w`.
        as_ofs: Single ones.
        file: A text file with one in each line; empty lines and those that begin with `#` are skipped.

    Raises:
        ConfigError: Not a timestamp, in the future, half a series, or an unreadable file.
    """
    found = {moment(one, "--as-of") for one in as_ofs or ()}
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeError) as error:
            raise ConfigError(f"cannot read {file}: {type(error).__name__}", "pass a text file") from None
        found |= {moment(line, str(file)) for line in lines if line and not line.startswith("#")}
    if (start is None) != (end is None):
        raise ConfigError("--from and --to belong together", "give both, or use --as-of")
    if start is not None and end is not None:
        step = _EVERY.match(every or "")
        if not step or not int(step.group(1)):
            raise ConfigError(f"--every {every or ''!r}", "write it as 14d or 4w")
        at, last = moment(start, "--from"), moment(end, "--to")
        if at > last:
            raise ConfigError("--from lies after --to", "exchange them")
        while at <= last:
            found.add(at)
            at += timedelta(days=int(step.group(1)) * (7 if step.group(2) == "w" else 1))
    return sorted(found)


def moment(text: str, option: str) -> datetime:
    """Reads a time; a bare date is midnight UTC.

    Raises:
        ConfigError: Not a timestamp with time zone, or in the future.
    """
    try:
        return parse_as_of(f"{text}T00:00:00Z" if re.fullmatch(r"\d{4}-\d\d-\d\d", text) else text)
    except ConfigError as error:
        raise ConfigError(f"{option}: {error.message}", error.hint) from None
