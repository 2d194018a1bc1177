"""Time the tiles of the fused screen on a GPU, beside the chunked path: what the table of plans is made from.

``python -m sparsekern.bench.tune`` prints, for each shape and dtype of the screen, the time of every candidate in
multiples of the library's matmul alone, and the line of ``sparsekern.backends.triton.plans.TILES`` that is best over
the shapes. Candidates that do not compile, or want more shared memory than there is, are left out with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Sequence

import torch

from sparsekern.backends.triton import encode, plans
from sparsekern.backends.triton.plans import EncodePlan, Tile
from sparsekern.bench.gpu import SHAPES
from sparsekern.bench.timing import Call, Clock

TUNED = ("D", "F", "A", "G")
OPERANDS = {"fp16": torch.float16, "bf16": torch.bfloat16, "tf32": torch.float32, "fp8": torch.float8_e4m3fn}

CANDIDATES = [
    Tile(rows, 8, members, depth, warps, stages)
    for rows, members, depth, (warps, stages) in itertools.product(
        (64, 128), (16, 32), (32, 64, 128), ((4, 3), (8, 3), (8, 4))
    )
    if rows * members * 8 <= 128 * 256 * (warps / 8)  # more accumulators than that do not fit into the registers
]


def measure(
    clock: Clock, shape: tuple[int, int, int, int], name: str, tiles: Sequence[Tile], seconds: float
) -> tuple[dict[str, float], dict[str, str]]:
    """Median times by tile, by ``"chunked"`` and by ``"matmul"``, in milliseconds; and why others were left out."""
    rows, d, n, k = shape
    device, operand = clock.device, OPERANDS[name]
    generator = torch.Generator(device).manual_seed(0)
    batches = [torch.randn(rows, d, generator=generator, device=device) for _ in range(4)]
    weight = torch.randn(n, d, generator=generator, device=device)
    plan = plans.encode_plan(
        rows, d, n, k, torch.float32, "auto", encode.capability(weight), has_copy=False, path="fused"
    )
    assert plan is not None, "the shapes that are tuned are all served"
    plan = plan._replace(operand=operand, precision="tf32" if name == "tf32" else "ieee")
    screened = [encode.screen_operands(x, weight, None, plan, None) for x in batches]
    part = slice(0, next(iter(encode.chunks(rows, 4 * plan.n_buckets * plan.keep + 8 * plan.room))).stop)

    def call(changed: EncodePlan) -> Call:
        return lambda turn: encode.screen_keys(screened[turn % 4], part, None, changed)

    calls: dict[str, Call] = {str(tuple(tile)): call(plan._replace(tile=tile)) for tile in tiles}
    if name != "fp8":
        calls["chunked"] = call(plan._replace(tile=None))
        calls["matmul"] = lambda turn: screened[turn % 4].x.rows[part] @ screened[turn % 4].weight.rows.T
    left_out = {}
    for label, each in list(calls.items()):
        try:
            each(0)
            clock.wait()
        except Exception as problem:  # Triton's own, of many kinds: too much shared memory, no such instruction
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
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device to time on")
    clock = Clock(torch.device("cuda"))
    for name in options.operands:
        ratios: dict[str, list[float]] = {}
        for shape in options.shapes:
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
