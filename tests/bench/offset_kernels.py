"""Small kernels, most of them deliberately wrong, and what is found in them: run without TRITON_INTERPRET, prints JSON.

Each has one launch on a matrix of 2**32 elements. Then come the sums over latents, with as many entries as there can be
and with more.
"""

import json
from unittest import mock

import torch
import triton
import triton.language as tl

from sparsekern.backends.triton import _launch, products
from sparsekern.bench import offsets

ROWS, WIDTH = 2**20, 4096


@triton.jit
def right(x, latents, d, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    tl.store(x + row * d + column, 0.0, mask=column < d)


@triton.jit
def product_in_32_bits(x, latents, d, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    tl.store(x + row * d + column, 0.0, mask=column < d)


@triton.jit
def extended_too_late(x, latents, d, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    tl.store(x + (row * d).to(tl.int64) + column, 0.0, mask=column < d)


@triton.jit
def right_from_memory(x, latents, d, n, BLOCK: tl.constexpr):
    latent = tl.load(latents + tl.program_id(0)).to(tl.int64)
    tl.store(x + latent * d + tl.arange(0, BLOCK), 0.0)


@triton.jit
def product_of_what_was_read(x, latents, d, n, BLOCK: tl.constexpr):
    latent = tl.load(latents + tl.program_id(0))
    tl.store(x + (latent * d).to(tl.int64) + tl.arange(0, BLOCK), 0.0)


@triton.jit
def nobody_knows(x, unnamed, d, n, BLOCK: tl.constexpr):
    latent = tl.load(unnamed + tl.program_id(0)).to(tl.int64)
    tl.store(x + latent * d + tl.arange(0, BLOCK), 0.0)


@triton.jit
def never_far(x, latents, d, n, BLOCK: tl.constexpr):
    tl.store(x + tl.program_id(0) * 8 + tl.arange(0, BLOCK), 0.0)


@triton.jit
def sum_in_a_loop(x, latents, d, n, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    for _ in range(0, n):
        place += d
    tl.store(x + place.to(tl.int64), 0.0)


@triton.jit
def right_in_a_loop(x, latents, d, n, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    for _ in range(0, n):
        place += d
    tl.store(x + place, 0.0)


@triton.jit
def counts_past_the_end(x, latents, d, n, BLOCK: tl.constexpr):
    for place in range(0, 2147483647, BLOCK):
        tl.store(x + place.to(tl.int64), 0.0)


KERNELS = (
    right,
    product_in_32_bits,
    extended_too_late,
    right_from_memory,
    product_of_what_was_read,
    nobody_knows,
    never_far,
    sum_in_a_loop,
    right_in_a_loop,
    counts_past_the_end,
)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def found(record, held):
    with _launch.recording() as recorded:
        record()
    reports = {}
    for kernel, setting in offsets.settings(recorded, held).items():
        report = offsets.analyse(kernel.name, offsets.lower(kernel, offsets.ARCH), setting)
        reports[kernel.name] = report._asdict()
    return reports


def record_kernels():
    for kernel in KERNELS:
        _launch.launch(kernel, (ROWS,), empty(ROWS, WIDTH), empty(ROWS, dtype=torch.int32), WIDTH, ROWS, BLOCK=WIDTH)


def sums(entries):
    """What is found in the sums over latents of so many entries, without the kernel that needs more than intervals."""
    with mock.patch.object(products, "MOST_ENTRIES", entries):
        values, indices = empty(entries, 1), empty(entries, 1, dtype=torch.int32)
        held = offsets.contents((entries, 50, 1000, 1))
        reports = found(lambda: products.scatter_outer(values, indices, empty(entries, 50), 1000), held)
    del reports["_sum_pieces"]
    return reports


if __name__ == "__main__":
    kernels = found(record_kernels, {"latents": (-1, ROWS - 1)})
    print(json.dumps({"kernels": kernels, "most": sums(products.MOST_ENTRIES), "more": sums(2**31 - 1)}))
