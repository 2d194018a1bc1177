"""Is the screened encoder exact? ``python -m sparsekern.bench.exactness`` counts wrong rows over a million and more.

A row is right when its indices are the k largest of the float64 pre-activations of the stored weights, ties to the
lower index, or else those that the float32 reference selects. Float64 scores within 1e-13 of the row's largest possible
score count as tied: no order of summation tells them apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.backends import cpu, reference
from sparsekern.bench import record
from sparsekern.files import write_json
from sparsekern.progress import Progress


class Problem(NamedTuple):
    """Input of one encoding: `x` ``[rows, d]``, `weight` ``[n, d]``, `bias` ``[n]``."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def random(rows: int, n: int, d: int) -> Problem:
    """Gaussian inputs, weights of unit rows: no structure at all."""
    weight = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    return Problem(torch.randn(rows, d), weight, 0.1 * torch.randn(n))


def zipf(rows: int, n: int, d: int) -> Problem:
    """Sums of a few directions with Zipf frequencies, seen by an encoder that knows them, its rows of uneven length."""
    directions = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    frequency = 1 / torch.arange(1, n + 1).float()
    active = min(12, n)
    chosen = torch.multinomial(frequency.expand(rows, -1), active)
    x = (directions[chosen] * torch.rand(rows, active, 1)).sum(1) + 0.02 * torch.randn(rows, d)
    return Problem(x, directions * (0.3 + torch.rand(n, 1)), -0.05 * torch.rand(n))


def outliers(rows: int, n: int, d: int) -> Problem:
    """Residual streams of language models: a few dimensions 30 to 300 times the others, and a few enormous tokens."""
    x, weight, bias = random(rows, n, d)
    x[:, torch.randperm(d)[: max(1, d // 100)]] *= 30
    x[:, torch.randint(d, ())] *= 300
    x[:: max(1, rows // 5)] *= 1000
    return Problem(x, weight, bias)


def near_ties(rows: int, n: int, d: int) -> Problem:
    """Every weight beside copies of itself that differ in the last bits."""
    x, weight, bias = random(rows, n, d)
    weight = weight[: (n + 3) // 4].repeat(4, 1)[:n]
    return Problem(x, weight * (1 + 1e-7 * torch.randint(-1, 2, weight.shape)), torch.zeros_like(bias))


def duplicates(rows: int, n: int, d: int) -> Problem:
    """Every weight four times over: ties by the hundred."""
    x, weight, bias = random(rows, n, d)
    return Problem(x, weight[: (n + 3) // 4].repeat(4, 1)[:n].contiguous(), torch.zeros_like(bias))


def all_negative(rows: int, n: int, d: int) -> Problem:
    """No positive pre-activation anywhere, and a few zero inputs."""
    x, weight, _ = random(rows, n, d)
    x[::7] = 0
    return Problem(x, weight, -x.norm(dim=1).max() - torch.rand(n))


def tiny_norms(rows: int, n: int, d: int) -> Problem:
    """Inputs and weights whose lengths span thirty orders of magnitude, some of them zero."""
    x, weight, _ = random(rows, n, d)
    x *= 10 ** (torch.rand(rows, 1) * 15 - 15)
    weight *= 10 ** (torch.rand(n, 1) * 15 - 15)
    weight[::9] = 0
    return Problem(x, weight, torch.zeros(n))


CASES: dict[str, Callable[[int, int, int], Problem]] = {
    case.__name__: case for case in (random, zipf, outliers, near_ties, duplicates, all_negative, tiny_norms)
}


def real(store: Path, rows: int, n: int) -> Problem:
    """Harvested activations and an SAE trained on them for a hundred steps."""
    from sparsekern.data import ActivationStore

    x = ActivationStore(store).rows(0, rows).float()
    sae = sk.SAE(x.shape[1], n, sk.TopK(32))
    trainer = sk.Trainer(sae, lr=1e-3, steps=100)
    for _ in range(100):
        trainer.step(x[torch.randint(0, len(x), (1024,))])
    return Problem(x - sae.b_dec.detach(), sae.W_enc.detach(), sae.b_enc.detach())


def wrong_rows(problem: Problem, indices: Tensor, absolute: bool = False) -> Tensor:
    """Which rows of `indices` ``[rows, k]`` are wrong, by score or by its size: ``[rows]`` bool."""
    x, weight, bias = problem
    k = indices.shape[1]
    scores = torch.addmm(bias.double(), x.double(), weight.double().T)
    scores = scores.abs() if absolute else scores
    kth = scores.topk(k, dim=1).values[:, -1:]
    tied = 1e-13 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max() + bias.abs().max())
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices.long(), True)
    above, below = scores > kth + tied, scores < kth - tied
    level = ~above & ~below
    # Of those level with the k-th, the chosen must be the first ones.
    last_chosen = (chosen & level).int().mul(torch.arange(1, scores.shape[1] + 1)).amax(1, keepdim=True)
    skipped = level & ~chosen & (torch.arange(1, scores.shape[1] + 1) < last_chosen)
    wrong = (chosen.sum(1) != k) | (above & ~chosen).any(1) | (chosen & below).any(1) | skipped.any(1)
    rows = wrong.nonzero().squeeze(1)
    if rows.numel():
        again = reference.topk_encode(x[rows], weight, bias, k, "none", absolute)[1]
        wrong[rows] = (again.sort(1).values != indices[rows].sort(1).values).any(1)
    return wrong


def main() -> None:
    """Run all cases and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=160_000, help="of each case")
    parser.add_argument("--store", type=Path, help="harvested activations, for the case of real ones")
    parser.add_argument("--output", type=Path, default=Path("bench/results/exactness.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    done = 0
    names = [*CASES, *(["real"] if arguments.store else [])]
    with Progress("exactness", total=arguments.rows * len(names), unit="rows") as progress:
        for name in names:
            found = {"rows": 0, "wrong": 0, "repaired": 0, "rescored": 0}
            trained = real(arguments.store, arguments.rows, 4096) if name == "real" else None
            for first in range(0, arguments.rows, 4000):
                if trained is None:
                    # Widths that fill no register and dictionaries that fill no panel are as common as others.
                    n, d, k = ((4096, 128, 32), (2999, 129, 7), (5000, 67, 64), (1500, 768, 32))[first // 4000 % 4]
                    problem = CASES[name](4000, n, d)
                else:
                    problem, k = trained._replace(x=trained.x[first : first + 4000]), 32
                _, indices = cpu.topk_encode(problem.x, problem.weight, problem.bias, k, "int8")
                assert cpu.last_encode is not None
                found["rows"] += len(problem.x)
                found["wrong"] += int(wrong_rows(problem, indices).sum())
                found["repaired"] += cpu.last_encode.repaired
                found["rescored"] += cpu.last_encode.rescored
                done += len(problem.x)
                progress.update(done)
            results[name] = found
            print(name, found)
    total = {key: sum(result[key] for result in results.values()) for key in ("rows", "wrong", "repaired")}
    write_json(arguments.output, {**record.provenance(), "total": total, "cases": results})


if __name__ == "__main__":
    main()
