"""Checks of a GPU backend's kernels on the device at hand, against float64 on the CPU.

The first call of an op with a dtype on a device runs that op's check: small shapes, milliseconds once compiled. The
outcome is kept in a file for the device, the driver, torch and the build of the kernels, so that it is run once. An op
whose kernels disagree, or do not run, is not served by them, which one warning says.

The backend is the argument `engine` throughout: its module, :mod:`~sparsekern.backends.triton` or
:mod:`~sparsekern.backends.cuda`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.backends import reference
from sparsekern.factors import OuterProducts
from sparsekern.files import write_json

# Twice the error of the same expression in the same precision, with room for the order of sums over these widths.
_BOUNDS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


WIDE = 14_001
"""Latents of the wide cases: more than there are buckets."""


class Result(NamedTuple):
    """Outcome of the check of one op with one dtype.

    Attributes
    ----------
    kernel : str
        The op.
    dtype : str
    passed : bool
    error, bound : float
        Largest relative error over the results, ``‖out − ref‖ / ‖ref‖``, and what it may be.
    seconds : float
        Compilation included.
    note : str
        What went wrong; empty where nothing did.
    """

    kernel: str
    dtype: str
    passed: bool
    error: float
    bound: float
    seconds: float
    note: str


class _DisagreementError(Exception):
    """A result that is not a matter of rounding."""


# The cases: each returns pairs of a kernel's result and the expected one.

Pairs = list[tuple[Tensor, Tensor]]


def _random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _codes(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes with empty latents, one that fires on every token, and zero-valued slots."""
    order = torch.stack([torch.randperm(n // 2, generator=torch.Generator().manual_seed(row)) for row in range(rows)])
    indices = order[:, :k] + 1
    indices[:, 0] = 0
    return _random(rows, k, dtype=dtype, seed=1).relu(), indices.int()


def _encode_cases(engine: Any, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor, int]]:
    """Activations, weights, bias and k: narrow, wide, with ties, and with a bucket that hides candidates."""
    cases: list[tuple[Tensor, Tensor, Tensor, int]] = []
    for rows, n, k in [(19, 300, 7), (5, WIDE, 4)]:  # of one width: that spares compilations
        x, weight = _random(rows, 72, dtype=dtype, seed=2), _random(n, 72, dtype=dtype, seed=3)
        weight[n // 2 : n // 2 + 9] = weight[:9]  # ties
        x[1] = weight[5] * 2  # a clear winner, twice
        cases.append((x, weight, _random(n, dtype=dtype, seed=4), k))
    x, weight, bias, k = cases[-1]
    weight = weight.clone()
    plan = engine.encode_plan(5, 72, WIDE, k, dtype, "auto", (9, 0), has_copy=False)
    assert plan is not None
    assert plan.keep < k
    weight[7 :: plan.n_buckets] = x[2] + 0.1 * weight[7 :: plan.n_buckets]  # all winners are in one bucket
    x = x.clone()
    x[3] = 0  # all latents tie: too many candidates, so the token is repaired
    cases.append((x, weight, torch.zeros_like(bias), k))
    return cases


def _check_topk_encode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    # What few tokens are screened with, on every path, and what many are: 16-bit operands are taken as they are.
    paths = engine.ENCODE_PATHS
    ways = [*(("auto", path) for path in paths), *([("fp16", paths[0])] if dtype == torch.float32 else [])]
    return [pair for way in ways for pair in _codes_by(engine, *way, dtype, device)]


def _check_topk_encode_bf16(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    return _codes_by(engine, "bf16", engine.ENCODE_PATHS[0], dtype, device)


def _check_topk_encode_fp8(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    return _codes_by(engine, "fp8", engine.ENCODE_PATHS[0], dtype, device)


def _codes_by(engine: Any, screen: str, path: str, dtype: torch.dtype, device: torch.device) -> Pairs:
    pairs: Pairs = []
    cases = _encode_cases(engine, dtype)
    x, weight, bias, k = cases[-1]
    calls = [(*case, False) for case in cases]
    calls.append((x, weight * (1 - 2 * (torch.arange(len(weight)) % 3 == 0).to(dtype)).unsqueeze(1), bias, k, True))
    for x, weight, bias, k, absolute in calls:
        on = [t.to(device) for t in (x, weight, bias)]
        values, indices = engine.topk_encode(*on, k, screen, path=path, absolute=absolute)
        wide = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        pairs += _compare_codes(values.cpu(), indices.cpu(), wide, k, absolute)
    return pairs


def _compare_codes(values: Tensor, indices: Tensor, scores: Tensor, k: int, absolute: bool = False) -> Pairs:
    """Beside the k largest, or those of largest size, of all `scores` of a token, in float64."""
    signed = scores
    scores = signed.abs() if absolute else signed
    expected, order = (found[:, :k] for found in scores.sort(dim=1, descending=True, stable=True))
    if not ((indices >= 0) & (indices < scores.shape[1])).all():
        raise _DisagreementError("an index is out of range")
    score, cut = scores.gather(1, indices.long()), expected[:, -1:]
    if (score < cut - 1e-4 * cut.abs().clamp_min(1)).any():
        raise _DisagreementError("a latent outside the top k was taken")
    if (indices.sort(dim=1).values.diff(dim=1) == 0).any():
        raise _DisagreementError("a latent was taken twice")
    tied = (score[:, 1:] == score[:, :-1]) & (indices[:, 1:] < indices[:, :-1])
    if tied.any() or not torch.equal(indices[3], order[3].int()):
        raise _DisagreementError("ties do not go to the lower latent")
    if absolute:
        return [(values.abs(), expected), (values, signed.gather(1, indices.long()))]
    return [(values, expected.relu())]


def _check_route(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    pairs: Pairs = []
    x, weight, bias = (_random(*shape, dtype=dtype, seed=7) for shape in ((75, 72), (11, 72), (11,)))
    weight[7], bias[7] = weight[2], bias[2]
    x[3] = 0  # all experts tie
    exact = x.double() @ weight.double().T
    for gate, chosen_by in (("softmax", None), ("sigmoid", None), ("softmax", bias), ("sigmoid", bias)):
        bias_there = None if chosen_by is None else chosen_by.to(device)
        found = engine.route(x.to(device), weight.to(device), bias_there, 3, gate)
        logits, gates, experts, order, offsets = (t.cpu() for t in found)
        wide = exact.softmax(1) if gate == "softmax" else exact.sigmoid()
        scores = exact if chosen_by is None else wide + chosen_by.double()
        expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :3]
        if not torch.equal(experts, expected.int()):
            raise _DisagreementError("the experts are not the best ones, ties to the lower one")
        pairs += [(logits, exact), (gates, wide.gather(1, expected))]
        _compare_slots(order, offsets, experts, len(weight))
    return pairs


def _check_group_slots(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    for n_experts in (70, 5000):
        experts = torch.randint(n_experts, (150, 3), generator=torch.Generator().manual_seed(8)).int()
        experts[20:90] = 3
        order, offsets = engine.group_slots(experts.to(device), n_experts)
        _compare_slots(order.cpu(), offsets.cpu(), experts, n_experts)
    return [(order, order.double().cpu())]


def _compare_slots(order: Tensor, offsets: Tensor, experts: Tensor, n_experts: int) -> None:
    expected = reference.group_slots(experts, n_experts)
    if not (torch.equal(order, expected[0]) and torch.equal(offsets, expected[1])):
        raise _DisagreementError("slots are not sorted by expert, those of each in order")


def _check_routed_topk_encode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    screens = ("auto", "fp16") if dtype == torch.float32 else ("auto",)
    return [pair for screen in screens for pair in _routed_by(engine, screen, dtype, device)]


def _check_routed_topk_encode_bf16(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    return _routed_by(engine, "bf16", dtype, device)


def _routed_by(engine: Any, screen: str, dtype: torch.dtype, device: torch.device) -> Pairs:
    """Uneven loads, an expert without tokens, and one that has them all; buckets of several latents, and of one.

    And the best latent of each expert, where all experts serve every token.
    """
    tokens = torch.arange(13)
    pairs: Pairs = []
    uneven, every = torch.stack([torch.where(tokens < 9, 0, 4), 1 + tokens % 2], 1).int(), torch.arange(5).int()
    both = (False, True) if screen == "auto" else (False,)
    many = -(-WIDE // 640) * 128  # latents of an expert, whole tiles of them
    cases = [(uneven, many, 5, both), (uneven[:9, :1], 30, 7, both), (every.repeat(5, 1), many, 1, (True,))]
    for experts, latents, k, ways in cases:
        n, n_active = 5 * latents, experts.shape[1]
        shapes = ((len(experts), 72), (n, 72), (1,))
        x, weight, bias = (_random(*shape, dtype=dtype, seed=9) for shape in shapes)
        weight[latents : latents + 9] = weight[:9]  # ties between experts
        plan = engine.routed_plan(
            13, n_active, 5, 72, latents, k, dtype, screen, (9, 0), has_copy=False, per_expert=ways[0]
        )  # fmt: skip
        assert plan is not None or latents < many, "the kernels are to be checked, not who serves in their place"
        buckets = latents if plan is None else plan.n_buckets if ways[0] else plan.n_buckets // n_active
        weight[7:latents:buckets] = x[2] + 0.1 * weight[7:latents:buckets]  # all winners are in one bucket
        x[1] = weight[5] * 2
        x[3] = 0  # all latents tie
        bias = bias.expand(n).contiguous()
        on = [t.to(device) for t in (x, weight, bias, experts, *reference.group_slots(experts, 5))]
        mine = torch.arange(n) // latents == experts.unsqueeze(2)  # [tokens, n_active, N]
        scores = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
        for per_expert in ways:
            values, indices = (t.cpu() for t in engine.routed_topk_encode(*on, k, per_expert, screen))
            for slot, owned in enumerate(mine.unbind(1) if per_expert else [mine.any(1)]):
                part = slice(slot * k, (slot + 1) * k)
                wide = scores.masked_fill(~owned, -torch.inf)
                pairs += _compare_codes(values[:, part], indices[:, part], wide, k)
    return pairs


def _check_sparse_decode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    values, indices = _codes(37, 50, 5, dtype)
    weight, bias = _random(50, 77, dtype=dtype, seed=5), _random(77, dtype=dtype, seed=6)
    out = engine.sparse_decode(*(t.to(device) for t in (values, indices, weight, bias)))
    return [(out, reference.sparse_decode(values.double(), indices, weight.double(), bias.double()))]


def _check_gather_dot(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    _, indices = _codes(37, 50, 5, dtype)
    weight, grad = _random(50, 77, dtype=dtype, seed=5), _random(37, 77, dtype=dtype, seed=6)
    out = engine.gather_dot(*(t.to(device) for t in (grad, indices, weight)))
    return [(out, reference.gather_dot(grad.double(), indices, weight.double()))]


def _check_scatter_outer(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    values, indices = _codes(300, 50, 5, dtype)
    grad = _random(300, 77, dtype=dtype, seed=6)
    arguments = [t.to(device) for t in (values, indices, grad)]
    out, again = engine.scatter_outer(*arguments, 50), engine.scatter_outer(*arguments, 50)
    if not torch.equal(out, again):
        raise _DisagreementError("two runs differ")
    return [(out, reference.scatter_outer(values.double(), indices, grad.double(), 50))]


def _check_weighted_row_sum(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    coefficients = _random(3000, dtype=dtype, seed=7) * (torch.arange(3000) % 3 == 0)
    weight = _random(3000, 77, dtype=dtype, seed=5)
    out = engine.weighted_row_sum(coefficients.to(device), weight.to(device))
    return [(out, coefficients.double() @ weight.double())]


def _csr(rows: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``crow``, ``col``, values and the dense codes; the first row is empty."""
    dense = _random(rows, n, dtype=dtype, seed=8).relu() * (torch.arange(n) % 3 == 0)
    dense[0] = 0
    row, col = dense.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return crow, col.int(), dense[row, col], dense


def _check_csr_decode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    crow, col, values, dense = _csr(37, 50, dtype)
    weight, bias = _random(50, 77, dtype=dtype, seed=5), _random(77, dtype=dtype, seed=6)
    out = engine.csr_decode(*(t.to(device) for t in (values, crow, col, weight, bias)))
    return [(out, dense.double() @ weight.double() + bias.double())]


def _check_csr_gather_dot(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    crow, col, _, dense = _csr(37, 50, dtype)
    weight, grad = _random(50, 77, dtype=dtype, seed=5), _random(37, 77, dtype=dtype, seed=6)
    out = engine.csr_gather_dot(*(t.to(device) for t in (grad, crow, col, weight)))
    return [(out, (grad.double() @ weight.double().T)[dense != 0])]


def _check_csr_scatter_outer(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    crow, col, values, dense = _csr(300, 50, dtype)
    grad = _random(300, 77, dtype=dtype, seed=6)
    out = engine.csr_scatter_outer(*(t.to(device) for t in (values, crow, col, grad)), 50)
    return [(out, dense.double().T @ grad.double())]


def _check_threshold_encode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    x, weight, bias, _ = _encode_cases(engine, dtype)[0]
    score = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    # A threshold in the widest gap near it: rounding must not decide.
    near = score.flatten().sort().values
    near = near[near > 1.0][:200]
    gap = near.diff().argmax()
    threshold = ((near[gap] + near[gap + 1]) / 2).to(torch.float32)
    crow, col, values = engine.threshold_encode(*(t.to(device) for t in (x, weight, bias, threshold)), "auto")
    expected = torch.where(score > threshold.double(), score, 0.0)
    return [(_to_dense(crow, col, values, weight.shape[0]), expected)]


def _check_batch_topk_encode(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    x, weight, bias, k = _encode_cases(engine, dtype)[0]
    count = k * x.shape[0] - 1  # no whole number a row
    crow, col, values = engine.batch_topk_encode(*(t.to(device) for t in (x, weight, bias)), count, "auto")
    if col.shape[0] != count:
        raise _DisagreementError(f"{col.shape[0]} entries were kept, not {count}")
    score = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    flat = torch.zeros_like(score).flatten()
    order = score.flatten().sort(descending=True, stable=True).indices[: col.shape[0]]
    flat[order] = score.flatten()[order].relu()
    return [(_to_dense(crow, col, values, weight.shape[0]), flat.view_as(score))]


def _to_dense(crow: Tensor, col: Tensor, values: Tensor, n: int) -> Tensor:
    crow, col, values = crow.cpu(), col.cpu().long(), values.cpu().double()
    dense = torch.zeros(crow.shape[0] - 1, n, dtype=torch.float64)
    dense[torch.repeat_interleave(torch.arange(crow.shape[0] - 1), crow.diff()), col] = values
    return dense


def _check_row_adam(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    n, d = 60, 77
    weight = torch.nn.functional.normalize(_random(n, d, dtype=dtype, seed=5), dim=1)
    expected = weight.double()
    mine = weight.to(device)
    state = {"step": torch.zeros((), device=device)}
    state |= {name: torch.zeros_like(mine) for name in ("exp_avg", "exp_avg_sq")}
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    finite = torch.ones((), dtype=torch.bool, device=device)
    rest = torch.zeros((), dtype=torch.float64, device=device)
    for step in range(1, 4):
        crow, col, entries, dense = _csr(300, n, dtype)
        vectors = [_random(300, d, dtype=dtype, seed=20 + i) for i in range(2)]
        parts = [OuterProducts(*_codes(300, n, 5, dtype), vectors[0]), OuterProducts(entries, col, vectors[1], crow)]
        values, indices = parts[0][:2]
        gradient = reference.scatter_outer(values.double(), indices, vectors[0].double(), n)
        gradient = gradient + dense.double().T @ vectors[1].double()
        gradient = gradient - (gradient * expected).sum(1, keepdim=True) * expected
        gradient = gradient * (0.5 / gradient.norm()).clamp(max=1)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        expected = expected - 1e-2 / (1 - 0.9**step) * first / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        expected = expected / expected.norm(dim=1, keepdim=True)
        on = [OuterProducts(*(None if t is None else t.to(device) for t in part)) for part in parts]  # type: ignore
        factors = engine.SortedFactors(on, n)
        clip = engine.clip_factor([(factors, mine, True)], rest, 0.5)
        options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "clip": clip, "copy": None, "finite": finite}
        engine.row_adam(factors, mine, True, state, **options)
    return [(mine, expected), (state["exp_avg"], first), (state["exp_avg_sq"], second)]


def _bits(n: int) -> Tensor:
    return torch.randint(256, (n, 23), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def _check_bit_distances(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    a, b = _bits(70), _bits(131)
    pairs: Pairs = []
    for metric in ("hamming", "jaccard"):
        expected = reference.bit_distances(a, b, metric)
        out = engine.bit_distances(a.to(device), b.to(device), metric)
        if not torch.equal(out.cpu(), expected):
            raise _DisagreementError(f"a {metric} distance is not right to the bit")
        pairs.append((out, expected.double()))
    return pairs


def _check_bit_neighbors(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    a = _bits(70)
    found = engine.bit_neighbors(a.to(device), a.to(device), 9, "hamming", False)
    expected = reference.bit_neighbors(a, a, 9, "hamming", False)
    if not torch.equal(found[1].cpu(), expected[1]):
        raise _DisagreementError("a row is not among the nearest")
    return [(found[0], expected[0].double())]


def _check_cooccurrence(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    active = torch.rand(300, 90, generator=torch.Generator().manual_seed(5)) < 0.1
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    col = active.nonzero()[:, 1].int()
    found = [t.cpu() for t in engine.cooccurrence(crow.to(device), col.to(device), 90, 2)]
    expected = reference.cooccurrence(crow, col, 90, 2)
    if not all(map(torch.equal, found, expected)):
        raise _DisagreementError("a pair has another count")
    return [(found[2], expected[2].double())]


def _check_row_topk(engine: Any, dtype: torch.dtype, device: torch.device) -> Pairs:
    pairs: Pairs = []
    for rows, n, k in [(7, 1003, 30), (3, 70_001, 64)]:  # selected at once, and streamed
        keys = _random(rows, n, dtype=dtype, seed=11)
        keys[1], keys[2, ::3] = 0.5, -torch.inf  # all tie
        values, indices = engine.row_topk(keys.to(device), k)
        expected, order = (found[:, :k] for found in keys.sort(dim=1, descending=True, stable=True))
        if not torch.equal(indices.cpu(), order.int()):
            raise _DisagreementError("they are not the largest, ties to the lower index")
        pairs.append((values, expected.double()))
    return pairs


CASES: dict[str, Callable[[Any, torch.dtype, torch.device], Pairs]] = {
    "topk_encode": _check_topk_encode,
    "topk_encode bf16": _check_topk_encode_bf16,
    "topk_encode fp8": _check_topk_encode_fp8,
    "route": _check_route,
    "group_slots": _check_group_slots,
    "routed_topk_encode": _check_routed_topk_encode,
    "routed_topk_encode bf16": _check_routed_topk_encode_bf16,
    "sparse_decode": _check_sparse_decode,
    "gather_dot": _check_gather_dot,
    "scatter_outer": _check_scatter_outer,
    "weighted_row_sum": _check_weighted_row_sum,
    "csr_decode": _check_csr_decode,
    "csr_gather_dot": _check_csr_gather_dot,
    "csr_scatter_outer": _check_csr_scatter_outer,
    "threshold_encode": _check_threshold_encode,
    "batch_topk_encode": _check_batch_topk_encode,
    "bit_distances": _check_bit_distances,
    "bit_neighbors": _check_bit_neighbors,
    "cooccurrence": _check_cooccurrence,
    "row_topk": _check_row_topk,
    "row_adam": _check_row_adam,
}
"""The check of every op; those of the encoders by other screens than what "auto" chooses have checks of their own."""

_FLOAT32_ONLY = ("row_adam", "bit_distances", "bit_neighbors", "cooccurrence")


def name_of(op: str, screen: str) -> str:
    """The check that a call of `op` needs."""
    return f"{op} {screen}" if f"{op} {screen}" in CASES else op


def names(engine: Any) -> list[str]:
    """The checks of what `engine` has."""
    return [name for name in CASES if hasattr(engine, name.split()[0])]


def run_one(engine: Any, op: str, dtype: torch.dtype, device: torch.device) -> Result:
    """Check one op now."""
    start, error, note = time.perf_counter(), float("nan"), ""
    try:
        pairs = [(out.double().cpu(), expected) for out, expected in CASES[op](engine, dtype, device)]
        error = max(float((out - expected).norm() / expected.norm()) for out, expected in pairs)
        passed = error <= _BOUNDS[dtype]  # not where it is NaN
        note = "" if passed else "the results are too far from float64"
    except Exception as problem:  # whatever it is, the reference can serve
        passed, note = False, f"{type(problem).__name__}: {problem}"
    seconds = time.perf_counter() - start
    return Result(op, str(dtype).removeprefix("torch."), passed, error, _BOUNDS[dtype], seconds, note)


def run(engine: Any, device: torch.device | str) -> list[Result]:
    """Check every op with every dtype now, whatever was found before."""
    device = torch.device(device)
    fp8 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)
    ops = [op for op in names(engine) if fp8 or not op.endswith("fp8")]
    pairs = [(op, dtype) for op in ops for dtype in _BOUNDS if dtype == torch.float32 or op not in _FLOAT32_ONLY]
    return [run_one(engine, op, dtype, device) for op, dtype in pairs]


def cache_file() -> Path:
    """Where outcomes are kept; ``SPARSEKERN_CACHE`` names another folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SPARSEKERN_CACHE") or Path(home) / "sparsekern") / "checks.json"


def digest(files: Iterable[Path]) -> str:
    """Of the content of some files."""
    found = hashlib.sha256()
    for path in sorted(files):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


@functools.cache
def _fingerprint(engine: Any, index: int) -> str:
    """Of all that the outcome of a check depends on."""
    device = torch.cuda.get_device_properties(index)
    driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
    parts = [f"{device.name} {device.major}.{device.minor}", f"driver {driver}", f"torch {torch.__version__}"]
    return "; ".join([*parts, engine.build(), f"checks {digest([Path(__file__)])}"])


_verdicts: dict[tuple[str, str, torch.dtype, int], str | None] = {}


def verdict(engine: Any, op: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """None where the kernels of `op` are right on `device`, else why they are not used there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    key = engine.__name__, op, dtype, index
    if key not in _verdicts:
        _verdicts[key] = _first_verdict(engine, op, dtype, index)
    return _verdicts[key]


def _first_verdict(engine: Any, op: str, dtype: torch.dtype, index: int) -> str | None:
    if op not in CASES or (dtype != torch.float32 and op in _FLOAT32_ONLY):
        return f"has no {op} kernel for {dtype}"
    known = _read_cache()
    fingerprint, name = _fingerprint(engine, index), f"{op} {dtype}"
    if known.get(fingerprint, {}).get(name) is True:
        return None
    result = run_one(engine, op, dtype, torch.device("cuda", index))
    if result.passed:
        known.setdefault(fingerprint, {})[name] = True
        try:
            cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_json(cache_file(), known)
        except OSError:
            pass  # it will be checked again in the next process
        return None
    warnings.warn(
        f"sparsekern's {engine.__name__.rpartition('.')[2]} kernels for {op} on {dtype} failed their check on this "
        f"device and are not used: {result.note} (error {result.error:.2g}, at most {result.bound:.2g}). Please report "
        f"this line and the output of `sparsekern doctor`: {fingerprint}",
        RuntimeWarning,
        stacklevel=6,
    )
    return f"failed its check on this device: {result.note}"


def _read_cache() -> dict[str, dict[str, bool]]:
    try:
        known = json.loads(cache_file().read_text())
    except (OSError, ValueError):  # none yet, or half of one
        return {}
    return {key: found for key, found in known.items() if isinstance(found, dict)} if isinstance(known, dict) else {}
