"""route against its definition in float64: logits, gates, experts, the sorted slots, every gradient, and bad input."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.ops._route import _route, group_slots

GATES = ["softmax", "sigmoid"]


def definition(x, weight, n_active, gate, bias=None, center=None):
    logits = (x if center is None else x - center) @ weight.T
    gates = logits.softmax(1) if gate == "softmax" else logits.sigmoid()
    scores = logits if bias is None else gates + bias
    experts = scores.detach().sort(dim=1, descending=True, stable=True).indices[:, :n_active]
    return logits, gates.gather(1, experts), experts


def assert_sorted(routing):
    """Slots by expert, rising inside an expert, each once."""
    flat, order = routing.experts.flatten(), routing.order.long()
    assert torch.equal(order.sort().values, torch.arange(flat.numel()))
    sizes = torch.bincount(flat, minlength=routing.n_experts)
    assert torch.equal(routing.loads(), sizes)
    for expert, slots in enumerate(order.split(sizes.tolist())):
        assert (flat[slots] == expert).all()
        assert (slots.diff() > 0).all()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 12), st.data(), st.integers(0, 2**31))
def test_equals_the_definition_with_ties_to_the_lower_expert(product_backend, rows, d, n_experts, data, seed):
    torch.manual_seed(seed)
    n_active, gate = data.draw(st.integers(1, n_experts)), data.draw(st.sampled_from(GATES))
    x, weight = torch.randint(-2, 3, (rows, d)).float(), torch.randint(-1, 2, (n_experts, d)).float()
    routing = sk.route(x, weight, n_active, gate=gate)
    logits, gates, experts = definition(x, weight, n_active, gate)
    assert torch.equal(routing.logits, logits)  # small whole numbers: exact, with ties
    assert torch.equal(routing.experts.long(), experts)
    torch.testing.assert_close(routing.gates, gates)
    assert_sorted(routing)
    assert (routing.n_experts, routing.n_active) == (n_experts, n_active)


@pytest.mark.parametrize("gate", GATES)
def test_the_bias_chooses_and_nothing_else(product_backend, gate):
    x, weight = torch.randn(40, 8), torch.randn(5, 8)
    bias = torch.tensor([0.0, 3.0, 0.0, -3.0, 0.0])
    routing = sk.route(x, weight, 2, gate=gate, selection_bias=bias)
    logits, gates, experts = definition(x, weight, 2, gate, bias)
    assert torch.equal(routing.experts.long(), experts)
    torch.testing.assert_close(routing.gates, gates)
    torch.testing.assert_close(routing.logits, logits)
    assert (routing.experts[:, 0] == 1).all()
    assert (routing.experts != 3).all()
    assert_sorted(routing)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("n_active", [1, 3, 4])
def test_gradients_of_gates_and_logits(product_backend, gate, n_active):
    x, weight, center = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(6, 5), (4, 5), (5,)])

    def both(x, weight, center):
        routing = sk.route(x, weight, n_active, gate=gate, center=center)
        return routing.gates, routing.logits

    assert torch.autograd.gradcheck(both, (x, weight, center))
    logits, gates, _ = definition(x, weight, n_active, gate, center=center)
    cotangents = torch.randn_like(gates), torch.randn_like(logits)
    mine = torch.autograd.grad(both(x, weight, center), (x, weight, center), cotangents)
    theirs = torch.autograd.grad((gates, logits), (x, weight, center), cotangents)
    for got, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(got, expected)


def test_saturated_gates_still_tell_the_experts_apart():
    x, weight = torch.tensor([[1.0]]), torch.tensor([[200.0], [300.0], [100.0]])
    routing = sk.route(x, weight, 3, gate="sigmoid")  # every gate is 1 in float32
    assert routing.experts.tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_is_compared_in_float32(dtype):
    x, weight = torch.randn(300, 48).to(dtype), torch.randn(7, 48).to(dtype)
    routing = sk.route(x, weight, 2)
    assert routing.logits.dtype == routing.gates.dtype == torch.float32
    logits, _, experts = definition(x.float(), weight.float(), 2, "softmax")
    torch.testing.assert_close(routing.logits, logits)
    assert torch.equal(routing.experts.long(), experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sk.route(x.float(), weight.float(), 2).logits, logits)


def test_leading_dimensions_strides_and_the_gates_of_codes():
    x, weight = torch.randn(3, 4, 16)[..., ::2], torch.randn(6, 8)
    routing = sk.route(x, weight, 2)
    assert routing.experts.shape == (12, 2)
    torch.testing.assert_close(routing.logits, x.reshape(-1, 8) @ weight.T)
    codes = sk.routed_topk_encode(x, torch.randn(30, 8), None, routing, 7)
    gates = routing.gates_of(codes)
    assert gates.shape == codes.values.shape == (3, 4, 7)
    expected = routing.logits.softmax(1).gather(1, (codes.indices.reshape(12, 7) // 5).long())
    torch.testing.assert_close(gates.reshape(12, 7), expected)


def test_group_slots_of_many_experts(product_backend):
    experts = torch.randint(0, 5000, (200, 7), dtype=torch.int32)
    order, offsets = group_slots(experts, 5000)
    assert_sorted(sk.Routing(experts, experts.float(), order, offsets, None))
    with pytest.raises(ValueError, match=r"experts must lie in \[0, 3\)"):
        group_slots(experts, 3)


def test_opcheck_and_compilation():
    x, weight = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True)
    for center, bias, gate in ((None, None, "softmax"), (torch.ones(5, requires_grad=True), torch.ones(4), "sigmoid")):
        torch.library.opcheck(_route, (x, weight, center, bias, 2, gate))
    torch.library.opcheck(group_slots, (torch.tensor([[0], [2]], dtype=torch.int32), 3))

    def loss(x, weight):
        routing = sk.route(x, weight, 2)
        return routing.gates.square().sum() + routing.logits.logsumexp(1).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight), loss(x, weight))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_active": 0}, "n_active must be between 1 and n_experts=4, got 0"),
        ({"n_active": 5}, "n_active must be between 1 and n_experts=4, got 5"),
        ({"gate": "relu"}, "gate must be one of softmax, sigmoid, got 'relu'"),
        ({"x": torch.ones(3, 7)}, "x must have 8 columns"),
        ({"x": torch.ones(0, 8)}, "x must hold at least one token"),
        ({"x": torch.ones(3, 8).long()}, "x must be a floating-point tensor"),
        ({"x": torch.full((3, 8), float("nan"))}, "x holds NaN or infinity, first in row 0"),
        ({"W_router": torch.ones(8)}, "W_router must be 2-D"),
        ({"W_router": torch.ones(4, 8, device="meta")}, "one device"),
        ({"selection_bias": torch.ones(3)}, r"selection_bias must have shape \(4,\)"),
        ({"center": torch.ones(3)}, r"center must have shape \(8,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        sk.route(**{"x": torch.ones(3, 8), "W_router": torch.ones(4, 8)} | change)
