"""What a device can do at most, measured once, and the least time that this leaves to each kernel: its floor.

Operations are multiplications and additions, two for each pair. Bytes are the fewest that device memory must see: every
input read once, every output written once, weights only in the rows that are touched. `B` tokens, width `d`, `N`
latents, `k` slots, and `touched` distinct latents among the ``B × k`` slots.
"""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import torch

from sparsekern.bench.options import Case
from sparsekern.bench.timing import Clock

Roofs = dict[str, float]
"""``copy_bytes_s`` (read and written), and of each kind of matmul ``<unit>_flops_s``."""

UNITS = ("bf16", "fp8", "fp32", "tf32")


class Work(NamedTuple):
    """Operations, bytes, and the unit that does the operations, one of :data:`UNITS`."""

    flops: float
    bytes: float
    unit: str

    def floor_ms(self, roofs: Roofs) -> float | None:
        """The larger of the two times; None where the rate of the unit was not measured."""
        rate = roofs.get(f"{self.unit}_flops_s")
        return None if rate is None else 1e3 * max(self.flops / rate, self.bytes / roofs["copy_bytes_s"])


def matmul(case: Case) -> Work:
    """``[B, d] × [d, N]`` in bfloat16, written in full: what others begin with."""
    b, d, n, _ = _sizes(case)
    return Work(2 * b * n * d, 2 * (b * d + n * d + b * n), "bf16")


def encode(case: Case, touched: int, screen: str = "bf16", weight_bytes: int = 4) -> Work:
    """A screening pass over weights of the screen's width, the kept latents read again at full width."""
    b, d, n, k = _sizes(case)
    unit, screen_bytes = ("fp8", 1) if screen == "fp8" else ("bf16", 2)
    rescored = weight_bytes * touched * d if weight_bytes > screen_bytes else 0
    return Work(2 * b * n * d, screen_bytes * n * d + rescored + weight_bytes * b * d + 8 * b * k, unit)


def select(case: Case, rows: int, key_bytes: int) -> Work:
    """The k largest of every row of scores that are there already: each of them is read once."""
    _, _, n, k = _sizes(case)
    return Work(0, rows * (key_bytes * n + (key_bytes + 4) * k), "fp32")


BALANCE = 267
"""Tokens for which a latent's row has to be used before the tensor cores, and no longer the memory that it comes from,
set the time of a matmul: those of 800 TFLOP/s in bfloat16 beside 3 TB/s."""


def routed_encode(case: Case, n_experts: int, n_active: int) -> Work:
    """:func:`encode` of the latents of each token's experts alone; all weights of the screen's width are read."""
    whole = encode(case, min(case.d_sae, case.rows * case.k))
    return whole._replace(flops=whole.flops * n_active / n_experts)


def least_routed_ratio(case: Case, n_experts: int, n_active: int) -> float:
    """Least time of a routed screen as a share of a dense one's: by operations, and by reading the weights."""
    return max(n_active / n_experts, BALANCE / case.rows)


def route(case: Case, n_experts: int) -> Work:
    """Logits of a router, in full float32."""
    b, d, _, _ = _sizes(case)
    return Work(2 * b * d * n_experts, 4 * (b * d + n_experts * d + b * n_experts), "fp32")


def products(case: Case, touched: int) -> Work:
    """``sparse_decode`` or ``gather_dot``: the touched rows, one ``B × d`` tensor, values and indices."""
    b, d, _, k = _sizes(case)
    return Work(2 * b * k * d, 4 * touched * d + 4 * b * d + 8 * b * k, "fp32")


def scatter(case: Case) -> Work:
    """``scatter_outer``: every row of the gradient is written."""
    b, d, n, k = _sizes(case)
    return Work(2 * b * k * d, 4 * n * d + 4 * b * d + 8 * b * k, "fp32")


def gather_traffic(case: Case) -> float:
    """Bytes of ``sparse_decode`` or ``gather_dot`` when each slot reads its row anew, from whichever memory."""
    b, d, _, k = _sizes(case)
    return 4 * b * k * d + 4 * b * d + 8 * b * k


def backward_traffic(case: Case) -> float:
    """The same of ``gather_dot`` and ``scatter_outer`` together: a row of the weight and a token's vector a slot."""
    b, d, n, k = _sizes(case)
    return gather_traffic(case) + 4 * b * k * d + 4 * n * d + 8 * b * k


def update(case: Case) -> Work:
    """Both weights from factors: weight and two moments read and written, the encoder's bfloat16 copy written."""
    b, d, n, k = _sizes(case)
    return Work(4 * b * k * d + 30 * n * d, 24 * 2 * n * d + 2 * n * d + 8 * b * d + 12 * b * k, "fp32")


def dense_adam(case: Case) -> Work:
    """Both weights from gradients that are there already: these are read besides."""
    _, d, n, _ = _sizes(case)
    return Work(30 * n * d, 28 * 2 * n * d, "fp32")


def step(case: Case, touched: int) -> list[Work]:
    """A full step: encode, decode, gradient of the codes, update; one after the other."""
    return [encode(case, touched), products(case, touched), products(case, touched), update(case)]


def step_floor_ms(case: Case, touched: int, roofs: Roofs) -> float:
    """Least time of a full step with a bfloat16 screen."""
    return sum(work.floor_ms(roofs) or 0.0 for work in step(case, touched))


def _sizes(case: Case) -> tuple[int, int, int, int]:
    return case.rows, case.d, case.d_sae, case.k


def measure(clock: Clock, copy_bytes: int, side: int, turns: int) -> tuple[Roofs, dict[str, str]]:
    """The roofs of the clock's device, and why some are missing.

    Parameters
    ----------
    clock : Clock
        Of the device.
    copy_bytes : int
        Size of what is copied; the rate counts it twice, read and written.
    side : int
        Of the square matrices.
    turns : int
        Of which the median counts.
    """
    device = clock.device
    pair = torch.empty(2, copy_bytes, dtype=torch.uint8, device=device).random_()
    ms = clock.by_turns({"copy": lambda _: pair[0].copy_(pair[1])}, turns=turns, seconds=5)["copy"]
    roofs, missing = {"copy_bytes_s": 2e3 * copy_bytes / statistics.median(ms)}, {}
    pair = pair[:, :0].clone()  # the rest is free again
    for unit in UNITS:
        try:
            call = _square(unit, side, device)
            call()
            ms = clock.by_turns({unit: lambda _, call=call: call()}, turns=turns, seconds=5)[unit]
            roofs[f"{unit}_flops_s"] = 2e3 * side**3 / statistics.median(ms)
        except (RuntimeError, AttributeError, ValueError) as error:
            missing[unit] = str(error).strip().splitlines()[0]
    return roofs, missing


def _square(unit: str, side: int, device: torch.device) -> Any:
    """A square matrix product in the unit; raises where the device has none."""
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    if unit == "fp8":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError("fp8 needs capability 8.9")
        low = [t.to(torch.float8_e4m3fn) for t in (a, b)]
        one = torch.ones((), device=device)
        return lambda: torch._scaled_mm(low[0], low[1].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
    if unit == "bf16":
        half = [t.bfloat16() for t in (a, b)]
        return lambda: half[0] @ half[1].T
    if unit == "fp32":
        return lambda: a @ b.T
    if device.type != "cuda":
        raise ValueError("tf32 is a mode of GPUs")

    def with_tf32() -> None:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            a @ b.T
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    return with_tf32
