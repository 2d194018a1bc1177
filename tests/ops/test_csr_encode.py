"""batch_topk_encode and threshold_encode against their dense definitions: entries, every gradient, what they refuse."""

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.factors import kept_as_factors
from sparsekern.ops._batch_topk_encode import _batch_topk_encode
from sparsekern.ops._sparse_decode import sum_of_outer_products
from sparsekern.ops._threshold_encode import _threshold_encode


def batch_topk(pre, k):
    """Positions, in row-major order, of the k·B largest: a stable sort of everything."""
    return pre.flatten().sort(descending=True, stable=True).indices[: int(k * pre.shape[0])].sort().values


def above(pre, threshold):
    """Positions, in row-major order, of what passes the threshold."""
    return (pre > threshold).flatten().nonzero().squeeze(1)


def positive(pre, positions):
    """Those of the positions where the pre-activation is positive."""
    return positions[pre.flatten()[positions] > 0]


def assert_codes(codes, pre, positions):
    """`codes` hold the pre-activations at these positions, and nothing else."""
    rows, n = pre.shape
    assert (codes.crow.dtype, codes.col.dtype, codes.d_sae) == (torch.int64, torch.int32, n)
    assert codes.crow.tolist() == [int((positions < row * n).sum()) for row in range(rows + 1)]
    assert torch.equal(codes.col.long(), positions % n)
    assert torch.equal(codes.values, pre.flatten()[positions].to(codes.values.dtype))


# Small whole numbers: sums are exact in float32, so that ties are real ties and the float64 definition is comparable.
@st.composite
def whole_number_problems(draw):
    rows, d, n = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randint(-2, 3, (rows, d), generator=generator).float()
    weight = torch.randint(-2, 3, (n, d), generator=generator).float()
    bias = torch.randint(-3, 2, (n,), generator=generator).float() if draw(st.booleans()) else None
    threshold = draw(st.sampled_from([-1.5, 0, 1, 2.5, "one a latent"]))
    if isinstance(threshold, str):
        threshold = torch.randint(-2, 4, (n,), generator=generator).float()
    return x, weight, bias, draw(st.one_of(st.integers(1, n), st.floats(1, n))), threshold


@pytest.fixture
def screen(product_backend):
    """A screening pass at any size, where the backend has one."""
    return "int8" if product_backend == "cpu" else "auto"


any_example = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def pre_activations(x, weight, bias):
    return x @ weight.T + (0 if bias is None else bias)


@any_example
@given(whole_number_problems())
def test_equals_the_definition_with_ties_to_the_lower_position(screen, problem):
    x, weight, bias, k, threshold = problem
    pre = pre_activations(x, weight, bias)
    assert_codes(sk.batch_topk_encode(x, weight, bias, k, screen), pre.relu(), batch_topk(pre, k))
    assert_codes(sk.threshold_encode(x, weight, bias, threshold, screen), pre, above(pre, threshold))


@given(whole_number_problems(), st.integers(1, 150), st.integers(1, 20))
def test_panels_and_row_blocks_do_not_change_the_answer(problem, cells, narrowest):
    x, weight, bias, k, threshold = problem
    pre = pre_activations(x, weight, bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "WORKSPACE_BYTES", 20 * cells)
        patch.setattr(reference, "NARROWEST_PANEL", narrowest)  # several rows by several panels
        assert_codes(sk.batch_topk_encode(x, weight, bias, k), pre.relu(), batch_topk(pre, k))
        assert_codes(sk.threshold_encode(x, weight, bias, threshold), pre, above(pre, threshold))


@any_example
@given(whole_number_problems())
def test_gradients_of_an_autoencoder_equal_those_of_the_definition(screen, problem):
    dtype = torch.float32 if screen == "int8" else torch.float64
    x, weight, bias, k, threshold = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in problem)
    n, d = weight.shape
    center, decoder, decoder_bias = (torch.randn(*s, dtype=dtype).round() for s in [(d,), (n, 3), (3,)])
    inputs = [t.requires_grad_() for t in (x, weight, bias, center, decoder, decoder_bias) if t is not None]
    pre = pre_activations(x - center, weight, bias)
    cotangent = torch.randn(x.shape[0], 3, dtype=dtype)
    for codes, positions in [
        (sk.batch_topk_encode(x, weight, bias, k, screen, center), positive(pre, batch_topk(pre, k))),
        (sk.threshold_encode(x, weight, bias, threshold, screen, center), above(pre, threshold)),
    ]:
        taken = torch.zeros(pre.numel(), dtype=torch.bool).index_fill(0, positions, True).view_as(pre)
        expected = torch.where(taken & (pre != 0), pre, 0) @ decoder + decoder_bias  # zeros carry no gradient
        got = sk.sparse_decode(codes, decoder, decoder_bias)
        torch.testing.assert_close(got, expected)
        theirs = torch.autograd.grad(expected, inputs, cotangent, retain_graph=True)
        for mine, other in zip(torch.autograd.grad(got, inputs, cotangent), theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-9)


def test_a_token_may_have_all_of_the_entries_or_none():
    x = torch.tensor([[-1.0, -1.0], [3.0, 4.0], [1.0, 0.0]], requires_grad=True)
    weight = torch.eye(2, requires_grad=True)
    codes = sk.batch_topk_encode(x, weight, None, 1)
    assert codes.crow.tolist() == [0, 0, 2, 3]
    assert codes.col.tolist() == [0, 1, 0]
    assert codes.values.tolist() == [3.0, 4.0, 1.0]
    assert codes.l0().tolist() == [0, 2, 1]
    assert codes.firing_counts().tolist() == [2, 1]
    codes.values.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 0.0]]
    assert weight.grad.tolist() == [[4.0, 4.0], [3.0, 4.0]]


def test_entries_that_are_not_positive_stay_as_zeros_without_gradient():
    x = torch.tensor([[-1.0, -2.0], [-3.0, 1.0]], requires_grad=True)
    weight, bias = torch.eye(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    codes = sk.batch_topk_encode(x, weight, bias, 1)
    assert codes.crow.tolist() == [0, 1, 2]
    assert codes.values.tolist() == [0.0, 1.0]
    assert codes.l0().tolist() == [0, 1]
    codes.values.sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert bias.grad.tolist() == [0.0, 1.0]
    nothing = sk.batch_topk_encode(x, weight, torch.full((2,), -9.0), 2)
    assert nothing.crow.tolist() == [0, 2, 4]
    assert not nothing.values.any()
    for gradient in torch.autograd.grad(nothing.values.sum(), (x, weight)):
        assert not gradient.any()


def test_equal_rows_and_latents_are_taken_in_row_major_order():
    codes = sk.batch_topk_encode(torch.ones(5, 3), torch.ones(4, 3), None, 2)
    assert codes.crow.tolist() == [0, 4, 8, 10, 10, 10]
    assert codes.col.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_a_threshold_that_nothing_passes_leaves_no_entry():
    x, weight, bias = (torch.randn(*s, requires_grad=True) for s in [(3, 4), (7, 4), (2,)])
    codes = sk.threshold_encode(x, weight, None, float("inf"))
    assert codes.crow.tolist() == [0, 0, 0, 0]
    assert codes.col.shape == codes.values.shape == (0,)
    out = sk.sparse_decode(codes, weight[:, :2], bias)
    assert torch.equal(out, bias.expand(3, 2))
    for gradient in torch.autograd.grad(out.sum(), (x, weight)):
        assert gradient.shape[1] == 4
        assert not gradient.any()


def test_the_threshold_itself_does_not_pass_and_has_no_gradient():
    threshold = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    codes = sk.threshold_encode(torch.full((1, 1), 2.0, requires_grad=True), torch.ones(3, 1), None, threshold)
    assert codes.col.tolist() == [0]
    assert codes.values.tolist() == [2.0]  # the pre-activation, not what it has above the threshold
    codes.values.sum().backward()
    assert threshold.grad is None


def test_a_threshold_is_not_rounded_to_the_dtype_of_storage():
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert sk.threshold_encode(one, one, None, 0.999).values.tolist() == [1.0]  # 0.999 is 1 in bfloat16
    assert sk.threshold_encode(one, one, None, torch.tensor([0.999])).values.tolist() == [1.0]


def test_nan_weights_are_not_hidden():
    weight = torch.randn(8, 4)
    weight[3, 2] = torch.nan
    codes = sk.batch_topk_encode(torch.randn(5, 4), weight, None, 2)
    assert codes.values.shape == (10,)
    assert codes.col[codes.values.isnan()].tolist() == [3] * 5


# What holds for both.

ENCODERS = {
    "batch_topk": functools.partial(sk.batch_topk_encode, k=5),
    "threshold": functools.partial(sk.threshold_encode, threshold=0.7),
    "thresholds": functools.partial(sk.threshold_encode, threshold=torch.linspace(0, 1.5, 16)),
}


@pytest.fixture(params=ENCODERS)
def encode(request):
    return ENCODERS[request.param]


def assert_same(mine, theirs):
    assert torch.equal(mine.crow, theirs.crow)
    assert torch.equal(mine.col, theirs.col)
    assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize(("rows", "d", "n", "k"), [(1, 1, 1, 1), (3, 37, 129, 1), (129, 65, 1000, 17), (5, 8, 33, 33)])
def test_odd_sizes_match_float64(rows, d, n, k):
    x, weight, bias = torch.randn(rows, d), torch.randn(n, d), torch.randn(n)
    exact = x.double() @ weight.double().T + bias.double()
    cut = exact.flatten().sort(descending=True).values[rows * k - 1]
    for codes, limit in [
        (sk.batch_topk_encode(x, weight, bias, k), cut),
        (sk.threshold_encode(x, weight, bias, cut.relu()), cut.relu()),
    ]:
        taken = codes._replace(values=torch.ones_like(codes.values)).to_dense().bool()
        torch.testing.assert_close(codes.to_dense().double(), (exact * taken).relu(), rtol=1e-5, atol=1e-4)
        # Nothing left out beats what was taken, up to the rounding of float32.
        assert (exact[taken] >= limit - 1e-4).all()
        assert (exact[~taken] <= limit + 1e-4).all()


def test_strided_and_offset_views(encode):
    x, weight, bias = torch.randn(12, 20)[::2, 3:13], torch.randn(10, 16).T, torch.randn(32)[::2]
    mine, theirs = encode(x, weight, bias), encode(x.contiguous(), weight.contiguous(), bias.contiguous())
    assert torch.equal(mine.crow, theirs.crow)
    assert torch.equal(mine.col, theirs.col)
    torch.testing.assert_close(mine.values, theirs.values)


def test_leading_dimensions_are_flattened(encode):
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(16, 8)
    codes = encode(x, weight, None)
    assert_same(codes, encode(x.reshape(-1, 8), weight, None))
    assert codes.crow.shape == (25,)
    assert encode(x[0, 0, 0], weight, None).crow.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_compared_in_float32(encode, dtype):
    x, weight, bias, center = (torch.randn(*s).to(dtype) for s in [(64, 48), (16, 48), (16,), (48,)])
    codes, wide = encode(x, weight, bias), encode(x.float(), weight.float(), bias.float())
    assert codes.values.dtype == dtype
    assert_same(codes, wide._replace(values=wide.values.to(dtype)))
    assert encode(x, weight.float(), bias, center=center).values.dtype == torch.float32


def test_autocast_does_not_change_the_entries_or_the_gradients(encode):
    x, weight, center = (torch.randn(*s, requires_grad=True) for s in [(64, 96), (16, 96), (96,)])

    def entries_and_gradients():
        codes = encode(x, weight, None, center=center)
        loss = sk.sparse_decode(codes, weight).square().sum()
        return [*codes[:3], *torch.autograd.grad(loss, (x, weight, center))]

    plain = entries_and_gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = entries_and_gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


@pytest.mark.parametrize(
    ("op", "argument"),
    [
        (_batch_topk_encode, 3),
        (_threshold_encode, torch.tensor(0.5, dtype=torch.float64)),
        (_threshold_encode, torch.linspace(0, 1, 11, dtype=torch.float64)),
    ],
)
def test_opcheck_gradcheck_and_double_backward(op, argument):
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 6), (11, 6), (11,)])
    center = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (x, weight, bias, center, argument, "auto"))
    torch.library.opcheck(op, (x, weight, None, None, argument, "none"))

    def values(x, weight, bias, center):
        return op(x, weight, bias, center, argument, "auto")[0]

    # With x and without: the gradient of the centre then goes through that of the bias.
    for inputs in ((x, weight, bias, center), (x.detach(), weight, bias, center), (x, weight, None, None)):
        assert torch.autograd.gradcheck(values, inputs)
        assert torch.autograd.gradgradcheck(values, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(encode, backend):
    x, weight, bias = torch.randn(8, 12), torch.randn(16, 12, requires_grad=True), torch.randn(16)

    def loss(x, weight, bias):
        return sk.sparse_decode(encode(x, weight, bias), weight).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for batch in (x, x.flip(1), x[:5]):  # other numbers of entries, then of tokens
        torch.testing.assert_close(compiled(batch, weight, bias), loss(batch, weight, bias))
        (mine,) = torch.autograd.grad(compiled(batch, weight, bias), weight)
        (theirs,) = torch.autograd.grad(loss(batch, weight, bias), weight)
        torch.testing.assert_close(mine, theirs)


def test_gradients_of_weights_can_be_kept_as_factors(encode):
    x, weight = torch.randn(6, 8), torch.randn(16, 8, requires_grad=True)
    (expected,) = torch.autograd.grad(sk.sparse_decode(encode(x, weight, None), weight).sum(), weight)
    loss = sk.sparse_decode(encode(x, weight, None), weight).sum()
    with kept_as_factors([weight]) as kept:
        loss.backward()
    assert weight.grad is None
    (parts,) = kept.values()
    torch.testing.assert_close(sum(sum_of_outer_products(part, 16) for part in parts), expected)


_PEAK = """
import resource, sys, torch, sparsekern as sk
x, weight = torch.randn(4096, 64), torch.randn(65536, 64)
encode = lambda x, w: eval(sys.argv[1])
encode(x[:32], weight[:4096])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encode(x, weight)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
@pytest.mark.parametrize("call", ["sk.batch_topk_encode(x, w, None, 32)", "sk.threshold_encode(x, w, None, 28.0)"])
def test_peak_memory_stays_far_below_the_dense_pre_activations(call):
    run = subprocess.run([sys.executable, "-c", _PEAK, call], check=True, capture_output=True, text=True)
    added, dense = int(run.stdout) * 1024, 4096 * 65536 * 4
    assert added < dense / 4, f"{added / 2**20:.0f} MiB of {dense / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 7)}, "x must have 8 columns"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x must be a floating-point tensor"),
        ({"x": torch.ones(0, 8)}, "x must hold at least one token"),
        ({"x": torch.ones(8, device="meta")}, "one device"),
        ({"W_enc": torch.ones(16)}, "W_enc must be 2-D"),
        ({"b_enc": torch.ones(15)}, r"b_enc must have shape \(16,\)"),
        ({"screen": "fp4"}, "screen must be one of"),
        ({"screen": "fp8"}, "no backend serves .*_encode .* screen='fp8'"),
        ({"center": torch.ones(7)}, r"center must have shape \(8,\)"),
        (
            {"x": torch.ones(4, 8).index_fill(0, torch.tensor([2]), torch.nan)},
            "x holds NaN or infinity, first in row 2",
        ),
        (
            {"x": torch.ones(4, 8).index_fill(0, torch.tensor([1]), torch.inf)},
            "x holds NaN or infinity, first in row 1",
        ),
        ({"center": torch.full((8,), torch.nan)}, "x - center holds NaN or infinity, first in row 0"),
    ],
)
def test_bad_arguments_are_named(encode, change, message):
    arguments = {"x": torch.ones(4, 8), "W_enc": torch.ones(16, 8), "b_enc": None} | change
    with pytest.raises(ValueError, match=message):
        encode(**arguments)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (0, "above 0 and at most d_sae=16, got 0"),
        (16.1, "above 0 and at most d_sae=16, got 16.1"),
        (float("nan"), "above 0 and at most d_sae=16, got nan"),
        (0.24, "at least 1 / 4 to keep anything of 4 tokens, got 0.24"),
    ],
)
def test_k_out_of_range_is_refused(k, message):
    with pytest.raises(ValueError, match=f"k must be {message}"):
        sk.batch_topk_encode(torch.ones(4, 8), torch.ones(16, 8), None, k)


def test_k_need_not_be_whole():
    x, weight = torch.randn(10, 4), torch.randn(6, 4)
    for k, count in [(0.1, 1), (1.8, 18), (1.89, 18), (2.0, 20), (5.99, 59)]:
        assert sk.batch_topk_encode(x, weight, None, k).col.shape == (count,)
    sae = sk.SAE(4, 6, sk.BatchTopK(1.8))
    assert sae.loss(x).codes.col.shape == (18,)
    assert sk.SAE.from_config(sae.config()).activation.k == 1.8


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (float("nan"), "threshold must be a number, got nan"),
        (torch.ones(16).index_fill(0, torch.tensor(3), torch.nan), "threshold must hold numbers, got nan"),
        (torch.ones(15), r"threshold must be a number or have shape \(\) or \(16,\)"),
        (torch.tensor(1), "threshold must be a floating-point tensor"),
        (torch.ones(16, device="meta"), "one device, got x on cpu, threshold on meta"),
    ],
)
def test_bad_thresholds_are_named(threshold, message):
    with pytest.raises(ValueError, match=message):
        sk.threshold_encode(torch.ones(4, 8), torch.ones(16, 8), None, threshold)


def test_a_number_is_checked_on_any_device():
    x, weight = torch.ones(4, 8, device="meta"), torch.ones(16, 8, device="meta")
    with pytest.raises(ValueError, match="threshold must be a number"):
        sk.threshold_encode(x, weight, None, float("nan"))
