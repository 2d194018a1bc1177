"""Routers and routed encoders of the Triton backend against the reference.

Inputs are small whole numbers: every score is exact, in whatever order it is summed, and ties are everywhere. So values
and indices have to be equal to the bit.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

import sparsekern as sk
from sparsekern.backends import reference, screening, triton
from sparsekern.backends.triton import encode, plans, routing

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def whole(*shape, most=2):
    return torch.randint(-most, most + 1, shape).float()


def assert_equal(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(mine.cpu(), theirs)


def on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


# Routers


ROUTERS = [(37, 19, 5, 2, False), (3, 1, 1, 1, False), (9, 40, 18, 18, False), (9, 19, 5, 2, True)]


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "d", "n_experts", "n_active", "library"), ROUTERS)
def test_route(monkeypatch, triton_device, gate, biased, rows, d, n_experts, n_active, library):
    if library:
        monkeypatch.setattr(routing, "MOST_ACTIVE", 0)
    x, weight = whole(rows, 2 * d)[:, ::2], 0.25 * whole(n_experts, d)
    x[1] = 0  # all experts tie
    weight[n_experts // 2] = weight[-1]
    # Bits beyond those of the gates: no two sums tie but those of equal gates with equal biases.
    bias = (torch.arange(n_experts) // 2 % 3) * 0.3 if biased else None
    expected = reference.route(x, weight, bias, n_active, gate)
    found = triton.route(*on(triton_device, x, weight, bias), n_active, gate)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-6, atol=1e-7)
    if biased:  # float32 rounds gates, and so decides between those that nearly tie
        chosen = expected[1] + bias[expected[2].long()]
        mine = found[1].cpu() + bias[found[2].cpu().long()]
        torch.testing.assert_close(mine, chosen, rtol=1e-6, atol=1e-6)
        expected = (expected[0], expected[1], found[2].cpu(), *reference.group_slots(found[2].cpu(), n_experts))
    assert_equal([found[0], *found[2:]], [expected[0], *expected[2:]])
    again = triton.route(*on(triton_device, x, weight, bias), n_active, gate)
    assert_equal([t.cpu() for t in again], [t.cpu() for t in found])


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_the_selection_bias_decides_and_leaves_the_gates(triton_device, gate):
    x, weight = torch.randn(9, 12), torch.randn(6, 12)
    bias = torch.tensor([0.0, -math.inf, 3.0, -math.inf, -math.inf, 1.5])
    logits, gates, experts, *_ = (t.cpu() for t in triton.route(*on(triton_device, x, weight, bias), 4, gate))
    assert (experts == torch.tensor([2, 5, 0, 1])).all()  # of those that are switched off the lowest
    wide = (
        (x.double() @ weight.double().T).softmax(1) if gate == "softmax" else (x.double() @ weight.double().T).sigmoid()
    )
    torch.testing.assert_close(gates.double(), wide.gather(1, experts.long()), rtol=1e-5, atol=1e-7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routers_in_half_precision_sum_in_float32(triton_device, dtype):
    x, weight = torch.randn(20, 150).to(dtype), torch.randn(3, 150).to(dtype)
    logits, gates, *_ = (t.cpu() for t in triton.route(*on(triton_device, x, weight), None, 1, "softmax"))
    assert logits.dtype == gates.dtype == torch.float32
    torch.testing.assert_close(logits.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)


def test_a_token_with_nan_gets_real_experts(triton_device):
    x, weight = whole(5, 8), whole(6, 8)
    expected = reference.route(x, weight, None, 3, "softmax")
    x[2, 3] = math.nan
    found = [t.cpu() for t in triton.route(*on(triton_device, x, weight), None, 3, "softmax")]
    rest = [0, 1, 3, 4]
    assert_equal([t[rest] for t in found[::2][:2]], [t[rest] for t in expected[::2][:2]])
    assert found[2][2].sort().values.diff().min() > 0
    assert 0 <= found[2].min() <= found[2].max() < 6
    assert_equal(found[3:], reference.group_slots(found[2], 6))


@few
@given(
    tokens=st.integers(1, 100),
    n_active=st.integers(1, 4),
    n_experts=st.sampled_from([4, 5, 70]),
    crowd=st.booleans(),
    counted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_group_slots(triton_device, tokens, n_active, n_experts, crowd, counted, seed):
    torch.manual_seed(seed)
    experts = torch.randint(n_experts, (tokens, n_active), dtype=torch.int32)
    if crowd:
        experts[:] = 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "MOST_COUNTED", n_experts if counted else 1)
        found = triton.group_slots(experts.to(triton_device), n_experts)
    assert_equal(found, reference.group_slots(experts, n_experts))


@pytest.mark.parametrize("height", [16, 64])
def test_tiles_cover_every_slot_once(height):
    loads = torch.tensor([0, 1, 150, 0, 64, 16, 0, 0])
    offsets = torch.nn.functional.pad(loads.cumsum(0), (1, 0)).int()
    slots = screening.Slots(torch.zeros(231, 1).int(), torch.arange(231).int(), offsets, 1, 5)
    first, expert = slots.tiles(height)
    assert len(expert) == -(-231 // height) + 8
    seen = []
    for tile, owner in enumerate(expert.tolist()):
        if owner < 8:
            start = int(offsets[owner]) + (tile - int(first[owner])) * height
            assert start < offsets[owner + 1]
            seen += range(start, min(start + height, int(offsets[owner + 1])))
    assert seen == list(range(231))


# Encoders


def problem(tokens, d, n_experts, n_active, latents, dtype=torch.float32, crowd=False):
    """Whole numbers, a zero token, and experts by token: at random, or the same for all but one."""
    x, weight, bias = whole(tokens, d), whole(n_experts * latents, d), whole(n_experts * latents)
    x[0] = 0
    chosen = torch.rand(tokens, n_experts)
    if crowd:
        chosen[1:] = chosen[:1]
    experts = chosen.argsort(1)[:, :n_active].int()
    return [t.to(dtype) for t in (x, weight, bias)], [experts, *reference.group_slots(experts, n_experts)]


def run(device, tensors, routed, k, per_expert=False, screen="auto"):
    return triton.routed_topk_encode(*on(device, *tensors, *routed), k, per_expert, screen)


def check(device, tensors, routed, k, per_expert=False, screen="auto"):
    found = run(device, tensors, routed, k, per_expert, screen)
    assert_equal(found, reference.routed_topk_encode(*tensors, *routed, k, per_expert, "none"))
    return found


@few
@given(
    tokens=st.integers(1, 6),
    d=st.integers(1, 40),
    n_experts=st.integers(1, 6),
    latents=st.integers(1, 40),
    crowd=st.booleans(),
    has_bias=st.booleans(),
    per_expert=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    screen=st.sampled_from(["auto", "none", "fp16"]),
    data=st.data(),
)
def test_any_shape(triton_device, tokens, d, n_experts, latents, crowd, has_bias, per_expert, dtype, screen, data):
    n_active = data.draw(st.integers(1, n_experts), label="n_active")
    k = data.draw(st.integers(1, min(12, latents if per_expert else n_active * latents)), label="k")
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    tensors, routed = problem(tokens, d, n_experts, n_active, latents, dtype, crowd)
    if not has_bias:
        tensors[2] = None
    check(triton_device, tensors, routed, k, per_expert, screen)


@pytest.mark.parametrize("per_expert", [False, True])
def test_all_latents_are_kept_with_those_switched_off_last(triton_device, per_expert):
    (x, weight, bias), routed = problem(5, 12, 3, 2, 7)
    bias[[1, 4, 8, 9, 15]] = -math.inf
    check(triton_device, [x, weight, bias], routed, 7 if per_expert else 14, per_expert)


def test_an_expert_that_is_switched_off_gives_its_lowest_latents(triton_device):
    (x, weight, bias), routed = problem(4, 12, 3, 1, 40)
    bias[:] = -math.inf
    bias[[3, 50, 90]] = 1.0
    values, indices = check(triton_device, [x, weight, bias], routed, 3)
    assert (indices.cpu() // 40 == routed[0]).all()
    assert values.count_nonzero() > 0


@pytest.mark.parametrize("n_active", [1, 2])
def test_tokens_and_weights_with_strides(triton_device, n_active):
    (x, weight, bias), routed = problem(6, 20, 3, n_active, 10)
    x, weight, bias = x.T.contiguous().T, weight.T.contiguous().T, bias.repeat_interleave(2)[::2]
    assert not x.is_contiguous()
    check(triton_device, [x, weight, bias], routed, 4)


def few_buckets(monkeypatch, across=16, keep=3, room=64):
    monkeypatch.setattr(plans, "_routed_buckets", lambda latents, n_owners, k: (across, keep, room))


@pytest.mark.parametrize("keep", [2, 3])
@pytest.mark.parametrize("per_expert", [False, True])
def test_crowded_buckets_are_opened(monkeypatch, triton_device, keep, per_expert):
    """All winners of a token's second expert are members of one bucket, of which not all keys are kept."""
    few_buckets(monkeypatch, keep=keep)
    x, weight = torch.randn(4, 24), torch.randn(300, 24)
    experts = torch.tensor([[0, 1], [2, 1], [0, 2], [1, 0]], dtype=torch.int32)
    routed = [experts, *reference.group_slots(experts, 3)]
    weight[105:200:16] = 3 * x[1] + 0.1 * weight[105:200:16]
    values, indices = (t.cpu() for t in run(triton_device, [x, weight, None], routed, 5, per_expert))
    expected = reference.routed_topk_encode(x, weight, None, *routed, 5, per_expert, "none")
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0])
    assert (indices[1, -5:] % 16 == 9).all()
    stats = triton.last_encode()
    assert stats.rows == (8 if per_expert else 4)
    assert int(stats.repaired) == 0
    beyond = int(stats.rescored) - (5 * stats.rows + 7 - keep)
    assert 0 <= beyond <= (4 if keep == 3 else 8 * stats.rows)  # few other buckets


def test_chunks_change_nothing(monkeypatch, triton_device):
    """Each groups its slots anew, and repairs the token of which all latents tie."""
    few_buckets(monkeypatch, across=8, room=32)
    (x, weight, _), routed = problem(5, 24, 5, 2, 40)
    x[4] = 0
    for per_expert, selections, owners in ((False, 1, 2), (True, 2, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(screening, "WORKSPACE_BYTES", 3 * selections * (4 * 8 * owners * 3 + 8 * 32))
            check(triton_device, [x, weight, None], routed, 4, per_expert)
        assert [count.shape[0] for count, _ in screening.last] == [3 * selections, 2 * selections]
        repaired = torch.cat([flags for _, flags in screening.last]).view(5, selections)
        assert repaired[[0, 4]].all()


def test_with_all_experts_it_is_the_plain_encoder(triton_device):
    x, weight, bias = torch.randn(6, 40), torch.randn(60, 40), torch.randn(60)
    experts = torch.rand(6, 4).argsort(1).int()
    routed = [experts, *reference.group_slots(experts, 4)]
    plain = triton.topk_encode(*on(triton_device, x, weight, bias), 7, "auto")
    assert_equal(run(triton_device, [x, weight, bias], routed, 7), [t.cpu() for t in plain])


def every_group(tokens, groups):
    """What GroupMax asks for: every expert of every token."""
    experts = torch.arange(groups, dtype=torch.int32).expand(tokens, -1)
    return [experts, *reference.group_slots(experts, groups)]


@few
@given(
    tokens=st.integers(1, 4),
    groups=st.integers(1, 4),
    latents=st.sampled_from([1, 2, 7, 33, 65]),
    k=st.sampled_from([1, 1, 2, 4]),
    chunked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_best_of_each_group(triton_device, tokens, groups, latents, k, chunked, seed):
    torch.manual_seed(seed)
    (x, weight, bias), _ = problem(tokens, 9, groups, 1, latents)  # token 0 is zero
    x[tokens // 2], bias[: latents // 2] = -x[0].abs(), -math.inf
    with pytest.MonkeyPatch.context() as patch:
        if chunked:
            patch.setattr(screening, "WORKSPACE_BYTES", 2**12)
        check(triton_device, [x, weight, bias], every_group(tokens, groups), min(k, latents), per_expert=True)


def test_a_group_whose_bucket_hides_candidates_or_whose_latents_all_tie(triton_device):
    plan = plans.routed_plan(3, 2, 2, 24, 300, 1, torch.float32, "auto", (9, 0), has_copy=False, per_expert=True)
    assert (plan.keep, plan.room) == (3, plans.FEW_ROOM)
    assert plan.n_members > plan.keep
    x, weight = whole(3, 24), whole(600, 24)
    x[0] = 0
    weight[307 : 307 + 5 * plan.n_buckets : plan.n_buckets] = 2 * x[1].sign()  # five of a bucket, in the second group
    found = check(triton_device, [x, weight, None], every_group(3, 2), 1, per_expert=True)
    assert found[1][1, 1] == 307
    repaired, counts = screening.last[0][1], screening.last[0][0]
    assert repaired.tolist()[:2] == [1, 1]
    assert not repaired[3]
    assert counts[3] >= plan.n_members


def test_a_plan_for_groups_fits_into_the_workspace():
    """At 8192 tokens of width 4096, 64 groups of 2048: the keys and candidates of a chunk, and few keys a latent."""
    shape = (8192, 64, 64, 4096, 2048, 1, torch.float32, "auto", (9, 0))
    plan = plans.routed_plan(*shape, has_copy=True, per_expert=True)
    row_bytes = 64 * (4 * plan.n_buckets * plan.keep + 8 * plan.room)
    assert screening.WORKSPACE_BYTES // row_bytes >= 2048  # tokens of a chunk: whole tiles of every group
    assert plan.n_buckets * plan.keep * 5 < 2048
    assert plan.tile.rows == 128


def test_a_copy_is_used_while_it_is_current(monkeypatch, triton_device):
    few_buckets(monkeypatch)
    (x, weight, bias), routed = problem(3, 24, 2, 1, 100)
    weight = weight.to(triton_device)
    copy = triton.quantized(weight)
    casts = []
    cast_rows = encode.cast_rows
    monkeypatch.setattr(encode, "cast_rows", lambda rows, dtype: casts.append(rows.shape[0]) or cast_rows(rows, dtype))

    def encode_now():
        casts.clear()
        found = triton.routed_topk_encode(
            *on(triton_device, x), weight, *on(triton_device, bias, *routed), 4, False, "auto"
        )
        assert_equal(found, reference.routed_topk_encode(x, weight.cpu(), bias, *routed, 4, False, "none"))
        return list(casts), int(triton.last_encode().repaired)

    x[0] = x[1]
    assert encode_now() == ([3], 0)  # of the tokens alone
    weight.data.mul_(-1)  # which no counter sees
    assert encode_now() == ([3], 3)
    del copy
    assert encode_now() == ([], 0)  # few tokens: tf32 reads the weights as they are


@pytest.mark.parametrize("per_expert", [False, True])
def test_each_token_has_its_own_slack(triton_device, per_expert):
    """Scores that float16 cannot tell apart, of one token that is enormous beside the others."""
    x = torch.randn(4, 24) * torch.tensor([1e-3, 1e3, 1e-3, 1e-3]).unsqueeze(1)
    weight = torch.randn(24) + 3e-4 * torch.randn(120, 24)
    experts = torch.tensor([[0, 2], [2, 1], [0, 1], [1, 0]], dtype=torch.int32)
    routed = [experts, *reference.group_slots(experts, 3)]
    _, indices = run(triton_device, [x, weight, None], routed, 4, per_expert, "fp16")
    expected = reference.routed_topk_encode(x.double(), weight.double(), None, *routed, 4, per_expert, "none")
    assert torch.equal(indices.cpu(), expected[1])


def test_nothing_waits_for_the_device(monkeypatch, triton_device, no_waiting):
    """Neither a router, of either kind, nor an encoder that works in chunks."""
    (x, weight, bias), _ = problem(5, 12, 4, 2, 10)
    x, weight, bias, router = on(triton_device, x, weight, bias, whole(4, 12))
    with no_waiting():
        triton.route(x, router, bias[:4], 2, "sigmoid")
        monkeypatch.setattr(routing, "MOST_ACTIVE", 0)
        monkeypatch.setattr(routing, "MOST_COUNTED", 0)
        _, _, *routed = triton.route(x, router, None, 2, "softmax")
        monkeypatch.setattr(screening, "WORKSPACE_BYTES", 3 * 8 * 64)
        triton.routed_topk_encode(x, weight, bias, *routed, 3, False, "auto")
    assert len(screening.last) > 1


def test_a_token_with_nan_harms_no_other(triton_device):
    (x, weight, bias), routed = problem(5, 24, 3, 2, 50)
    expected = reference.routed_topk_encode(x, weight, bias, *routed, 4, False, "none")
    x[2, 3] = math.nan
    values, indices = (t.cpu() for t in run(triton_device, [x, weight, bias], routed, 4))
    rest = [0, 1, 3, 4]
    assert_equal([values[rest], indices[rest]], [t[rest] for t in expected])
    assert ((indices >= 0) & (indices < 150)).all()


def test_what_it_does_not_screen_goes_to_the_reference(monkeypatch, triton_device):
    called = []
    monkeypatch.setattr(
        reference, "routed_topk_encode", lambda *a: called.append(a) or (torch.zeros(1), torch.zeros(1))
    )
    monkeypatch.setattr(plans, "MOST_TOP", 2)
    tensors, routed = problem(3, 8, 3, 2, 10)
    run(triton_device, tensors, routed, 3)
    assert called


def test_plans():
    for n, k in [(40, 4), (5000, 32), (2**17, 32), (2**17, 64), (2**20, 64), (2**22, 384)]:
        for n_experts in (1, 8, 32, 40, 128, 1024):
            for n_active in (1, 2, 3, 8):
                latents = n // n_experts
                if n_active > n_experts or k > n_active * latents:
                    continue
                shape = (8192, n_active, n_experts, 768, latents, k)
                given = (*shape, torch.float32, "auto", (9, 0))
                plan = plans.routed_plan(*given, has_copy=True, per_expert=False)
                if plan is None:
                    assert k == 384, given
                    continue
                across = plan.n_buckets // n_active
                assert across * n_active == plan.n_buckets, given
                assert across * plan.n_members >= latents > across * (plan.n_members - 1), given
                assert min(plan.keep, plan.n_members) * plan.n_buckets >= k, given
                assert plan.n_members <= 1 << plan.member_bits <= 2**12, given
                assert plan.n_buckets * plan.keep <= plans.MOST_KEYS, given
                assert plan.room >= 4 * k, given
                assert plan.tile.members <= 2 * plan.n_members, given  # not mostly members that are not there


# Both, with gradients


def routed_step(device, dtype, gate, per_expert, tensors, grad):
    given = {name: t.to(device, dtype).requires_grad_() for name, t in tensors.items()}
    x, center = given["x"], given["center"]
    route = sk.route(x, given["W_router"], 2, gate=gate, center=center)
    codes = sk.routed_topk_encode(x, given["W_enc"], given["b_enc"], route, 3, center=center, per_expert=per_expert)
    codes = codes._replace(values=codes.values * route.gates_of(codes))
    out = sk.sparse_decode(codes, given["W_dec"], None)
    balance = route.logits.square().mean()
    return torch.autograd.grad((out * grad.to(device, dtype)).sum() + balance, list(given.values())), codes


@pytest.mark.parametrize(("gate", "per_expert"), [("softmax", False), ("sigmoid", True)])
def test_gradients_equal_those_of_the_reference(monkeypatch, triton_device, gate, per_expert):
    shapes = {
        "x": (2, 5, 12),
        "W_router": (5, 12),
        "center": (12,),
        "W_enc": (45, 12),
        "b_enc": (45,),
        "W_dec": (45, 12),
    }
    tensors = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    grad = torch.randn(2, 5, 12)
    mine, codes = routed_step(triton_device, torch.float32, gate, per_expert, tensors, grad)
    assert codes.indices.shape == (2, 5, 6 if per_expert else 3)
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    same, _ = routed_step("cpu", torch.float32, gate, per_expert, tensors, grad)
    exact, _ = routed_step("cpu", torch.float64, gate, per_expert, tensors, grad)
    for name, got, plain, wide in zip(shapes, mine, same, exact, strict=True):
        error, allowed = ((t.cpu().double() - wide).abs().max() for t in (got, plain))
        assert error <= 2 * allowed + 1e-6 * wide.abs().max(), name
