"""routed_topk_encode against the dense encoder with the other experts' latents left out, on every backend, any load."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import cpu, reference
from sparsekern.bench.exactness import CASES, wrong_rows
from sparsekern.ops._route import group_slots
from sparsekern.ops._routed_topk_encode import _routed_topk_encode


def routing_to(experts, n_experts):
    """A routing with the given experts ``[B, n_active]``."""
    experts = torch.as_tensor(experts, dtype=torch.int32)
    return sk.Routing(experts, torch.ones(experts.shape), *group_slots(experts, n_experts), None)


def random_routing(rows, n_experts, n_active):
    return routing_to(torch.rand(rows, n_experts).argsort(1)[:, :n_active], n_experts)


def masked(x, weight, bias, routing):
    """All pre-activations, −∞ at the latents of experts that do not serve the token."""
    pre = x @ weight.T + (0 if bias is None else bias)
    owner = torch.arange(weight.shape[0]) // (weight.shape[0] // routing.n_experts)
    serves = (owner[None, :, None] == routing.experts[:, None, :]).any(2)
    return torch.where(serves, pre, -torch.inf)


def top(pre, k):
    order = pre.sort(dim=1, descending=True, stable=True)
    return order.values[:, :k].relu(), order.indices[:, :k].int()


@st.composite
def whole_number_problems(draw):
    rows, d = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    n_experts, latents = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    n_active = draw(st.integers(1, n_experts))
    k = draw(st.integers(1, n_active * latents))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-2, 3, (n_experts * latents, d)).float()
    bias = torch.randint(-3, 2, (n_experts * latents,)).float() if draw(st.booleans()) else None
    return x, weight, bias, random_routing(rows, n_experts, n_active), k


@pytest.mark.parametrize("screen", ["none", "int8"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(whole_number_problems())
def test_equals_the_definition_with_ties_to_the_lower_index(product_backend, screen, problem):
    x, weight, bias, routing, k = problem
    screen = screen if product_backend == "cpu" else "auto"
    codes = sk.routed_topk_encode(x, weight, bias, routing, k, screen)
    values, indices = top(masked(x, weight, bias, routing), k)
    assert torch.equal(codes.values, values)
    assert torch.equal(codes.indices, indices)
    each = min(k, weight.shape[0] // routing.n_experts)
    apart = sk.routed_topk_encode(x, weight, bias, routing, each, screen, per_expert=True)
    for j in range(routing.n_active):
        alone = routing_to(routing.experts[:, j : j + 1], routing.n_experts)
        values, indices = top(masked(x, weight, bias, alone), each)
        assert torch.equal(apart.values[:, j * each : (j + 1) * each], values)
        assert torch.equal(apart.indices[:, j * each : (j + 1) * each], indices)


@pytest.mark.parametrize("per_expert", [False, True])
def test_gradients_equal_those_of_the_definition(product_backend, per_expert):
    rows, d, n_experts, latents, k = 23, 9, 5, 8, 6
    dtype = torch.float32 if product_backend == "cpu" else torch.float64
    tensors = x, weight, bias, center = [
        torch.randn(*s, dtype=dtype, requires_grad=True) for s in [(rows, d), (n_experts * latents, d), (40,), (d,)]
    ]
    routing = random_routing(rows, n_experts, 2)
    codes = sk.routed_topk_encode(x, weight, bias, routing, k, center=center, per_expert=per_expert)
    pre = ((x - center) @ weight.T + bias).gather(1, codes.indices.long()).relu()
    cotangent = torch.randn_like(pre)
    mine, theirs = (torch.autograd.grad(out, tensors, cotangent) for out in (codes.values, pre))
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradients_through_gates_reach_the_router():
    x, router, weight = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(9, 5), (4, 5), (24, 5)])

    def gated(x, router, weight):
        routing = sk.route(x, router, 2)
        codes = sk.routed_topk_encode(x, weight, None, routing, 3)
        return codes.values * routing.gates_of(codes)

    assert torch.autograd.gradcheck(gated, (x, router, weight))


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("one gets everything", torch.full((70, 1), 2)),
        ("most are empty", torch.arange(70).remainder(2).mul(4).unsqueeze(1)),
        ("one token of its own", torch.cat([torch.zeros(69, 1), torch.full((1, 1), 4)])),
    ],
)
def test_any_load(product_backend, name, experts):
    x, weight, bias = torch.randn(70, 33), torch.randn(1500, 33), torch.randn(1500)
    routing = routing_to(experts, 5)
    codes = sk.routed_topk_encode(x, weight, bias, routing, 20)
    values, indices = top(masked(x, weight, bias, routing), 20)
    torch.testing.assert_close(codes.values, values)
    assert torch.equal(codes.indices, indices)


@pytest.mark.parametrize("screen", ["auto", "none"])
def test_all_experts_active_is_the_plain_encoder(product_backend, screen):
    x, weight, bias = torch.randn(40, 50), torch.randn(1280, 50), torch.randn(1280)
    routing = sk.route(x, torch.randn(4, 50), 4)
    routed = sk.routed_topk_encode(x, weight, bias, routing, 16, screen)
    plain = sk.topk_encode(x, weight, bias, 16, screen)
    torch.testing.assert_close(routed.values, plain.values)
    assert torch.equal(routed.indices, plain.indices)


def test_views_leading_dimensions_and_half_precision():
    x, weight = torch.randn(2, 6, 40)[..., 3:33], torch.randn(30, 60).T
    routing = sk.route(x, torch.randn(4, 30))
    mine = sk.routed_topk_encode(x, weight, None, routing, 5)
    theirs = sk.routed_topk_encode(x.reshape(12, 30).contiguous(), weight.contiguous(), None, routing, 5)
    assert mine.indices.shape == (2, 6, 5)
    assert torch.equal(mine.indices.reshape(12, 5), theirs.indices)
    half = sk.routed_topk_encode(x.bfloat16(), weight.bfloat16(), None, routing, 5)
    assert half.values.dtype == torch.bfloat16
    pre = masked(x.reshape(12, 30).bfloat16().float(), weight.bfloat16().float(), None, routing)
    assert torch.equal(half.indices.reshape(12, 5), top(pre, 5)[1])


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")
class TestScreened:
    """What the CPU kernels add: experts that begin within a panel, repairs, copies, threads, every kind of input."""

    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("n_experts", [1, 3, 40])
    @pytest.mark.parametrize("copy", [False, True])
    def test_no_wrong_index(self, case, n_experts, copy):
        latents = 1500 // n_experts  # no multiple of a panel
        problem = CASES[case](300, n_experts * latents, 67)
        kept = cpu.quantized(problem.weight) if copy else None
        routing = random_routing(300, n_experts, 1)
        codes = sk.routed_topk_encode(*problem, routing, 9, "int8")
        assert (kept is None) != copy
        for expert in range(n_experts):
            rows = (routing.experts[:, 0] == expert).nonzero().squeeze(1)
            mine = slice(expert * latents, (expert + 1) * latents)
            alone = type(problem)(problem.x[rows], problem.weight[mine], problem.bias[mine])
            if len(rows):
                assert not wrong_rows(alone, codes.indices[rows] - mine.start).any()

    @pytest.mark.parametrize("screen", ["int8", "none"])
    def test_rows_that_cannot_be_certain_are_repaired(self, screen):
        problem = CASES["random"](30, 2000, 64)
        problem.x[3] *= 1e18
        problem.x[5] *= 1e-33
        routing = random_routing(30, 4, 2)
        for per_expert in (False, True):
            got = sk.routed_topk_encode(*problem, routing, 4, screen, per_expert=per_expert)
            assert cpu.last_encode.repaired == (4 if per_expert else 2)
            expected = reference.routed_topk_encode(*problem, *routing[:1], *routing[2:4], 4, per_expert, "none")
            torch.testing.assert_close(got.values, expected[0])
            assert torch.equal(got.indices, expected[1])

    @pytest.mark.parametrize("screen", ["int8", "none"])
    def test_weights_that_are_not_finite_are_left_to_the_reference(self, screen):
        problem = CASES["random"](20, 2000, 64)
        problem.weight[7, 3] = float("inf")
        problem.x[:, 3] = problem.x[:, 3].abs() + 1
        codes = sk.routed_topk_encode(*problem, routing_to(torch.zeros(20, 1), 4), 4, screen)
        assert (codes.indices[:, 0] == 7).all()
        assert cpu.last_encode.repaired == 20

    @pytest.mark.parametrize("screen", ["int8", "none"])
    def test_the_same_bits_for_any_number_of_threads(self, screen):
        problem, routing = CASES["zipf"](400, 3000, 100), random_routing(400, 6, 2)
        before, results = torch.get_num_threads(), []
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(sk.routed_topk_encode(*problem, routing, 20, screen))
        finally:
            torch.set_num_threads(before)
        for codes in results[1:]:
            assert torch.equal(codes.values, results[0].values)
            assert torch.equal(codes.indices, results[0].indices)

    def test_blocks_of_rows_do_not_change_the_answer(self):
        """More candidates than the workspace holds at one time: rows are taken in blocks."""
        x, weight = torch.randn(5000, 32), torch.randn(16384, 32)
        routing = random_routing(5000, 2, 2)
        codes = sk.routed_topk_encode(x, weight, None, routing, 40, "int8")
        plain = sk.topk_encode(x, weight, None, 40, "int8")
        assert torch.equal(codes.indices, plain.indices)
        assert torch.equal(codes.values, plain.values)

    def test_other_experts_are_not_computed(self):
        x, weight = torch.randn(256, 64), torch.randn(8192, 64)
        sk.routed_topk_encode(x, weight, None, random_routing(256, 8, 1), 32)
        assert 256 * 32 <= cpu.last_encode.rescored < 0.3 * 256 * 1024


def test_opcheck_gradcheck_and_compilation():
    x, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(4, 6), (12, 6), (12,)])
    routing = random_routing(4, 3, 2)
    slots = (routing.experts, routing.order, routing.offsets)
    torch.library.opcheck(_routed_topk_encode, (x, weight, bias, None, *slots, 3, False, "auto"))
    torch.library.opcheck(_routed_topk_encode, (x, weight, None, None, *slots, 2, True, "auto"))

    def values(x, weight, bias):
        return sk.routed_topk_encode(x, weight, bias, routing, 3).values

    assert torch.autograd.gradcheck(values, (x, weight, bias))
    assert torch.autograd.gradgradcheck(values, (x, weight, bias))
    compiled = torch.compile(values, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), values(x, weight, bias))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be between 1 and the 8 latents of a token's experts, got 0"),
        ({"k": 9}, "k must be between 1 and the 8 latents of a token's experts, got 9"),
        ({"k": 5, "per_expert": True}, "k must be between 1 and the 4 latents of each expert, got 5"),
        ({"x": torch.ones(5, 8)}, "route must be of the 5 tokens of x, got one of 6"),
        ({"W_enc": torch.ones(15, 8)}, "W_enc must have a multiple of n_experts=4 rows, got 15"),
        ({"screen": "fp4"}, "screen must be one of"),
        ({"x": torch.full((6, 8), float("inf"))}, "x holds NaN or infinity, first in row 0"),
    ],
)
def test_bad_arguments_are_named(change, message):
    routing = random_routing(6, 4, 2)
    arguments = {"x": torch.ones(6, 8), "W_enc": torch.ones(16, 8), "b_enc": None, "route": routing, "k": 3}
    with pytest.raises(ValueError, match=message):
        sk.routed_topk_encode(**arguments | change)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("experts", torch.full((6, 2), 4, dtype=torch.int32), r"route.experts must lie in \[0, 4\)"),
        ("order", torch.full((12,), 12, dtype=torch.int32), r"route.order must lie in \[0, 12\)"),
        ("order", torch.zeros(3, dtype=torch.int32), "route.offsets must rise from 0"),
        ("offsets", torch.tensor([0, 5, 3, 9, 12], dtype=torch.int32), "route.offsets must rise from 0"),
    ],
)
def test_a_routing_that_kernels_cannot_trust_is_refused(field, value, message):
    routing = random_routing(6, 4, 2)._replace(**{field: value})
    with pytest.raises(ValueError, match=message):
        sk.routed_topk_encode(torch.ones(6, 8), torch.ones(16, 8), None, routing, 3)
