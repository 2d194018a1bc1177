"""Nearest rows of bits beside torch, pairs of latents beside scipy: ``python -m sparsekern.bench.bits [STORE SAE]``.

Everything is timed by turns in one process, on one thread and by the processor's time, so that other work on the
machine weighs on all alike; ``--whole`` adds one run over all pairs of rows on all threads, by the clock.

torch's ways have the bits of both sides unpacked to ±1 beforehand, which is not timed, and go through tiles of rows:
a matrix product, ``topk``, and a merge with the best so far. They are told from one another by their numbers: int8
through ``torch._int_mm``, bfloat16 and float32. "unequal" is the way without a product,
``(a[:, None] != b).sum(-1)`` of flags, for a few rows. Codes are random, and those of a network: which MLP units of
MiniLM are on (above 0 before the GELU) for tokens of numpy's docstrings. scipy's way is the product ``XᵀX`` of CSR
matrices of ones, and its upper triangle.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.bench import record
from sparsekern.bits import unpack_bits
from sparsekern.codes import CSRCodes
from sparsekern.data import ActivationStore
from sparsekern.files import write_json

TILE = 8192
"""Rows of b that torch compares at a time."""

UNEQUAL = (16, 1024)
"""Rows of a and of b for which torch compares flags."""


def _products(a: Tensor) -> dict[str, Callable[[Tensor], Callable[[], Tensor]]]:
    """For each way of torch what prepares a tile of b, given as ±1 in int8, and returns the product with `a`."""
    sides = {"bfloat16": a.bfloat16(), "float32": a.float()}

    def whole(tile: Tensor) -> Callable[[], Tensor]:
        return lambda: torch._int_mm(a, tile.T)

    def floating(name: str) -> Callable[[Tensor], Callable[[], Tensor]]:
        def prepare(tile: Tensor) -> Callable[[], Tensor]:
            wide = tile.to(sides[name].dtype)
            return lambda: sides[name] @ wide.T

        return prepare

    return {"int8": whole, "bfloat16": floating("bfloat16"), "float32": floating("float32")}


def _seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def random_codes(rows: int, bits: int, generator: torch.Generator) -> Tensor:
    """Codes whose bits are set half of the time."""
    return torch.randint(256, (rows, bits // 8), dtype=torch.uint8, generator=generator)


def token_codes(tokens: int, bits: int) -> Tensor:
    """Which of MiniLM's first MLP units are on, in tokens of docstrings in an order of chance."""
    from sparsekern.analysis.polytope import polytope_codes
    from sparsekern.data import EMBEDDED_MODEL, load_model, package_docstrings

    tokenizer, model = load_model(EMBEDDED_MODEL)
    texts = [text for _, text in package_docstrings("numpy") if len(text) > 500][: tokens // 100]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)
    batch = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    codes = polytope_codes(model, batch, batch_size=32).data[:, : bits // 8]
    return codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:tokens]].contiguous()


def neighbors(name: str, a: Tensor, b: Tensor, k: int, rounds: int) -> dict[str, Any]:
    """Nanoseconds a pair of every way to the nearest rows of `b`."""
    (rows, width), others = a.shape, len(b)
    bits = 8 * width
    flags, other_flags = (unpack_bits(x[:most], bits) for x, most in zip((a, b), UNEQUAL, strict=True))
    wide = unpack_bits(a, bits).to(torch.int8) * 2 - 1
    ways = _products(wide)
    taken: dict[str, list[float]] = {way: [] for way in ("hamming", "jaccard", *ways, "unequal")}
    pairs = {**dict.fromkeys(taken, rows * others), "unequal": len(flags) * len(other_flags)}
    sk.bit_neighbors(a, b[:TILE], k)
    expected = sk.bit_neighbors(a, b, k).distances
    for _ in range(rounds):
        for metric in ("hamming", "jaccard"):
            taken[metric].append(_seconds(lambda metric=metric: sk.bit_neighbors(a, b, k, metric)))  # type: ignore[misc]
        taken["unequal"].append(_seconds(lambda: (flags[:, None] != other_flags).sum(-1).topk(k, dim=1, largest=False)))
        spent, best = dict.fromkeys(ways, 0.0), dict[str, Tensor]()
        for left in range(0, others, TILE):
            tile = unpack_bits(b[left : left + TILE], bits).to(torch.int8) * 2 - 1
            for way, prepare in ways.items():
                product = prepare(tile)

                start = time.process_time()
                found = product().topk(k, dim=1).values
                best[way] = torch.cat([best[way], found], 1).topk(k, dim=1).values if way in best else found
                spent[way] += time.process_time() - start
        for way, seconds in spent.items():
            taken[way].append(seconds)
        exact = (bits - best["int8"]) // 2
        if not torch.equal(exact, expected):
            raise AssertionError("torch and bit_neighbors disagree")
    each = {way: [1e9 * seconds / pairs[way] for seconds in times] for way, times in taken.items()}
    return {
        **{"codes": name, "rows": rows, "others": others, "bits": bits, "k": k, "rounds": rounds},
        "threads": torch.get_num_threads(),
        "ns_a_pair": {way: statistics.median(times) for way, times in each.items()},
        "over_hamming": {
            way: statistics.median(x / y for x, y in zip(times, each["hamming"], strict=True))
            for way, times in each.items()
        },
    }


def whole(rows: int, bits: int, k: int) -> dict[str, Any]:
    """All pairs of so many rows, once, on all threads."""
    codes = random_codes(rows, bits, torch.Generator().manual_seed(0))
    start, used = time.perf_counter(), time.process_time()
    sk.bit_neighbors(codes, k=k)
    seconds = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
    return {"rows": rows, "bits": bits, "k": k, "threads": torch.get_num_threads(), **seconds}


def zipf_codes(tokens: int, d_sae: int, k: int) -> CSRCodes:
    """Codes of up to k latents a token, drawn with frequencies that fall as one over the rank."""
    generator = torch.Generator().manual_seed(0)
    share = torch.arange(1, d_sae + 1, dtype=torch.float64).reciprocal().cumsum(0)
    drawn = torch.rand(tokens, k, generator=generator, dtype=torch.float64) * share[-1]
    latents = torch.searchsorted(share, drawn).clamp_max(d_sae - 1).sort(dim=1).values
    new = torch.ones(tokens, k, dtype=torch.bool)
    new[:, 1:] = latents[:, 1:] != latents[:, :-1]
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), new.sum(1).cumsum(0)])
    col = torch.randperm(d_sae, generator=generator)[latents[new]]
    rows = torch.arange(tokens).repeat_interleave(crow.diff())
    col = col[(rows * d_sae + col).argsort()]
    return CSRCodes(crow, col.int(), torch.ones(col.numel()), d_sae)


def pairs(name: str, codes: CSRCodes, rounds: int) -> dict[str, Any]:
    """Seconds of :func:`sparsekern.cooccurrence` and of scipy on the same codes."""
    from scipy import sparse

    ones = codes.values.new_ones(codes.col.numel(), dtype=torch.int32).numpy()
    shape = (codes.tokens, codes.d_sae)
    matrix = sparse.csr_matrix((ones, codes.col.numpy(), codes.crow.int().numpy()), shape=shape)
    taken: dict[str, list[float]] = {"sparsekern": [], "scipy": []}
    for _ in range(rounds):
        taken["sparsekern"].append(_seconds(lambda: sk.cooccurrence(codes)))
        taken["scipy"].append(_seconds(lambda: sparse.triu(matrix.T @ matrix, 1, format="csr")))
    mine, theirs = sk.cooccurrence(codes), sparse.triu(matrix.T @ matrix, 1, format="csr")
    if mine.counts.numel() != theirs.nnz or int(mine.counts.sum()) != int(theirs.data.sum()):
        raise AssertionError("scipy and cooccurrence disagree")
    return {
        **{"codes": name, "tokens": codes.tokens, "d_sae": codes.d_sae, "entries": codes.col.numel()},
        **{"pairs": mine.counts.numel(), "met": int(mine.counts.sum()), "rounds": rounds},
        "seconds": {way: statistics.median(times) for way, times in taken.items()},
        "scipy_over_sparsekern": statistics.median(
            y / x for x, y in zip(taken["sparsekern"], taken["scipy"], strict=True)
        ),
    }


def main() -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path, nargs="?", help="activations written by `sparsekern harvest`")
    parser.add_argument("sae", type=Path, nargs="?", help="an autoencoder trained on them")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--others", type=int, default=100_000)
    parser.add_argument("--bits", type=int, default=4096)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--tokens-of-text", type=int, default=20_000, help="codes of a network; 0 for none")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 131072])
    parser.add_argument("--zipf", type=int, nargs=3, default=[65536, 131072, 32], metavar=("TOKENS", "D_SAE", "K"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also all pairs of --others rows, on all threads")
    parser.add_argument("--json", action="store_true", help="print the record")
    parser.add_argument("--output", type=Path, default=Path("bench/results/bits.json"))
    args = parser.parse_args()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    report: dict[str, Any] = {**record.provenance(), "cooccurrence": []}
    generator = torch.Generator().manual_seed(0)
    a, b = (random_codes(n, args.bits, generator) for n in (args.rows, args.others))
    report["neighbors"] = [neighbors("random", a, b, args.k, args.rounds)]
    write_json(args.output, report)
    if args.tokens_of_text:
        b = token_codes(args.tokens_of_text, args.bits)
        report["neighbors"].append(neighbors("tokens", b[: args.rows], b, args.k, args.rounds))
        write_json(args.output, report)
    if args.sae is not None:
        sae, store = sk.SAE.from_pretrained(args.sae), ActivationStore(args.store).split(0.5, 0)[1]
        for tokens in args.tokens:
            with torch.no_grad():
                encoded = [sae.encode(x) for x in store.load(tokens).split(8192)]
            parts = [part.to_csr() if isinstance(part, sk.SparseCodes) else part for part in encoded]
            lengths = torch.cat([part.crow.diff() for part in parts])
            crow = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
            col, values = (torch.cat([getattr(part, field) for part in parts]) for field in ("col", "values"))
            kept = values != 0
            crow = torch.cat([torch.zeros(1, dtype=torch.int64), kept.cumsum(0)])[crow]
            codes = CSRCodes(crow, col[kept], values[kept], parts[0].d_sae)
            report["cooccurrence"].append(pairs("activations", codes, args.rounds))
            write_json(args.output, report)
    report["cooccurrence"].append(pairs("zipf", zipf_codes(*args.zipf), args.rounds))
    if args.whole:
        torch.set_num_threads(threads)
        report["whole"] = whole(args.others, args.bits, args.k)
    write_json(args.output, report)
    if args.json:
        print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
