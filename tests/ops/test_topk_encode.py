"""topk_encode against the dense definition in float64: values, indices, every gradient, and what it must refuse."""

import resource
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.ops._topk_encode import _topk_encode


def dense_topk(x, weight, bias, k, absolute=False):
    """The definition: all pre-activations, a stable sort (by size), ReLU (or not)."""
    pre = x @ weight.T + (0 if bias is None else bias)
    order = (pre.abs() if absolute else pre).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    values = pre.gather(-1, order)
    return values if absolute else values.relu(), order


# Small whole numbers: sums are exact in float32, so that ties are real ties and the float64 definition is comparable.
@st.composite
def whole_number_problems(draw):
    rows, d, n = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    k = draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randint(-2, 3, (rows, d), generator=generator).float()
    weight = torch.randint(-2, 3, (n, d), generator=generator).float()
    bias = torch.randint(-3, 2, (n,), generator=generator).float() if draw(st.booleans()) else None
    return x, weight, bias, k


@given(whole_number_problems(), st.booleans())
def test_equals_the_definition_with_ties_to_the_lower_index(problem, absolute):
    x, weight, bias, k = problem
    codes = sk.topk_encode(x, weight, bias, k, absolute=absolute)
    values, indices = dense_topk(x, weight, bias, k, absolute)
    assert torch.equal(codes.values, values)
    assert torch.equal(codes.indices.long(), indices)


@given(whole_number_problems(), st.integers(1, 13), st.integers(1, 4), st.booleans())
def test_panels_and_row_blocks_do_not_change_the_answer(problem, panel, rows, absolute):
    x, weight, bias, k = problem
    whole = reference.topk_encode(x, weight, bias, k, "none", absolute)
    before = reference.WORKSPACE_BYTES
    try:
        # Room for a few rows of a narrow panel only: forces merging over many panels.
        reference.WORKSPACE_BYTES = 4 * max(panel, rows)
        pieces = reference.topk_encode(x, weight, bias, k, "none", absolute)
    finally:
        reference.WORKSPACE_BYTES = before
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


@given(whole_number_problems(), st.booleans())
def test_gradients_equal_those_of_the_definition(problem, absolute):
    x, weight, bias, k = (t.double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in problem)
    codes = sk.topk_encode(x, weight, bias, k, absolute=absolute)
    cotangent = torch.randn_like(codes.values)
    inputs = [t for t in (x, weight, bias) if t is not None]
    got = torch.autograd.grad(codes.values, inputs, cotangent)
    pre = x @ weight.T + (0 if bias is None else bias)
    taken = pre.gather(1, codes.indices.long())
    taken = torch.where(taken != 0, taken, 0) if absolute else taken.relu()  # zeros carry no gradient
    expected = torch.autograd.grad(taken, inputs, cotangent)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_row_with_fewer_than_k_positives_has_empty_slots_without_gradient():
    x = torch.tensor([[1.0, 0.0], [-1.0, -1.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    bias = torch.tensor([0.0, -1.0, 0.0, -5.0], requires_grad=True)
    codes = sk.topk_encode(x, weight, bias, 3)
    assert codes.values.tolist() == [[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert codes.l0().tolist() == [2, 0]
    codes.values.sum().backward()
    assert bias.grad.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert weight.grad.tolist() == [[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
    assert x.grad.tolist() == [[3.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(("rows", "d", "n", "k"), [(1, 1, 1, 1), (3, 37, 129, 1), (129, 65, 1000, 17), (5, 8, 33, 33)])
def test_odd_sizes_match_float64(rows, d, n, k):
    x, weight, bias = torch.randn(rows, d), torch.randn(n, d), torch.randn(n)
    codes = sk.topk_encode(x, weight, bias, k)
    exact = x.double() @ weight.double().T + bias.double()
    chosen = exact.gather(1, codes.indices.long())
    torch.testing.assert_close(codes.values.double(), chosen.relu(), rtol=1e-5, atol=1e-5)
    # No latent left out beats one that was taken, up to the rounding of float32.
    cut = exact.sort(dim=1, descending=True).values[:, k - 1]
    assert (chosen >= cut[:, None] - 1e-4).all()
    assert (codes.indices.long().sort(1).values.diff(dim=1) > 0).all()


def test_strided_and_offset_views():
    x, weight = torch.randn(12, 20)[::2, 3:13], torch.randn(10, 50).T
    mine, theirs = sk.topk_encode(x, weight, None, 4), sk.topk_encode(x.contiguous(), weight.contiguous(), None, 4)
    torch.testing.assert_close(mine.values, theirs.values)
    assert torch.equal(mine.indices, theirs.indices)


def test_leading_dimensions_are_kept():
    x, weight = torch.randn(2, 3, 4, 8), torch.randn(16, 8)
    codes = sk.topk_encode(x, weight, None, 5)
    assert codes.values.shape == codes.indices.shape == (2, 3, 4, 5)
    flat = sk.topk_encode(x.reshape(-1, 8), weight, None, 5)
    assert torch.equal(codes.indices.reshape(-1, 5), flat.indices)
    assert codes.to_dense().shape == (2, 3, 4, 16)
    assert int(codes.firing_counts().sum()) == int((codes.values > 0).sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_compared_in_float32(dtype):
    x, weight = torch.randn(64, 48).to(dtype), torch.randn(512, 48).to(dtype)
    codes = sk.topk_encode(x, weight, None, 8)
    assert codes.values.dtype == dtype
    _, indices = dense_topk(x.float(), weight.float(), None, 8)
    assert torch.equal(codes.indices.long(), indices)


def test_autocast_does_not_change_the_selection():
    x, weight, bias = torch.randn(64, 96), torch.randn(2048, 96), torch.randn(2048)
    plain = sk.topk_encode(x, weight, bias, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = sk.topk_encode(x, weight, bias, 16)
    assert torch.equal(plain.values, inside.values)
    assert torch.equal(plain.indices, inside.indices)


def test_the_same_bits_every_time():
    x, weight = torch.randn(300, 64), torch.randn(5000, 64)
    first, second = sk.topk_encode(x, weight, None, 20), sk.topk_encode(x, weight, None, 20)
    assert torch.equal(first.values, second.values)
    assert torch.equal(first.indices, second.indices)


def test_opcheck_gradcheck_and_double_backward():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 6), (11, 6), (11,)])
    center = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(_topk_encode, (x, weight, bias, center, 3, "auto"))
    torch.library.opcheck(_topk_encode, (x, weight, None, None, 3, "none"))

    def values(x, weight, bias, center):
        return sk.topk_encode(x, weight, bias, 3, center=center).values

    for inputs in ((x, weight, bias, center), (x.detach(), weight, bias, center), (x, weight, bias, None)):
        assert torch.autograd.gradcheck(values, inputs)
        assert torch.autograd.gradgradcheck(values, inputs)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend):
    x, weight, bias = torch.randn(8, 16), torch.randn(64, 16, requires_grad=True), torch.randn(64)

    def loss(x, weight, bias):
        codes = sk.topk_encode(x, weight, bias, 4)
        return sk.sparse_decode(codes, weight).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, weight, bias), loss(x, weight, bias))
    (mine,) = torch.autograd.grad(compiled(x, weight, bias), weight)
    (theirs,) = torch.autograd.grad(loss(x, weight, bias), weight)
    torch.testing.assert_close(mine, theirs)


_PEAK = """
import resource, torch, sparsekern as sk
torch.set_num_threads(2)
x, weight = torch.randn(4096, 64), torch.randn(65536, 64)
sk.topk_encode(x[:32], weight[:4096], None, 32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sk.topk_encode(x, weight, None, 32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_peak_memory_stays_far_below_the_dense_pre_activations():
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    run = subprocess.run([sys.executable, "-c", _PEAK], check=True, capture_output=True, text=True)
    added, dense = int(run.stdout) * 1024, 4096 * 65536 * 4
    assert added < dense / 4, f"{added / 2**20:.0f} MiB of {dense / 2**20:.0f} MiB"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be between 1 and d_sae=16, got 0"),
        ({"k": 17}, "k must be between 1 and d_sae=16, got 17"),
        ({"x": torch.ones(4, 7)}, "x must have 8 columns"),
        ({"x": torch.ones(4, 8, dtype=torch.int64)}, "x must be a floating-point tensor"),
        ({"x": torch.ones(0, 8)}, "x must hold at least one token"),
        ({"x": torch.ones(8, device="meta")}, "one device"),
        ({"W_enc": torch.ones(16)}, "W_enc must be 2-D"),
        ({"b_enc": torch.ones(15)}, r"b_enc must have shape \(16,\)"),
        ({"screen": "fp4"}, "screen must be one of"),
        ({"screen": "fp8"}, "no backend serves topk_encode .* screen='fp8'"),
        ({"center": torch.ones(7)}, r"center must have shape \(8,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"x": torch.ones(4, 8), "W_enc": torch.ones(16, 8), "b_enc": None, "k": 3} | change
    with pytest.raises(ValueError, match=message):
        sk.topk_encode(**arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_activations_name_their_row(bad):
    x = torch.ones(6, 8)
    x[3, 2] = bad
    with pytest.raises(ValueError, match="x holds NaN or infinity, first in row 3"):
        sk.topk_encode(x, torch.ones(16, 8), None, 2)
