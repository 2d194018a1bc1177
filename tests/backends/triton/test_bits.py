"""Distances of bits, nearest rows and pairs of latents: equal to the reference, to the bit."""

import os

import pytest
import torch

if not os.environ.get("CI"):
    pytest.importorskip("triton")

import sparsekern as sk
from sparsekern.backends import reference, triton
from sparsekern.backends.triton import bits
from sparsekern.bits import pack_bits

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")


def codes(n, width, share, seed):
    """Rows of bits, of which the first is empty and two are the same."""
    flags = torch.rand(n, 8 * width, generator=torch.Generator().manual_seed(seed)) < share
    flags[0] = False
    flags[-1] = flags[n // 2]
    return pack_bits(flags)


@pytest.mark.parametrize("metric", ["hamming", "jaccard"])
@pytest.mark.parametrize(("n", "m", "width", "share"), [(1, 1, 1, 0.5), (65, 130, 9, 0.3), (70, 64, 16, 0.02)])
def test_bit_distances(triton_device, metric, n, m, width, share):
    a, b = codes(n, width, share, 0), codes(m, width, share, 1)
    out = triton.bit_distances(a.to(triton_device), b.to(triton_device), metric)
    expected = reference.bit_distances(a, b, metric)
    assert out.dtype == expected.dtype
    assert torch.equal(out.cpu(), expected)


def test_bit_neighbors_in_panels(triton_device, monkeypatch):
    monkeypatch.setattr(bits, "PANEL", (50, 64))
    a = codes(130, 3, 0.3, 2)
    for metric in ("hamming", "jaccard"):
        found = sk.bit_neighbors(a.to(triton_device), k=70, metric=metric)
        expected = reference.bit_neighbors(a, a, 70, metric, False)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("at_once", [5, 200])
def test_cooccurrence_some_latents_at_a_time(triton_device, monkeypatch, at_once):
    d_sae = 26
    monkeypatch.setattr(bits, "COUNT_BYTES", 4 * d_sae * at_once)
    active = torch.rand(150, d_sae, generator=torch.Generator().manual_seed(3)) < 0.1
    active[3], active[:, 9], active[:, 20:25] = True, True, False
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), active.sum(1).cumsum(0)])
    col = active.nonzero()[:, 1].int()
    for at_least in (1, 4):
        found = triton.cooccurrence(crow.to(triton_device), col.to(triton_device), d_sae, at_least)
        expected = reference.cooccurrence(crow, col, d_sae, at_least)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.cpu(), other)


def test_no_tokens(triton_device):
    crow, col = torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    found = triton.cooccurrence(crow.to(triton_device), col.to(triton_device), 5, 1)
    assert [one.tolist() for one in found] == [[0] * 6, [], []]
