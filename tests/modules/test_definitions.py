"""Every activation in every module against its published definition, written out with dense tensors in float64.

First the loss: codes, every part and every parameter's gradient. Then training: :class:`sparsekern.Trainer` in float32,
on kernels and without, against the definition under ``torch.optim.Adam``; and what a step must not make.
"""

import copy
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sparsekern as sk
from sparsekern.backends import cpu

# The definitions. `pre` are all pre-activations, [B, N].


def largest(scores, k):
    """1 at the k largest of the last dimension, ties to the lower index."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(scores).scatter(-1, order, 1.0)


def with_slope(value, parameter, slope):
    """`value` with a pseudo-derivative to `parameter`."""
    return value + slope.detach() * (parameter - parameter.detach())


def jump(act, pre):
    """JumpReLU's thresholds, the width of its window, where pre-activations pass and where they lie in the window."""
    threshold, width = act.threshold.to(pre.dtype), float(act.bandwidth * act.length)
    passed, near = pre > threshold, (pre - threshold).abs() < width / 2
    return threshold, width, passed.to(pre.dtype), near.to(pre.dtype)


def dense_codes(act, pre, b_enc):
    """What the activation makes of all pre-activations, ``[B, N]``."""
    match act.name:
        case "topk":
            return (pre * largest(pre, act.k)).relu()
        case "abstopk":  # a slot of value 0 has no gradient
            return pre * largest(pre.abs(), act.k) * (pre != 0)
        case "groupmax":
            groups = pre.unflatten(1, (act.k, -1))
            return (groups * largest(groups, 1)).relu().flatten(1)
        case "batchtopk":
            return (pre * largest(pre.flatten(), act.k * len(pre)).view_as(pre)).relu()
        case "relu":
            return pre.relu()
        case "jumprelu":
            threshold, width, passed, near = jump(act, pre)
            return with_slope(pre * passed, threshold, -threshold / width * near)
        case "gated":
            return (pre > 0) * (act.r_mag.exp() * (pre - b_enc) + act.b_mag).relu()


def dense_penalties(act, pre, z, norms, length, fvu, frozen_fvu):
    """What the activation is charged for; `fvu` and `frozen_fvu` are those of other codes."""
    due = min(1, act.tokens_seen.item() / act.warmup_tokens) if getattr(act, "warmup_tokens", 0) else 1
    if act.name == "topk" and act.multi_k:
        return {"multi": act.multi_coefficient * fvu((pre * largest(pre, act.multi_k)).relu())}
    if act.name == "relu":
        size = z * norms / length
        if act.p < 1:
            size = (size + 0.001) ** act.p - 0.001**act.p
        return {"sparsity": act.l1_coefficient * due * size.sum(1).mean()}
    if act.name == "gated":
        l1 = (pre.relu() * norms / length).sum(1).mean()
        return {"sparsity": act.l1_coefficient * due * l1, "gate": frozen_fvu(pre.relu())}
    if act.name == "jumprelu":
        threshold, width, passed, near = jump(act, pre)
        l0 = with_slope(passed, threshold, -near / width).sum(1).mean()
        price = l0 if act.target_l0 is None else (l0 / act.target_l0 - 1) ** 2
        below = ((threshold - pre).relu() * norms).sum(1).mean() / length
        return {"sparsity": act.l0_coefficient * due * price, "pre_act": act.pre_act_coefficient * due * below}
    return {}


def dense_loss(sae, x, target=None, dead=None):
    """Parts of the loss, codes and FVU."""
    y = x if target is None else target
    x, y = x.reshape(len(x), -1), y.reshape(len(x), -1)
    centred = y - y.mean(0)

    def fvu(error, of=centred):
        squares = [part.unflatten(1, (sae.n_sources, -1)).square().sum((0, 2)) for part in (error, of)]
        return (squares[0] / squares[1]).mean()

    length = centred.square().sum(1).mean().sqrt()
    if isinstance(sae, sk.CrossLayerTranscoder):
        return cross_layer_loss(sae, x, y, fvu, length)
    act, W_enc, b_enc, W_dec, b_dec = sae.activation, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
    reads_centred = sae.pre_bias and not isinstance(sae, sk.Transcoder)
    pre = (x - b_dec if reads_centred else x) @ W_enc.T + b_enc
    z = dense_codes(act, pre, b_enc)
    offset = b_dec + (x @ sae.W_skip.T if getattr(sae, "skip", False) else 0)
    norms = torch.ones(sae.d_sae, dtype=x.dtype)
    if not sae.unit_decoder:
        norms = W_dec.unflatten(1, (sae.n_sources, -1)).norm(dim=2).sum(1)
    error = y - z @ W_dec - offset
    reconstruction = fvu(error)
    if isinstance(sae, sk.MatryoshkaSAE):
        sizes = random_sizes(sae) if sae.n_random else sae.prefixes
        each = [w * fvu(y - z[:, :m] @ W_dec[:m] - offset) for m, w in zip(sizes, sae.weights, strict=True)]
        reconstruction = sum(each) / sum(sae.weights)
    parts = {"reconstruction": reconstruction}
    parts |= dense_penalties(
        act,
        pre,
        z,
        norms,
        length,
        lambda codes: fvu(y - codes @ W_dec - offset),
        lambda codes: fvu(y - codes @ W_dec.detach() - offset.detach()),
    )
    if dead is not None and dead.any():
        residual, own = error.detach(), pre[:, dead]
        k = min(sae.aux_k, own.shape[1])
        kept = own * largest(own.abs(), k) * (own != 0) if act.name == "abstopk" else (own * largest(own, k)).relu()
        parts["auxk"] = sae.aux_coefficient * fvu(residual - kept @ W_dec[dead], residual - residual.mean(0))
    return parts, z, fvu(error)


def random_sizes(sae):
    """Prefixes of this batch: Pareto with exponent 1/2 between 1 and d_sae, by the golden ratio."""
    numbers = [i + sae.n_random * int(sae.batches_seen) for i in range(1, sae.n_random + 1)]
    uniform = [number * (math.sqrt(5) - 1) / 2 % 1 for number in numbers]
    return [*sorted(math.floor((1 - u * (1 - sae.d_sae**-0.5)) ** -2) for u in uniform), sae.d_sae]


def cross_layer_loss(sae, x, y, fvu, length):
    layers = list(sae.layers)
    recon, penalties, codes = layers[0].b_dec, {}, []
    for layer, part in enumerate(layers):
        pre = x.unflatten(1, (sae.n_sources, -1))[:, layer] @ part.W_enc.T + part.b_enc
        z = dense_codes(part.activation, pre, part.b_enc)
        written = z @ part.W_dec  # at this layer and all later ones
        before = written.new_zeros(len(x), layer * sae.d_source)
        recon = recon + torch.cat([before, written], 1)
        norms = torch.ones(len(part.W_dec), dtype=x.dtype) if sae.unit_decoder else part.W_dec.norm(dim=1)
        for name, value in dense_penalties(part.activation, pre, z, norms, length, None, None).items():
            penalties[name] = penalties.get(name, 0) + value
        codes.append(z)
    return {"reconstruction": fvu(y - recon), **penalties}, torch.cat(codes, 1), fvu(y - recon)


def trained(sae):
    return [parameter for parameter in sae.parameters() if parameter.requires_grad]


def assert_same(sae, out, expected):
    parts, z, fvu = expected
    torch.testing.assert_close(out.codes.to_dense(), z.detach())
    torch.testing.assert_close(out.fvu, fvu.detach())
    assert out.parts.keys() == parts.keys()
    for name, part in parts.items():
        torch.testing.assert_close(out.parts[name], part, msg=lambda text, name=name: f"{name}: {text}")
    mine = torch.autograd.grad(out.total, trained(sae), materialize_grads=True)
    theirs = torch.autograd.grad(sum(parts.values()), trained(sae), materialize_grads=True)
    names = [name for name, parameter in sae.named_parameters() if parameter.requires_grad]
    for name, got, wanted in zip(names, mine, theirs, strict=True):
        torch.testing.assert_close(got, wanted, msg=lambda text, name=name: f"gradient of {name}: {text}")


@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 9),
    unit_decoder=st.sampled_from([None, True, False]),
    n_dead=st.integers(0, 12),
    ties=st.booleans(),
)
def test_the_loss_and_every_gradient_equal_the_definition(kind, seed, rows, unit_decoder, n_dead, ties):
    torch.manual_seed(seed)
    aux = {"aux_coefficient": 0.3, "aux_k": 5, "dead_after": 10}
    sae = kind.perturbed(unit_decoder=unit_decoder, dtype=torch.float64, **aux)
    x, target = kind.batch(sae, rows, torch.float64)
    if ties:  # whole numbers: many equal pre-activations, and zeros
        x = x.sign() * (x.abs() > 0.5)
        with torch.no_grad():
            for part in getattr(sae, "layers", [sae]):
                part.W_enc.copy_(part.W_enc.mul(3).round().clamp(-1, 1))
                part.b_enc.zero_()
            sae.b_dec.zero_()
        y = x if target is None else target
        assume((y - y.mean(0)).flatten(1).unflatten(1, (sae.n_sources, -1)).square().sum((0, 2)).min() > 0)
    if isinstance(sae, sk.MatryoshkaSAE):
        sae.batches_seen.fill_(seed % 1000)
    dead = torch.zeros(sae.d_sae, dtype=torch.bool)
    dead[torch.randperm(sae.d_sae)[:n_dead]] = True
    sae.tokens_since_fired[dead] = 10
    expected = dense_loss(sae, x, target, dead)
    assert_same(sae, sae.loss(x, target), expected)


def test_auxk_with_more_room_than_dead_latents_is_the_same(kind):
    """As on a GPU, where the number of dead latents is bounded without counting them."""
    sae = kind.perturbed(aux_coefficient=0.3, aux_k=5, dead_after=10, dtype=torch.float64)
    x, target = kind.batch(sae, 9, torch.float64)
    for n_dead in (0, 3, 8) if sae.aux_coefficient else ():
        dead = torch.zeros(sae.d_sae, dtype=torch.bool)
        dead[torch.randperm(sae.d_sae)[:n_dead]] = True
        sae.tokens_since_fired.zero_()[dead] = 10
        expected = dense_loss(sae, x, target, dead)
        out = sae.loss_with_room(x, target, 8)
        if n_dead == 0:
            assert out.parts.pop("auxk") == 0
        assert_same(sae, out, expected)


def test_losses_of_equal_parts_add_up_to_that_of_the_batch(kind):
    if kind.activation in ("batchtopk", "jumprelu-target"):
        pytest.skip("selects, or compares its L0 with a target, in each part")
    sae = kind.perturbed(dtype=torch.float64)
    x, target = kind.batch(sae, 12, torch.float64)

    def loss_and_gradients(rows, variance=None):
        for act in kind.activations_of(sae):
            if hasattr(act, "tokens_seen"):
                act.tokens_seen.fill_(100)  # no penalty warms up any more
        if isinstance(sae, sk.MatryoshkaSAE):
            sae.batches_seen.zero_()  # the same random prefixes
        total = sae.loss(x[rows], None if target is None else target[rows], variance=variance).total
        return [total.detach(), *torch.autograd.grad(total, trained(sae), materialize_grads=True)]

    whole = loss_and_gradients(slice(None))
    variance = sae.variance_of(x if target is None else target)
    thirds = [loss_and_gradients(slice(first, first + 4), variance) for first in (0, 4, 8)]
    mean = [torch.stack(numbers).mean(0) for numbers in zip(*thirds, strict=True)]
    torch.testing.assert_close(mean, whole)


@pytest.mark.parametrize("backend", ["", "reference"])
def test_training_equals_the_definition_under_torch_adam(kind, backend, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)  # empty for none: the kernels, where there are any
    rows, lr, clip_norm = 30, 1e-2, 3.0  # the norm is above it in some steps, and below in others
    mine = kind.perturbed(aux_coefficient=0.3, aux_k=5, dead_after=2 * rows)
    mine.normalize_decoder_()
    theirs = copy.deepcopy(mine).double()
    trainer = sk.Trainer(mine, lr=lr, warmup_steps=0, clip_norm=clip_norm, fit_start=False)
    adam = torch.optim.Adam(trained(theirs), lr=lr)
    since = torch.zeros(mine.d_sae, dtype=torch.int64)
    for step in range(3):
        x, target = kind.batch(mine, rows)
        stats = trainer.step(x, target)
        doubles = [x.double(), None if target is None else target.double()]
        parts, z, fvu = dense_loss(theirs, *doubles, since >= 2 * rows)
        total = sum(parts.values())
        adam.zero_grad()
        total.backward()
        theirs.project_decoder_grad_()
        norm = torch.nn.utils.clip_grad_norm_(trained(theirs), clip_norm)
        adam.step()
        theirs.normalize_decoder_()
        since = torch.where((z != 0).any(0), 0, since + rows)
        for act in kind.activations_of(theirs):
            if hasattr(act, "tokens_seen"):
                act.tokens_seen += rows
        if isinstance(theirs, sk.MatryoshkaSAE):
            theirs.batches_seen += 1
        assert stats.tokens == rows * (step + 1)
        for got, wanted in ((stats.loss, total), (stats.fvu, fvu), (stats.grad_norm, norm)):
            torch.testing.assert_close(got.double(), wanted.detach().double(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.l0, (z != 0).sum(1).float().mean())
    assert torch.equal(mine.tokens_since_fired, since)
    for (name, got), wanted in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            got.double(), wanted.double(), rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    if trainer.optimizer._factored()[1]:
        assert all(weight.grad is None for weight in mine.latent_weights())


class NothingLarge(TorchDispatchMode):
    """Refuses new tensors of the shape of a weight, or of as many numbers as tokens × latents.

    It sees what ops return, not what they work on: a kernel's workspace, and the reference's panels, are inside.
    """

    def __init__(self, sae, numbers):
        super().__init__()
        self.shapes, self.numbers = {weight.shape for weight in sae.latent_weights()}, numbers

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves([args, kwargs]) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in known:
                assert t.shape not in self.shapes, f"{func} made a tensor of the shape of a weight, {tuple(t.shape)}"
                assert t.numel() < self.numbers, f"{func} made {tuple(t.shape)}"
        return out


@pytest.mark.skipif(cpu.isa() is None, reason="the native kernels are not built")
def test_a_step_makes_no_dense_gradient_and_nothing_of_tokens_times_latents(kind):
    rows, n = 60, 1200
    sae = kind.make(n=n, aux_coefficient=0.3, dead_after=rows)
    for act in kind.activations_of(sae):
        if act.name == "jumprelu":
            act.bandwidth = 0.01  # what lies in the window is worked on
    trainer = sk.Trainer(sae, lr=1e-3)
    for _ in range(2):  # the first makes Adam's moments, and the encoder's copy
        trainer.step(*kind.batch(sae, rows))
    per_layer = n // sae.n_sources if kind.module == "cross-layer" else n
    mode = NothingLarge(sae, rows * per_layer)
    if kind.module == "crosscoder" and kind.activation in ("relu", "lp"):
        mode.shapes = set()  # the gradient of the norms in each source is of the size of the decoder
    with mode:
        stats = trainer.step(*kind.batch(sae, rows))
    assert stats.skipped == 0
    assert all(weight.grad is None for weight in sae.latent_weights())
