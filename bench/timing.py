"""How long calls take on a device: events in its stream on a GPU, the host's clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Call = Callable[[int], object]
"""What is timed. It is given the number of the turn, so that inputs can go around and no cache holds them."""

SPILL_BYTES = 256 * 2**20  # several times the second-level cache of any GPU
MOST_LEADS = 8
FEWEST_TURNS = 3


class Clock:
    """Times calls by turns on one device.

    Before a timed call of a GPU a *lead-in* is put into the stream, untimed, and the host does not wait for it. By the
    time the device is through with it the host has queued the call, so that the events enclose work and no launches.
    The lead-in of kernels overwrites the second-level cache; that of steps is a step, as a training loop has it: where
    the host is too slow for the device, that shows.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._spill = torch.empty(SPILL_BYTES if self._cuda else 0, dtype=torch.uint8, device=device)
        self._spill_seconds = 0.0
        if self._cuda:
            self.seconds(self._spill.zero_)
            self._spill_seconds = self.seconds(self._spill.zero_)

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, call: Callable[[], object]) -> float:
        """One call with everything around it, on the host's clock."""
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - start

    def host_seconds(self, call: Callable[[], object]) -> float:
        """How long one call keeps the host before it returns."""
        self.wait()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.wait()
        return taken

    def by_turns(
        self, calls: dict[str, Call], *, turns: int, seconds: float, own_lead: bool = False
    ) -> dict[str, list[float]]:
        """Milliseconds of every call in every turn, in an order that rotates.

        Parameters
        ----------
        calls : dict[str, Call]
            By name; each was called before.
        turns : int
            How many, where there is time for them.
        seconds : float
            Bound on the time that all turns take together; there are at least three turns.
        own_lead : bool
            Whether a call's lead-in is the call itself.
        """
        leads = {name: self._lead(call, own_lead) for name, call in calls.items()}
        names, taken = list(calls), {name: list[float]() for name in calls}
        start = time.perf_counter()
        for turn in range(turns):
            if turn >= FEWEST_TURNS and (time.perf_counter() - start) * (turn + 1) / turn > seconds:
                break
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                leads[name](turn)
                taken[name].append(self._milliseconds(calls[name], turn))
        return taken

    def _lead(self, call: Call, own: bool) -> Call:
        if not self._cuda:
            return lambda turn: None
        if own:
            return call
        host = self.host_seconds(lambda: call(0))
        times = min(MOST_LEADS, 1 + int(1.5 * host / self._spill_seconds))
        return lambda turn: [self._spill.zero_() for _ in range(times)]

    def _milliseconds(self, call: Call, turn: int) -> float:
        if not self._cuda:
            return 1e3 * self.seconds(lambda: call(turn))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(turn)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
