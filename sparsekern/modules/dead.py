"""Which latents are dead, as rows of a size that is known without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

LOOKAHEAD = 8
"""Batches between asking a GPU for a count and using it."""


class DeadRows(NamedTuple):
    """The rows of the dead latents.

    Attributes
    ----------
    rows : Tensor [n] int64
        Latents; the unused places at the end hold 0.
    used : Tensor [n] bool, or None
        Which places are used; None where all are.
    """

    rows: Tensor
    used: Tensor | None


def dead_rows(dead: Tensor, bound: int | None) -> DeadRows:
    """The rows of the mask `dead` ``[d_sae]``: exactly as many, or in `bound` places, of which it needs no more."""
    if bound is None:
        return DeadRows(dead.nonzero().squeeze(1), None)
    place = torch.where(dead, dead.cumsum(0) - 1, bound)  # the place after the last takes those that are not
    rows = torch.zeros(bound + 1, dtype=torch.int64, device=dead.device)
    rows.scatter_(0, place.clamp(max=bound), torch.arange(dead.shape[0], device=dead.device))
    used = torch.arange(bound, device=dead.device) < dead.sum()
    return DeadRows(torch.where(used, rows[:bound], 0), used)


class _Asked(NamedTuple):
    """A count on its way from the GPU, which holds up to `horizon` tokens."""

    answer: Tensor
    event: torch.cuda.Event
    horizon: int


class DeadBound:
    """An upper bound on the number of dead latents, without waiting for the GPU.

    A latent cannot be dead in :data:`LOOKAHEAD` batches unless it has already been silent for all but those batches. So
    after every batch the latents that could be dead by then are counted; the count travels while the GPU works on,
    and has long arrived when it is used. The bound is a power of two, so that shapes seldom change, and a function of
    the data alone. Where no count holds (at the start, after larger batches, or when somebody else changed the
    counters) the GPU is waited for.
    """

    def __init__(self) -> None:
        self._asked: deque[_Asked] = deque()
        self._tokens = 0
        self._version = -1

    def __reduce__(self) -> tuple[type[DeadBound], tuple[()]]:
        return DeadBound, ()  # a copy of the module asks anew

    def bound(self, tokens_since_fired: Tensor, dead_after: int) -> int:
        """At least the number of latents that have been silent for `dead_after` tokens; 0 or a power of two."""
        if tokens_since_fired._version != self._version:
            self._asked.clear()
        found = None
        if len(self._asked) == LOOKAHEAD:
            asked = self._asked.popleft()
            if asked.horizon >= self._tokens:
                asked.event.synchronize()  # of LOOKAHEAD batches ago
                found = int(asked.answer)
        if found is None:
            found = int((tokens_since_fired >= dead_after).sum())
        return 1 << (found - 1).bit_length() if found else 0

    def ask(self, tokens_since_fired: Tensor, dead_after: int, batch: int) -> None:
        """Count for later, after a `batch` of so many tokens has been counted in `tokens_since_fired`."""
        self._tokens += batch
        self._version = tokens_since_fired._version
        ahead = LOOKAHEAD * batch
        answer = torch.empty((), dtype=torch.int64, pin_memory=True)
        answer.copy_((tokens_since_fired >= dead_after - ahead).sum(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._asked.append(_Asked(answer, event, self._tokens + ahead))
