"""``sk.splice``: what the model sees, what gradients see, and that nothing stays behind."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.codes import CSRCodes, SparseCodes, entry_rows

D, N = 6, 20


class Block(nn.Module):
    """A residual block that returns what `wrap` makes of its activations."""

    def __init__(self, wrap=None):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.wrap = wrap or (lambda h: h)

    def forward(self, hidden_states):
        return self.wrap(hidden_states + self.linear(hidden_states).tanh())


class Model(nn.Module):
    def __init__(self, wrap=None, unwrap=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block(wrap), Block()])
        self.unwrap = unwrap or (lambda h: h)

    def forward(self, x):
        return self.blocks[2](self.unwrap(self.blocks[1](hidden_states=self.blocks[0](x))))


@pytest.fixture
def model():
    return Model()


@pytest.fixture(params=["slots", "csr"])
def sae(request):
    sae = sk.SAE(D, N, sk.TopK(4) if request.param == "slots" else sk.ReLU())
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_()
    return sae


def block(model, index, h):
    """What block `index` gives for `h`, as a tensor."""
    return h + model.blocks[index].linear(h).tanh()


def expected(model, x, change):
    """The model with `change` applied to the output of the middle block."""
    return block(model, 2, change(block(model, 1, block(model, 0, x))))


def dense_recon(sae, y, change=lambda z: z):
    z = sae.encode(y).to_dense().reshape(*y.shape[:-1], N)
    return change(z) @ sae.W_dec + sae.b_dec


def with_columns(values, add=0.0):
    def change(z):
        z = z.clone()
        for latent, value in values.items():
            z[..., latent] = add * z[..., latent] + value
        return z

    return change


@pytest.mark.parametrize("shape", [(5, D), (2, 7, D), (1, D)])
def test_replace(model, sae, shape):
    x = torch.randn(*shape)
    before = model(x)
    with sk.splice(model, "blocks.1", sae) as spliced:
        assert spliced.codes is None
        during = model(x)
    torch.testing.assert_close(during, expected(model, x, lambda y: dense_recon(sae, y)))
    torch.testing.assert_close(spliced.codes.to_dense(), sae.encode(block(model, 1, block(model, 0, x))).to_dense())
    assert torch.equal(model(x), before)
    assert not model.blocks[1]._forward_hooks


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize(
    ("mode", "latents", "add"),
    [
        ("ablate", {3: 0.0, 0: 0.0, N - 1: 0.0}, 0),
        ("clamp", {3: 2.5, 11: -1.0, 0: 0.0}, 0),
        ("steer", {19: 2.0, 4: -3.0}, 1),
    ],
)
def test_edits_act_on_active_and_silent_latents_alike(model, sae, mode, latents, add, error):
    x = torch.randn(3, 5, D)
    change = with_columns(latents, add)

    def direct(y):
        edited = dense_recon(sae, y, change)
        return y + edited - dense_recon(sae, y) if error else edited

    with sk.splice(
        model, "blocks.1", sae, mode, list(latents) if mode == "ablate" else latents, error=error
    ) as spliced:
        during = model(x)
    torch.testing.assert_close(during, expected(model, x, direct), atol=1e-5, rtol=1e-5)
    active = spliced.codes.values_of(list(latents)) != 0
    assert 0 < active.sum() < active.numel()  # both kinds were there


def test_steering_with_the_error_adds_decoder_rows(model, sae):
    x = torch.randn(4, D)
    with sk.splice(model, "blocks.1", sae, "steer", {5: 3.0}, error=True):
        during = model(x)
    torch.testing.assert_close(during, expected(model, x, lambda y: y + 3 * sae.W_dec[5]), atol=1e-5, rtol=1e-5)


def test_any_edit(model, sae):
    x = torch.randn(4, D)
    double = lambda codes: codes.with_values([2, 9], 2 * codes.values_of([2, 9]))  # noqa: E731
    with sk.splice(model, "blocks.1", sae, edit=double) as spliced:
        during = model(x)
    change = lambda z: z * (1 + torch.isin(torch.arange(N), torch.tensor([2, 9])))  # noqa: E731
    torch.testing.assert_close(during, expected(model, x, lambda y: dense_recon(sae, y, change)))
    torch.testing.assert_close(spliced.edited.to_dense(), change(spliced.codes.to_dense()))


def test_with_the_error_an_unedited_model_is_untouched_to_the_bit(model, sae):
    x = torch.randn(2, 5, D, requires_grad=True)
    alone = torch.autograd.grad(model(x).square().sum(), [x, model.blocks[0].linear.weight])
    with sk.splice(model, "blocks.1", sae, error=True):
        out = model(x)
    assert torch.equal(out, model(x))
    own = [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec]
    spliced = torch.autograd.grad(out.square().sum(), [x, model.blocks[0].linear.weight, *own])
    for one, two in zip(alone, spliced, strict=False):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-5)
    for grad in spliced[2:]:
        torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-4, rtol=0)


@pytest.mark.parametrize("error", [False, True])
def test_what_a_latent_writes_has_a_gradient(model, sae, error):
    """∂loss/∂values = ⟨decoder row, ∂loss/∂output⟩, also where the error term holds the reconstruction too."""
    x, seen = torch.randn(4, D), []
    with sk.splice(model, "blocks.1", sae, error=error) as spliced:
        handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(args[2]))
        loss = model(x).square().sum()
        handle.remove()
    grad, at_output = torch.autograd.grad(loss, [spliced.edited.values, seen[0]])
    table = at_output @ sae.W_dec.T
    if isinstance(spliced.codes, CSRCodes):
        wanted = table[entry_rows(spliced.codes.crow, spliced.codes.col), spliced.codes.col.long()]
    else:
        wanted = table.gather(1, spliced.codes.indices.long())
    active = spliced.codes.values != 0
    torch.testing.assert_close(grad[active], wanted[active], atol=1e-5, rtol=1e-4)


def test_an_end_to_end_loss_reaches_the_sae_and_earlier_layers(model, sae):
    x = torch.randn(3, 4, D)
    with sk.splice(model, "blocks.1", sae):
        grads = torch.autograd.grad(
            model(x).square().sum(), [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, model.blocks[0].linear.weight]
        )
    direct = torch.autograd.grad(
        expected(model, x, lambda y: dense_recon(sae, y)).square().sum(),
        [sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, model.blocks[0].linear.weight],
    )
    for one, two in zip(grads, direct, strict=True):
        assert one.any()
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


Pair = namedtuple("Pair", ["hidden", "rest"])


@dataclass
class Output:
    note: str
    hidden: torch.Tensor


@pytest.mark.parametrize(
    ("wrap", "unwrap"),
    [
        (lambda h: (h, "rest"), lambda out: out[0] if type(out) is tuple and out[1] == "rest" else None),
        (lambda h: [h], lambda out: out[0] if type(out) is list else None),
        (lambda h: Pair(h, 1), lambda out: out.hidden if isinstance(out, Pair) and out.rest == 1 else None),
        (lambda h: {"note": 1, "hidden": h}, lambda out: out["hidden"] if out["note"] == 1 else None),
        (lambda h: Output("x", h), lambda out: out.hidden if out.note == "x" else None),
    ],
)
def test_what_wraps_the_tensor_is_kept(sae, wrap, unwrap):
    model, x = Model(wrap, unwrap), torch.randn(3, D)
    with sk.splice(model, "blocks.1", sae):
        during = model(x)
    torch.testing.assert_close(during, expected(model, x, lambda y: dense_recon(sae, y)))


def test_outputs_of_transformers(sae):
    outputs = pytest.importorskip("transformers.modeling_outputs")
    kind = outputs.BaseModelOutputWithPast
    model = Model(lambda h: kind(last_hidden_state=h, attentions=(h,)), lambda out: out.last_hidden_state + out[0])
    plain = Model(unwrap=lambda h: 2 * h)
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, D)
    with sk.splice(model, "blocks.1", sae), sk.splice(plain, "blocks.1", sae):
        assert torch.equal(model(x), plain(x))


def test_padding_can_be_left_alone(model, sae):
    x, mask = torch.randn(2, 5, D), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    before = model(x)
    with sk.splice(model, "blocks.1", sae, where=mask) as spliced:
        during = model(x)
        spliced.where = None
        everywhere = model(x)
        spliced.where = mask[:, :4]
        with pytest.raises(ValueError, match=r"where must fit \(2, 5\), got shape \(2, 4\)"):
            model(x)
    assert torch.equal(during, torch.where(mask[..., None] == 1, everywhere, before))
    assert not torch.equal(during, everywhere)


def test_a_transcoder_reads_the_input(model, sae):
    x = torch.randn(2, 5, D)
    with sk.splice(model, "blocks.1", sae, read="input"):
        during = model(x)
    torch.testing.assert_close(during, block(model, 2, dense_recon(sae, block(model, 0, x))))
    with sk.splice(model, "blocks.1", sae, read="input", error=True):
        assert torch.equal(model(x), expected(model, x, lambda y: y))


def test_blocks_nest_and_are_undone_after_exceptions(model, sae):
    x = torch.randn(3, D)
    before = model(x)
    with sk.splice(model, "blocks.0", sae) as outer:
        once = model(x)
        with sk.splice(model, "blocks.1", sae) as inner:
            twice = model(x)
        assert torch.equal(model(x), once)
        with pytest.raises(ValueError, match="d_in"), sk.splice(model, "blocks.1", sk.SAE(D + 1, N, sk.TopK(2))):
            model(x)
        assert torch.equal(model(x), once)
    with pytest.raises(RuntimeError, match="stop"), sk.splice(model, "blocks.0", sae):
        raise RuntimeError("stop")
    assert torch.equal(model(x), before)
    assert not torch.equal(twice, once)
    first = dense_recon(sae, block(model, 0, x))
    torch.testing.assert_close(twice, block(model, 2, dense_recon(sae, block(model, 1, first))))
    assert outer.codes is not inner.codes
    with sk.splice(model, "blocks.1", sae, "ablate", [1]), sk.splice(model, "blocks.1", sae, error=True) as last:
        model(x)
    ablated = dense_recon(sae, block(model, 1, block(model, 0, x)), with_columns({1: 0.0}))
    torch.testing.assert_close(last.codes.to_dense(), sae.encode(ablated).to_dense())


def test_half_precision_models_keep_their_dtype(sae):
    model = Model().bfloat16()
    with sk.splice(model, "blocks.1", sae, error=True), torch.no_grad():
        out = model(torch.randn(2, 3, D, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_a_hierarchy_can_be_ablated():
    sae = sk.HierarchicalSAE(D, levels=[(4, 2), (3, 1)])
    model, x = Model(), torch.randn(3, D)
    with sk.splice(model, "blocks.1", sae, "ablate", list(range(sae.d_sae))):
        during = model(x)
    torch.testing.assert_close(during, expected(model, x, lambda y: sae.b_dec.expand_as(y)))
    with sk.splice(model, "blocks.1", sae, "clamp", {1: 2.0}), pytest.raises(ValueError, match="as encode makes them"):
        model(x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("block.1",), r"module 'block.1' is not a module of Model; the nearest names: blocks.1, "),
        (("",), "not a module of Model; the nearest names: blocks, "),
        (("blocks.1", "delete"), "mode must be one of replace, ablate, clamp, steer, got 'delete'"),
        (("blocks.1", "replace", [1]), "latents go with mode ablate"),
        (("blocks.1", "ablate"), "latents must be a sequence of ints for mode ablate, got None"),
        (("blocks.1", "ablate", {1: 0.0}), "latents must be a sequence of ints"),
        (("blocks.1", "steer", [1]), "latents must be a mapping of ints to numbers for mode steer"),
        (("blocks.1", "ablate", [N]), r"latents must be whole numbers in \[0, 20\), got 20"),
        (("blocks.1", "ablate", [-1]), "got -1"),
        (("blocks.1", "ablate", [2, 2]), "must not repeat"),
        (("blocks.1", "clamp", {1.5: 2.0}), "got 1.5"),
    ],
)
def test_bad_arguments(model, sae, arguments, message):
    with pytest.raises(ValueError, match=message), sk.splice(model, arguments[0], sae, *arguments[1:]):
        pass
    assert not model.blocks[1]._forward_hooks


def test_more_bad_arguments(model, sae):
    with pytest.raises(ValueError, match="read must be"), sk.splice(model, "blocks.1", sae, read="both"):
        pass
    edit = lambda codes: codes  # noqa: E731
    with pytest.raises(ValueError, match="edit goes with"), sk.splice(model, "blocks.1", sae, "ablate", [1], edit=edit):
        pass
    with sk.splice(model, "blocks.1", sk.SAE(D + 1, N, sk.TopK(2))), pytest.raises(ValueError, match=r"d_in"):
        model(torch.randn(2, D))
    model = Model(lambda h: "no tensor")
    with sk.splice(model, "blocks.1", sae), pytest.raises(ValueError, match=r"'blocks.1' gives str: neither"):
        model(torch.randn(2, D))


def csr(dense):
    rows, cols = dense.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), (dense != 0).sum(1).cumsum(0)])
    return CSRCodes(crow, cols.int(), dense[rows, cols], dense.shape[1])


def slots(dense, k):
    values, indices = dense.sort(dim=1, descending=True, stable=True)
    return SparseCodes(values[:, :k], indices[:, :k].int(), dense.shape[1])


def test_codes_with_values_equal_the_dense_assignment():
    dense = torch.rand(7, 9) * (torch.rand(7, 9) < 0.4)
    dense[3] = 0
    given, latents = torch.randn(7, 3), [8, 0, 5]
    for codes in (csr(dense), slots(dense, 9)):
        assert torch.equal(codes.values_of(latents), dense[:, latents])
        assert codes.values_of([]).shape == (7, 0)
        wanted = dense.clone()
        wanted[:, latents] = given
        changed = codes.with_values(latents, given)
        assert torch.equal(changed.to_dense(), wanted)
        wanted[:, latents] = 0
        assert torch.equal(codes.with_values(latents, 0).to_dense(), wanted)
        wanted[:, latents] = 1.5
        assert torch.equal(codes.with_values(latents, 1.5).to_dense(), wanted)
        assert torch.equal(codes.with_values([], 1.5).to_dense(), dense)
    changed = csr(dense).with_values(latents, given)
    for start, stop in changed.crow.unfold(0, 2, 1).tolist():
        assert (changed.col[start:stop].diff() > 0).all()
    empty = csr(torch.zeros(0, 9))
    assert empty.with_values([1], 2.0).to_dense().shape == (0, 9)
