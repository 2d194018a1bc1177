"""The sparse products against dense float64, down to a few units in the last place of every entry."""

import os

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if not os.environ.get("CI"):
    pytest.importorskip("triton")

from sparsekern.backends import triton
from sparsekern.backends.triton import _launch, products

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")

few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    """So that latents of a few entries are long, and rows of a few numbers take several tiles."""
    monkeypatch.setattr(products, "SPLIT", 4)
    monkeypatch.setattr(products, "_block", lambda d, most: 16)


def assert_exact(got, expression, *operands):
    """Each entry is within rounding of `expression` in float64, relative to the sum of its terms' magnitudes.

    Where there is no term it must be zero.
    """
    operands = [t.cpu().double() for t in operands]
    exact, magnitude = expression(*operands), expression(*(t.abs() for t in operands))
    limits = torch.finfo(got.dtype)
    assert got.shape == exact.shape
    assert ((got.cpu().double() - exact).abs() <= 2 * limits.eps * magnitude + limits.tiny * (magnitude != 0)).all()


class Case:
    """Codes with what they multiply, and their dense form."""

    def __init__(self, device, rows, n, d, k, seed, dtype=torch.float32, strided=False):
        generator = torch.Generator().manual_seed(seed)
        stride = 2 if strided else 1

        def random(*shape):
            return torch.randn(*shape, generator=generator).to(device, dtype)

        # Half of the latents have no entry, latent 0 has many; some values are zero.
        indices = torch.randint((n + 1) // 2, (rows, k), generator=generator, dtype=torch.int32)
        indices[:, 0] = 0
        self.indices = indices.to(device).repeat_interleave(stride, dim=1)[:, ::stride]
        present = torch.rand(rows, k, generator=generator) > 0.2
        self.values = random(rows, stride * k)[:, ::stride].mul_(present.to(device))
        self.weight, self.bias = random(n, stride * d)[:, :d], random(stride * d)[::stride]
        self.grad = random(d, rows).T if strided else random(rows, d)
        # The same as CSR codes, where the tokens have any number of entries, some none.
        counts = torch.bincount(torch.randint(max(rows, 1), (rows * k,), generator=generator), minlength=rows)
        self.crow = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)
        self.row = torch.arange(rows).repeat_interleave(counts)
        self.rows, self.n, self.k = rows, n, k

    def dense(self, values):
        """Float64 matrix ``[rows, n]`` of fixed-width codes, or of CSR codes."""
        row = self.row if values.dim() == 1 else torch.arange(self.rows)[:, None].expand(-1, self.k)
        latent = self.indices.cpu().long()
        zeros = torch.zeros(self.rows, self.n, dtype=torch.float64)
        return zeros.index_put((row, latent.reshape(row.shape)), values.cpu().double(), accumulate=True)


def shuffle_arrivals(patch):
    """Entries come into their latents in an order of chance, as the atomics of a GPU leave it."""

    def launch(kernel, grid, *args, **options):
        if kernel is products._order:
            _, start, placed, *_ = args
            latent = torch.searchsorted(start, torch.arange(len(placed), device=start.device), right=True)
            placed.copy_(placed[(latent + torch.rand_like(latent, dtype=torch.float64)).argsort()])
        _launch.launch(kernel, grid, *args, **options)

    patch.setattr(products, "launch", launch)


@few
@given(
    st.integers(0, 9),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(1, 11),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
)
def test_products(triton_device, rows, n, d, k, seed, dtype, strided):
    case = Case(triton_device, rows, n, d, k, seed, dtype, strided)
    values, indices, weight, bias, grad = case.values, case.indices, case.weight, case.bias, case.grad
    latents = indices.cpu().long()
    out = triton.sparse_decode(values, indices, weight, bias)
    assert_exact(out, lambda v, w, b: case.dense(v) @ w + b, values, weight, bias)
    out = triton.gather_dot(grad, indices, weight)
    assert_exact(out, lambda g, w: (g @ w.T).gather(1, latents), grad, weight)
    out = triton.scatter_outer(values, indices, grad, n)
    assert_exact(out, lambda v, g: case.dense(v).T @ g, values, grad)


@few
@given(
    st.integers(1, 9),
    st.integers(1, 30),
    st.integers(1, 40),
    st.integers(0, 9),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float16]),
    st.booleans(),
)
def test_csr_products(triton_device, rows, n, d, k, seed, dtype, strided):
    case = Case(triton_device, rows, n, d, max(k, 1), seed, dtype, strided)
    if k == 0:  # no entries at all
        case.crow, case.row, case.indices, case.values = (
            torch.zeros_like(case.crow),
            case.row[:0],
            case.indices[:0],
            case.values[:0],
        )
    crow, col, values, weight, grad = case.crow, case.indices.flatten(), case.values.flatten(), case.weight, case.grad
    if strided:
        crow, col, values = (torch.stack([t, t], 1)[:, 0] for t in (crow, col, values))
    out = triton.csr_decode(values, crow, col, weight, None)
    assert_exact(out, lambda v, w: case.dense(v) @ w, values, weight)
    out = triton.csr_gather_dot(grad, crow, col, weight)
    assert_exact(out, lambda g, w: (g @ w.T)[case.row, col.cpu().long()], grad, weight)
    out = triton.csr_scatter_outer(values, crow, col, grad, n)
    assert_exact(out, lambda v, g: case.dense(v).T @ g, values, grad)


def test_bfloat16(triton_device):
    case = Case(triton_device, 9, 12, 17, 3, 0, torch.bfloat16)
    out = triton.sparse_decode(case.values, case.indices, case.weight, None)
    assert_exact(out, lambda v, w: case.dense(v) @ w, case.values, case.weight)
    out = triton.scatter_outer(case.values, case.indices, case.grad, 12)
    assert_exact(out, lambda v, g: case.dense(v).T @ g, case.values, case.grad)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (23, 37), (4099, 3)])  # the last in shares of several steps
@pytest.mark.parametrize("strided", [False, True])
def test_weighted_row_sum_reads_only_the_rows_that_count(triton_device, n, d, strided):
    coefficients, weight = torch.randn(n) * (torch.rand(n) > 0.7), torch.randn(n, 2 * d)[:, :d]
    coefficients[0] = 1.5
    unread = weight.clone()
    unread[coefficients == 0] = torch.nan
    inputs = [t.to(triton_device) if strided else t.to(triton_device).contiguous() for t in (coefficients, unread)]
    assert_exact(triton.weighted_row_sum(*inputs), lambda c, w: c @ w, coefficients, weight)


def test_rows_without_a_value_do_not_leak(triton_device):
    """Zero-valued slots point at NaN, in the weight as in the vectors, and at no other row."""
    case = Case(triton_device, 9, 30, 17, 3, 0)
    case.values[4] = 0
    case.indices[4] = torch.tensor([29, 28, 29])
    case.values[case.indices == 1] = 0
    weight, grad = case.weight.clone(), case.grad.clone()
    weight[28:] = weight[1] = grad[4] = torch.nan
    out = triton.sparse_decode(case.values, case.indices, weight, case.bias)
    assert_exact(out, lambda v, w, b: case.dense(v) @ w + b, case.values, case.weight, case.bias)
    out = triton.scatter_outer(case.values, case.indices, grad, 30)
    assert_exact(out, lambda v, g: case.dense(v).T @ g, case.values, case.grad)
    csr = case.values.flatten(), case.crow, case.indices.flatten()
    assert_exact(triton.csr_decode(*csr, weight, None), lambda v, w: case.dense(v) @ w, csr[0], case.weight)
    grad = case.grad.clone()
    grad[(case.dense(csr[0]).abs().sum(1) == 0).to(triton_device)] = torch.nan
    assert_exact(triton.csr_scatter_outer(*csr, grad, 30), lambda v, g: case.dense(v).T @ g, csr[0], case.grad)


def test_the_same_bits_every_time(triton_device, monkeypatch):
    case = Case(triton_device, 12, 9, 20, 4, 0)
    calls = (
        lambda: triton.sparse_decode(case.values, case.indices, case.weight, case.bias),
        lambda: triton.gather_dot(case.grad, case.indices, case.weight),
        lambda: triton.scatter_outer(case.values, case.indices, case.grad, 9),
        lambda: triton.csr_scatter_outer(case.values.flatten(), case.crow, case.indices.flatten(), case.grad, 9),
    )
    first = [call() for call in calls]
    shuffle_arrivals(monkeypatch)
    assert all(torch.equal(call(), before) for call, before in zip(calls, first, strict=True))


@few
@given(st.integers(1, 9), st.lists(st.integers(0, 8), max_size=150), st.integers(1, 4))
def test_entries_are_sorted_by_latent_and_long_ones_cut(triton_device, d_sae, latents, split):
    latents = [min(latent, d_sae - 1) for latent in latents]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SPLIT", split)
        shuffle_arrivals(patch)
        by = products.ByLatent(torch.tensor(latents, dtype=torch.int32, device=triton_device), d_sae, 1)
    counts = [latents.count(latent) for latent in range(d_sae)]
    assert by.start.tolist() == [sum(counts[:latent]) for latent in range(d_sae + 1)]
    assert by.order.tolist() == sorted(range(len(latents)), key=latents.__getitem__)  # a stable sort
    pieces = [latent for latent, count in enumerate(counts) if count > split for _ in range(0, count, split)]
    assert by.piece_latent.tolist() == pieces + [d_sae] * (len(by.piece_latent) - len(pieces))
    for latent, count in enumerate(counts):
        if count > split:
            assert by.piece_start[latent] == pieces.index(latent)


def test_too_many_entries_for_one_gradient():
    with pytest.raises(ValueError, match=r"at most 2147483520 entries .* got 2147483521; split the batch"):
        products.ByLatent(torch.zeros(1, dtype=torch.int32).expand(products.MOST_ENTRIES + 1), 1, 1)


def test_weights_of_more_than_two_billion_numbers(triton_device):
    """Only the pages that are written or read take memory."""
    if triton_device == "cuda":
        weight = torch.zeros(2**22 + 3, 768, device="cuda")
    else:
        weight = torch.from_numpy(numpy.zeros((2**22 + 3, 768), dtype=numpy.float32))
    latents = torch.tensor([0, 2**31 // 768, 2**22 - 1, 2**22 + 2])
    weight[latents.to(triton_device)] = part = torch.randn(4, 768).to(triton_device)
    places = torch.tensor([[3, 0], [2, 1]])
    values, grad = torch.randn(2, 2).to(triton_device), torch.randn(2, 768).to(triton_device)
    indices = latents[places].int().to(triton_device)
    out = triton.sparse_decode(values, indices, weight, None)
    assert_exact(out, lambda v, w: (v[:, :, None] * w[places]).sum(1), values, part)
    assert_exact(triton.gather_dot(grad, indices, weight), lambda g, w: (g @ w.T).gather(1, places), grad, part)
