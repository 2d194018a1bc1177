"""Rows of polytope codes in blocks of bounded size, and orders of samples in which nothing belongs together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sparsekern.analysis.nulls import permuted
from sparsekern.analysis.polytope.codes import PolytopeCodes

_ENTRIES = 2**23  # floats of a block


def block_rows(n_units: int, least: int = 1) -> int:
    """Rows of a block whose entries are `_ENTRIES` at most; never fewer than `least`."""
    return max(least, _ENTRIES // max(1, n_units))


def bounds(n: int, size: int) -> list[tuple[int, int]]:
    """Where parts of about equal size begin and end, each of at most `size` unless that would be less than one."""
    count = max(1, -(-n // max(1, size)))
    edges = [n * i // count for i in range(count + 1)]
    return list(pairwise(edges))


def shuffled(n: int, contexts: Tensor | None, generator: torch.Generator) -> Tensor:
    """A random order of n samples ``[n]``; with `contexts` of whole runs of equal contexts.

    Neighbours inside a context stay neighbours, so that what is slow in the data stays slow and only its place is lost.
    Of contexts of one length whole ones meet; others overlap. A single one is turned around a random place.
    """
    if contexts is None:
        return torch.randperm(n, generator=generator)
    _, lengths = contexts.unique_consecutive(return_counts=True)
    if len(lengths) == 1:
        return torch.arange(n).roll(int(torch.randint(n, (1,), generator=generator)))
    starts = lengths.cumsum(0) - lengths
    order = torch.randperm(len(lengths), generator=generator)
    lengths = lengths[order]
    within = torch.arange(n) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    return starts[order].repeat_interleave(lengths) + within


def check_contexts(contexts: Tensor | None, n: int) -> Tensor | None:
    """`contexts` on the CPU, or a ValueError unless they are n whole numbers, each context in one run."""
    if contexts is None:
        return None
    if contexts.shape != (n,) or contexts.is_floating_point():
        raise ValueError(f"contexts must be {n} whole numbers, got {tuple(contexts.shape)} {contexts.dtype}")
    if len(contexts.unique_consecutive()) != len(contexts.unique()):
        raise ValueError("contexts must be in runs: the samples of one context beside each other")
    return contexts.cpu()


class Units:
    """Codes as blocks of float32 rows, in a random order that is always the same one.

    Parameters
    ----------
    codes : PolytopeCodes
        Left alone.
    seed : int
        Determines the order, and what `mixed` does.
    mixed : bool
        Permute each unit over the samples of its block. The blocks are of random samples, so that this keeps every
        unit's rate and unties it from the others, without more than a block in memory.
    least : int
        Rows that a block has at least, unless N is smaller.
    """

    def __init__(self, codes: PolytopeCodes, seed: int, mixed: bool = False, least: int = 1) -> None:
        self.codes, self.seed, self.mixed = codes, seed, mixed
        self.order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(seed))
        self.bounds = bounds(len(codes), block_rows(codes.n_units, 2 * least))
        self._only: Tensor | None = None  # the block, where there is but one

    def blocks(self) -> Iterator[Tensor]:
        """Blocks ``[b, n]``, one after the other."""
        for index in range(len(self.bounds)):
            rows = self._block(index) if self._only is None else self._only
            if len(self.bounds) == 1:
                self._only = rows
            yield rows

    def batches(self, size: int) -> Iterator[Tensor]:
        """The same rows in pieces of at most `size`, and of half of that at least unless a block is smaller."""
        for rows in self.blocks():
            for start, stop in bounds(len(rows), size):
                yield rows[start:stop]

    def endless(self, size: int) -> Iterator[Tensor]:
        """:meth:`batches` again and again."""
        while True:
            yield from self.batches(size)

    def _block(self, index: int) -> Tensor:
        start, stop = self.bounds[index]
        rows = self.codes.unpack(self.order[start:stop]).float()
        if not self.mixed:
            return rows
        generator = torch.Generator().manual_seed(1 + index + self.seed * len(self.bounds))
        return permuted(rows, 0, generator)
