"""The SAE module: gradients, AuxK, the decoder constraint, and PyTorch's habits."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.modules.initialization import geometric_median


def make(d_in=12, d_sae=40, k=4, **options):
    return sk.SAE(d_in, d_sae, sk.TopK(k), generator=torch.Generator().manual_seed(1), **options)


def dense_loss(sae, x, dead=None):
    """The loss written out with dense tensors: the definition."""

    def topk(pre, k):
        order = pre.sort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(pre).scatter(1, order.indices[:, :k], 1.0)
        return (pre * kept).relu()

    def fvu(residual, target):
        return residual.square().sum() / (target - target.mean(0)).square().sum()

    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    residual = x - (topk(pre, sae.activation.k) @ sae.W_dec + sae.b_dec)
    loss = fvu(residual, x)
    if dead is not None:
        target = residual.detach()
        aux = topk(pre[:, dead], min(sae.aux_k, int(dead.sum()))) @ sae.W_dec[dead]
        loss = loss + sae.aux_coefficient * fvu(target - aux, target)
    return loss


@given(st.integers(0, 2**31), st.integers(2, 20), st.integers(1, 12), st.booleans())
def test_loss_and_every_gradient_equal_the_dense_definition(seed, rows, n_dead, with_dead):
    torch.manual_seed(seed)
    sae = make(dtype=torch.float64, dead_after=10, aux_k=5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    dead = torch.zeros(40, dtype=torch.bool)
    if with_dead:
        dead[torch.randperm(40)[:n_dead]] = True
    sae.tokens_since_fired[dead] = 10
    x = torch.randn(rows, 12, dtype=torch.float64)
    expected = dense_loss(sae, x, dead if with_dead else None)
    wanted = torch.autograd.grad(expected, list(sae.parameters()))
    out = sae.loss(x)
    assert ("auxk" in out.parts) == with_dead
    torch.testing.assert_close(out.total, expected)
    for mine, theirs in zip(torch.autograd.grad(out.total, list(sae.parameters())), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_auxk_reaches_the_encoder_of_dead_latents_and_of_no_other():
    sae = make(dead_after=10)
    sae.tokens_since_fired[[3, 17]] = 10
    x = torch.randn(64, 12)
    with torch.no_grad():  # out of the race for the top k, yet positive on the residual
        sae.b_enc[[3, 17]] = -50.0
        sae.W_enc[[3, 17]] *= 40
    out = sae.loss(x)
    out.parts["auxk"].backward()
    touched = sae.W_enc.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == sae.W_dec.grad.abs().sum(1).nonzero().flatten().tolist()
    assert touched == [3, 17]


def test_a_latent_dies_after_its_tokens_and_comes_back_when_it_fires():
    sae = make(d_in=2, d_sae=3, k=1, dead_after=20, pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    right = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).repeat(5, 1)
    sae.loss(right)
    assert sae.tokens_since_fired.tolist() == [0, 10, 10]
    sae.loss(right)
    assert sae.dead_mask().tolist() == [False, True, True]
    sae.loss(right.flip(1))
    assert sae.tokens_since_fired.tolist() == [10, 0, 30]
    sae.eval().loss(right)
    assert sae.tokens_since_fired.tolist() == [10, 0, 30], "evaluation must not count as training"


def test_forward_keeps_shape_and_dtype():
    sae = make()
    for shape in [(12,), (5, 12), (2, 3, 12), (2, 3, 4, 12)]:
        assert sae(torch.randn(shape)).shape == shape
    assert sae(torch.randn(5, 12).bfloat16()).dtype == torch.bfloat16


def test_drops_into_a_forward_hook():
    model, sae = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Linear(12, 2)), make()
    model[0].register_forward_hook(lambda module, args, output: sae(output))
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), model[1](sae(torch.nn.functional.linear(x, *model[0].parameters()))))


def test_starts_tied_with_unit_rows_and_reproducibly():
    sae = make()
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, make().W_enc)


def test_the_projected_gradient_is_orthogonal_to_the_rows():
    sae = make()
    sae.loss(torch.randn(50, 12)).total.backward()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() > 1e-4
    sae.project_decoder_grad_()
    assert (sae.W_dec.grad * sae.W_dec).sum(1).abs().max() < 1e-7
    with torch.no_grad():
        sae.W_dec.mul_(3)
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))


def test_geometric_median_resists_outliers():
    x = torch.randn(500, 3)
    x[:20] += 1000
    assert geometric_median(x).norm() < 0.3
    assert x.mean(0).norm() > 30
    # It minimises the summed distance: no small step improves on it.
    median = geometric_median(x.double(), tolerance=1e-10, max_iterations=1000)
    best = (x - median).norm(dim=1).sum()
    for step in 0.05 * torch.eye(3).double():
        assert (x - median - step).norm(dim=1).sum() > best
        assert (x - median + step).norm(dim=1).sum() > best


def test_the_fitted_start_is_the_best_scale_around_the_centre():
    x = 5 + torch.randn(200, 12)
    for center, expected in {
        "geometric_median": geometric_median(x),
        "mean": x.mean(0),
        "zeros": torch.zeros(12),
    }.items():
        sae = make(k=8)
        sae.fit_start_(x, center)
        torch.testing.assert_close(sae.b_dec.data, expected)
        start = sae.W_enc.detach().clone()

        def error(scale, sae=sae, start=start):
            with torch.no_grad():
                sae.W_enc.copy_(scale * start)
                return (x - sae(x)).square().sum()

        assert error(1.0) < min(error(0.9), error(1.1))
    constant = make()
    constant.fit_start_(torch.ones(5, 12))
    torch.testing.assert_close(constant.W_enc, make().W_enc)


def test_autocast_leaves_codes_exact_and_gradients_float32():
    sae, x = make(), torch.randn(30, 12)
    plain = sae.encode(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, out = sae.encode(x), sae.loss(x)
    assert torch.equal(plain.indices, inside.indices)
    assert torch.equal(plain.values, inside.values)
    out.total.backward()
    assert sae.W_enc.grad.dtype == torch.float32


def test_the_loss_of_half_precision_activations_is_computed_in_float32():
    sae, x = make(), 10 + torch.randn(500, 12).bfloat16()
    torch.testing.assert_close(sae.loss(x).total, sae.loss(x.float()).total)


def test_compiled_encode_and_decode_agree():
    sae, x = make(), torch.randn(30, 12)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), sae(x))


def test_deepcopy_pickle_and_state_dict_are_equal_and_apart():
    sae, x = make(), torch.randn(30, 12)
    sae.loss(x)
    clones = [copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), make()]
    clones[2].load_state_dict(sae.state_dict())
    for clone in clones:
        assert torch.equal(clone(x), sae(x))
        assert torch.equal(clone.tokens_since_fired, sae.tokens_since_fired)
        with torch.no_grad():
            clone.W_dec.zero_()
        assert sae.W_dec.any()


def test_target_other_than_x():
    sae, x, y = make(), torch.randn(9, 12), torch.randn(9, 12)
    out = sae.loss(x, y)
    expected = (y - sae(x)).square().sum() / (y - y.mean(0)).square().sum()
    torch.testing.assert_close(out.fvu, expected.detach())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.TopK(0), "k must be a whole number of at least 1, got 0"),
        (lambda: sk.TopK(2.5), "k must be a whole number of at least 1, got 2.5"),
        (lambda: make(k=41), "k must be at most d_sae=40, got 41"),
        (lambda: make(d_in=0), "d_in must be a whole number"),
        (lambda: sk.SAE(4, 8, 3), "activation must be an Activation"),
        (lambda: make(aux_coefficient=-1), "aux_coefficient must not be negative"),
        (lambda: make()(torch.ones(3, 11)), "x must have 12 columns"),
        (lambda: make().loss(torch.ones(3, 12, dtype=torch.int32)), "x must be a floating-point tensor"),
        (lambda: make().loss(torch.ones(0, 12)), "x must hold at least two tokens"),
        (lambda: make().loss(torch.ones(1, 12)), "at least two tokens"),
        (lambda: make().loss(torch.ones(3, 12), torch.ones(2, 12)), "target must have shape"),
        (lambda: make().fit_start_(torch.full((3, 12), float("nan"))), "x holds NaN or infinity, first in row 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_rows_leave_the_counters_alone():
    sae, x = make(), torch.ones(4, 12)
    x[2, 5] = float("inf")
    with pytest.raises(ValueError, match="first in row 2"):
        sae.loss(x)
    assert not sae.tokens_since_fired.any()
