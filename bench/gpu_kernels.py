"""The single operations of a step on a GPU, each beside what other libraries do in its place.

====================  ====================================================================================
group                 baseline
====================  ====================================================================================
encode                cuBLAS in bfloat16 alone, and with ``torch.topk`` behind it; in blocks of rows where the
                      pre-activations would not fit
decode                ``torch.nn.functional.embedding_bag``
backward              the backward pass of ``embedding_bag``
update                torch on dense gradients that are there already: projection, clipping, fused Adam, unit norm
routed                ``topk_encode`` over all latents
select                ``torch.topk`` of scores that are there already; only of the CUDA C++ kernels
====================  ====================================================================================

Each kernel names the backend that serves it. Where the CUDA C++ kernels can serve too, they are timed beside it, under
the same name with ``cuda`` behind it.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

import sparsekern as sk
from sparsekern.backends import choose, cuda, updater
from sparsekern.bench import memory, record, roofs
from sparsekern.bench.contenders import Sparsekern
from sparsekern.bench.options import Case
from sparsekern.bench.roofs import Roofs, Work
from sparsekern.bench.timing import Call, Clock
from sparsekern.codes import SparseCodes
from sparsekern.data import zipf_activations
from sparsekern.ops._checks import SCREENS
from sparsekern.ops._csr_products import csr_weight_gradient
from sparsekern.ops._sparse_decode import _gather_dot, _scatter_outer, weight_gradient

BATCHES = 4
WARM_UP_STEPS = 3
MADE_TOKENS = 8192
PATH_VARIABLE, PATHS = "SPARSEKERN_TRITON_ENCODE", ("fused", "chunked")


EXPERTS, ACTIVE = (8, 32, 128), (1, 2)
"""Experts, and how many of them a token has, that routed encoders are timed with."""


class Kernel(NamedTuple):
    """What is timed, what it has to do, and the kernel of the same group that it is compared with.

    `least` is the ratio to that one which the work leaves, where it is known. `backend` is who serves it.
    """

    call: Call
    work: Work
    against: str | None = None
    least: float | None = None
    backend: str = "torch"


def batches(case: Case, device: torch.device, seed: int) -> list[Tensor]:
    """Different batches ``[B, d]``, made on the device: Gaussian, or drawn with fresh noise from some Zipf tokens."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.rows, case.d)
    if case.data == "gaussian":
        return [torch.randn(shape, generator=generator, device=device) for _ in range(BATCHES)]
    tokens = min(case.rows, MADE_TOKENS)
    world = zipf_activations(tokens, case.d, features=4096, outliers=min(2, case.d), seed=seed).to(device)

    def drawn() -> Tensor:
        rows = torch.randint(tokens, (case.rows,), generator=generator, device=device)
        return world[rows].add_(torch.randn(shape, generator=generator, device=device), alpha=0.3 / case.d**0.5)

    return [drawn() for _ in range(BATCHES)]


@dataclass
class Subject:
    """Weights to time on, and the batches that go around.

    They are trained for a few steps where the optimizer's state fits: then the copies that the optimizer keeps for the
    encoder are there, and ``trainer`` is. The first step compiles and checks most of the kernels.
    """

    case: Case
    batches: list[Tensor]
    sae: sk.SAE
    trainer: sk.Trainer | None
    first_step_s: float | None = None
    _codes: list[SparseCodes] = field(default_factory=list)

    @classmethod
    def build(cls, case: Case, made: list[Tensor], trained: bool, clock: Clock) -> Subject:
        """New weights on the clock's device."""
        device = clock.device
        if not trained:
            with device:
                return cls(case, made, sk.SAE(case.d, case.d_sae, sk.TopK(case.k), aux_coefficient=0), None)
        contender = Sparsekern(case, 1e-4, device)
        first = clock.seconds(lambda: contender.step(made[0]))
        for number in range(1, WARM_UP_STEPS):
            contender.step(made[number % BATCHES])
        return cls(case, made, contender.sae, contender.trainer, first)

    @property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encoder, its bias, decoder, all detached."""
        return self.sae.W_enc.detach(), self.sae.b_enc.detach(), self.sae.W_dec.detach()

    def x(self, turn: int) -> Tensor:
        """The batch of a turn."""
        return self.batches[turn % BATCHES]

    def grad(self, turn: int) -> Tensor:
        """Stands for the gradient of the turn's reconstruction: another batch."""
        return self.batches[(turn + 1) % BATCHES]

    def codes(self, turn: int) -> SparseCodes:
        """Codes of the turn's batch."""
        if not self._codes:
            weight, bias, _ = self.weights
            center = self.sae.b_dec.detach()
            self._codes = [sk.topk_encode(x, weight, bias, self.case.k, center=center) for x in self.batches]
        return self._codes[turn % BATCHES]

    def touched(self) -> int:
        """Distinct latents in the codes of a batch."""
        return self.codes(0).indices.unique().numel()


def served(weight: Tensor) -> tuple[list[str], dict[str, str]]:
    """The screens that some backend has for weights like this one, and why not the others."""
    screens, reasons = [], {}
    for screen in SCREENS:
        if screen == "auto":
            continue
        try:
            choose("topk_encode", weight, screen)
            screens.append(screen)
        except ValueError as error:
            reasons[screen] = str(error)
    return screens, reasons


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """With variables of the environment at some values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


FORCED = {"SPARSEKERN_BACKEND": "cuda"}


def serving(op: str, tensor: Tensor, screen: str = "auto") -> str:
    """Name of the backend that serves `op`."""
    return choose(op, tensor, screen).__name__.rpartition(".")[2]


def why_not_cuda(op: str, tensor: Tensor, screen: str = "auto") -> str | None:
    """Why the CUDA C++ kernels cannot serve `op`; None where they can, though they may be off."""
    with environment(FORCED):
        return cuda.unavailable(op, tensor.device, tensor.dtype, screen)


def by_cuda(call: Call) -> Call:
    """The call as the CUDA C++ kernels serve it."""

    def forced(turn: int) -> object:
        with environment(FORCED):
            return call(turn)

    return forced


def both(name: str, kernel: Kernel, op: str, tensor: Tensor, screen: str = "auto") -> dict[str, Kernel]:
    """A kernel by whom it is served, and by the CUDA C++ kernels where they can serve it and do not."""
    found = {name: kernel._replace(backend=serving(op, tensor, screen))}
    if found[name].backend != "cuda" and why_not_cuda(op, tensor, screen) is None:
        found[f"{name}, cuda"] = kernel._replace(call=by_cuda(kernel.call), backend="cuda")
    return found


def encode(subject: Subject) -> dict[str, Kernel]:
    """``topk_encode`` in all its forms: on trained weights, on weights whose copies nobody keeps, in bfloat16."""
    case, k = subject.case, subject.case.k
    weight, bias, _ = subject.weights
    center, touched = subject.sae.b_dec.detach(), subject.touched()
    half, half_bias, halves = weight.bfloat16(), bias.bfloat16(), [x.bfloat16() for x in subject.batches]
    fresh, out = (
        weight.clone(),
        torch.empty(_block(case, weight.device), case.d_sae, dtype=half.dtype, device=half.device),
    )

    def product(turn: int, then: Callable[[Tensor], object] = lambda _: None) -> None:
        for part in halves[turn % BATCHES].split(len(out)):
            pre = out[: len(part)]
            torch.mm(part, half.T, out=pre)
            then(pre)

    def ours(w: Tensor = weight, screen: str = "auto") -> Call:
        return lambda turn: sk.topk_encode(subject.x(turn), w, bias, k, screen, center)

    def on_path(path: str) -> Call:
        def call(turn: int) -> None:
            with environment({PATH_VARIABLE: path}):
                ours()(turn)

        return call

    def in_half(turn: int) -> object:
        return sk.topk_encode(halves[turn % BATCHES], half, half_bias, k)

    def by_size(turn: int) -> object:
        return sk.topk_encode(subject.x(turn), weight, bias, k, center=center, absolute=True)

    work, base = roofs.encode(case, touched), "matmul, bf16"
    found = {
        base: Kernel(product, roofs.matmul(case)),
        "matmul and torch.topk": Kernel(
            lambda turn: product(turn, lambda pre: pre.topk(k, sorted=False)), roofs.matmul(case), base
        ),
    }

    def add(name: str, call: Call, work: Work = work, of: Tensor = weight, screen: str = "auto") -> None:
        found.update(both(name, Kernel(call, work, base), "topk_encode", of, screen))

    add("topk_encode", ours())
    add("topk_encode, making the copy", ours(fresh))
    add("topk_encode, bf16 weights", in_half, roofs.encode(case, touched, weight_bytes=2), half)
    add("topk_encode, absolute", by_size)
    if serving("topk_encode", weight) == "triton":
        found |= {f"topk_encode, {path}": Kernel(on_path(path), work, base, backend="triton") for path in PATHS}
    for screen in served(weight)[0]:
        if screen != "none":  # in full float32: checked, not timed
            work = roofs.encode(case, touched, screen)
            add(f"topk_encode, {screen} screen", ours(screen=screen), work, screen=screen)
    return found


def _block(case: Case, device: torch.device) -> int:
    """Rows of pre-activations that exist at one time: even blocks that take at most a quarter of what is free."""
    free = memory.available(device)
    most = case.rows if free is None else max(1, free // (4 * 2 * case.d_sae))
    return math.ceil(case.rows / math.ceil(case.rows / most))


def decode(subject: Subject) -> dict[str, Kernel]:
    """``sparse_decode``."""
    dec, work = subject.weights[2], roofs.products(subject.case, subject.touched())
    wide = [subject.codes(turn).indices.long() for turn in range(BATCHES)]

    def bag(turn: int) -> object:
        return embedding_bag(wide[turn % BATCHES], dec, per_sample_weights=subject.codes(turn).values, mode="sum")

    return {
        "embedding_bag": Kernel(bag, work),
        "sparse_decode": Kernel(
            lambda turn: sk.sparse_decode(subject.codes(turn), dec),
            work,
            "embedding_bag",
            backend=serving("sparse_decode", dec),
        ),
    }


def backward(subject: Subject) -> dict[str, Kernel]:
    """``gather_dot`` and ``scatter_outer``: the gradients of values and decoder."""
    case, dec = subject.case, subject.weights[2]
    gathered, scattered = roofs.products(case, subject.touched()), roofs.scatter(case)
    together = Work(gathered.flops + scattered.flops, gathered.bytes + scattered.bytes, "fp32")
    leaves, outs = [], []
    for turn in range(BATCHES):
        values, indices, _ = subject.codes(turn)
        w, v = dec.detach().requires_grad_(), values.detach().requires_grad_()
        leaves.append([w, v])
        outs.append(embedding_bag(indices.long(), w, per_sample_weights=v, mode="sum"))

    def bag(turn: int) -> object:
        at = turn % BATCHES
        return torch.autograd.grad(outs[at], leaves[at], subject.grad(turn), retain_graph=True)

    def gather(turn: int) -> object:
        return _gather_dot(subject.grad(turn), subject.codes(turn).indices, dec)

    def scatter(turn: int) -> object:
        codes = subject.codes(turn)
        return _scatter_outer(codes.values, codes.indices, subject.grad(turn), case.d_sae)

    return {
        "embedding_bag, backward": Kernel(bag, together),
        "gather_dot and scatter_outer": Kernel(
            lambda turn: (gather(turn), scatter(turn)),
            together,
            "embedding_bag, backward",
            backend=serving("gather_dot", dec),
        ),
        "gather_dot": Kernel(gather, gathered, backend=serving("gather_dot", dec)),
        "scatter_outer": Kernel(scatter, scattered, backend=serving("scatter_outer", dec)),
    }


class _Gradients(torch.autograd.Function):
    """A zero whose backward pass hands out the gradients of both weights as that of a training step does.

    Of codes of a fixed width, or with a `crow` of codes in CSR form.
    """

    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, W_dec: Tensor, *factors: Tensor | None) -> Tensor:
        ctx.save_for_backward(W_enc, W_dec, *factors)
        return W_enc.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        W_enc, W_dec, dz, values, indices, x, grad, crow = ctx.saved_tensors

        def gradient(weight: Tensor, coefficients: Tensor, vectors: Tensor) -> Tensor | None:
            if crow is None:
                return weight_gradient(weight, coefficients, indices, vectors)
            return csr_weight_gradient(weight, coefficients, crow, indices, vectors)

        return gradient(W_enc, dz, x), gradient(W_dec, values, grad), None, None, None, None, None, None


def update(subject: Subject) -> dict[str, Kernel]:
    """``optim.Adam.step`` from the factors of both gradients on: norm, clipping, Adam, unit norm, encoder's copy."""
    case, sae = subject.case, subject.sae
    assert subject.trainer is not None
    adam, base = subject.trainer.optimizer, "Adam of dense gradients, torch"
    dz = [
        _gather_dot(subject.grad(turn), subject.codes(turn).indices, sae.W_dec.detach()).mul_(1e-3)
        for turn in range(BATCHES)
    ]

    def from_factors(turn: int) -> object:
        codes = subject.codes(turn)
        factors = (dz[turn % BATCHES], codes.values, codes.indices, subject.x(turn), subject.grad(turn), None)
        return adam.step(_Gradients.apply(sae.W_enc, sae.W_dec, *factors), lr=0.0, clip_norm=1.0)

    starts = case.k * torch.arange(case.rows + 1, device=sae.device)

    def from_csr_factors(turn: int) -> object:
        codes = subject.codes(turn)
        entries = (part.flatten() for part in (dz[turn % BATCHES], codes.values, codes.indices))
        factors = (*entries, subject.x(turn), subject.grad(turn), starts)
        return adam.step(_Gradients.apply(sae.W_enc, sae.W_dec, *factors), lr=0.0, clip_norm=1.0)

    theirs = [w.detach().clone().requires_grad_() for w in (sae.W_enc, sae.W_dec)]
    for weight in theirs:
        weight.grad = torch.randn_like(weight)
    decoder, dense = theirs[1], torch.optim.Adam(theirs, lr=0.0, fused=True)

    @torch.no_grad()
    def by_torch(_: int) -> None:
        assert decoder.grad is not None
        decoder.grad.addcmul_((decoder.grad * decoder).sum(1, keepdim=True), decoder, value=-1)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        dense.step()
        decoder.div_(decoder.norm(dim=1, keepdim=True))

    engine, work = updater(sae.W_enc), roofs.update(case)
    by = "torch" if engine is None else engine.__name__.rpartition(".")[2]
    found = {base: Kernel(by_torch, roofs.dense_adam(case))}
    for name, call in (
        ("gradients and Adam of both weights", from_factors),
        ("gradients and Adam, codes in CSR form", from_csr_factors),
    ):
        found[name] = Kernel(call, work, base, backend=by)
        if by != "cuda" and why_not_cuda("row_adam", sae.W_enc) is None:
            found[f"{name}, cuda"] = Kernel(by_cuda(call), work, base, backend="cuda")
    return found


def routed(subject: Subject) -> dict[str, Kernel]:
    """``routed_topk_encode`` behind a router of random rows, and that router; and the best latent of each group."""
    case, k, base = subject.case, subject.case.k, "topk_encode, all experts"
    weight, bias, _ = subject.weights
    center = subject.sae.b_dec.detach()
    work = roofs.encode(case, subject.touched())
    found = {
        base: Kernel(
            lambda turn: sk.topk_encode(subject.x(turn), weight, bias, k, center=center),
            work,
            backend=serving("topk_encode", weight),
        )
    }
    for n_experts in EXPERTS:
        router = torch.randn(n_experts, case.d, device=weight.device)
        for n_active in ACTIVE:
            if case.d_sae % n_experts or k > n_active * case.d_sae // n_experts:
                continue
            routes = [sk.route(x, router, n_active, center=center) for x in subject.batches]

            def encode_routed(turn: int, routes: list[sk.Routing] = routes) -> object:
                return sk.routed_topk_encode(subject.x(turn), weight, bias, routes[turn % BATCHES], k, center=center)

            def route(turn: int, router: Tensor = router, n_active: int = n_active) -> object:
                return sk.route(subject.x(turn), router, n_active, center=center)

            name = f"{n_active} of {n_experts} experts"
            least = roofs.least_routed_ratio(case, n_experts, n_active)
            kernel = Kernel(encode_routed, roofs.routed_encode(case, n_experts, n_active), base, least)
            found |= both(f"routed_topk_encode, {name}", kernel, "routed_topk_encode", weight)
            found[f"route, {name}"] = Kernel(route, roofs.route(case, n_experts), backend=serving("route", weight))
    if case.d_sae % k == 0:
        groups = sk.GroupMax(k)

        def best_of_groups(turn: int) -> object:
            return groups.encode(subject.x(turn), weight, bias, center)

        kernel = Kernel(best_of_groups, work, base, 1.0)
        found |= both(f"routed_topk_encode, best of {k} groups", kernel, "routed_topk_encode", weight)
    return found


def select(subject: Subject) -> dict[str, Kernel]:
    """``row_topk`` of the CUDA C++ kernels on scores in bfloat16 and in float32."""
    case, k = subject.case, subject.case.k
    weight, rows = subject.weights[0], _block(case, subject.weights[0].device) // 2 or 1
    scores = subject.x(0)[:rows].bfloat16() @ weight.bfloat16().T
    found = {}
    for keys in (scores, scores.float()):
        name = str(keys.dtype).removeprefix("torch.")
        work, base = roofs.select(case, rows, keys.element_size()), f"torch.topk, {name}"
        found[base] = Kernel(lambda _, keys=keys: keys.topk(k), work)
        call = lambda _, keys=keys: cuda.row_topk(keys, k)  # noqa: E731
        found[f"row_topk, {name}"] = Kernel(call, work, base, backend="cuda")
    return found


GROUPS: dict[str, Callable[[Subject], dict[str, Kernel]]] = {
    group.__name__: group for group in (encode, decode, backward, update, routed, select)
}


def needs(case: Case, group: str) -> float:
    """Bytes, about, that a group takes beyond the weights and the optimizer's state."""
    weight, batch = 4 * case.d_sae * case.d, 4 * case.rows * case.d
    weights = {"encode": 2, "decode": 0, "backward": 2, "update": 11, "routed": 1, "select": 1}[group]
    return weights * weight + 3 * batch + 2**28


def state_needs(case: Case, trained: bool) -> float:
    """Bytes, about, of weights and batches, and of the optimizer's state and a dense gradient of both."""
    return (8 if trained else 2) * 4 * case.d_sae * case.d + 4 * BATCHES * case.rows * case.d + 2**28


def release(device: torch.device) -> None:
    """Give unreferenced memory back, so that the next one finds it in one piece."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    kernels: dict[str, Kernel], clock: Clock, found: Roofs, *, turns: int, seconds: float
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time the kernels of one group by turns.

    Returns
    -------
    measured, failed
        By kernel: times, ratio to the baseline within each turn, memory, work and floor; and the message of those that
        raised on their first call.
    """
    measured: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name, kernel in kernels.items():
        try:
            first = clock.seconds(lambda kernel=kernel: kernel.call(0))
            host = clock.host_seconds(lambda kernel=kernel: kernel.call(1))
            grown = memory.growth(lambda kernel=kernel: kernel.call(2), clock.device)
        except Exception as error:
            failed[name] = one_line(error)
            release(clock.device)
            continue
        work, floor = kernel.work, kernel.work.floor_ms(found)
        measured[name] = {
            "backend": kernel.backend,
            "first_call_s": first,
            "host_ms": 1e3 * host,
            "memory_bytes": grown,
            **work._asdict(),
            "floor_ms": floor,
        }
    calls = {name: kernels[name].call for name in measured}
    for name, samples in clock.by_turns(calls, turns=turns, seconds=seconds).items():
        measured[name] |= {"ms": record.spread(samples), "samples": len(samples), "all_ms": samples}
    for name, entry in measured.items():
        base = kernels[name].against
        if base in measured:
            pairs = zip(entry["all_ms"], measured[base]["all_ms"], strict=True)
            entry |= {"against": base, "over": record.spread([one / other for one, other in pairs])}
        if kernels[name].least is not None:
            entry["least"] = kernels[name].least
    for entry in measured.values():
        del entry["all_ms"]
    return measured, failed


def one_line(error: BaseException) -> str:
    """An exception as a line for the record; memory that ran out is named as such."""
    text = (str(error).strip().splitlines() or [""])[0]
    name = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{name}: {text}"
