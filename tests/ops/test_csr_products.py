"""The sparse products over CSR codes, and CSRCodes themselves, against dense float64."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.ops._csr_products import csr_decode, csr_gather_dot, csr_scatter_outer


def random_codes(rows, n, share, dtype=torch.float32, generator=None):
    """About that share of all entries, each present by chance: some rows have none."""
    row, col = (torch.rand(rows, n, generator=generator) < share).nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=rows).cumsum(0)])
    return row, sk.CSRCodes(crow, col.int(), torch.rand(row.numel(), generator=generator, dtype=dtype), n)


def dense_codes(row, codes, values):
    """The matrix ``[B, d_sae]`` that the codes stand for, without their methods."""
    dense = torch.zeros(codes.crow.shape[0] - 1, codes.d_sae, dtype=values.dtype)
    return dense.index_put((row, codes.col.long()), values)


def assert_no_worse(mine, same_precision, exact):
    """An error at most twice that of the same-precision PyTorch expression."""
    mine, same_precision = (t.double() - exact for t in (mine, same_precision))
    floor = 1e-6 * exact.abs().max().clamp_min(1e-30)
    assert mine.abs().max() <= 2 * same_precision.abs().max() + floor


SIZES = [(1, 1, 1, 1.0), (1, 5, 7, 0.5), (33, 64, 64, 0.1), (17, 129, 100, 0.02), (64, 32, 257, 1.0)]


@pytest.mark.parametrize(("rows", "n", "d", "share"), SIZES)
def test_values_and_gradients_match_dense(product_backend, rows, n, d, share):
    row, codes = random_codes(rows, n, share)
    weight, bias, grad = torch.randn(n, d), torch.randn(d), torch.randn(rows, d)
    inputs = [t.requires_grad_() for t in (codes.values, weight, bias)]
    out = sk.sparse_decode(codes, weight, bias)
    mine = [out, *torch.autograd.grad(out, inputs, grad)]

    def dense(dtype):
        values, w, b = (t.detach().to(dtype).requires_grad_() for t in inputs)
        y = dense_codes(row, codes, values) @ w + b
        return [y, *torch.autograd.grad(y, [values, w, b], grad.to(dtype))]

    for got, same, exact in zip(mine, dense(torch.float32), dense(torch.float64), strict=True):
        assert_no_worse(got.detach(), same.detach(), exact.detach())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20),
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.integers(0, 2**31),
    st.booleans(),
    st.sampled_from([1, 600, 8 * 2**20]),
)
def test_the_products_equal_matrix_products(product_backend, rows, n, d, share, seed, strided, product_bytes):
    generator = torch.Generator().manual_seed(seed)
    row, codes = random_codes(rows, n, share, torch.float64, generator)
    crow, col, values, _ = codes
    if strided:
        crow, col, values = (torch.stack([t, t], 1)[:, 0] for t in (crow, col, values))
    weight = torch.randn(n, 2 * d if strided else d, generator=generator, dtype=torch.float64)[:, :d]
    grad = torch.randn(d, rows, generator=generator, dtype=torch.float64).T if strided else torch.ones(rows, d).double()
    dense = dense_codes(row, codes, codes.values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "PRODUCT_BYTES", product_bytes)  # one entry at a time, a few, all
        torch.testing.assert_close(csr_decode(values, crow, col, weight, None), dense @ weight)
        torch.testing.assert_close(csr_gather_dot(grad, crow, col, weight), (grad @ weight.T)[row, col.long()])
        torch.testing.assert_close(csr_scatter_outer(values, crow, col, grad, n), dense.T @ grad)


@pytest.mark.parametrize("row", [0, 3, 6])
def test_one_row_may_have_everything(product_backend, row):
    """And repeat its latents; the other rows are empty."""
    crow = torch.zeros(8, dtype=torch.int64)
    crow[row + 1 :] = 900
    col, values = torch.randint(40, (900,), dtype=torch.int32), torch.rand(900, dtype=torch.float64)
    weight, grad = torch.randn(40, 70, dtype=torch.float64), torch.randn(7, 70, dtype=torch.float64)
    dense = torch.zeros(7, 40, dtype=torch.float64)
    dense[row] = torch.bincount(col, values, 40)
    bias = torch.randn(70, dtype=torch.float64)
    torch.testing.assert_close(csr_decode(values, crow, col, weight, bias), dense @ weight + bias)
    torch.testing.assert_close(csr_gather_dot(grad, crow, col, weight), (weight @ grad[row])[col.long()])
    torch.testing.assert_close(csr_scatter_outer(values, crow, col, grad, 40), dense.T @ grad)


def test_the_same_bits_every_time(product_backend):
    _, codes = random_codes(300, 900, 0.05)
    weight, grad = torch.randn(900, 64), torch.randn(300, 64)
    first, second = (
        [
            csr_decode(codes.values, codes.crow, codes.col, weight, None),
            csr_gather_dot(grad, codes.crow, codes.col, weight),
            csr_scatter_outer(codes.values, codes.crow, codes.col, grad, 900),
        ]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_opcheck_gradcheck_and_double_backward(product_backend, share):
    crow, col, values, _ = random_codes(4, 11, share, torch.float64)[1]
    values.requires_grad_()
    weight, bias, grad = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(11, 6), (6,), (4, 6)])
    torch.library.opcheck(csr_decode, (values, crow, col, weight, bias))
    torch.library.opcheck(csr_gather_dot, (grad, crow, col, weight))
    torch.library.opcheck(csr_scatter_outer, (values, crow, col, grad, 11))
    for function, inputs in [
        (lambda v, w, b: csr_decode(v, crow, col, w, b), (values, weight, bias)),
        (lambda g, w: csr_gather_dot(g, crow, col, w), (grad, weight)),
        (lambda v, g: csr_scatter_outer(v, crow, col, g, 11), (values, grad)),
    ]:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    row, codes = random_codes(40, 500, 0.2)
    crow, col, values, _ = codes
    values, weight, grad = values.to(dtype), torch.randn(500, 72).to(dtype), torch.randn(40, 72).to(dtype)
    dense = dense_codes(row, codes, values.double())
    for out, exact in [
        (sk.sparse_decode(codes._replace(values=values), weight), dense @ weight.double()),
        (csr_gather_dot(grad, crow, col, weight), (grad.double() @ weight.double().T)[row, col.long()]),
        (csr_scatter_outer(values, crow, col, grad, 500), dense.T @ grad.double()),
    ]:
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_codes_count_active_entries_and_become_dense():
    row, codes = random_codes(30, 20, 0.3)
    values = (codes.values * (torch.rand(row.numel()) < 0.5)).requires_grad_()  # the others are zero-valued
    codes = codes._replace(values=values)
    dense = dense_codes(row, codes, values.detach())
    assert torch.equal(codes.to_dense(), dense)
    assert torch.equal(codes.l0(), (dense > 0).sum(1))
    assert torch.equal(codes.firing_counts(), (dense > 0).sum(0))
    cotangent = torch.randn(30, 20)
    (gradient,) = torch.autograd.grad(codes.to_dense(), values, cotangent)
    assert torch.equal(gradient, cotangent[row, codes.col.long()])


_PEAK = """
import resource, torch
from sparsekern.ops._csr_products import csr_decode, csr_gather_dot, csr_scatter_outer
rows, k, n, d = 4096, 64, 1024, 1024
crow, col = torch.arange(rows + 1) * k, torch.randint(n, (rows * k,), dtype=torch.int32)
values, weight, grad = torch.rand(rows * k), torch.randn(n, d), torch.randn(rows, d)

def run(rows):
    part = slice(0, rows * k)
    csr_decode(values[part], crow[: rows + 1], col[part], weight, None)
    csr_gather_dot(grad[:rows], crow[: rows + 1], col[part], weight)
    csr_scatter_outer(values[part], crow[: rows + 1], col[part], grad[:rows], n)

run(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_peak_memory_stays_far_below_a_vector_for_each_entry():
    run = subprocess.run([sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True)
    added, vectors = int(run.stdout) * 1024, 4096 * 64 * 1024 * 4
    assert added < vectors / 8, f"{added / 2**20:.0f} MiB of {vectors / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"crow": torch.tensor([0, 1, 3], dtype=torch.int32)}, {}, "codes.crow must be 1-D torch.int64"),
        ({"col": torch.tensor([0, 1, 2])}, {}, "codes.col must be 1-D torch.int32, got torch.int64"),
        ({"col": torch.zeros(1, 3, dtype=torch.int32)}, {}, r"codes.col must be 1-D .* of shape \(1, 3\)"),
        ({"col": torch.tensor([0, 1, 5], dtype=torch.int32)}, {}, r"col must lie in \[0, 5\), got values from 0 to 5"),
        ({"col": torch.tensor([0, -1, 4], dtype=torch.int32)}, {}, r"col must lie in \[0, 5\)"),
        ({"crow": torch.tensor([0, 1, 2])}, {}, "crow must go from 0 to 3"),
        ({"crow": torch.tensor([1, 1, 3])}, {}, "crow must go from 0 to 3"),
        ({"crow": torch.tensor([0, 4, 3])}, {}, "crow must go from 0 to 3 .* and never fall"),
        ({"crow": torch.tensor([], dtype=torch.int64)}, {}, "crow must go from 0 to 3"),
        ({"values": torch.ones(4)}, {}, r"codes.values and codes.col must both be \[nnz\]"),
        ({"values": torch.ones(3, dtype=torch.int64)}, {}, "values must be a floating-point tensor"),
        ({"values": torch.ones(3, device="meta")}, {}, "one device"),
        ({"d_sae": 6}, {}, "W_dec must have 6 rows"),
        ({}, {"b_dec": torch.zeros(3)}, r"b_dec must have shape \(4,\)"),
    ],
)
def test_bad_arguments_are_named(change, options, message):
    good = sk.CSRCodes(torch.tensor([0, 1, 3]), torch.tensor([0, 1, 4], dtype=torch.int32), torch.ones(3), 5)
    with pytest.raises(ValueError, match=message):
        sk.sparse_decode(good._replace(**change), torch.ones(5, 4), **options)
