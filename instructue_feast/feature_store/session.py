"""Opening a Feast repo in-process, without the noise that stock Feast makes on stdout, stderr and the log."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from feast import FeatureStore

from instructue_feast.errors import ConfigError

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)
_OVERWRITING: ContextVar[bool] = ContextVar("overwriting", default=False)


class _Silence:
    """No stdout, warnings of ibis or advice of Feast, for as long as somebody is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._undo = contextlib.ExitStack()

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            logger = logging.getLogger("feast.repo_config")
            self._undo.callback(logger.setLevel, logger.level)
            # It doubts `serve_features_while_materializing` with a file registry: it is needed.
            logger.setLevel(logging.ERROR)
            self._undo.enter_context(warnings.catch_warnings())
            self._undo.enter_context(contextlib.redirect_stdout(io.StringIO()))
            # ibis calls a duckdb function that will be renamed.
            warnings.filterwarnings("ignore", category=DeprecationWarning)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._undo.close()


_SILENCE = _Silence()


def open_store(repo: Path | str) -> FeatureStore:
    """Opens the Feast repo in a folder.

    Raises:
        ConfigError: There is no `feature_store.yaml` in it, or Feast refuses it.
    """
    folder = Path(repo).resolve()
    if not (folder / "feature_store.yaml").is_file():
        raise ConfigError(f"no feature_store.yaml in {folder}", "pass the folder of a Feast repo, such as feature_repo")
    with quiet():
        try:
            store = FeatureStore(repo_path=str(folder))
            # The registry is read lazily; the advice Feast logs about its settings comes with it.
            store.registry.list_entities(store.project)
        except Exception as error:  # anything comes out of Feast here, from pydantic errors to ImportError
            raise ConfigError(
                f"Feast cannot open {folder}: {error}", "mend feature_store.yaml in that folder"
            ) from error
    return store


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps Feast's prints and advice from mixing with what a command prints itself.

    Replaces the stdout of the whole process while any thread is inside; the last one out puts it back.
    """
    token = _QUIET.set(True)
    _SILENCE.enter()
    try:
        yield
    finally:
        _SILENCE.leave()
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether the code runs inside `quiet`: then our engine draws no progress bar either."""
    return _QUIET.get()


@contextlib.contextmanager
def overwriting(yes: bool) -> Iterator[None]:
    """Lets our engine replace newer rows of an online store, because what they came from was taken back."""
    token = _OVERWRITING.set(yes)
    try:
        yield
    finally:
        _OVERWRITING.reset(token)


def is_overwriting() -> bool:
    """Whether the code runs inside `overwriting(True)`."""
    return _OVERWRITING.get()
