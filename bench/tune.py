"""Time the tiles of the fused screen on a GPU, beside the chunked path: what the table of plans is made from.

``python -m sparsekern.bench.tune`` prints, for each shape and dtype of the screen, the time of every candidate in
multiples of the library's matmul alone, and the line of ``sparsekern.backends.triton.plans.TILES`` that is best over
the shapes. Candidates that do not compile, or want more shared memory than there is, are left out with the reason.

With ``--clusters`` it times the CUDA C++ screen instead, with each number of blocks that share what they read of the
weight, beside the Triton screen as it is shipped: what ``sparsekern.backends.cuda.encode.CLUSTER`` is chosen by.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.backends import cuda
from sparsekern.backends.cuda import encode as cuda_encode
from sparsekern.backends.triton import encode, plans
from sparsekern.backends.triton.plans import EncodePlan, Tile
from sparsekern.bench.gpu import SHAPES
from sparsekern.bench.timing import Call, Clock

TUNED = ("D", "F", "A", "G")
OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp8": torch.float8_e4m3fn}

CLUSTERS = (1, 2, 4)

CANDIDATES = [
    Tile(rows, 8, members, depth, warps, stages)
    for rows, members, depth, (warps, stages) in itertools.product(
        (64, 128), (16, 32), (32, 64, 128), ((4, 3), (8, 3), (8, 4))
    )
    if rows * members * 8 <= 128 * 256 * (warps / 8)  # more accumulators than that do not fit into the registers
]


def inputs(clock: Clock, shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    """Four batches that go around, and a weight."""
    rows, d, n, _ = shape
    generator = torch.Generator(clock.device).manual_seed(0)
    batches = [torch.randn(rows, d, generator=generator, device=clock.device) for _ in range(4)]
    return batches, torch.randn(n, d, generator=generator, device=clock.device)


def first_chunk(rows: int, plan: EncodePlan) -> slice:
    """The tokens that go through the screen at a time."""
    return next(iter(encode.chunks(rows, 4 * plan.n_buckets * plan.keep + 8 * plan.room)))


def measure(
    clock: Clock, shape: tuple[int, int, int, int], name: str, tiles: Sequence[Tile], seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Median times by tile, by ``"chunked"`` and by ``"matmul"``, in milliseconds; and why others were left out."""
    rows, d, n, k = shape
    batches, weight = inputs(clock, shape)
    plan = plans.encode_plan(
        rows, d, n, k, torch.float32, "auto", encode.capability(weight), has_copy=False, path="fused"
    )
    assert plan is not None, "the shapes that are tuned are all served"
    plan = plan._replace(operand=OPERANDS[name], precision="tf32" if name == "tf32" else "ieee")
    screened = [encode.screen_operands(x, weight, None, plan, None) for x in batches]
    part = first_chunk(rows, plan)

    def call(changed: EncodePlan) -> Call:
        return lambda turn: encode.screen_keys(screened[turn % 4], part, None, changed)

    calls: dict[str, Call] = {str(tuple(tile)): call(plan._replace(tile=tile)) for tile in tiles}
    if name != "fp8":
        calls["chunked"] = call(plan._replace(tile=None))
        calls["matmul"] = lambda turn: screened[turn % 4].x.rows[part] @ screened[turn % 4].weight.rows.T
    return timed(clock, calls, seconds)


def measure_clusters(
    clock: Clock, shape: tuple[int, int, int, int], name: str, seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """As :func:`measure`, of the CUDA C++ screen: by blocks of a cluster, by ``"triton"`` and by ``"matmul"``."""
    rows, d, n, k = shape
    batches, weight = inputs(clock, shape)

    def screening(module: Any, plan: EncodePlan | None) -> Call:
        assert plan is not None, "the shapes that are tuned are all served"
        screened = [module.screen_operands(x, weight, None, plan, None) for x in batches]
        part = first_chunk(rows, plan)
        return lambda turn: module.screen_keys(screened[turn % 4], part, None, plan)

    def in_clusters_of(blocks: int) -> Call:
        def call(turn: int) -> None:
            before, cuda_encode.CLUSTER = cuda_encode.CLUSTER, blocks
            try:
                by_cuda(turn)
            finally:
                cuda_encode.CLUSTER = before

        return call

    shared = (rows, d, n, k, torch.float32, name, encode.capability(weight))
    by_cuda = screening(cuda_encode, cuda_encode.encode_plan(*shared, has_copy=False, path="fused"))
    calls = {f"clusters of {blocks}": in_clusters_of(blocks) for blocks in CLUSTERS}
    calls["triton"] = screening(encode, plans.encode_plan(*shared, has_copy=False, path="fused"))
    if name != "fp8":
        low, low_weight = [x.to(OPERANDS[name]) for x in batches], weight.to(OPERANDS[name])
        calls["matmul"] = lambda turn: low[turn % 4] @ low_weight.T
    return timed(clock, calls, seconds)


def timed(clock: Clock, calls: dict[str, Call], seconds: float) -> tuple[dict[str, float], dict[str, str]]:
    """Median times of calls by turns, and why those that raise were left out."""
    left_out = {}
    for label, each in list(calls.items()):
        try:
            each(0)
            clock.wait()
        except Exception as problem:  # of many kinds: too much shared memory, no such instruction
            left_out[label] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
            del calls[label]
    times = clock.by_turns(calls, turns=20, seconds=seconds)
    return {label: statistics.median(taken) for label, taken in times.items()}, left_out


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m sparsekern.bench.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(TUNED), help="default: %(default)s")
    parser.add_argument("--operands", nargs="+", choices=OPERANDS, default=["fp16"], help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the turns of one shape (default: %(default)s)")
    parser.add_argument("--clusters", action="store_true", help="of the CUDA C++ screen, not tiles of Triton's")
    options = parser.parse_args(arguments)
    if options.clusters and "tf32" in options.operands:
        parser.error("the CUDA C++ screen has no tf32")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to time on")
    clock = Clock(torch.device("cuda"))
    missing = cuda.missing(clock.device) if options.clusters else None
    if missing is not None:
        parser.error(f"the CUDA C++ kernels are {missing}")
    for name in options.operands:
        ratios: dict[str, list[float]] = {}
        for shape in options.shapes:
            if options.clusters:
                times, left_out = measure_clusters(clock, SHAPES[shape], name, options.seconds)
            else:
                times, left_out = measure(clock, SHAPES[shape], name, CANDIDATES, options.seconds)
            base = times.get("matmul", min(times.values()))
            print(f"\n{name} at {shape} {SHAPES[shape]}: multiples of {base:.3f} ms")
            for label, taken in sorted(times.items(), key=lambda item: item[1]):
                ratios.setdefault(label, []).append(taken / base)
                print(f"  {taken / base:6.3f}  {label}")
            for label, reason in left_out.items():
                print(f"  left out: {label}: {reason}")
        everywhere = {
            label: statistics.geometric_mean(of) for label, of in ratios.items() if len(of) == len(options.shapes)
        }
        tiles = {label: ratio for label, ratio in everywhere.items() if label.startswith("(")}
        if tiles:
            best = min(tiles, key=lambda label: tiles[label])
            major = torch.cuda.get_device_capability()[0]
            size = OPERANDS[name].itemsize
            print(f"\nbest over these shapes: ({major}, {size}): Tile{best}, {tiles[best]:.3f}")
        clusters = {label: ratio for label, ratio in everywhere.items() if label.startswith("clusters")}
        if clusters:
            best = min(clusters, key=lambda label: clusters[label])
            print(f"\nbest over these shapes: {best}, {clusters[best]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
