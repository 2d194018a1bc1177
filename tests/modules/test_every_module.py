"""What every class keeps with every activation: its start, saving, casting, and batches that change nothing."""

import copy
import json
import pickle

import pytest
import torch

import sparsekern as sk


def test_the_start_has_its_l0_and_the_best_scale(kind):
    sae = kind.make(d=24, n=96, dtype=torch.float64)
    x, _ = kind.batch(sae, 200, torch.float64)
    x = x + 3
    # A target of x, with a part that no linear map of x makes, for the decoder of a skip transcoder to find.
    target = x.abs()[..., : sae.d_out // sae.n_sources] if "coder" in kind.module or "cross" in kind.module else None
    sae.fit_start_(x, target=target)
    codes = sae.encode(x)
    layers = kind.activations_of(sae)
    if hasattr(layers[0], "start_l0"):
        assert codes.l0().double().mean() == pytest.approx(3 * len(layers), abs=0.05)
    offset = sae.offset(x.reshape(200, -1))
    recon = sae.reconstruct(codes, x).reshape(200, -1) - offset
    wanted = (x if target is None else target).reshape(200, -1) - offset
    # The slope of ‖wanted − s · recon‖² at s = 1 vanishes.
    # The last latent to be active is so by a rounding error, which the scale may change.
    rtol = 0.01 if kind.activation.startswith(("jumprelu", "gated")) else 1e-6
    torch.testing.assert_close((recon * wanted).sum(), recon.square().sum(), rtol=rtol, atol=0)
    if sae.W_dec.any():  # a transcoder's rows may start at zero
        assert sae.loss(x, target).fvu < 1
    else:
        assert not sae.unit_decoder
    for weight in sae.unit_weights():
        torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight), dtype=torch.float64))


def test_a_degenerate_start_leaves_all_parameters_finite(kind):
    for rows in ("two", "zero", "constant", "one that differs"):
        sae = kind.make()
        x, target = kind.batch(sae, 2 if rows == "two" else 9)
        if rows != "two":
            x, target = (t if t is None else torch.full_like(t, float(rows != "zero")) for t in (x, target))
        if rows == "one that differs":
            x[4] *= 100
        sae.fit_start_(x, target=target)
        for name, tensor in sae.state_dict().items():
            assert tensor.isfinite().all(), (rows, name)
        assert sae.loss(*kind.batch(sae, 9)).total.isfinite(), rows
        for weight in sae.unit_weights():
            torch.testing.assert_close(weight.norm(dim=1), torch.ones(len(weight)))


def test_a_configuration_builds_the_module_again(kind, tmp_path):
    sae = kind.make(dead_after=77)
    trainer = sk.Trainer(sae)
    for _ in range(2):
        x, target = kind.batch(sae, 9)
        trainer.step(x, target)
    config = json.loads(json.dumps(sae.config()))
    fresh = sk.SAE.from_config(config)
    assert type(fresh) is type(sae)
    assert fresh.config() == sae.config()
    assert repr(fresh) == repr(sae)
    assert fresh.state_dict().keys() == sae.state_dict().keys()
    sae.save_pretrained(tmp_path)
    copies = [sk.SAE.from_pretrained(tmp_path), copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), fresh]
    fresh.load_state_dict(sae.state_dict())
    for training in (False, True):
        expected = copy.deepcopy(sae).train(training).loss(x, target).total
        for other in copies:
            for (name, mine), theirs in zip(sae.state_dict().items(), other.state_dict().values(), strict=True):
                assert torch.equal(mine, theirs), name
                assert mine.data_ptr() != theirs.data_ptr(), name
                assert mine.dtype == theirs.dtype, name
            assert torch.equal(other.train(training).loss(x, target).total, expected)
    names = {name.rsplit(".", 1)[-1] for name in sae.state_dict()}
    own = {"W_skip", "batches_seen", "tokens_seen", "threshold", "length", "relative_threshold", "r_mag", "b_mag"}
    assert names - own == {"W_enc", "b_enc", "W_dec", "b_dec", "tokens_since_fired"}
    assert ("W_skip" in names) == (kind.module == "skip-transcoder")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_have_the_dtype_asked_for_and_exact_ones_their_own(kind, dtype):
    made, cast = kind.make(dtype=dtype), kind.perturbed()
    x, target = kind.batch(cast, 9)
    cast.loss(x, target).total.backward()
    exact = {name: t.clone() for name, t in cast.state_dict().items() if name.rsplit(".", 1)[-1] in EXACT}
    cast.to(dtype)
    for sae in (made, cast):
        for name, tensor in sae.state_dict().items():
            if tensor.is_floating_point():
                assert tensor.dtype == EXACT.get(name.rsplit(".", 1)[-1], dtype), name
        for name, parameter in sae.named_parameters():
            assert parameter.grad is None or parameter.grad.dtype == parameter.dtype, name
    for name, tensor in exact.items():
        assert torch.equal(cast.state_dict()[name], tensor), name
    out = cast.loss(x.to(dtype), None if target is None else target.to(dtype))
    assert all(part.dtype == (dtype if dtype == torch.float64 else torch.float32) for part in out.parts.values())


EXACT = {"threshold": torch.float64, "relative_threshold": torch.float32, "length": torch.float32}


def test_a_module_in_half_precision_trains_as_one_in_float32(kind):
    x, target = (t if t is None else t.bfloat16() for t in kind.batch(kind.make(), 60))
    losses = []
    for dtype in (torch.bfloat16, torch.float32):
        trainer = sk.Trainer(kind.make(dtype=dtype), lr=3e-3, warmup_steps=0)
        losses.append(torch.stack([trainer.step(x, target).loss for _ in range(4)]))
    torch.testing.assert_close(*losses, rtol=0.05, atol=0)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_batch_that_is_not_finite_changes_nothing(kind, fresh):
    sae = kind.perturbed()
    trainer = sk.Trainer(sae, fit_start=False)
    x, target = kind.batch(sae, 9)
    if not fresh:
        trainer.step(x, target)
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    stats = trainer.step(*(t if t is None else 1e30 * t for t in (x, target)))  # whose square overflows
    assert stats.skipped == 1
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    sae.eval()
    codes = sae.encode(x)
    sae.load_state_dict(before)
    assert torch.equal(sae.eval().encode(x).to_dense(), codes.to_dense())


def test_codes_in_evaluation_do_not_depend_on_the_batch(kind):
    sae = kind.make()
    trainer = sk.Trainer(sae, warmup_steps=0)
    for _ in range(2):
        trainer.step(*kind.batch(sae, 30))
    sae.eval()
    x, _ = kind.batch(sae, 9)
    whole = sae.encode(x).to_dense()
    alone = torch.cat([sae.encode(row).to_dense().view(1, -1) for row in x.split(1)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole != 0, alone != 0)
    torch.testing.assert_close(sae(x)[7:9], sae(x[7:9]), rtol=1e-5, atol=1e-6)


def test_tokens_in_any_shape_give_the_same(kind):
    sae = kind.perturbed()
    x, target = kind.batch(sae, 12)
    flat = copy.deepcopy(sae).loss(x, target)
    x, target = (t if t is None else t.unflatten(0, (3, 4)) for t in (x, target))
    assert torch.equal(copy.deepcopy(sae).loss(x, target).parts["reconstruction"], flat.parts["reconstruction"])
    assert sae(x).shape == (target if target is not None else x).shape
    assert sk.Trainer(sae, fit_start=False).step(x, target).tokens == 12
