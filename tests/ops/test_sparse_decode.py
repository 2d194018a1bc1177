"""sparse_decode and its adjoints against dense float64, on every backend of this machine."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.ops._sparse_decode import _gather_dot, _scatter_outer, _sparse_decode


def random_codes(rows, k, n, dtype=torch.float32):
    indices = torch.stack([torch.randperm(n)[:k] for _ in range(rows)]).int()
    return sk.SparseCodes(torch.rand(rows, k, dtype=dtype), indices, n)


def assert_no_worse(mine, same_precision, exact):
    """A kernel's error is at most twice that of the same-precision PyTorch expression."""
    mine, same_precision = (t.double() - exact for t in (mine, same_precision))
    floor = 1e-6 * exact.abs().max().clamp_min(1e-30)
    assert mine.abs().max() <= 2 * same_precision.abs().max() + floor


SIZES = [(1, 1, 1, 1), (1, 3, 5, 7), (33, 8, 64, 64), (17, 5, 129, 100), (64, 32, 32, 257), (200, 7, 3000, 48)]


@pytest.mark.parametrize(("rows", "k", "n", "d"), SIZES)
def test_values_and_gradients_match_dense(product_backend, rows, k, n, d):
    codes = random_codes(rows, k, n)
    weight, bias, grad = torch.randn(n, d), torch.randn(d), torch.randn(rows, d)
    inputs = [t.requires_grad_() for t in (codes.values, weight, bias)]
    out = sk.sparse_decode(codes, weight, bias)
    mine = [out, *torch.autograd.grad(out, inputs, grad)]

    def dense(dtype):
        values, w, b = (t.detach().to(dtype).requires_grad_() for t in inputs)
        y = torch.zeros(rows, n, dtype=dtype).scatter_add(1, codes.indices.long(), values) @ w + b
        return [y, *torch.autograd.grad(y, [values, w, b], grad.to(dtype))]

    for got, same, exact in zip(mine, dense(torch.float32), dense(torch.float64), strict=True):
        assert_no_worse(got.detach(), same.detach(), exact.detach())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 20), st.integers(1, 9), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**31), st.booleans()
)
def test_repeated_indices_add_up(product_backend, rows, k, n, d, seed, strided):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, n, (rows, k), generator=generator, dtype=torch.int32)  # repeats in a row allowed
    values = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, 2 * d if strided else d, generator=generator, dtype=torch.float64)[:, :d]
    grad = torch.randn(d, rows, generator=generator, dtype=torch.float64).T if strided else torch.ones(rows, d).double()
    spread = torch.zeros(rows, n, dtype=torch.float64).scatter_add(1, indices.long(), values)
    torch.testing.assert_close(_sparse_decode(values, indices, weight, None), spread @ weight)
    torch.testing.assert_close(_gather_dot(grad, indices, weight), (grad @ weight.T).gather(1, indices.long()))
    torch.testing.assert_close(_scatter_outer(values, indices, grad, n), spread.T @ grad)


def test_hot_and_empty_latents(product_backend):
    """One latent in every slot, all others in none: the split of work must not lose a row."""
    indices = torch.full((500, 4), 7, dtype=torch.int32)
    values, grad = torch.rand(500, 4).double(), torch.randn(500, 96).double()
    out = _scatter_outer(values, indices, grad, 1000)
    torch.testing.assert_close(out[7], (values.sum(1, keepdim=True) * grad).sum(0))
    assert not out[:7].any()
    assert not out[8:].any()


def test_the_same_bits_for_any_number_of_threads():
    values, indices = torch.rand(3000, 16), torch.randint(0, 900, (3000, 16), dtype=torch.int32)
    weight, grad, before = torch.randn(900, 128), torch.randn(3000, 128), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(
                [
                    _sparse_decode(values, indices, weight, None),
                    _gather_dot(grad, indices, weight),
                    _scatter_outer(values, indices, grad, 900),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck_gradcheck_and_double_backward(product_backend):
    values = torch.rand(4, 3, dtype=torch.float64, requires_grad=True)
    weight, bias, grad = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(11, 6), (6,), (4, 6)])
    indices = random_codes(4, 3, 11).indices
    torch.library.opcheck(_sparse_decode, (values, indices, weight, bias))
    torch.library.opcheck(_gather_dot, (grad, indices, weight))
    torch.library.opcheck(_scatter_outer, (values, indices, grad, 11))
    for function, inputs in [
        (lambda v, w, b: _sparse_decode(v, indices, w, b), (values, weight, bias)),
        (lambda g, w: _gather_dot(g, indices, w), (grad, weight)),
        (lambda v, g: _scatter_outer(v, indices, g, 11), (values, grad)),
    ]:
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    codes = random_codes(40, 64, 500)
    weight = torch.randn(500, 72).to(dtype)
    out = sk.sparse_decode(codes._replace(values=codes.values.to(dtype)), weight)
    exact = codes._replace(values=codes.values.to(dtype)).to_dense().double() @ weight.double()
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-2)


def test_leading_dimensions_and_no_rows():
    codes = random_codes(6, 2, 10)
    shaped = sk.SparseCodes(codes.values.reshape(2, 3, 2), codes.indices.reshape(2, 3, 2), 10)
    assert sk.sparse_decode(shaped, torch.randn(10, 4)).shape == (2, 3, 4)
    empty = sk.SparseCodes(torch.ones(0, 2), torch.ones(0, 2, dtype=torch.int32), 10)
    assert sk.sparse_decode(empty, torch.randn(10, 4)).shape == (0, 4)


@pytest.mark.parametrize(
    ("codes", "options", "message"),
    [
        ({"indices": torch.zeros(2, 3, dtype=torch.int64)}, {}, "codes.indices must be int32"),
        ({"indices": torch.zeros(2, 4, dtype=torch.int32)}, {}, r"must both be \[..., k\]"),
        ({"indices": torch.full((2, 3), 5, dtype=torch.int32)}, {}, r"indices must lie in \[0, 5\), got .* 5"),
        ({"indices": torch.full((2, 3), -1, dtype=torch.int32)}, {}, r"indices must lie in \[0, 5\)"),
        ({"d_sae": 6}, {}, "W_dec must have 6 rows"),
        ({"values": torch.zeros(2, 3, dtype=torch.int32)}, {}, "values must be a floating-point tensor"),
        ({}, {"b_dec": torch.zeros(3)}, r"b_dec must have shape \(4,\)"),
    ],
)
def test_bad_arguments_are_named(codes, options, message):
    good = sk.SparseCodes(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int32), 5)
    with pytest.raises(ValueError, match=message):
        sk.sparse_decode(good._replace(**codes), torch.ones(5, 4), **options)
