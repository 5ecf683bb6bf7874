"""To the accelerator and back without waiting: pinned memory, and answers that are fetched a batch later.

While an accelerator computes one batch, the host gathers and lays out the next; it waits only for the batch before.
On a CPU nothing is copied and nothing is late.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IN_FLIGHT = 1
"""Batches an accelerator works on while the host prepares the next; each holds its inputs in the device's memory."""


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on the device; the copy to a GPU goes on while the host does something else."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """The embeddings of a batch, once they are on the host.

    Attributes:
        users: Position of each user in the whole.
        embeddings: `[B, K, D]` on the host; complete after `wait`.
        num_tokens: Tokens the batch read.
        event: Recorded behind the copy; None where nothing is late.
    """

    users: npt.NDArray[np.int64]
    embeddings: torch.Tensor
    num_tokens: int
    event: Any = None

    def wait(self) -> npt.NDArray[np.float32]:
        """The embeddings, after the copy has ended."""
        if self.event is not None:
            self.event.synchronize()
        values: npt.NDArray[np.float32] = self.embeddings.numpy()
        return values


def ask(users: npt.NDArray[np.int64], embeddings: torch.Tensor, num_tokens: int) -> Answer:
    """Starts to bring embeddings to the host."""
    if embeddings.device.type != "cuda":
        return Answer(users, embeddings.cpu(), num_tokens)
    host = torch.empty(embeddings.shape, dtype=embeddings.dtype, pin_memory=True)
    host.copy_(embeddings, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return Answer(users, host, num_tokens, event)


def in_turn(answers: Iterator[Answer], in_flight: int) -> Iterator[Answer]:
    """The same answers in the same order, each only after `in_flight` more were asked for."""
    waiting: deque[Answer] = deque()
    for one in answers:
        waiting.append(one)
        if len(waiting) > in_flight:
            yield waiting.popleft()
    yield from waiting
