"""Is what runs on the device right? Every check compares with the reference backend in float64, at real shapes.

A kernel's relative error ``‖out − exact‖ / ‖exact‖`` may be twice that of the reference backend in the same precision
(and :data:`SLACK` more). Where float64 would not fit, some rows are compared, or the gradients of some latents. Outputs
are allocated where NaN lay before, all of them must be finite, and two runs must agree in every bit. Inputs are fresh:
the seed is drawn anew for every run of the command, and recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.backends import check, cuda, reference, triton
from sparsekern.bench.gpu_kernels import FORCED, batches, environment, one_line, release, served, why_not_cuda
from sparsekern.bench.options import Case
from sparsekern.modules.activations import Activation
from sparsekern.ops._sparse_decode import _gather_dot, _scatter_outer

ROWS, LATENTS = 64, 64  # compared in float64
SLACK = 1e-6
ROUNDING = 4 * torch.finfo(torch.float32).eps  # of a float32 score, as a share of ‖x‖ · ‖w‖
ROUTINGS = ((8, 2), (32, 1), (128, 1))  # experts, and how many a token has
STEPS = 3
MOST_MOVED = 0.02  # error of all latents' steps together, near ties included


class Check(NamedTuple):
    """One comparison: what, at which shape and precision, its error and bound, and the counts of the encoder."""

    check: str
    dtype: str
    error: float
    bound: float
    repeatable: bool
    recall: float | None = None
    wrong: int = 0

    @property
    def passed(self) -> bool:
        """Whether everything holds; NaN does not."""
        return self.error <= self.bound and self.repeatable and self.wrong == 0


def of_backends(device: torch.device) -> dict[str, dict[str, Any]]:
    """What each GPU backend's own checks say about this device; ``missing`` where there are none."""
    found: dict[str, dict[str, Any]] = {}
    for name, engine in (("triton", triton), ("cuda", cuda)):
        reason = engine.missing(device) if device.type == "cuda" else "they check kernels of GPUs"
        if reason is not None:
            found[name] = {"missing": reason}
            continue
        try:
            found[name] = {"results": [result._asdict() for result in check.run(engine, device)]}
        except Exception as error:
            found[name] = {"error": one_line(error)}
    return found


def of_case(case: Case, device: torch.device, seed: int, *, steps: bool) -> Iterator[dict[str, Any]]:
    """All checks at one shape, as entries of the record; one that raises is an entry too.

    Everything by the backends that serve; then what the CUDA C++ kernels can serve, by these.
    """
    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        problem = Problem(case, device, dtype, seed)
        for forced in (False, True):
            if not forced or why_not_cuda("topk_encode", problem.weight) is None:
                for name, run in _encoders(problem, forced):
                    yield _entry(case, name, dtype, run, forced)
        if why_not_cuda("row_topk", problem.weight) is None:
            yield _entry(case, "row_topk", dtype, lambda p=problem: selection(p), True)  # type: ignore[misc]
        for name, compare in PRODUCTS.items():
            yield _entry(case, name, dtype, lambda c=compare, p=problem: c(p))  # type: ignore[misc]
        weight = problem.weight
        del problem
        release(device)
    if steps:
        for activation in (sk.TopK(case.k), sk.BatchTopK(case.k)):
            name = f"Trainer.step, {activation.name}, {STEPS} times"
            for forced in (False, True):
                if not forced or why_not_cuda("row_adam", weight.float()) is None:
                    run = lambda a=activation: train(case, device, seed, a)  # type: ignore[misc] # noqa: E731
                    yield _entry(case, name, torch.float32, run, forced)
                    release(device)


def _encoders(problem: Problem, forced: bool) -> Iterator[tuple[str, Callable[[], Check]]]:
    """The checks of encoders by name."""
    case = problem.case
    with environment(FORCED if forced else {}):
        screens = ["auto", *served(problem.weight)[0]]
    for screen in screens:
        yield f"topk_encode, {screen}", lambda s=screen: encode(problem, s)  # type: ignore[misc]
    yield "topk_encode, absolute", lambda: encode(problem, "auto", absolute=True)
    if case.d_sae % case.k == 0:
        yield f"best of {case.k} groups", lambda: best_of_groups(problem)
    for n_experts, n_active in ROUTINGS:
        if case.d_sae % n_experts == 0 and case.k <= case.d_sae // n_experts:
            name = f"routed_topk_encode, {n_active} of {n_experts} experts"
            yield name, lambda e=n_experts, a=n_active: routed(problem, e, a)  # type: ignore[misc]


def _entry(case: Case, name: str, dtype: torch.dtype, run: Callable[[], Check], forced: bool = False) -> dict[str, Any]:
    start = time.perf_counter()
    name = f"{name}, cuda" if forced else name
    try:
        with environment(FORCED if forced else {}):
            found = run()
        entry = {**found._asdict(), "passed": found.passed}
    except Exception as error:
        entry = {"check": name, "dtype": _name(dtype), "passed": False, "raised": one_line(error)}
    return {"case": case.label, **entry, "check": name, "seconds": time.perf_counter() - start}


class Problem:
    """Inputs of the ops at one shape, and codes that hold the latents which these inputs fire."""

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        self.case, self.device, self.dtype = case, device, dtype
        made = batches(case, device, seed)
        self.x, self.grad = made[0].to(dtype), made[1].to(dtype)
        del made
        self.weight = normalize(torch.randn(case.d_sae, case.d, device=device), dim=1).to(dtype)
        self.bias = torch.randn(case.d_sae, device=device).mul_(0.01).to(dtype)
        self.rows = torch.randperm(case.rows, device=device)[:ROWS]
        self.codes = sk.topk_encode(self.x, self.weight, self.bias, case.k)

    def twice(self, call: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], bool]:
        """Outputs of one call, and whether those of a second one are the same bits; both where NaN lay before."""
        poison(self.case, self.device, self.dtype)
        first = call()
        poison(self.case, self.device, self.dtype)
        second = call()
        return first, all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def poison(case: Case, device: torch.device, dtype: torch.dtype) -> None:
    """Fill memory of the sizes of the ops' outputs with NaN and give it back, for the next allocation to find."""
    sizes = [case.rows * case.k, case.rows * case.k, case.rows * case.d, case.d_sae * case.d]
    blocks = [torch.full((size,), float("nan"), dtype=dtype, device=device) for size in sizes]
    del blocks


def encode(problem: Problem, screen: str, absolute: bool = False) -> Check:
    """Values and indices of some rows beside the top k in float64, ties to the lower index.

    An index is wrong where its float64 score lies below the k-th by more than float32 can tell.
    """
    x, weight, bias, rows, k = problem.x, problem.weight, problem.bias, problem.rows, problem.case.k

    def call() -> tuple[Tensor, ...]:
        return sk.topk_encode(x, weight, bias, k, screen, absolute=absolute)[:2]

    (values, indices), same = problem.twice(call)
    finite = bool(values.isfinite().all()) and int(indices.min()) >= 0 and int(indices.max()) < len(weight)
    if not finite:
        return Check("topk_encode", _name(x.dtype), float("nan"), 0.0, same)
    best, exact = reference.topk_encode(x[rows].double(), weight, bias, k, "auto", absolute)
    single, at = reference.topk_encode(x[rows], weight, bias, k, "auto", absolute)

    def codes(of: Tensor) -> Tensor:
        found = scores(problem, of)
        return found if absolute else found.relu()

    chosen, true = indices[rows], codes(indices[rows])
    missed = ~(chosen.unsqueeze(2) == exact.unsqueeze(1)).any(2)
    wrong = missed & (true.abs() < best[:, -1:].abs() - ROUNDING * reach(problem))
    return Check(
        "topk_encode",
        _name(x.dtype),
        relative(values[rows], true),
        2 * relative(single, codes(at)) + SLACK,
        same,
        1 - missed.double().mean().item(),
        int(wrong.sum()),
    )


def scores(problem: Problem, of: Tensor) -> Tensor:
    """Pre-activations of the latents `of` in the rows that are compared, in float64."""
    weight, x = problem.weight, problem.x[problem.rows].double()
    products = [weight[latents].double() @ row for latents, row in zip(of.long(), x, strict=True)]
    return torch.stack(products) + problem.bias[of.long()].double()


def reach(problem: Problem) -> Tensor:
    """What :data:`ROUNDING` is a share of, ``[ROWS, 1]``."""
    norms = problem.x[problem.rows].double().norm(dim=1, keepdim=True)
    return norms * problem.weight.norm(dim=1).max().double() + problem.bias.abs().max()


def best_of_groups(problem: Problem) -> Check:
    """``GroupMax``: some rows beside the best latent of each of k groups in float64."""
    x, weight, bias, rows, k = problem.x, problem.weight, problem.bias, problem.rows, problem.case.k

    def call() -> tuple[Tensor, ...]:
        return sk.GroupMax(k).encode(x, weight, bias)[0][:2]

    (values, indices), same = problem.twice(call)
    every = torch.arange(k, dtype=torch.int32, device=x.device).expand(ROWS, -1)[: len(rows)]

    def by_reference(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        routing = (every, *reference.group_slots(every, k))
        return reference.routed_topk_encode(x[rows].to(dtype), weight, bias, *routing, 1, True, "none")

    (best, exact), (single, at) = by_reference(torch.float64), by_reference(x.dtype)
    finite = bool(values.isfinite().all()) and int(indices.min()) >= 0 and int(indices.max()) < len(weight)
    if not finite:
        return Check("GroupMax", _name(x.dtype), float("nan"), 0.0, same)
    chosen, true = indices[rows], scores(problem, indices[rows]).relu()
    missed = chosen != exact
    wrong = missed & (true < best - ROUNDING * reach(problem)) | (chosen // (len(weight) // k) != every)
    return Check(
        "GroupMax",
        _name(x.dtype),
        relative(values[rows], true),
        2 * relative(single, scores(problem, at).relu()) + SLACK,
        same,
        1 - missed.double().mean().item(),
        int(wrong.sum()),
    )


def routed(problem: Problem, n_experts: int, n_active: int) -> Check:
    """``route`` and ``routed_topk_encode``: some rows beside the best latents of their experts in float64."""
    x, weight, bias, rows, k = problem.x, problem.weight, problem.bias, problem.rows, problem.case.k
    router = normalize(torch.randn(n_experts, x.shape[1], device=x.device), dim=1).to(x.dtype)

    def call() -> tuple[Tensor, ...]:
        route = sk.route(x, router, n_active)
        assert route.logits is not None
        return *sk.routed_topk_encode(x, weight, bias, route, k)[:2], *route[:4], route.logits

    (values, indices, experts, gates, order, offsets, logits), same = problem.twice(call)
    grouped = reference.group_slots(experts, n_experts)
    wrong = sum(int((a != b).sum()) for a, b in zip((order, offsets), grouped, strict=True))
    exact_logits = x[rows].double() @ router.double().T
    chosen_logits = exact_logits.gather(1, experts[rows].long())
    norms = x[rows].double().norm(dim=1, keepdim=True)  # times 1, the norm of the router's rows
    cut = exact_logits.topk(n_active).values[:, -1:]
    wrong += int((chosen_logits < cut - ROUNDING * norms).sum())

    def of_experts(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        mine = experts[rows]
        return reference.routed_topk_encode(
            x[rows].to(dtype), weight, bias, mine, *reference.group_slots(mine, n_experts), k, False, "none"
        )

    best, exact = of_experts(torch.float64)
    single, at = of_experts(x.dtype)
    chosen, true = indices[rows], scores(problem, indices[rows])
    missed = ~(chosen.unsqueeze(2) == exact.unsqueeze(1)).any(2)
    wrong += int((missed & (true.relu() < best[:, -1:] - ROUNDING * reach(problem))).sum())
    wrong += int((chosen // (len(weight) // n_experts)).unsqueeze(2).ne(experts[rows].unsqueeze(1)).all(2).sum())
    return Check(
        "routed_topk_encode",
        _name(x.dtype),
        relative(values[rows], true.relu()),
        2 * relative(single, scores(problem, at).relu()) + SLACK,
        same and bool(values.isfinite().all() and gates.isfinite().all() and logits.isfinite().all()),
        1 - missed.double().mean().item(),
        wrong,
    )


def selection(problem: Problem) -> Check:
    """``row_topk`` on the scores of some rows: the same keys and places as a stable sort has."""
    keys, k = problem.x[problem.rows] @ problem.weight.T, problem.case.k
    (values, indices), same = problem.twice(lambda: cuda.row_topk(keys, k))
    expected, order = keys.sort(dim=1, descending=True, stable=True)
    wrong = int((indices != order[:, :k]).sum() + (values != expected[:, :k]).sum())
    return Check("row_topk", _name(keys.dtype), 0.0, 0.0, same, wrong=wrong)


def decode(problem: Problem) -> Check:
    """``sparse_decode`` on some rows."""
    codes, weight, rows = problem.codes, problem.weight, problem.rows
    bias = torch.randn(weight.shape[1], device=problem.device).to(problem.dtype)
    (out,), same = problem.twice(lambda: (sk.sparse_decode(codes, weight, bias),))
    values, indices = codes.values[rows], codes.indices[rows]
    exact = reference.sparse_decode(values.double(), indices, weight, bias)
    return _compared(
        "sparse_decode", out, out[rows], exact, reference.sparse_decode(values, indices, weight, bias), same
    )


def gather(problem: Problem) -> Check:
    """``gather_dot`` on some rows."""
    weight, rows, grad, indices = problem.weight, problem.rows, problem.grad, problem.codes.indices
    (out,), same = problem.twice(lambda: (_gather_dot(grad, indices, weight),))
    exact = reference.gather_dot(grad[rows].double(), indices[rows], weight)
    return _compared("gather_dot", out, out[rows], exact, reference.gather_dot(grad[rows], indices[rows], weight), same)


def scatter(problem: Problem) -> Check:
    """``scatter_outer``: rows of the most frequent latents, of some that fired, and of one that did not."""
    values, indices, n = problem.codes
    grad, counts = problem.grad, problem.codes.firing_counts()
    (out,), same = problem.twice(lambda: (_scatter_outer(values, indices, grad, n),))
    fired = counts.nonzero().squeeze(1)
    some = fired[torch.randperm(len(fired), device=fired.device)[: LATENTS // 2]]
    rows = torch.cat([counts.topk(min(n, LATENTS // 2)).indices, some, counts.argmin().view(1)]).unique()
    # The slots of these latents alone, renumbered; all others add nothing to one more row.
    numbers = torch.full((n,), len(rows), dtype=torch.int32, device=rows.device)
    numbers[rows] = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
    renumbered = numbers[indices.long()]
    kept = values.where(renumbered < len(rows), 0)

    def by_reference(dtype: torch.dtype) -> Tensor:
        return reference.scatter_outer(kept.to(dtype), renumbered, grad.to(dtype), len(rows) + 1)[:-1]

    exact = by_reference(torch.float64)
    return _compared("scatter_outer", out, out[rows], exact, by_reference(problem.dtype), same)


PRODUCTS: dict[str, Callable[[Problem], Check]] = {
    "sparse_decode": decode,
    "gather_dot": gather,
    "scatter_outer": scatter,
}


def train(case: Case, device: torch.device, seed: int, activation: Activation) -> Check:
    """How far all parameters have moved after some steps, beside the same steps of the reference backend in float64.

    Where float32 orders a near tie in another way than float64, whole rows move otherwise, rightly. So the hundredth
    of the latents that differ most is held to :data:`MOST_MOVED` alone. A step chains several kernels, and Adam divides
    by gradients near zero: its error may be four times that of the reference in float32.
    """
    made = batches(case, device, seed)
    torch.manual_seed(seed)
    with device:
        start = sk.SAE(case.d, case.d_sae, activation, aux_coefficient=0).state_dict()

    def moved(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of each latent ``[d_sae, 2d + 1]``, and of the decoder's bias."""
        with device:
            sae = sk.SAE(case.d, case.d_sae, activation, aux_coefficient=0, dtype=dtype)
        sae.load_state_dict(start)
        trainer = sk.Trainer(sae, lr=1e-3, warmup_steps=0, fit_start=False)
        for number in range(STEPS):
            trainer.step(made[number].to(dtype))
        by = {name: p.detach().double() - start[name] for name, p in sae.named_parameters()}
        return torch.cat([by["W_enc"], by["b_enc"].unsqueeze(1), by["W_dec"]], 1), by["b_dec"]

    def error(of: tuple[Tensor, Tensor]) -> float:
        squares = (of[0] - exact[0]).square().sum(1).sort().values
        most = squares[: -len(squares) // 100]
        of_all, of_most = ((part.sum().sqrt() / exact[0].norm()).item() for part in (squares, most))
        return max(of_most, relative(of[1], exact[1])) if of_all <= MOST_MOVED else float("nan")

    first = moved(torch.float32)
    same = all(torch.equal(a, b) for a, b in zip(first, moved(torch.float32), strict=True))
    with environment({"SPARSEKERN_BACKEND": "reference"}):
        exact = moved(torch.float64)
        bound = 4 * error(moved(torch.float32)) + SLACK
    return Check("Trainer.step", "float32", error(first), bound, same)


def _compared(name: str, out: Tensor, some: Tensor, exact: Tensor, single: Tensor, same: bool) -> Check:
    error = relative(some, exact) if out.isfinite().all() else float("nan")
    return Check(name, _name(out.dtype), error, 2 * relative(single, exact) + SLACK, same)


def relative(out: Tensor, exact: Tensor) -> float:
    """``‖out − exact‖ / ‖exact‖`` in float64."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
