"""The process that one contender, or the kernels, run in: ``python -m sparsekern.bench.worker``.

It answers one line of JSON on its standard input with one on its standard output. Between two requests it blocks on the
pipe and takes no processor time. The requests:

``{"do": "open", "what": …, "case": …, "batches": …, "lr": …, "warm_up": …, "seed": …}``
    Build, train `warm_up` steps, and answer with the names of what can be timed and with ``facts`` about it.
``{"do": "time", "call": …, "batch": …}``
    Run one call once and answer with its milliseconds.
``{"do": "close"}``
    Answer with the facts of the end.

The answer is ``{"ok": …}`` or ``{"error": traceback}``.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from sparsekern.backends import cpu
from sparsekern.bench import kernels, memory
from sparsekern.bench.architectures import ENTRIES
from sparsekern.bench.contenders import Contender, Sparsekern, Torch, TorchCompile
from sparsekern.bench.options import Case


class Session:
    """One contender at one case, from `open` to `close`."""

    def __init__(self, request: dict[str, Any]) -> None:
        torch.manual_seed(request["seed"])
        self.case = Case(**request["case"])
        self.batches = load_file(request["batches"])["x"].clone()
        self.loss = torch.tensor(float("nan"))
        self.what = request["what"]
        kind = Sparsekern if self.what == "kernels" else ENTRIES[self.what].kind
        kind.load()
        rehearse(kind)
        before = memory.resident()
        self.contender: Contender = kind(self.case, request["lr"])
        self._take(0)
        self.facts = {
            "timed": " ".join((kind.__doc__ or "").split()),
            "version": f"{kind.distribution} {importlib.metadata.version(kind.distribution)}",
            "threads": torch.get_num_threads(),
            "cpu_kernels": cpu.isa() or "not built",
        }
        self._step(0)  # compilation and the fit of the start happen once, and are no part of a step's memory
        possible = before is not None and memory.reset_peak()
        for number in range(1, request["warm_up"]):
            self._step(number)
        highest = memory.peak() if possible else None
        self.contender.settle(self.batch[0])
        if self._varies():
            self.facts["l0"] = self._l0()
        state = self.contender.state_bytes()
        self.facts["parameters_and_optimizer_bytes"] = state
        self.facts["beyond_bytes"] = None if highest is None or before is None else highest - before - state
        self.calls: dict[str, Callable[[], object]]
        if self.what == "kernels":
            grad = torch.randn(self.case.rows, self.case.d)
            sae = self.contender.module
            (x,) = self.batch
            self.calls = kernels.calls(sae, self.case.k, x, grad)
            self.facts["encode_bytes"] = memory.growth(self.calls["topk_encode"])
            self.facts["exactness"] = kernels.exactness(sae, self.case.k, x)
        else:
            weight = self.contender.encoder().detach()
            self.calls = {
                "matmul": lambda: self.rows @ weight.T,
                "step": lambda: self.contender.step(*self.batch),
            }
        for call in self.calls.values():
            call()

    def _take(self, number: int) -> None:
        """Make the batch of a turn, of as many layers as the contender wants: here, that many batches."""
        layers = [self.batches[(number + layer) % len(self.batches)] for layer in range(self.contender.layers)]
        self.batch = self.contender.inputs(torch.stack(layers) if len(layers) > 1 else layers[0][None])
        self.rows = self.contender.rows(self.batch[0])

    def _step(self, number: int) -> None:
        self._take(number)
        self.loss = self.contender.step(*self.batch)

    def _varies(self) -> bool:
        """Whether the number of active latents does."""
        return type(self.contender).settle is not Contender.settle

    @torch.no_grad()
    def _l0(self) -> float:
        """Active latents a token of the batch, as the library itself encodes."""
        return self.contender.reconstruct(self.batch[0])[1].double().mean().item()

    def time(self, request: dict[str, Any]) -> dict[str, float]:
        """Run one call."""
        self._take(request["batch"])
        call = self.calls[request["call"]]
        start = time.perf_counter()
        result = call()
        elapsed = time.perf_counter() - start
        if request["call"] == "step":
            assert isinstance(result, torch.Tensor)
            self.loss = result
        return {"ms": 1e3 * elapsed}

    def close(self) -> dict[str, float]:
        """The loss of the last step, as a sign that it trained, and active latents where their number varies."""
        return {"loss": self.loss.item()} | ({"l0_at_end": self._l0()} if self._varies() else {})


def rehearse(kind: type[Contender]) -> None:
    """A tiny step: what torch loads on first use is no memory of the step."""
    # torch.compile would take the second shape that it sees for a reason to compile for any shape.
    kind = Torch if kind is TorchCompile else kind
    contender = kind(Case("", 4, 4, 32, 4), 1e-4)
    contender.step(*contender.inputs(torch.randn(contender.layers, 4, 4)))


def answer(request: dict[str, Any], session: Session | None) -> tuple[dict[str, Any], Session | None]:
    """Do what one request asks for."""
    if request["do"] == "open":
        session = Session(request)
        return {"calls": list(session.calls), "facts": session.facts}, session
    assert session is not None, "open comes first"
    return (session.time(request) if request["do"] == "time" else session.close()), session


def main() -> None:
    """Answer until the input ends."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result, session = answer(request, session)
            reply: dict[str, Any] = {"ok": result}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
