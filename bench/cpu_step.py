"""Where the time of a training step goes on a CPU: ``python -m bench.cpu_step``.

Every figure is a ratio to one fp32 encoder matmul ``[B, d] × [d, N]``, interleaved with it. Beside the C++ kernels
stand the reference backend and, for decoding, ``torch.nn.functional.embedding_bag``, as other libraries have it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import sparsekern as sk
from bench import record
from sparsekern.backends import cpu, reference

SHAPES = [(2048, 384, 24576, 32), (2048, 768, 32768, 32), (1024, 384, 65536, 32)]


def measure(rows: int, d: int, d_sae: int, k: int, rounds: int) -> dict[str, Any]:
    """Ratios to one encoder matmul at one shape, on random data with Zipf frequencies of latents."""
    x, grad = torch.randn(rows, d), torch.randn(rows, d)
    sae = sk.SAE(d, d_sae, sk.TopK(k))
    weight = sae.W_dec.detach()
    values = torch.rand(rows, k)
    frequency = 1 / torch.arange(1, d_sae + 1).float()
    indices = torch.multinomial(frequency.expand(rows, -1), k).int()  # no repeats inside a row
    trainer = sk.Trainer(sae, lr=1e-4)
    bag = torch.nn.functional.embedding_bag
    wide = indices.long()

    def bag_and_gradients() -> None:
        w, v = weight.requires_grad_(), values.requires_grad_()
        out = bag(wide, w, per_sample_weights=v, mode="sum")
        torch.autograd.grad(out, [w, v], grad)
        weight.requires_grad_(False)
        values.requires_grad_(False)

    def products_and_gradients() -> None:
        cpu.sparse_decode(values, indices, weight, None)
        cpu.gather_dot(grad, indices, weight)
        cpu.scatter_outer(values, indices, grad, d_sae)

    calls = {
        "matmul": lambda: x @ weight.T,
        "topk_encode": lambda: sk.topk_encode(x, weight, None, k),
        "sparse_decode cpu": lambda: cpu.sparse_decode(values, indices, weight, None),
        "sparse_decode reference": lambda: reference.sparse_decode(values, indices, weight, None),
        "sparse_decode embedding_bag": lambda: bag(wide, weight, per_sample_weights=values, mode="sum"),
        "gather_dot cpu": lambda: cpu.gather_dot(grad, indices, weight),
        "gather_dot reference": lambda: reference.gather_dot(grad, indices, weight),
        "scatter_outer cpu": lambda: cpu.scatter_outer(values, indices, grad, d_sae),
        "scatter_outer reference": lambda: reference.scatter_outer(values, indices, grad, d_sae),
        "decode, forward and backward, cpu": products_and_gradients,
        "decode, forward and backward, embedding_bag": bag_and_gradients,
        "full step": lambda: trainer.step(x),
    }
    times = record.interleaved(calls, rounds)
    base = times["matmul"]["median"]
    print(f"B={rows} d={d} N={d_sae} k={k}: one matmul {base:.0f} ms")
    for name, spread in times.items():
        print(f"  {name:<45} {spread['median'] / base:7.3f}")
    return {
        "shape": {"B": rows, "d": d, "d_sae": d_sae, "k": k},
        "matmul_ms": times["matmul"],
        "ratio": {name: {q: t / base for q, t in spread.items()} for name, spread in times.items()},
    }


def main() -> None:
    """Measure every shape and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of each call")
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu_step.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    shapes = [measure(*shape, arguments.rounds) for shape in SHAPES]
    record.write(arguments.output, {**record.provenance(), "rounds": arguments.rounds, "shapes": shapes})


if __name__ == "__main__":
    main()
