"""The encoders of the CUDA C++ backend, in the emulator of CUDA, against the reference and against float64."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import cuda, reference, screening
from sparsekern.backends.cuda import _library, encode
from sparsekern.backends.triton import plans
from sparsekern.bench.exactness import CASES

pytestmark = pytest.mark.usefixtures("poisoned_memory")
few = settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def kernels(emulated, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", "cuda")
    with _library.emulating(emulated):
        yield emulated


def few_buckets(monkeypatch, n_buckets=32, keep=3, room=64):
    monkeypatch.setattr(plans, "_buckets", lambda n, k: (n_buckets, keep, room))


def whole(*shape, most=2):
    return torch.randint(-most, most + 1, shape).float()


def check(values, indices, x, weight, bias, k, absolute=False):
    """Indices of a top k up to the rounding of float32, values and order to match, ties to the lower latent."""
    bias = torch.zeros(weight.shape[0]) if bias is None else bias
    x, weight, bias = x.double(), weight.double(), bias.double()
    score = torch.addmm(bias, x, weight.T)
    rounding = 1e-6 * (x.norm(dim=1, keepdim=True) * weight.norm(dim=1).max() + bias.abs().max())
    taken = score.gather(1, indices.long())
    coarse = 0 if values.dtype == torch.float32 else 8e-3 * taken.abs()
    assert ((values.double() - (taken if absolute else taken.relu())).abs() <= rounding + coarse).all()
    if absolute:
        score, taken, values = score.abs(), taken.abs(), values.abs()
    assert ((indices >= 0) & (indices < weight.shape[0])).all()
    assert (indices.sort(1).values.diff(dim=1) > 0).all()
    assert (taken >= score.sort(1, descending=True).values[:, k - 1 : k] - rounding).all()
    assert (values.diff(dim=1) <= 0).all()
    same = (taken[:, 1:] == taken[:, :-1]) & (indices[:, 1:] < indices[:, :-1])
    assert not same.any()


def assert_equal(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine, theirs)


# All latents


PATHS = [("fused", 3, False), ("fused", 3, True), ("chunked", 1, False), ("chunked", 2, True), ("chunked", 3, False)]


@pytest.mark.parametrize(("path", "keep", "absolute"), PATHS)
@pytest.mark.parametrize("case", sorted(CASES))
def test_hard_inputs(monkeypatch, path, keep, absolute, case):
    few_buckets(monkeypatch, n_buckets=64 if keep == 1 else 24, keep=keep)
    problem = CASES[case](3, 61 if keep == 1 else 150, 40 if path == "fused" else 37)
    assert_path(path, problem, 4, "fp16")
    check(*cuda.topk_encode(*problem, 4, "fp16", path=path, absolute=absolute), *problem, 4, absolute)


def assert_path(path, problem, k, screen):
    """So that no test of the fused screen tests the other one."""
    x, weight, _ = problem
    plan = cuda.encode_plan(*x.shape, len(weight), k, x.dtype, screen, (9, 0), has_copy=False, path=path)
    assert (plan.tile is not None) == (path == "fused")


SCREENS = [
    ("chunked", "auto"),
    ("chunked", "none"),
    ("chunked", "bf16"),
    ("fused", "fp16"),
    ("fused", "bf16"),
    ("fused", "fp8"),
]


@pytest.mark.parametrize(("path", "screen"), SCREENS)
@pytest.mark.parametrize(
    ("dtype", "absolute"),
    [(torch.float32, False), (torch.float16, False), (torch.bfloat16, False), (torch.float32, True)],
)
def test_every_precision(monkeypatch, path, screen, dtype, absolute):
    few_buckets(monkeypatch)
    n = 256 if path == "fused" else 200  # whole tiles, which weights that are no copy have to fill
    problem = x, weight, bias = tuple(t.to(dtype) for t in CASES["zipf"](4, n, 48))
    x[1] *= -1  # its largest scores are those of low latents, with the other sign
    assert_path(path, problem, 3, screen)
    check(*cuda.topk_encode(x, weight, bias, 3, screen, path=path, absolute=absolute), x, weight, bias, 3, absolute)


@pytest.mark.parametrize(("rows", "d", "n", "k"), [(1, 1, 1, 1), (3, 5, 17, 17), (2, 130, 33, 32), (1, 600, 300, 1)])
def test_odd_shapes(rows, d, n, k):
    x, weight = torch.randn(rows, d), torch.randn(n, d)
    check(*cuda.topk_encode(x, weight, None, k, "auto"), x, weight, None, k)


@few
@given(
    rows=st.integers(1, 5),
    n=st.integers(1, 200),
    d=st.sampled_from([*range(1, 41), 8, 16, 24]),
    k=st.integers(1, 8),
    keep=st.sampled_from([1, 2, 3]),
    screen=st.sampled_from(["auto", "fp16"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    has_bias=st.booleans(),
    absolute=st.booleans(),
    negative=st.booleans(),
    latent_by_latent=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_whole_numbers_equal_to_the_reference(
    rows, n, d, k, keep, screen, dtype, has_bias, absolute, negative, latent_by_latent, seed
):
    """Scores are exact, and latents tie everywhere, of either sign."""
    torch.manual_seed(seed)
    x, weight = whole(rows, d), whole(n, d)
    bias, k = whole(n, most=3) if has_bias else None, min(k, n)
    if negative:
        x, weight = x.abs(), -weight.abs()
    weight[n // 2 :] = -weight[: n - n // 2].flip(0)
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    with pytest.MonkeyPatch.context() as patch:
        few_buckets(patch, n_buckets=n if keep == 1 else -(-n // 3), keep=keep)
        patch.setattr(encode, "by_latent", lambda *_: latent_by_latent)
        found = cuda.topk_encode(x, weight, bias, k, screen, absolute=absolute)
    assert_equal(found, reference.topk_encode(x, weight, bias, k, "none", absolute))


@pytest.mark.parametrize("latent_by_latent", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_input(monkeypatch, dtype, latent_by_latent):
    """Rows that are not contiguous, and rows that do not begin at multiples of 16 bytes."""
    monkeypatch.setattr(encode, "by_latent", lambda *_: latent_by_latent)
    for x, weight in [
        (whole(12, 20)[::2, 3:13], whole(10, 50).T),
        (whole(4, 16), whole(30, 48)[:, 16:32]),
        (whole(65)[1:].view(4, 16), whole(321)[1:].view(20, 16)),
    ]:
        x, weight = x.to(dtype), weight.to(dtype)
        for absolute in (False, True):
            found = cuda.topk_encode(x, weight, None, 4, "auto", absolute=absolute)
            assert_equal(found, reference.topk_encode(x, weight, None, 4, "none", absolute))


@pytest.mark.parametrize("path", ["fused", "chunked"])
@pytest.mark.parametrize("absolute", [False, True])
def test_crowded_buckets_are_opened(monkeypatch, path, absolute):
    """All winners are members of one bucket, of which only three keys are kept."""
    few_buckets(monkeypatch)
    buckets = 16 if path == "fused" else 32
    x, weight = torch.randn(3, 24), torch.randn(256, 24)
    weight[5::buckets] = 3 * x[1] + 0.1 * weight[5::buckets]
    if absolute:
        weight[5 :: 2 * buckets] *= -1
    values, indices = cuda.topk_encode(x, weight, None, 5, "fp16", path=path, absolute=absolute)
    check(values, indices, x, weight, None, 5, absolute)
    assert (indices[1] % buckets == 5).all()
    stats = cuda.last_encode()
    assert int(stats.repaired) == 0
    assert int(stats.rescored) >= 15 + len(weight[5::buckets]) - 5


def test_zeros_of_either_sign_tie():
    x, weight = torch.zeros(2, 1), torch.tensor([[-1.0], [1.0], [-2.0], [3.0]])
    x[1] = 1
    found = cuda.topk_encode(x, weight, None, 2, "none")
    assert_equal(found, reference.topk_encode(x, weight, None, 2, "none"))
    assert found[1][0].tolist() == [0, 1]


@pytest.mark.parametrize("parts", [1, 5])
@pytest.mark.parametrize("absolute", [False, True])
def test_tokens_with_too_many_candidates_are_repaired(monkeypatch, parts, absolute):
    few_buckets(monkeypatch)
    monkeypatch.setattr(encode, "SPARE_ROWS", 2 * parts)
    x, weight = torch.randn(5, 24), torch.randn(200, 24)
    x[1] = x[4] = 0  # all latents tie
    if absolute:  # also where they are not zero, with one sign or the other
        x[4, 3], weight[:, 3] = 2, 1.0 - 2 * (torch.arange(200) % 3 == 0)
    values, indices = cuda.topk_encode(x, weight, None, 5, "auto", absolute=absolute)
    check(values, indices, x, weight, None, 5, absolute)
    assert indices[1].tolist() == indices[4].tolist() == [0, 1, 2, 3, 4]
    if absolute:
        assert values[4].tolist() == [-2, 2, 2, -2, 2]
    stats = cuda.last_encode()
    assert stats.rows == 5
    assert int(stats.repaired) == 2


def test_many_latents_of_a_repaired_token_to_keep(monkeypatch):
    """More than are sorted at one time, in parts that have fewer than are kept."""
    few_buckets(monkeypatch, n_buckets=700, keep=1, room=512)
    monkeypatch.setattr(encode, "SPARE_ROWS", 8)
    x, weight = whole(2, 8), whole(700, 8)
    x[1] = 0
    found = cuda.topk_encode(x, weight, None, 300, "none")
    assert_equal(found, reference.topk_encode(x, weight, None, 300, "none"))
    assert int(cuda.last_encode().repaired) >= 1


def test_latent_by_latent_is_token_by_token(monkeypatch):
    """To the bit, over several slices of the width, and with neighbours of a latent in other runs."""
    few_buckets(monkeypatch, room=128)
    x, weight, bias = torch.randn(9, 1100), torch.randn(40, 1100), torch.randn(40)
    results = []
    for latent_by_latent in (False, True):
        monkeypatch.setattr(encode, "by_latent", lambda *_, on=latent_by_latent: on)
        results.append(cuda.topk_encode(x, weight, bias, 30, "none"))
    assert_equal(*results)
    check(*results[0], x, weight, bias, 30)


def test_latents_that_are_met_often_are_rescored_one_after_the_other():
    def chosen(rows, d, n, k):
        return encode.by_latent(rows, k, torch.empty(n, d, device="meta"))

    assert chosen(8192, 4096, 2**17, 64)
    assert not chosen(8192, 768, 2**17, 32)
    assert not chosen(8192, 768, 2**20, 32)
    assert not chosen(8192, 768, 2**14, 32)  # stays in the cache


@pytest.mark.parametrize("latent_by_latent", [False, True])
def test_equal_rows_of_the_weight_have_equal_scores(monkeypatch, latent_by_latent):
    monkeypatch.setattr(encode, "by_latent", lambda *_: latent_by_latent)
    x, weight = torch.randn(3, 133), torch.randn(8, 133).repeat(9, 1)
    values, indices = cuda.topk_encode(x, weight, None, 27, "none")
    positive = values > 0
    assert torch.equal(indices[positive].view(-1, 9) % 8, indices[positive].view(-1, 9)[:, :1].expand(-1, 9) % 8)
    assert (values[positive].view(-1, 9) == values[positive].view(-1, 9)[:, :1]).all()


def test_a_screen_that_errs_more_than_it_should_is_not_believed(monkeypatch):
    """The slack of fp8 is an estimate: where scores are far off, the token is repaired."""
    x, weight = torch.randn(3, 32), torch.randn(1024, 32)
    weight[[5, 70, 700]] = 2 * x  # clear winners
    fused = encode.fused_keys

    def wrong(keys, *rest):
        fused(keys, *rest)
        keys[1] *= 1.5

    monkeypatch.setattr(encode, "fused_keys", wrong)
    for latent_by_latent in (False, True):
        monkeypatch.setattr(encode, "by_latent", lambda *_, on=latent_by_latent: on)
        check(*cuda.topk_encode(x, weight, None, 1, "fp8"), x, weight, None, 1)
        ((count, repaired),) = screening.last
        assert (repaired != 0).tolist() == [False, True, False]
        assert count.max() <= 64


def test_chunks_and_panels_change_nothing(monkeypatch):
    few_buckets(monkeypatch)
    x, weight, bias = CASES["random"](7, 300, 24)
    whole_batch = cuda.topk_encode(x, weight, bias, 4, "none", path="chunked")
    monkeypatch.setattr(screening, "PANEL_BYTES", 4 * 3 * 64)
    monkeypatch.setattr(screening, "WORKSPACE_BYTES", 3 * (4 * 32 * 3 + 20 * 64 + 8 * 4))
    parts = cuda.topk_encode(x, weight, bias, 4, "none", path="chunked")
    assert [count.shape[0] for count, _ in screening.last] == [3, 3, 1]
    assert_equal(whole_batch, parts)


@pytest.mark.parametrize("n", [200, 256])
def test_a_copy_is_used_while_it_is_current(monkeypatch, n):
    few_buckets(monkeypatch)
    x, weight = torch.randn(3, 24), torch.randn(n, 24)
    copy = cuda.quantized(weight)
    casts = []
    cast_rows = encode.cast_rows
    monkeypatch.setattr(encode, "cast_rows", lambda rows, *rest: casts.append(len(rows)) or cast_rows(rows, *rest))

    def encode_now():
        casts.clear()
        check(*cuda.topk_encode(x, weight, None, 4, "auto"), x, weight, None, 4)
        return list(casts), int(cuda.last_encode().repaired)

    assert encode_now() == ([3], 0)  # of the tokens alone
    weight.data.mul_(-1)  # which no counter sees
    assert encode_now() == ([3], 3)
    copy.mark_current(weight)
    weight.mul_(-1)
    monkeypatch.setattr(plans, "_operand", lambda *_: (plans.SCREEN_DTYPE, "ieee"))
    assert encode_now() == ([3, n], 0)
    del copy
    assert encode_now() == ([3, n], 0)


@pytest.mark.parametrize("path", ["fused", "chunked"])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_token_with_nan_harms_no_other(monkeypatch, path, absolute):
    few_buckets(monkeypatch)
    x, weight, bias = CASES["random"](4, 200, 24)
    x[2, 3] = math.nan
    values, indices = cuda.topk_encode(x, weight, bias, 4, "fp16", path=path, absolute=absolute)
    assert ((indices >= 0) & (indices < 200)).all()
    rest = [0, 1, 3]
    check(values[rest], indices[rest], x[rest], weight, bias, 4, absolute)


@pytest.mark.parametrize("path", ["fused", "chunked"])
def test_latents_switched_off_by_their_bias_come_last(path):
    x, weight, bias = whole(3, 24), whole(128, 24), torch.zeros(128)
    bias[4:] = -math.inf
    found = cuda.topk_encode(x, weight, bias, 6, "fp16", path=path)
    assert_equal(found, reference.topk_encode(x, weight, bias, 6, "none"))


def test_nothing_waits_for_the_device(monkeypatch, no_waiting):
    few_buckets(monkeypatch)
    x, weight, bias = CASES["random"](3, 256, 24)
    tensors, routed = problem(5, 16, 3, 2, 128)
    with no_waiting():
        for latent_by_latent in (False, True):
            monkeypatch.setattr(encode, "by_latent", lambda *_, on=latent_by_latent: on)
            cuda.topk_encode(x, weight, bias, 3, "fp16", path="fused")
            cuda.topk_encode(x, weight, bias, 3, "auto", path="chunked")
        cuda.routed_topk_encode(*tensors, *routed, 3, False, "auto")


def test_what_it_does_not_screen_goes_to_the_reference(monkeypatch):
    called = []
    monkeypatch.setattr(reference, "topk_encode", lambda *a: called.append(a) or (torch.zeros(1), torch.zeros(1)))
    x, weight = torch.ones(1, 2), torch.ones(30, 2)
    monkeypatch.setattr(plans, "MOST_TOP", 2)
    cuda.topk_encode(x, weight, None, 3, "auto", absolute=True)
    assert called[0][-1] is True
    monkeypatch.undo()
    monkeypatch.setattr(reference, "topk_encode", lambda *a: called.append(a) or (torch.zeros(1), torch.zeros(1)))
    monkeypatch.setattr(encode, "MOST_ROW_BYTES", 7)
    cuda.topk_encode(x, weight, None, 1, "auto")
    assert len(called) == 2


def test_what_is_served(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    assert encode.serves("topk_encode", gpu, torch.float32, "auto") is None
    assert "9.0" in encode.serves("topk_encode", gpu, torch.float32, "fp8")
    assert "int8" in encode.serves("topk_encode", gpu, torch.float32, "int8")
    assert encode.serves("topk_encode", torch.device("cpu"), torch.float32, "fp8") is None
    assert "fp8" in encode.serves("routed_topk_encode", torch.device("cpu"), torch.float32, "fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "8.0" in encode.serves("topk_encode", gpu, torch.float32, "auto")


# The public ops


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_indices_and_gradients_of_the_op(monkeypatch, dtype, absolute):
    results = []
    x, weight, bias, center = (t.to(dtype) for t in (whole(6, 16), whole(128, 16), whole(128), whole(16)))
    cotangent = torch.randn(6, 5).to(dtype)
    for backend in ("cuda", "reference"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias, center)]
        codes = sk.topk_encode(*leaves[:3], 5, center=leaves[3], absolute=absolute)
        results.append([codes.values, codes.indices, *torch.autograd.grad(codes.values, leaves, cotangent)])
    assert_equal(*results)


def test_the_optimizer_keeps_the_copy_that_the_screen_reads(monkeypatch):
    few_buckets(monkeypatch)
    monkeypatch.setattr(cuda, "screens", lambda n, d: True)
    casts = []
    cast_rows = encode.cast_rows
    monkeypatch.setattr(encode, "cast_rows", lambda rows, *rest: casts.append(len(rows)) or cast_rows(rows, *rest))
    sae = sk.SAE(16, 200, sk.TopK(4), generator=torch.Generator().manual_seed(1))
    trainer = sk.Trainer(sae, lr=1e-2)
    x = torch.randn(3, 8, 16)
    for batch in x[:2]:
        trainer.step(batch)
    casts.clear()
    trainer.step(x[2])
    assert casts == [8]  # of the tokens alone
    assert int(cuda.last_encode().repaired) == 0
    copy, fresh = screening.current_copy(sae.W_enc), encode.cast_rows(sae.W_enc.detach(), plans.SCREEN_DTYPE)
    assert torch.equal(copy.cast.rows, fresh.rows)
    assert torch.equal(copy.cast.scale, fresh.scale)
    assert copy.zeros >= 56  # up to whole tiles


@pytest.mark.parametrize("per_expert", [False, True])
def test_gradients_of_the_routed_op(monkeypatch, per_expert):
    results = []
    x, weight, bias = whole(6, 16), whole(512, 16), whole(512)
    cotangent = torch.randn(6, 6 if per_expert else 3)
    route = sk.route(x, whole(4, 16), n_active=2)
    for backend in ("cuda", "reference"):
        monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        codes = sk.routed_topk_encode(*leaves, route, 3, per_expert=per_expert)
        results.append([codes.values, codes.indices, *torch.autograd.grad(codes.values, leaves, cotangent)])
    assert_equal(*results)


# Latents of a token's experts


def problem(tokens, d, n_experts, n_active, latents, dtype=torch.float32, crowd=False):
    """Whole numbers, a zero token, and experts by token: at random, or the same for all but one."""
    x, weight, bias = whole(tokens, d), whole(n_experts * latents, d), whole(n_experts * latents)
    x[0] = 0
    chosen = torch.rand(tokens, n_experts)
    if crowd:
        chosen[1:] = chosen[:1]
    experts = chosen.argsort(1)[:, :n_active].int()
    return [t.to(dtype) for t in (x, weight, bias)], [experts, *reference.group_slots(experts, n_experts)]


def check_routed(tensors, routed, k, per_expert=False, screen="auto"):
    screening.last.clear()
    found = cuda.routed_topk_encode(*tensors, *routed, k, per_expert, screen)
    assert screening.last, "the reference stood in"
    assert_equal(found, reference.routed_topk_encode(*tensors, *routed, k, per_expert, "none"))
    return found


@pytest.mark.parametrize("per_expert", [False, True])
@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed(per_expert, crowd, dtype):
    tensors, routed = problem(6, 16, 5, 2, 128, dtype, crowd)
    for k, bias in ((1, tensors[2]), (3, None)):
        check_routed([*tensors[:2], bias], routed, k, per_expert)


@few
@given(
    tokens=st.integers(1, 6),
    d=st.integers(1, 40),
    n_experts=st.integers(1, 6),
    latents=st.integers(1, 40),
    across=st.integers(1, 12),
    keep=st.sampled_from([2, 3]),
    crowd=st.booleans(),
    per_expert=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    latent_by_latent=st.booleans(),
    data=st.data(),
)
def test_routed_with_any_buckets(
    tokens, d, n_experts, latents, across, keep, crowd, per_expert, dtype, latent_by_latent, data
):
    """Selection and what follows, where buckets are of no tile: the keys are made here."""
    n_active = data.draw(st.integers(1, n_experts), label="n_active")
    owners = 1 if per_expert else n_active
    across = min(across, latents)
    k = data.draw(st.integers(1, min(12, owners * min(latents, keep * across))), label="k")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    tensors, routed = problem(tokens, d, n_experts, n_active, latents, dtype, crowd)
    tile = plans.Tile(16, 8, 16, 16, 4, 1)
    members = -(-latents // across)
    plan = plans.EncodePlan(dtype, "ieee", owners * across, members, min(keep, members), 64, tile, 0.0, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "routed_plan", lambda *_, **__: plan)
        patch.setattr(encode, "screen_keys", plain_keys)
        patch.setattr(encode, "_is_even", lambda _: True)
        patch.setattr(encode, "screen_operands", plain_operands)
        patch.setattr(encode, "by_latent", lambda *_: latent_by_latent)
        check_routed(tensors, routed, k, per_expert)


def plain_operands(x, weight, bias, plan, copy):
    return screening.with_slack(screening.as_it_is(x), screening.as_it_is(weight), bias, plan)


def plain_keys(screened, part, bias, plan, slots):
    """Keys of each slot by their definition."""
    across = plan.n_buckets // slots.n_owners
    x, experts = screened.x.rows[part].float(), slots.experts.view(-1).long()
    scores = x.repeat_interleave(slots.n_active, 0).unsqueeze(1) @ screened.weight.rows.float().view(
        slots.n_experts, slots.latents, -1
    )[experts].transpose(1, 2)
    scores = scores.squeeze(1)
    if bias is not None:
        scores += bias.float().view(slots.n_experts, -1)[experts].clamp_min(-3.0e38)
    member = torch.arange(slots.latents, dtype=torch.int32) // across
    keys = (scores.view(torch.int32) & (-1 << plan.member_bits) | member).view(torch.float32)
    room = plan.n_members * across - slots.latents
    keys = torch.nn.functional.pad(keys, (0, room), value=-3.0e38).view(len(keys), plan.n_members, across)
    return keys.sort(1, descending=True).values[:, : plan.keep].contiguous()


@pytest.mark.parametrize("per_expert", [False, True])
def test_routed_chunks_change_nothing(monkeypatch, per_expert):
    """Each groups its slots anew, and repairs the token of which all latents tie."""
    (x, weight, _), routed = problem(5, 24, 5, 2, 128)
    x[4] = 0
    plan = cuda.routed_plan(5, 2, 5, 24, 128, 4, torch.float32, "auto", (9, 0), has_copy=False, per_expert=per_expert)
    selections = 2 if per_expert else 1
    token_bytes = selections * encode._row_bytes(plan, 4) + 2 * 24 * plan.operand.itemsize
    monkeypatch.setattr(screening, "WORKSPACE_BYTES", 3 * token_bytes)
    check_routed([x, weight, None], routed, 4, per_expert)
    assert [count.shape[0] for count, _ in screening.last] == [3 * selections, 2 * selections]
    repaired = torch.cat([flags for _, flags in screening.last]).view(5, selections)
    assert repaired[[0, 4]].all()


def test_the_best_of_each_group():
    """What GroupMax asks for: every expert of every token, which has few candidates in each."""
    (x, weight, bias), _ = problem(4, 16, 6, 1, 128)
    bias[:40], bias[128:255] = -math.inf, -math.inf
    experts = torch.arange(6, dtype=torch.int32).expand(4, -1)
    check_routed([x, weight, bias], [experts, *reference.group_slots(experts, 6)], 1, per_expert=True)


def test_an_expert_that_is_switched_off_gives_its_lowest_latents():
    (x, weight, bias), routed = problem(4, 16, 3, 1, 128)
    bias[:] = -math.inf
    bias[[3, 150, 290]] = 1.0
    values, indices = check_routed([x, weight, bias], routed, 3)
    assert (indices // 128 == routed[0]).all()
    assert values.count_nonzero() > 0


def test_routed_with_strides_and_a_token_with_nan():
    (x, weight, bias), routed = problem(6, 16, 3, 2, 128)
    x, weight, bias = x.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    expected = check_routed([x, weight, bias], routed, 4)
    x[2, 3] = math.nan
    values, indices = cuda.routed_topk_encode(x, weight, bias, *routed, 4, False, "auto")
    rest = [0, 1, 3, 4, 5]
    assert_equal([values[rest], indices[rest]], [t[rest] for t in expected])
    assert ((indices >= 0) & (indices < 384)).all()


def test_routed_calls_that_fill_no_tiles_are_served_by_another():
    tensors, routed = problem(4, 16, 3, 2, 40)
    screening.last.clear()
    found = cuda.routed_topk_encode(*tensors, *routed, 4, False, "auto")
    assert not screening.last
    assert_equal(found, reference.routed_topk_encode(*tensors, *routed, 4, False, "none"))


# Plans


def test_plans():
    shapes = [(n, k) for n in (40, 5000, 12288, 12289, 24576, 2**17, 2**17 + 1, 2**20, 2**22) for k in (1, 32, 64, 384)]
    for n, k in shapes:
        k = min(k, n)
        for capability in ((8, 0), (9, 0), (12, 0)):
            plan = cuda.encode_plan(8192, 768, n, k, torch.float32, "auto", capability, has_copy=True)
            if plan is None:
                assert (n, k) == (2**22, 384)
                continue
            assert plan.n_buckets * plan.n_members >= n
            assert min(plan.keep, plan.n_members) * plan.n_buckets >= k
            assert plan.n_members <= 1 << plan.member_bits <= 2**12
            assert plan.room >= 4 * k
            assert plan.n_buckets * plan.keep <= plans.MOST_KEYS
            if plan.tile is not None:
                assert capability == (9, 0)
                assert plan.n_buckets % 8 == plan.n_members % 16 == 0
                assert plan.n_buckets * plan.n_members - n <= 8 * plans.whole_tiles(n, 1)[1]  # zeros of a copy
        assert plan is None or plan.tile is None  # of (12, 0)
    for n, k in ((2**17, 32), (2**17 + 1, 64), (24576, 32), (4096, 32)):
        assert cuda.encode_plan(8192, 768, n, k, torch.float32, "auto", (9, 0), has_copy=True).tile is not None
    odd = {"d": 768, "dtype": torch.bfloat16, "screen": "auto", "capability": (9, 0), "has_copy": False}
    assert cuda.encode_plan(8192, n=2**17, k=32, **odd).tile is not None
    assert cuda.encode_plan(8192, n=2**17 + 1, k=32, **odd).tile is None  # no copy, so no rows of zeros
    assert cuda.encode_plan(8192, n=2**17, k=32, **{**odd, "d": 770}).tile is None
    assert cuda.encode_plan(8192, n=2**17, k=32, **{**odd, "d": 760, "screen": "fp8"}).operand == torch.bfloat16


def test_routed_plans():
    for n, k in [(2**14, 1), (2**17, 32), (2**20, 64)]:
        for n_experts in (8, 32):
            for n_active in (1, 2, 8):
                for per_expert in (False, True):
                    shape = (8192, n_active, n_experts, 768, n // n_experts, k, torch.float32, "auto", (9, 0))
                    plan = cuda.routed_plan(*shape, has_copy=True, per_expert=per_expert)
                    owners = 1 if per_expert else n_active
                    assert plan.n_buckets * plan.n_members == owners * (n // n_experts), shape
                    assert plan.n_buckets // owners % 8 == plan.n_members % 16 == 0
                    assert k <= 3 * plan.n_buckets <= plans.MOST_KEYS
    crowded = (8192, 1, 128, 768, 1024, 64, torch.float32, "auto", (9, 0))
    assert cuda.routed_plan(*crowded, has_copy=True, per_expert=False) is None
    shape = (8192, 2, 8, 768, 1000, 32, torch.float32, "auto")
    assert cuda.routed_plan(*shape, (9, 0), has_copy=True, per_expert=False) is None
    shape = (8192, 2, 8, 768, 1024, 32, torch.float32, "auto")
    assert cuda.routed_plan(*shape, (8, 0), has_copy=True, per_expert=False) is None


# Rows in the precision of the screen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "stride"), [(64, 64), (1030, 1032), (7, 7)])
def test_cast_rows(dtype, given_dtype, d, stride):
    rows = torch.randn(5, stride)[:, :d].to(given_dtype) * torch.tensor([1, 1e-20, 0, 1e4, 3]).to(given_dtype)[:, None]
    cast = encode.cast_rows(rows, dtype, zeros=3)
    assert cast.rows.shape == (5, d)
    limit = screening.LIMITS.get(dtype)
    wide = rows.float()
    scale = torch.ones(5) if limit is None else (wide.abs().amax(1) / limit).clamp_min(1e-30)
    if limit is not None:
        torch.testing.assert_close(cast.scale, scale, rtol=1e-7, atol=0)
    expected = (wide / scale[:, None]).to(dtype)
    assert torch.equal(cast.rows.float(), expected.float())
    torch.testing.assert_close(cast.norm, wide.norm(dim=1), rtol=1e-5, atol=0)
    off = (wide - expected.float() * scale[:, None]).norm(dim=1)
    torch.testing.assert_close(cast.error, off, rtol=1e-4, atol=1e-30)
    after = torch.as_strided(cast.rows, (3, d), (d, 1), cast.rows.storage_offset() + 5 * d)
    assert (after.float() == 0).all()
