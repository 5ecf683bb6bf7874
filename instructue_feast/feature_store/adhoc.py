"""Instructions nobody planned for, answered online: packed history in, one forward pass, user embedding out."""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from feast import FeatureStore

from instructue_feast.errors import MissingDependencyError, VersionMismatchError
from instructue_feast.feature_store.histories import HistoryView, histories_of, history_view
from instructue_feast.feature_store.online import to_micros
from instructue_feast.feature_store.readers import reader_of
from instructue_feast.history.pack import PackedHistory
from instructue_feast.instructions import Instruction
from instructue_feast.runs.history_bytes import decode_history, run_tag, tag_of
from instructue_feast.runs.reader import finished_runs, run_manifest
from instructue_feast.runs.store import OutputStore

if TYPE_CHECKING:
    from instructue_feast.inference.embedder import UserEmbedder

# U = users, D = embedding_dim
_KEPT_RUNS = 2  # the current one, and while it is being replaced the one before
_RESOLVE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Embedded:
    """What an instruction says about some users, in the order of the ids asked for.

    Attributes:
        vectors: `[U, D]` float32, unit-norm; zeros where `found` is false.
        found: `[U]` bool: the user has a packed history that has not outlived its ttl.
        as_of: `[U]` datetime64[us] in UTC, of the history; NaT for an unknown user.
        age: `[U]` timedelta64[us] since `as_of`.
        model_version: Of the model that read them; vectors of two model versions must not be compared.
        tokens: Prompt tokens of the forward passes that answered, company in the same batch included.
        seconds: Spent in those passes.
    """

    vectors: npt.NDArray[np.float32]
    found: npt.NDArray[np.bool_]
    as_of: npt.NDArray[np.datetime64]
    age: npt.NDArray[np.timedelta64]
    model_version: str
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Request:
    run_id: str
    values: list[bytes]
    user_ids: list[str]
    instruction: Instruction
    answer: Future[tuple[npt.NDArray[np.float32], int, float]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call: where its answers go."""

    view: HistoryView
    inverse: list[int]
    users: int
    times_us: dict[int, int]
    parts: list[tuple[list[int], Future[tuple[npt.NDArray[np.float32], int, float]]]]


class AdHocEmbeddings:
    """Embeds users of the online store under any instruction, with the model of the published run.

    The same `UserEmbedder` as in a backfill, over the same packed history and soft-token table: for an instruction that
    was backfilled the vectors are those of the batch. Requests that come within `window_seconds` of each other share
    forward passes when they ask the same thing. One thread runs the model.

    Args:
        store: The Feast store.
        service: Feature service whose model answers.
        window_seconds: How long a request waits for company; 0 for not at all.
        max_users: Users of one batch, after which nobody is waited for.
        dtype: Compute type of the LLM; that of the backfill gives its vectors.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        service: str,
        window_seconds: float = 0.005,
        max_users: int = 64,
        dtype: str = "float32",
    ) -> None:
        self._store, self._service, self._dtype = store, service, dtype
        self._window, self._max_users = window_seconds, max_users
        self._queue: queue.SimpleQueue[_Request] = queue.SimpleQueue()
        self._worker: tuple[int, threading.Thread] | None = None
        self._lock = threading.Lock()
        self._embedders: dict[str, UserEmbedder] = {}
        self._version = ""  # of the model in them
        self._view: HistoryView | None = None
        self._resolve_at = 0.0

    def embed(
        self, user_ids: Sequence[str], instruction: str | Instruction, *, now: datetime | None = None
    ) -> Embedded:
        """Embeds users under one instruction.

        Args:
            user_ids: `U` ids, in any order, repeats allowed; checked by the caller.
            instruction: Its words; or an `Instruction`, whose soft prompt must be one of the run's.
            now: What age and ttl are measured against; the present by default.

        Raises:
            ConfigError: No packed histories are published, or the instruction holds prompt markup or is too long.
            VersionMismatchError: The store holds histories of a run that is gone.
            MissingDependencyError: The extra `model` is not installed.
            StorageError: The online store or the run cannot be read.
        """
        asked = self._ask(user_ids, instruction, now)
        return _answer(asked, [part.result() for _, part in asked.parts], now)

    async def embed_async(
        self, user_ids: Sequence[str], instruction: str | Instruction, *, now: datetime | None = None
    ) -> Embedded:
        """The same without blocking the event loop; concurrent calls share forward passes."""
        asked = await asyncio.to_thread(self._ask, user_ids, instruction, now)
        return _answer(asked, await asyncio.gather(*(asyncio.wrap_future(part) for _, part in asked.parts)), now)

    def _ask(self, user_ids: Sequence[str], instruction: str | Instruction, now: datetime | None) -> _Asked:
        if isinstance(instruction, str):
            instruction = Instruction("ad_hoc", instruction)
        view = self._current()
        position = {one: row for row, one in enumerate(dict.fromkeys(user_ids))}
        found = histories_of(reader_of(self._store, view.join_key), view.stored, list(position))
        oldest = None
        if view.ttl:
            oldest = (time.time_ns() // 1_000 if now is None else to_micros(now)) - view.ttl // timedelta(
                microseconds=1
            )
        by_tag: dict[bytes, list[int]] = {}
        times = {}
        for row, one in enumerate(found):
            if one is None:
                continue
            times[row] = one[1]
            if oldest is None or one[1] >= oldest:
                by_tag.setdefault(tag_of(one[0]), []).append(row)
        names = list(position)
        parts = []
        for tag, rows in by_tag.items():
            request = _Request(
                run_id=self._run_of(tag, view),
                values=[own[0] for own in (found[row] for row in rows) if own],
                user_ids=[names[row] for row in rows],
                instruction=instruction,
                answer=Future(),
            )
            self._start()
            self._queue.put(request)
            parts.append((rows, request.answer))
        return _Asked(view, [position[one] for one in user_ids], len(position), times, parts)

    def _current(self) -> HistoryView:
        if self._view is None or time.monotonic() >= self._resolve_at:
            self._view = history_view(self._store, self._service)
            self._resolve_at = time.monotonic() + _RESOLVE_SECONDS
        return self._view

    def _run_of(self, tag: bytes, view: HistoryView) -> str:
        """The run of a stored history: the published one, or while it is being materialized the one before."""
        if tag == run_tag(view.run_id):
            return view.run_id
        store = OutputStore(view.root)
        for name in reversed(finished_runs(store)):
            if run_tag(name) == tag and run_manifest(store, name).model_version == view.model_version:
                return name
        raise VersionMismatchError(
            f"view {view.stored.view} holds packed histories of a run that is gone", "materialize the current run"
        )

    # ------------------------------------------------------------------------------------------- the model's thread

    def _start(self) -> None:
        with self._lock:
            if self._worker is None or self._worker[0] != os.getpid() or not self._worker[1].is_alive():
                thread = threading.Thread(target=self._work, name="instructue-ad-hoc", daemon=True)
                self._worker = os.getpid(), thread
                thread.start()

    def _work(self) -> None:
        while True:
            batch = [self._queue.get()]
            users, until = len(batch[0].user_ids), time.monotonic() + self._window
            while users < self._max_users:
                try:
                    batch.append(self._queue.get(timeout=max(0.0, until - time.monotonic())))
                except queue.Empty:
                    break
                users += len(batch[-1].user_ids)
            alike: dict[tuple[str, str], list[_Request]] = {}
            for one in batch:
                if not one.answer.set_running_or_notify_cancel():
                    continue  # nobody waits any more; from here on nobody can leave
                alike.setdefault((one.run_id, one.instruction.content_hash), []).append(one)
            for requests in alike.values():
                self._run(requests)

    def _run(self, requests: list[_Request]) -> None:
        try:
            vectors, tokens, seconds = self._encode(requests)
        except BaseException as error:
            if len(requests) > 1:  # one of them may be to blame
                for one in requests:
                    self._run([one])
            else:
                requests[0].answer.set_exception(error)
            return
        start = 0
        for one in requests:
            one.answer.set_result((vectors[start : start + len(one.user_ids)], tokens, seconds))
            start += len(one.user_ids)

    def _encode(self, requests: list[_Request]) -> tuple[npt.NDArray[np.float32], int, float]:
        embedder = self._embedder(requests[0].run_id)
        started, passes = time.perf_counter(), []
        config = embedder.model.config
        history = PackedHistory.from_arrow(
            decode_history(
                [value for one in requests for value in one.values],
                [user for one in requests for user in one.user_ids],
            ),
            num_sources=len(config.sources or []),
            num_numeric=len(config.numeric_columns or []),
            where="packed histories of the online store",
        )
        vectors = embedder.encode(history, [requests[0].instruction], on_batch=lambda _, tokens: passes.append(tokens))
        return vectors[:, 0], sum(passes), time.perf_counter() - started

    def _embedder(self, run_id: str) -> UserEmbedder:
        if run_id not in self._embedders:
            try:
                from instructue_feast.inference.from_run import open_embedder
            except ImportError as error:
                raise MissingDependencyError(
                    f"answering an instruction needs the model: {error}", "pip install 'instructue-feast[serve,model]'"
                ) from None
            view = self._current()
            store = OutputStore(view.root)
            version = run_manifest(store, run_id).model_version
            if version != view.model_version:
                raise VersionMismatchError(
                    f"run {run_id} was made by model version {version[:8]}, the registry says {view.model_version[:8]}",
                    "register the publication again with `feast apply`",
                )
            if self._version != version:
                self._embedders.clear()
            model = next((one.model for one in self._embedders.values()), None)
            while len(self._embedders) >= _KEPT_RUNS:
                self._embedders.pop(next(iter(self._embedders)))
            self._embedders[run_id] = open_embedder(store, run_id, dtype=self._dtype, model=model)
            self._version = version
        return self._embedders[run_id]


def _answer(
    asked: _Asked, parts: Sequence[tuple[npt.NDArray[np.float32], int, float]], now: datetime | None
) -> Embedded:
    view = asked.view
    dim = parts[0][0].shape[1] if parts else run_manifest(OutputStore(view.root), view.run_id).embedding_dim
    vectors, found = np.zeros((asked.users, dim), np.float32), np.zeros(asked.users, np.bool_)
    as_of = np.full(asked.users, np.datetime64("NaT", "us"))
    for row, micros in asked.times_us.items():
        as_of[row] = np.datetime64(micros, "us")
    for (rows, _), (own, _, _) in zip(asked.parts, parts, strict=True):
        vectors[rows], found[rows] = own, True
    present = np.datetime64(time.time_ns() // 1_000 if now is None else to_micros(now), "us")
    inverse = np.array(asked.inverse, np.int64)
    return Embedded(
        vectors=vectors[inverse],
        found=found[inverse],
        as_of=as_of[inverse],
        age=present - as_of[inverse],
        model_version=view.model_version,
        tokens=sum(tokens for _, tokens, _ in parts),
        seconds=sum(seconds for _, _, seconds in parts),
    )
