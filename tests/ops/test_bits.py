"""Distances between rows of bits, and the nearest rows, against numpy's counts in float64."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.bits import pack_bits
from sparsekern.ops._bits import _bit_distances, _bit_neighbors

METRICS = ("hamming", "jaccard")


def expected_distances(a, b, metric):
    """By counting, in whole numbers, rounded once."""
    a, b = (np.unpackbits(rows.numpy(), axis=1).astype(np.int64).reshape(len(rows), -1) for rows in (a, b))
    differ = (a[:, None] != b[None]).sum(2)
    if metric == "hamming":
        return torch.from_numpy(differ).int()
    either = (a[:, None] | b[None]).sum(2)
    return torch.from_numpy(np.where(either == 0, 0, differ / np.maximum(either, 1))).float()


def expected_neighbors(distances, k, itself):
    """By a stable sort."""
    distances = distances.double()
    if not itself:
        distances.fill_diagonal_(torch.inf)
    found = distances.sort(dim=1, stable=True)
    return found.values[:, :k], found.indices[:, :k].int()


def random_rows(n, width, share, generator):
    """Rows of `width` bytes; the first and the last are empty, and some are the same."""
    flags = torch.rand(n, 8 * width, generator=generator) < share
    flags[:: max(1, n - 1)] = False
    flags[n // 2 :][:3] = flags[n // 3]
    return pack_bits(flags)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 40),
    m=st.sampled_from([1, 5, 63, 64, 65, 150]),
    width=st.sampled_from([1, 3, 4, 17, 130, 300]),
    share=st.sampled_from([0.003, 0.1, 0.5, 1.0]),
    metric=st.sampled_from(METRICS),
    strided=st.booleans(),
    seed=st.integers(0, 999),
)
def test_equals_counting(product_backend, n, m, width, share, metric, strided, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = (random_rows(rows, width, share, generator) for rows in (n, m))
    if strided:
        a, b = torch.cat([b[:1].expand(n, -1), a], 1)[:, width:], b.T.contiguous().T
    expected = expected_distances(a, b, metric)
    out = sk.bit_distances(a, b, metric)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    for k in {1, min(7, m), m}:
        distances, indices = sk.bit_neighbors(a, b, k, metric)
        values, order = expected_neighbors(expected, k, True)
        assert torch.equal(indices, order)
        assert torch.equal(distances.double(), values)


@pytest.mark.parametrize("metric", METRICS)
def test_no_row_is_its_own_neighbor(product_backend, metric):
    """Also where a row has doubles: these are at distance 0 and are kept."""
    a = random_rows(150, 9, 0.2, torch.Generator().manual_seed(0))
    distances = expected_distances(a, a, metric)
    assert torch.equal(sk.bit_distances(a, metric=metric), distances)
    found = sk.bit_neighbors(a, k=5, metric=metric)
    values, order = expected_neighbors(distances, 5, False)
    assert torch.equal(found.indices, order)
    assert torch.equal(found.distances.double(), values)
    assert sk.bit_neighbors(a, a, 1, metric).indices[1].item() == 1
    assert sk.bit_neighbors(a[:2], k=1, metric=metric).indices.tolist() == [[1], [0]]


@pytest.mark.parametrize("metric", METRICS)
def test_near_rows_among_far_ones(product_backend, metric):
    """Where counting stops early: each row has three near ones, the rest differ in half of the bits."""
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(30, 2500, generator=generator) < 0.4
    b = torch.rand(400, 2500, generator=generator) < 0.4
    planted = torch.randperm(400, generator=generator)[:90].view(30, 3)
    for j, flips in enumerate((3, 11, 20)):
        b[planted[:, j]] = a
        b[planted[:, j], :flips] = ~a[:, :flips]
    a, b = pack_bits(a), pack_bits(b)
    found = sk.bit_neighbors(a, b, 3, metric)
    assert torch.equal(found.indices, planted.int())
    assert torch.equal(found.distances, sk.bit_distances(a, b, metric).gather(1, planted))


def test_many_blocks(product_backend, monkeypatch):
    """More rows than one block of the reference holds, or one part of the kernel's threads."""
    monkeypatch.setattr(reference, "BIT_ROWS", 64)
    monkeypatch.setattr(reference, "BIT_BYTES", 5)
    a = torch.randint(256, (333, 16), dtype=torch.uint8)
    for metric in METRICS:
        expected = expected_distances(a, a, metric)
        assert torch.equal(sk.bit_distances(a, metric=metric), expected)
        values, order = expected_neighbors(expected, 9, False)
        found = sk.bit_neighbors(a, k=9, metric=metric)
        assert torch.equal(found.indices, order)
        assert torch.equal(found.distances.double(), values)


def many_rows(kind, n, bits, generator):
    """Rows at random; around 20 centres, so that many are at one distance; all the same; with few bits set."""
    if kind == "random":
        return torch.rand(n, bits, generator=generator) < 0.5
    if kind == "clustered":
        centers = torch.rand(20, bits, generator=generator) < 0.4
        centers = centers[torch.randint(20, (n,), generator=generator)]
        return centers ^ (torch.rand(n, bits, generator=generator) < 0.002)
    if kind == "equal":
        return (torch.rand(bits, generator=generator) < 0.5).repeat(n, 1)
    return torch.rand(n, bits, generator=generator) < 0.01


@pytest.mark.parametrize(
    ("kind", "rows", "others", "bits", "k"),
    [
        *((kind, 517, 1030, 2056, 8) for kind in ("random", "clustered", "equal", "sparse")),
        ("clustered", 500, 1100, 2048, 3),
        ("sparse", 33, 1030, 31990, 1),
    ],
)
def test_many_long_rows(product_backend, kind, rows, others, bits, k):
    """On both sides of what it takes for the kernel to count in slices of bits."""
    generator = torch.Generator().manual_seed(2)
    flags = many_rows(kind, rows + others, bits, generator)
    a, b = flags[:rows].float(), flags[rows:].float()
    expected = (a.sum(1)[:, None] + b.sum(1) - 2 * a @ b.T).int()
    values, order = expected_neighbors(expected, k, True)
    found = sk.bit_neighbors(pack_bits(flags[:rows]), pack_bits(flags[rows:]), k)
    assert torch.equal(found.indices, order)
    assert torch.equal(found.distances.double(), values)


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_many_long_rows_among_themselves(product_backend, kind):
    flags = many_rows(kind, 1029, 2048, torch.Generator().manual_seed(3))
    wide = flags.float()
    expected = (wide.sum(1)[:, None] + wide.sum(1) - 2 * wide @ wide.T).int()
    values, order = expected_neighbors(expected, 8, False)
    found = sk.bit_neighbors(pack_bits(flags), k=8)
    assert torch.equal(found.indices, order)
    assert torch.equal(found.distances.double(), values)


def test_rows_that_are_not_there(product_backend):
    none, some = torch.empty(0, 3, dtype=torch.uint8), torch.zeros(4, 3, dtype=torch.uint8)
    assert sk.bit_distances(none, some).shape == (0, 4)
    assert sk.bit_distances(some, none, "jaccard").shape == (4, 0)
    assert sk.bit_neighbors(none, some, 2).indices.shape == (0, 2)
    assert sk.bit_distances(some[:, :0], metric="jaccard").tolist() == [[0.0] * 4] * 4
    assert sk.bit_neighbors(some[:, :0], k=3).indices[3].tolist() == [0, 1, 2]


@pytest.mark.parametrize("metric", METRICS)
def test_opcheck(product_backend, metric):
    a, b = (torch.randint(256, (n, 3), dtype=torch.uint8) for n in (5, 7))
    torch.library.opcheck(_bit_distances, (a, b, metric))
    torch.library.opcheck(_bit_neighbors, (a, b, 2, metric, True))


def test_bad_input_is_named():
    a = torch.zeros(4, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"a must be a 2-D uint8 tensor .* got torch.bool \[4, 3\]"):
        sk.bit_distances(a.bool())
    with pytest.raises(ValueError, match="b must be a 2-D uint8 tensor"):
        sk.bit_neighbors(a, a[0])
    with pytest.raises(ValueError, match="b must have 3 bytes a row"):
        sk.bit_distances(a, a[:, :2])
    with pytest.raises(ValueError, match="metric must be one of hamming, jaccard, got 'cosine'"):
        sk.bit_distances(a, metric="cosine")
    with pytest.raises(ValueError, match=r"k must be between 1 and 3 \(the rows of a but a row itself\), got 4"):
        sk.bit_neighbors(a, k=4)
    with pytest.raises(ValueError, match=r"k must be between 1 and 4 \(the rows of b\), got 5"):
        sk.bit_neighbors(a, a, 5)
    with pytest.raises(ValueError, match="k must be between 1 and 4"):
        sk.bit_neighbors(a, a, 0)
