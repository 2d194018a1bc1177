"""What every architecture has in common with any other ``nn.Module``: one test a habit.

``torch.compile`` and DistributedDataParallel have files of their own.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import sparsekern as sk

HALVES = [torch.bfloat16, torch.float16]


def tensors(codes):
    return [part for part in codes if isinstance(part, torch.Tensor)]


def assert_equal_codes(mine, theirs):
    assert type(mine) is type(theirs)
    assert mine.d_sae == theirs.d_sae
    for one, other in zip(tensors(mine), tensors(theirs), strict=True):
        assert torch.equal(one, other)


def assert_equal_state(mine, theirs):
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def assert_close_gradients(mine, theirs, **tolerance):
    for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        assert (parameter.grad is None) == (other.grad is None), name
        if other.grad is not None:
            torch.testing.assert_close(
                parameter.grad, other.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


# Precision


@pytest.mark.parametrize("low", HALVES, ids=str)
def test_autocast_leaves_the_selection_and_the_dtype_of_gradients(architecture, low):
    sae, batch = architecture.used(), architecture.batch()
    plain = copy.deepcopy(sae)
    expected = plain.loss(*batch)
    with torch.autocast("cpu", dtype=low):
        out = sae.loss(*batch)
        assert sae(batch[0]).dtype == torch.float32
        inside = torch.nn.functional.linear(batch[0], torch.eye(sae.d_in))
        assert inside.dtype == low
        assert sae(inside).dtype == low
        assert sae.loss(inside, *batch[1:]).total.dtype == torch.float32
    assert_equal_codes(out.codes, expected.codes)
    torch.testing.assert_close(out.total, expected.total, rtol=1e-3, atol=0)
    out.total.backward()
    expected.total.backward()
    assert {p.grad.dtype for p in sae.parameters() if p.grad is not None} == {torch.float32}
    assert_close_gradients(sae, plain, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64], ids=str)
def test_a_cast_module_selects_by_its_stored_weights(architecture, dtype):
    sae = architecture.used()
    with torch.no_grad():  # x - b_dec is rounded to the dtype of storage, all that follows is not
        sae.b_dec.zero_()
    sae.to(dtype)
    x, *target = architecture.batch(dtype=dtype)
    wide = copy.deepcopy(sae).to(torch.promote_types(dtype, torch.float32))
    mine, theirs = sae.eval()(x), wide.eval()(x.to(wide.b_dec.dtype))
    assert mine.dtype == dtype
    error = (mine.to(theirs.dtype) - theirs).norm() / theirs.norm()
    assert error < 2 * torch.finfo(dtype).eps
    assert sae(x.to(torch.float32)).dtype == torch.float32
    out = sae.train().loss(x, *target)
    assert out.total.dtype == torch.promote_types(dtype, torch.float32)
    out.total.backward()
    assert all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)


def test_half_and_bfloat16_are_casts(architecture):
    x = architecture.batch()[0]
    for name, dtype in {"half": torch.float16, "bfloat16": torch.bfloat16}.items():
        sae = getattr(architecture.used(), name)()
        assert sae.b_dec.dtype == dtype
        assert sae(x.to(dtype)).isfinite().all()


# Copies, pickles, states


def test_a_deepcopy_trains_on_its_own(architecture):
    sae = architecture.used()
    trainer = sk.Trainer(sae, lr=1e-2)
    for seed in range(2):
        trainer.step(*architecture.batch(seed=seed))
    clones, before = [copy.deepcopy(sae), copy.deepcopy(trainer).sae], copy.deepcopy(sae)
    second = copy.deepcopy(trainer)
    for clone in clones:
        assert_equal_state(clone, sae)
    sk.Trainer(clones[0], lr=1e-2).step(*architecture.batch(seed=2))
    second.step(*architecture.batch(seed=2))
    assert_equal_state(sae, before)
    trainer.step(*architecture.batch(seed=2))
    assert_equal_state(sae, second.sae)  # the same step from the same moments


def test_a_deepcopy_of_a_trainer_takes_no_part_in_the_screening_copy_of_the_first():
    sae = sk.SAE(32, 2048, sk.TopK(4), generator=torch.Generator().manual_seed(1))  # wide enough for one
    batches = torch.randn(4, 64, 32)
    trainer = sk.Trainer(sae, lr=1e-2)
    trainer.step(batches[0]), trainer.step(batches[1])
    second = copy.deepcopy(trainer)
    for batch in batches[2:]:
        second.step(batch)
        exact = sk.topk_encode(batch, sae.W_enc, sae.b_enc, 4, "none", sae.b_dec)
        assert torch.equal(sae.encode(batch).indices, exact.indices)
        exact = sk.topk_encode(batch, second.sae.W_enc, second.sae.b_enc, 4, "none", second.sae.b_dec)
        assert torch.equal(second.sae.encode(batch).indices, exact.indices)


def test_modules_and_codes_can_be_pickled(architecture):
    sae, x = architecture.used().eval(), architecture.batch()[0]
    codes = sae.encode(x)
    other = pickle.loads(pickle.dumps(sae))
    assert_equal_codes(other.encode(x), codes)
    assert_equal_codes(pickle.loads(pickle.dumps(codes)), codes)
    assert_equal_state(other, sae)


class Encoded(torch.utils.data.Dataset):
    """Codes of pieces of a batch, made where they are asked for."""

    def __init__(self, sae, x):
        self.sae, self.pieces = sae, x.split(6)

    def __len__(self):
        return len(self.pieces)

    def __getitem__(self, number):
        with torch.no_grad():
            return self.sae.encode(self.pieces[number])


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"], indirect=True)
def test_workers_of_a_loader_can_encode(architecture):
    sae, x = architecture.used().eval(), architecture.batch()[0]
    data = Encoded(sae, x)
    loaded = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork"))
    for mine, theirs in zip(loaded, data, strict=False):
        assert_equal_codes(mine, theirs)


def test_a_state_survives_torch_save_and_loads_strictly(architecture):
    sae, x = architecture.used(), architecture.batch()[0]
    file = io.BytesIO()
    torch.save(sae.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = architecture.build()
    other.load_state_dict(state)
    assert_equal_state(other, sae)
    assert torch.equal(other.eval()(x), sae.eval()(x))
    first = next(iter(state))
    with pytest.raises(RuntimeError, match=f"Missing key.*{first}"):
        other.load_state_dict({name: tensor for name, tensor in state.items() if name != first})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*surplus"):
        other.load_state_dict({**state, "surplus": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for (layers\.0\.)?b_dec"):
        other.load_state_dict({name: t[:-1] if name.endswith("b_dec") else t for name, t in state.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_state_loads_into_another_dtype(architecture, dtype):
    sae, x = architecture.used(), architecture.batch(dtype=dtype)[0]
    other = architecture.build(dtype=dtype)
    other.load_state_dict(sae.state_dict())
    assert torch.equal(other.eval()(x), sae.to(dtype).eval()(x))


def test_a_module_on_meta_takes_a_state(architecture):
    sae, batch = architecture.used(), architecture.batch()
    sae.dead_after = architecture.build().dead_after
    with torch.device("meta"):
        assigned = architecture.build()
    assigned.load_state_dict(sae.state_dict(), assign=True)
    filled = architecture.build(device="meta").to_empty(device="cpu")
    filled.load_state_dict(sae.state_dict())
    for other in (assigned, filled):
        assert not any(t.is_meta for t in [*other.parameters(), *other.buffers()])
        expected = copy.deepcopy(sae).loss(*batch).total  # before the loads are used: they share what was assigned
        assert torch.equal(copy.deepcopy(other).loss(*batch).total, expected)
        assert torch.equal(copy.deepcopy(other).eval()(batch[0]), copy.deepcopy(sae).eval()(batch[0]))


# Shapes


def test_any_leading_dimensions_and_strides(architecture):
    sae = architecture.used().eval()
    x, *target = architecture.batch()
    expected, d = sae(x), sae.d_in
    torch.testing.assert_close(sae(x[0]), expected[0])
    for shape in [(4, 6), (2, 3, 4), (24, 1)]:
        torch.testing.assert_close(sae(x.view(*shape, d)), expected.view(*shape, -1))
    columns = x.T.contiguous().T
    strided = torch.empty(48, 2 * d)[::2, ::2].copy_(x)
    for other in (columns, strided):
        assert not other.is_contiguous()
        torch.testing.assert_close(sae(other), expected)
    torch.testing.assert_close(sae(x.expand(3, 24, d)), expected.expand(3, 24, -1))
    sae.train()
    loss = copy.deepcopy(sae).loss(x, *target).total
    torch.testing.assert_close(copy.deepcopy(sae).loss(columns, *target).total, loss)
    folded = [part.view(6, 4, -1).transpose(0, 1) for part in (x, *target)]
    again = [part.reshape(24, -1) for part in folded]
    torch.testing.assert_close(copy.deepcopy(sae).loss(*folded).total, copy.deepcopy(sae).loss(*again).total)


# Gradients


def test_gradients_of_the_input_equal_finite_differences(architecture):
    sae = architecture.used().double().eval()
    x = architecture.batch(5, dtype=torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(sae, (x,), fast_mode=True)
    (with_others,) = torch.autograd.grad(sae(x).square().sum(), x)
    sae.requires_grad_(False)
    (alone,) = torch.autograd.grad(sae(x).square().sum(), x)
    torch.testing.assert_close(alone, with_others)


def test_a_loss_behind_a_splice_reaches_earlier_layers(architecture):
    sae = architecture.used().double().eval()
    model = torch.nn.Sequential(torch.nn.Linear(3, sae.d_in), torch.nn.Linear(sae.d_in, sae.d_out)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def loss(weight):
        with sk.splice(model, "1", sae, read="input"):
            return functional_call(model, {"0.weight": weight}, (inputs,)).square().mean()

    assert torch.autograd.gradcheck(loss, (model[0].weight,), fast_mode=True)


def test_auxk_is_the_same_with_more_room_than_dead_latents(architecture):
    sae, batch = architecture.used(), architecture.batch()
    roomy = copy.deepcopy(sae)
    x, target = (*batch, None)[:2]
    out, other = sae.loss(x, target), roomy.loss_with_room(x, target, 32)  # as on a GPU
    assert ("auxk" in out.parts) == ("auxk" in other.parts) == (sae.aux_coefficient > 0)
    torch.testing.assert_close(other.total, out.total)
    out.total.backward()
    other.total.backward()
    assert_close_gradients(roomy, sae)


NOT_THE_SUM_OF_ITS_PARTS = {
    "batchtopk": "selects in each part",
    "matryoshka": "selects in each part",
    "matryoshka_random": "draws prefixes for each part",
    "relu_warming": "is warmer in the second part",
    "switch": "balances the loads of each part",
    "hierarchy": "has its L1 in units of each part's length",
    "h_sae": "has its L1 in units of each part's length",
}


def test_gradients_of_the_parts_of_a_batch_add_up(architecture):
    if architecture.name in NOT_THE_SUM_OF_ITS_PARTS:
        pytest.skip(NOT_THE_SUM_OF_ITS_PARTS[architecture.name])
    sae, batch = architecture.used(), architecture.batch()
    sae.dead_after = 10**6  # the FVU of a residual is that of each part
    whole = copy.deepcopy(sae)
    whole.loss(*batch).total.backward()
    for part in zip(*[tensor.split(8) for tensor in batch], strict=True):
        (sae.loss(*part, variance=sae.variance_of(batch[-1])).total / 3).backward()
    assert_close_gradients(sae, whole)


def test_functional_call_takes_other_parameters(architecture):
    sae, x = architecture.used().eval(), architecture.batch()[0]
    other = copy.deepcopy(sae)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    given = {
        name: parameter.detach().clone().requires_grad_(parameter.requires_grad)
        for name, parameter in other.named_parameters()
    }
    mine, theirs = functional_call(sae, given, (x,)), other(x)
    assert torch.equal(mine, theirs)
    theirs.square().sum().backward()
    mine.square().sum().backward()
    for name, parameter in other.named_parameters():
        assert (given[name].grad is None) == (parameter.grad is None), name
        assert parameter.grad is None or torch.equal(given[name].grad, parameter.grad), name
    assert all(parameter.grad is None for parameter in sae.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_forward_pass_can_be_checkpointed(architecture, reentrant):
    sae, (x, y) = architecture.used(), (architecture.batch()[0].requires_grad_() for _ in range(2))
    plain = copy.deepcopy(sae)
    checkpoint(sae, x, use_reentrant=reentrant).square().sum().backward()
    plain(y).square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert_close_gradients(sae, plain, rtol=0, atol=0)
    assert_equal_state(sae, plain)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_counts_refuses_to_be_checkpointed(architecture, reentrant):
    sae = architecture.used()
    x, *target = architecture.batch()
    x.requires_grad_()
    once = copy.deepcopy(sae)
    once.loss(x, *target)
    total = checkpoint(lambda x: sae.loss(x, *target).total, x, use_reentrant=reentrant)
    with pytest.raises(ValueError, match="loss must not be checkpointed in training mode"):
        total.backward()
    assert_equal_state(sae, once)  # counted once
    sae.eval()
    checkpoint(lambda x: sae.loss(x, *target).total, x, use_reentrant=reentrant).backward()
    assert sae.b_dec.grad is not None


def test_a_backward_hook_may_train_on_what_it_gets():
    sae, layer, x = sk.SAE(12, 48, sk.TopK(4)), torch.nn.Linear(12, 12), torch.randn(24, 12)

    def train(module, grad_input, grad_output):
        with torch.enable_grad():
            sae.loss(grad_output[0]).total.backward()

    layer.register_full_backward_hook(train)
    for seen in (24, 48):
        layer(x.clone().requires_grad_()).square().sum().backward()
        assert sae.tokens_since_fired.max() == seen


def test_no_grad_and_inference_mode_change_nothing_but_the_graph(architecture):
    sae, batch = architecture.used(), architecture.batch()
    expected = copy.deepcopy(sae)
    wanted = expected.loss(*batch)
    for mode in (torch.no_grad, torch.inference_mode):
        other = copy.deepcopy(sae)
        with mode():
            out = other.loss(*batch)
            other.eval()(batch[0])
        assert not out.total.requires_grad
        assert torch.equal(out.total, wanted.total)
        assert_equal_state(other, expected)
        other.train().loss(*batch).total.backward()  # a module is none the worse for it


def test_what_is_frozen_stays_while_the_rest_trains(architecture):
    sae = architecture.used()
    frozen = [*sae.screened_weights(), sae.b_dec]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in sae.named_parameters()}
    trainer = sk.Trainer(sae, lr=1e-2)
    for seed in range(2):
        trainer.step(*architecture.batch(seed=seed))
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, before[name]) == (not parameter.requires_grad), name


# Hooks, and modes


def test_hooks_fire(architecture):
    sae, x, seen = architecture.used(), architecture.batch()[0].requires_grad_(), []
    sae.register_forward_pre_hook(lambda module, args: seen.append("before"))
    sae.register_forward_hook(lambda module, args, output: seen.append("after"))
    sae.register_full_backward_hook(lambda module, grad_input, grad_output: seen.append("backward"))
    sae.b_dec.register_hook(lambda grad: seen.append("gradient"))
    sae(x).sum().backward()
    assert seen[:2] == ["before", "after"]
    assert sorted(seen[2:]) == ["backward", "gradient"]


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"], indirect=True)
def test_a_token_depends_on_its_batch_in_training_alone(architecture):
    sae, x = architecture.used(), architecture.batch()[0]
    assert len(sae.encode(x).values) == 4 * len(x)
    together, halves = sae(x), torch.cat([sae(x[:12]), sae(x[12:])])
    assert not torch.equal(together, halves)
    threshold = sae.activation.threshold.clone()
    sae.eval()
    codes, alone = sae.encode(x), sae.encode(x[:1])
    assert (codes.values > threshold).all()
    torch.testing.assert_close(codes.values[: len(alone.values)], alone.values)
    sae.loss(x)
    assert torch.equal(sae.activation.threshold, threshold)
    sae.train().loss(x)
    assert not torch.equal(sae.activation.threshold, threshold)


def test_jumprelu_reconstructs_the_same_in_both_modes():
    sae = sk.SAE(12, 48, sk.JumpReLU(start_l0=4, bandwidth=0.5), generator=torch.Generator().manual_seed(1))
    x = torch.randn(64, 12)
    sae.fit_start_(x)
    training, evaluating = sae.encode(x), sae.eval().encode(x)
    assert len(training.values) > len(evaluating.values)  # what is just below the threshold, to learn from
    assert (evaluating.values > sae.activation.threshold[evaluating.col]).all()
    assert torch.equal(training.to_dense(), evaluating.to_dense())
