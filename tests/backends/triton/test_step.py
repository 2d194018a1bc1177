"""Whole training steps on the Triton backend: the reference's results, without waiting for the device."""

import os

import pytest
import torch

if not os.environ.get("CI"):
    pytest.importorskip("triton")

import sparsekern as sk
from sparsekern.backends import triton
from sparsekern.ops import _encoder, _route, _routed_topk_encode, _sparse_decode

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")

ROWS, D, N, K = 4, 10, 16, 2
DEAD_AFTER = ROWS  # a latent that is silent in one batch is dead in the next


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Leaves out the checks of values that are made on the CPU alone."""
    monkeypatch.setattr(_encoder, "check_finite", lambda name, tensor: None)
    monkeypatch.setattr(_sparse_decode, "check_indices", lambda indices, d_sae: None)
    monkeypatch.setattr(_route, "check_indices", lambda indices, d_sae, name: None)
    monkeypatch.setattr(_routed_topk_encode, "_check_slots", lambda experts, order, offsets: None)


def make(device, dead=5, aux_k=4, activation=None):
    generator = torch.Generator().manual_seed(1)
    activation = activation or sk.TopK(K)
    sae = sk.SAE(D, N, activation, dead_after=DEAD_AFTER, aux_k=aux_k, generator=generator, device=device)
    sae.tokens_since_fired[:dead] = DEAD_AFTER
    return sae.train()


def make_switch(device):
    generator = torch.Generator().manual_seed(1)
    sae = sk.SwitchSAE(
        D,
        N,
        sk.TopK(K),
        n_experts=4,
        n_active=2,
        balance="bias",
        dead_after=DEAD_AFTER,
        generator=generator,
        device=device,
    )
    return sae.train()


def make_hierarchy(device):
    levels = [(4, K), (3, 1)]
    return sk.HierarchicalSAE(D, levels, generator=torch.Generator().manual_seed(1), device=device).train()


def make_by_size(device):
    return make(device, activation=sk.AbsTopK(K))


def make_groups(device):
    return make(device, activation=sk.GroupMax(K))


def make_batch(device):
    return make(device, activation=sk.BatchTopK(K))


def make_jump(device):
    return make(device, activation=sk.JumpReLU(start_l0=K, bandwidth=0.5))


def trained(device, batches, made=make, **options):
    """A trainer after some steps, of which most have AuxK, and their statistics."""
    trainer = sk.Trainer(made(device), lr=1e-2, warmup_steps=0, fit_start=False, **options)
    return trainer, [trainer.step(x) for x in batches]


@pytest.mark.parametrize("made", [make, make_by_size, make_groups, make_batch, make_jump])
def test_equal_to_the_reference(triton_device, monkeypatch, made):
    monkeypatch.setattr(triton, "screens", lambda n, d: True)  # from the second step on with the optimizer's copy
    batches = torch.randn(3, ROWS, D, device=triton_device)
    mine, my_stats = trained(triton_device, batches, made, clip_norm=0.1)
    assert mine.optimizer._copies[mine.sae.W_enc].is_current(mine.sae.W_enc)
    monkeypatch.setenv("SPARSEKERN_BACKEND", "reference")
    theirs, their_stats = trained(triton_device, batches, made, clip_norm=0.1)
    for a, b in zip(my_stats, their_stats, strict=True):
        assert a.to_floats() == pytest.approx(b.to_floats(), rel=1e-5)
    assert any(stats.dead_fraction > 0 for stats in my_stats)
    state = theirs.state_dict()
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-6, msg=name)


# Gradients through autograd


def assert_no_worse(mine, same_precision, exact):
    """An error at most twice that of the same-precision PyTorch expression."""
    mine, same_precision = (t.cpu().double() - exact for t in (mine, same_precision))
    assert mine.abs().max() <= 2 * same_precision.abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize(
    ("kind", "frozen"),
    [*[("topk", frozen) for frozen in ("", "x", "b_enc", "W_enc")], ("absolute", ""), ("batch", ""), ("groups", "")],
)
def test_gradients_equal_those_of_the_dense_definition(triton_device, kind, frozen):
    shapes = {"x": (2, ROWS // 2, D), "W_enc": (N, D), "b_enc": (N,), "center": (D,), "W_dec": (N, D), "b_dec": (D,)}
    tensors = {name: torch.randn(*shape, dtype=torch.float64) for name, shape in shapes.items()}
    grad = torch.randn(*shapes["x"])

    def result(dtype, device, autoencode):
        given = {name: t.to(device, dtype).requires_grad_(name != frozen) for name, t in tensors.items()}
        out = autoencode(**given)
        wanted = [t for t in given.values() if t.requires_grad]
        return [t.detach() for t in (out, *torch.autograd.grad(out, wanted, grad.to(out)))]

    def sparse(x, W_enc, b_enc, center, W_dec, b_dec):
        if kind == "batch":
            codes = sk.batch_topk_encode(x, W_enc, b_enc, K, center=center)
        elif kind == "groups":
            codes, _ = sk.GroupMax(K).encode(x, W_enc, b_enc, center)
        else:
            codes = sk.topk_encode(x, W_enc, b_enc, K, center=center, absolute=kind == "absolute")
        return sk.sparse_decode(codes, W_dec, b_dec).view(x.shape)

    def dense(x, W_enc, b_enc, center, W_dec, b_dec):
        pre = (x - center) @ W_enc.T + b_enc
        size = pre.abs() if kind == "absolute" else pre
        if kind == "batch":
            kept = pre >= pre.flatten().topk(ROWS * K).values[-1]
        elif kind == "groups":
            groups = pre.unflatten(-1, (K, N // K))
            kept = (groups == groups.amax(-1, keepdim=True)).flatten(-2)
        else:
            kept = torch.zeros_like(pre).scatter(-1, size.topk(K).indices, 1)
        return ((pre if kind == "absolute" else pre.relu()) * kept) @ W_dec + b_dec

    mine, same = result(torch.float32, triton_device, sparse), result(torch.float32, "cpu", dense)
    for got, plain, exact in zip(mine, same, result(torch.float64, "cpu", dense), strict=True):
        assert_no_worse(got, plain, exact)


# Steps on a GPU, where nobody looks at values


TOPK, ABSTOPK = sk.TopK(K), sk.AbsTopK(K)
ROOMS = [("triton", TOPK, 5, 8, 12), ("triton", TOPK, 0, 4, 4), ("triton", ABSTOPK, 5, 8, 12)]
ROOMS += [("reference", TOPK, *case) for case in [(5, 8, 12), (5, 8, 4), (4, 4, 4), (13, 32, 6), (0, 4, 4)]]
ROOMS += [("reference", ABSTOPK, *case) for case in [(5, 8, 12), (5, 8, 4), (0, 4, 4)]]


@pytest.mark.parametrize(("backend", "activation", "dead", "room", "aux_k"), ROOMS)
def test_room_for_dead_latents_changes_nothing(triton_device, monkeypatch, backend, activation, dead, room, aux_k):
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
    x = torch.randn(ROWS, D, device=triton_device)
    results = []
    for places in (room, None if dead else 0):
        sae = make(triton_device, dead=dead, aux_k=aux_k, activation=activation)
        torch.nn.init.normal_(sae.b_enc, generator=torch.Generator(triton_device).manual_seed(2))
        out = sae.loss_with_room(x, None, places)
        out.total.backward()
        gradients = {name: p.grad for name, p in sae.named_parameters()}
        results.append({"loss": out.total, "tokens_since_fired": sae.tokens_since_fired, **gradients})
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("make_routed", [make_switch, make_hierarchy])
def test_a_routed_step_does_not_wait_for_the_device(triton_device, monkeypatch, like_a_gpu, no_waiting, make_routed):
    trainer = sk.Trainer(make_routed(triton_device), clip_norm=0.1)
    x = torch.randn(ROWS, D, device=triton_device)
    monkeypatch.setattr(sk.SAE, "device", property(lambda sae: torch.device("cuda")))
    with no_waiting():
        for _ in range(2):
            trainer.device_step(x, None, N, 1e-2)


@pytest.mark.parametrize("made", [make, make_by_size, make_groups])
def test_a_step_does_not_wait_for_the_device(triton_device, monkeypatch, like_a_gpu, no_waiting, made):
    monkeypatch.setattr(triton, "screens", lambda n, d: True)
    trainer = sk.Trainer(made(triton_device), clip_norm=0.1)
    x = torch.randn(ROWS, D, device=triton_device)
    with no_waiting():
        for _ in range(2):
            trainer.device_step(x, None, N, 1e-2)
        with pytest.raises(AssertionError, match="nonzero waits"):  # asked to count, it does
            trainer.device_step(x, None, None, 1e-2)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", [make, make_switch, make_hierarchy])
def test_a_batch_that_is_not_finite_changes_nothing(triton_device, monkeypatch, like_a_gpu, backend, kind):
    monkeypatch.setenv("SPARSEKERN_BACKEND", backend)
    trainer = sk.Trainer(kind(triton_device), lr=1e-2, warmup_steps=0, fit_start=False)
    x = torch.randn(ROWS, D, device=triton_device)
    assert trainer.step(x).to_floats()["skipped"] == 0
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    x = -x  # other latents would fire
    x[2, 3] = torch.nan
    stats = trainer.step(x)
    after = trainer.state_dict()
    for name in before.keys() - {"trainer.steps_done", "trainer.tokens_seen"}:
        assert torch.equal(after[name], before[name]), name
    with pytest.raises(ValueError, match=r"x held NaN or infinity, .* in 1 of 2 batches"):
        stats.to_floats()
