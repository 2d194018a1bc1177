"""Full training steps on a GPU: sparsekern's beside those of others, in the same turns."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import traceback
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import cuda
from sparsekern.bench import memory, record
from sparsekern.bench.contenders import ENTRIES, Contender
from sparsekern.bench.gpu_kernels import BATCHES, FORCED, WARM_UP_STEPS, environment, one_line, release
from sparsekern.bench.options import Case
from sparsekern.bench.timing import Call, Clock

CONTENDERS = ("sparsekern", "sparsekern-cuda", "sparsify", "torch", "torch-compile")
RUN_BY = {**ENTRIES, "sparsekern-cuda": replace(ENTRIES["sparsekern"], environment=FORCED)}
"""How each is run; sparsekern-cuda has the CUDA C++ kernels where there are any, and Triton's for the rest."""
LR = 1e-4


def absent(name: str, device: torch.device) -> str | None:
    """Why a contender cannot take part; None where it can."""
    if name == "sparsekern-cuda":
        return cuda.missing(device)
    module = next(iter(RUN_BY[name].kind.imports), "torch").split(".")[0]
    return None if importlib.util.find_spec(module) else f"{module} is not installed"


class Entrant:
    """One contender with its weights in memory, warmed up, and what that has shown."""

    def __init__(self, name: str, case: Case, made: list[Tensor], clock: Clock) -> None:
        kind, device = RUN_BY[name].kind, clock.device
        self.variables = RUN_BY[name].environment
        kind.load()
        before = memory.resident(device)
        self.batches = made
        self.contender: Contender = kind(case, LR, device, torch.bfloat16)
        first = clock.seconds(lambda: self.step(0))
        possible = before is not None and memory.reset_peak(device)
        for number in range(1, WARM_UP_STEPS):
            self.step(number)
        clock.wait()
        highest, state = memory.peak(device) if possible else None, self.contender.state_bytes()
        self.facts: dict[str, Any] = {
            "timed": " ".join((kind.__doc__ or "").split()),
            "version": f"{kind.distribution} {importlib.metadata.version(kind.distribution)}",
            "first_call_s": first,
            "parameters_and_optimizer_bytes": state,
            "beyond_bytes": None if highest is None or before is None else max(0, highest - before - state),
        }

    def step(self, turn: int) -> Tensor:
        """A step on the batch of the turn."""
        with environment(self.variables):
            self.loss = self.contender.step(self.batches[turn % BATCHES])
        return self.loss


def measure(
    names: list[str], case: Case, made: list[Tensor], clock: Clock, *, turns: int, seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Steps of sparsekern, and of each other contender by turns with it, or alone where there is no room for both.

    Returns
    -------
    measured, failed
        By contender: times, tokens a second, ratio to sparsekern's step of the same turn, memory, and whether a step
        waited for the device; and the message of those that raised.
    """
    measured: dict[str, Any] = {}
    failed: dict[str, str] = {}
    ours: Entrant | None = None
    for name in ["sparsekern", *(name for name in names if name != "sparsekern")]:
        for alone in (False, True):
            try:
                entrant = Entrant(name, case, made, clock)
                ours = ours or (entrant if name == "sparsekern" else None)
                measured[name] = _timed(name, entrant, ours, clock, turns, seconds)
                failed.pop(name, None)
                again = False
            except Exception as error:
                failed[name] = one_line(error)
                again = isinstance(error, torch.OutOfMemoryError) and ours is not None and not alone
            entrant = None  # type: ignore[assignment]
            if again:
                ours = None  # makes room, for this one and those after it
            release(clock.device)
            if not again:
                break
    for name, found in measured.items():
        found["tokens_s"] = 1e3 * case.rows / found["step_ms"]["median"]
        if name != "sparsekern" and "over_sparsekern" not in found and "sparsekern" in measured:
            base = measured["sparsekern"]["step_ms"]["median"]
            found |= {"alone": True, "over_sparsekern": {at: ms / base for at, ms in found["step_ms"].items()}}
    return measured, failed


def _timed(
    name: str, entrant: Entrant, ours: Entrant | None, clock: Clock, turns: int, seconds: float
) -> dict[str, Any]:
    """Facts and times of a contender; beside sparsekern's where there is one."""
    calls: dict[str, Call] = {name: entrant.step}
    if ours is not None:
        calls["sparsekern"] = ours.step
    taken = clock.by_turns(calls, turns=turns, seconds=seconds, own_lead=True)
    found = {**entrant.facts, "step_ms": record.spread(taken[name]), "samples": len(taken[name])}
    if name != "sparsekern" and ours is not None:
        pairs = zip(taken[name], taken["sparsekern"], strict=True)
        found["over_sparsekern"] = record.spread([one / other for one, other in pairs])
    found["loss"] = entrant.loss.item()
    found["waits"] = waits(entrant, clock.device)
    return found


def waits(entrant: Entrant, device: torch.device) -> str | None:
    """Where a step waits for the device, as torch tells it; "no" if nowhere, None on a CPU, where all calls wait."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        entrant.step(0)
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "/torch/" not in f.filename]
        return f"{one_line(error)} ({frames[-1].name}, {frames[-1].filename.rsplit('/', 1)[-1]}:{frames[-1].lineno})"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"
