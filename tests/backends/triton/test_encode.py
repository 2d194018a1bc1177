"""The encoders of the Triton backend against float64: every path, number of keys, precision and kind of input."""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from sparsekern.backends import reference, screening, triton
from sparsekern.backends.triton import csr_encode, encode, plans
from sparsekern.bench.exactness import CASES

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")
cuda = torch.cuda.is_available()
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def few_buckets(monkeypatch, n_buckets=32, keep=3, room=64):
    monkeypatch.setattr(plans, "_buckets", lambda n, k: (n_buckets, keep, room))


def run(device, x, weight, bias, k, screen="auto", absolute=False):
    on = [None if t is None else t.to(device) for t in (x, weight, bias)]
    values, indices = triton.topk_encode(*on, k, screen, absolute=absolute)
    return values.cpu(), indices.cpu()


def check(values, indices, x, weight, bias, k, absolute=False):
    """Indices of a top k up to the rounding of float32, values and order to match, ties to the lower latent."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    x, weight, bias = x.double(), weight.double(), bias.double()
    score = torch.addmm(bias, x, weight.T)
    rounding = 1e-6 * (x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max() + bias.abs().max())
    taken = score.gather(1, indices.long())
    coarse = 0 if values.dtype == torch.float32 else 2e-3 * taken.abs()
    assert ((values.double() - (taken if absolute else taken.relu())).abs() <= rounding + coarse).all()
    if absolute:
        score, taken, values = score.abs(), taken.abs(), values.abs()
    assert ((indices >= 0) & (indices < weight.shape[0])).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    assert (taken >= score.sort(1, descending=True).values[:, k - 1 : k] - rounding).all()
    assert (values.diff(dim=1) <= 0).all()
    same = (taken[:, 1:] == taken[:, :-1]) & (indices[:, 1:] < indices[:, :-1])
    assert not same.any()


KEPT = [("fused", 1, False), ("chunked", 2, False), ("fused", 3, False), ("chunked", 3, False)]


@pytest.mark.parametrize(("path", "keep", "absolute"), [*KEPT, ("fused", 3, True), ("chunked", 2, True)])
@pytest.mark.parametrize("case", sorted(CASES))
def test_hard_inputs(monkeypatch, triton_device, path, keep, case, absolute):
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", path)
    few_buckets(monkeypatch, n_buckets=64 if keep == 1 else 24, keep=keep)
    problem = CASES[case](3, 61 if keep == 1 else 150, 37)
    check(*run(triton_device, *problem, 4, "fp16", absolute), *problem, 4, absolute)


@pytest.mark.parametrize("path", ["fused", "chunked"])
def test_zeros_of_either_sign_tie(monkeypatch, triton_device, path):
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", path)
    few_buckets(monkeypatch, n_buckets=24)
    weight = -torch.ones(150, 1)  # times 0 that is -0, unless something is added to it
    weight[[5, 30, 60, 90]] = 1.0
    _, indices = run(triton_device, torch.zeros(3, 1), weight, None, 4, "none")
    assert indices.tolist() == [[0, 1, 2, 3]] * 3


WAYS = [(path, screen) for path in ("fused", "chunked") for screen in ("auto", "none", "fp16", "tf32")]


# Products of bfloat16 tiles are garbage in the interpreter of Triton 3.9, and there alone.
@pytest.mark.parametrize(
    ("path", "screen"), [*WAYS, ("chunked", "bf16"), ("fused", "fp8"), *([("fused", "bf16")] if cuda else [])]
)
@pytest.mark.parametrize(("dtype", "absolute"), [(torch.float32, False), (torch.float16, False), (torch.float32, True)])
def test_every_precision(monkeypatch, triton_device, path, screen, dtype, absolute):
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", path)
    few_buckets(monkeypatch)
    x, weight, bias = (t.to(dtype) for t in CASES["zipf"](4, 200, 40))
    x[1] *= -1  # its largest scores are those of low latents, with the other sign
    check(*run(triton_device, x, weight, bias, 3, screen, absolute), x, weight, bias, 3, absolute)


@pytest.mark.parametrize(("rows", "d", "n", "k"), [(1, 1, 1, 1), (3, 5, 17, 17), (2, 130, 33, 32), (1, 64, 1025, 1)])
@pytest.mark.parametrize("path", ["fused", "chunked"])
def test_odd_shapes(monkeypatch, triton_device, path, rows, d, n, k):
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", path)
    x, weight = torch.randn(rows, d), torch.randn(n, d)
    check(*run(triton_device, x, weight, None, k), x, weight, None, k)


@few
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 200),
    d=st.integers(1, 40),
    k=st.integers(1, 8),
    keep=st.sampled_from([1, 3]),
    path=st.sampled_from(["fused", "chunked"]),
    case=st.sampled_from(sorted(CASES)),
    absolute=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_shape(triton_device, rows, n, d, k, keep, path, case, absolute, seed):
    torch.manual_seed(seed)
    problem, k = CASES[case](rows, n, d), min(k, n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEKERN_TRITON_ENCODE", path)
        few_buckets(patch, n_buckets=n if keep == 1 else -(-n // 3), keep=keep)
        check(*run(triton_device, *problem, k, absolute=absolute), *problem, k, absolute)


@few
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 200),
    d=st.integers(1, 40),
    k=st.integers(1, 8),
    keep=st.sampled_from([1, 3]),
    path=st.sampled_from(["fused", "chunked"]),
    has_bias=st.booleans(),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_by_size_equal_to_the_reference(triton_device, rows, n, d, k, keep, path, has_bias, negative, seed):
    """Whole numbers: scores are exact, and latents of one size and either sign tie everywhere."""
    torch.manual_seed(seed)
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-2, 3, (n, d)).float()
    bias, k = torch.randint(-3, 4, (n,)).float() if has_bias else None, min(k, n)
    if negative:
        x, weight = x.abs(), -weight.abs()
    weight[n // 2 :] = -weight[: n - n // 2].flip(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEKERN_TRITON_ENCODE", path)
        few_buckets(patch, n_buckets=n if keep == 1 else -(-n // 3), keep=keep)
        values, indices = run(triton_device, x, weight, bias, k, absolute=True)
    expected = reference.topk_encode(x, weight, bias, k, "none", absolute=True)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_strided_input(triton_device):
    x, weight = torch.randn(12, 20)[::2, 3:13], torch.randn(10, 50).T
    for absolute in (False, True):
        values, indices = run(triton_device, x, weight, None, 4, absolute=absolute)
        expected = reference.topk_encode(x.contiguous(), weight.contiguous(), None, 4, "none", absolute)
        torch.testing.assert_close(values, expected[0])
        assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("absolute", [False, True])
def test_crowded_buckets_are_opened(monkeypatch, triton_device, absolute):
    """All winners are members of one bucket, of which only three keys are kept."""
    few_buckets(monkeypatch)
    x, weight = torch.randn(3, 24), torch.randn(200, 24)
    weight[5::32] = 3 * x[1] + 0.1 * weight[5::32]
    if absolute:
        weight[5::64] *= -1
    values, indices = run(triton_device, x, weight, None, 5, absolute=absolute)
    check(values, indices, x, weight, None, 5, absolute)
    assert (indices[1] % 32 == 5).all()
    stats = triton.last_encode()
    assert int(stats.repaired) == 0
    assert int(stats.rescored) >= 15 + len(weight[5::32]) - 5


@pytest.mark.parametrize("absolute", [False, True])
def test_tokens_with_too_many_candidates_are_repaired(monkeypatch, triton_device, absolute):
    few_buckets(monkeypatch)
    x, weight = torch.randn(5, 24), torch.randn(200, 24)
    x[1] = x[4] = 0  # all latents tie
    if absolute:  # also where they are not zero, with one sign or the other
        x[4, 3], weight[:, 3] = 2, 1.0 - 2 * (torch.arange(200) % 3 == 0)
    values, indices = run(triton_device, x, weight, None, 5, absolute=absolute)
    check(values, indices, x, weight, None, 5, absolute)
    assert indices[1].tolist() == indices[4].tolist() == [0, 1, 2, 3, 4]
    if absolute:
        assert values[4].tolist() == [-2, 2, 2, -2, 2]
    stats = triton.last_encode()
    assert stats.rows == 5
    assert int(stats.repaired) == 2


def test_chunks_and_panels_change_nothing(monkeypatch, triton_device):
    few_buckets(monkeypatch)
    x, weight, bias = CASES["random"](7, 300, 24)
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", "chunked")
    whole = run(triton_device, x, weight, bias, 4, "none")
    monkeypatch.setattr(screening, "PANEL_BYTES", 4 * 3 * 64)
    monkeypatch.setattr(screening, "WORKSPACE_BYTES", 3 * (4 * 32 * 3 + 8 * 64))
    parts = run(triton_device, x, weight, bias, 4, "none")
    assert [count.shape[0] for count, _ in screening.last] == [3, 3, 1]
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)


def test_a_copy_is_used_while_it_is_current(monkeypatch, triton_device):
    few_buckets(monkeypatch)
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", "fused")
    x, weight = torch.randn(3, 24).to(triton_device), torch.randn(200, 24).to(triton_device)
    copy = triton.quantized(weight)
    casts = []
    cast_rows = encode.cast_rows
    monkeypatch.setattr(encode, "cast_rows", lambda rows, dtype: casts.append(rows.shape[0]) or cast_rows(rows, dtype))

    def encode_now():
        casts.clear()
        check(*run(triton_device, x, weight, None, 4, "fp16"), x.cpu(), weight.cpu(), None, 4)
        return list(casts), int(triton.last_encode().repaired)

    assert encode_now() == ([3], 0)  # of the tokens alone
    weight.data.mul_(-1)  # which no counter sees
    assert encode_now() == ([3], 3)
    copy.mark_current(weight)
    weight.mul_(-1)
    assert encode_now() == ([3, 200], 0)
    del copy
    assert encode_now() == ([3, 200], 0)


@pytest.mark.parametrize("absolute", [False, True])
def test_a_token_with_nan_harms_no_other(monkeypatch, triton_device, absolute):
    few_buckets(monkeypatch)
    x, weight, bias = CASES["random"](4, 200, 24)
    x[2, 3] = math.nan
    values, indices = run(triton_device, x, weight, bias, 4, absolute=absolute)
    assert ((indices >= 0) & (indices < 200)).all()
    rest = [0, 1, 3]
    check(values[rest], indices[rest], x[rest], weight, bias, 4, absolute)


def test_latents_switched_off_by_their_bias_come_last(triton_device):
    x, weight, bias = torch.randn(3, 24), torch.randn(20, 24), torch.zeros(20)
    bias[4:] = -math.inf
    values, indices = run(triton_device, x, weight, bias, 6)
    expected = (x @ weight[:4].T).relu().sort(1, descending=True).values
    torch.testing.assert_close(values, torch.nn.functional.pad(expected, (0, 2)))
    assert (indices[values > 0] < 4).all()


def test_panels_are_summed_in_float32():
    flags = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    allowed = [getattr(flags, name) for name in names]
    assert any(allowed)  # torch's defaults
    seen = []

    class Rows:
        def __matmul__(self, other):
            seen.extend(getattr(flags, name) for name in names)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        encode.panel_scores(Rows(), torch.ones(2, 2))
    assert seen == [False, False]
    assert [getattr(flags, name) for name in names] == allowed


@pytest.mark.parametrize("by", ["precision", "name"])
def test_the_slack_follows_the_precision_of_the_library(by):
    """`none` is the library's float32, which this process may have told to round."""
    matmul = torch.backends.cuda.matmul
    plan = partial(plans.encode_plan, 64, 768, 2**17, 32, torch.float32, "none", (9, 0), has_copy=False)
    assert plan().precision == "ieee"
    before = matmul.fp32_precision
    try:
        if by == "name":
            matmul.fp32_precision = "tf32"
        else:
            torch.set_float32_matmul_precision("high")
        assert plan().precision == "tf32"
        assert plan().tile is None
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


def test_plans():
    shapes = [(n, k) for n in (40, 5000, 12288, 12289, 24576, 2**17, 2**20, 2**22) for k in (1, 32, 64, 384)]
    for n, k in [*((n, min(k, n)) for n, k in shapes if (n, k) != (2**22, 384)), (10_000, 2048)]:
        for capability in ((8, 0), (8, 9), (9, 0), (12, 0)):
            plan = plans.encode_plan(8192, 768, n, k, torch.float32, "auto", capability, has_copy=True)
            assert plan is not None, (n, k)
            assert plan.n_buckets * plan.n_members >= n > plan.n_buckets * (plan.n_members - 1)
            assert min(plan.keep, plan.n_members) * plan.n_buckets >= k
            assert plan.n_members <= 1 << plan.member_bits <= 2**12
            assert plan.room >= 4 * k
            assert plan.room & (plan.room - 1) == 0
            assert plan.n_buckets * plan.keep <= plans.MOST_KEYS
    plan = plans.encode_plan(2048, 384, 24576, 32, torch.float32, "auto", (9, 0), has_copy=True)
    assert (plan.n_buckets, plan.n_members) == (768, 32)  # no tile is left half empty
    for n, k in ((2**20, 2049), (2**20, 1024), (2**22, 384)):  # too many buckets would have to be opened
        assert plans.encode_plan(8, 768, n, k, torch.float32, "auto", (9, 0), has_copy=True) is None


def test_an_unknown_path_is_refused(monkeypatch, triton_device):
    monkeypatch.setenv("SPARSEKERN_TRITON_ENCODE", "quick")
    with pytest.raises(ValueError, match=r"SPARSEKERN_TRITON_ENCODE='quick': must be auto, fused or chunked"):
        run(triton_device, torch.ones(1, 2), torch.ones(3, 2), None, 1)


def test_what_it_does_not_screen_goes_to_the_reference(monkeypatch, triton_device):
    called = []
    monkeypatch.setattr(reference, "topk_encode", lambda *a: called.append(a) or (torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(plans, "MOST_TOP", 2)
    run(triton_device, torch.ones(1, 2), torch.ones(30, 2), None, 3, absolute=True)
    assert called[0][-1] is True


# Variable numbers of latents


def dense(crow, col, values, n):
    crow, col = crow.cpu(), col.cpu().long()
    out = torch.zeros(len(crow) - 1, n, dtype=values.dtype)
    out[torch.repeat_interleave(torch.arange(len(crow) - 1), crow.diff()), col] = values.cpu()
    return out


@few
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 300),
    d=st.integers(1, 40),
    level=st.sampled_from([0.0, 1.5, 1e3]),
    per_latent=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_threshold_encode(triton_device, rows, n, d, level, per_latent, seed):
    torch.manual_seed(seed)
    # Whole numbers: their scores are exact, and half of the thresholds are met exactly.
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-2, 3, (n, d)).float()
    bias = torch.randint(-3, 4, (n,)).float()
    threshold = torch.randint(0, 4, (n,)).float() + level if per_latent else torch.tensor(level)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screening, "WORKSPACE_BYTES", 2 * (n // 8 + 4))
        patch.setattr(screening, "PANEL_BYTES", 1)
        on = [t.to(triton_device) for t in (x, weight, bias, threshold)]
        crow, col, values = csr_encode.threshold_encode(*on, "auto")
    score = x @ weight.T + bias
    assert torch.equal(dense(crow, col, values, n), torch.where(score > threshold, score, 0))
    assert int(crow[-1]) == len(col) == len(values) == int((score > threshold).sum())
    assert crow.dtype == torch.int64
    assert col.dtype == torch.int32


@few
@given(
    rows=st.integers(1, 5), n=st.integers(3, 300), d=st.integers(1, 40), k=st.floats(1, 3), seed=st.integers(0, 2**31)
)
def test_batch_topk_encode(triton_device, rows, n, d, k, seed):
    count = int(k * rows)
    torch.manual_seed(seed)
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-2, 3, (n, d)).float()
    with pytest.MonkeyPatch.context() as patch:
        if n >= 24:
            few_buckets(patch, n_buckets=8, keep=3)
        found = csr_encode.batch_topk_encode(x.to(triton_device), weight.to(triton_device), None, count, "auto")
    expected = reference.batch_topk_encode(x, weight, None, count, "none")
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine.cpu(), other)
