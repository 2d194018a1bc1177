"""Crosscoder: its sources, the norms that a latent is charged for, where it starts, and its arguments."""

import copy

import pytest
import torch

import sparsekern as sk


def make(activation=None, n_sources=3, **options):
    generator = torch.Generator().manual_seed(1)
    return sk.Crosscoder(n_sources, 4, 32, activation or sk.TopK(3), generator=generator, **options)


def batch(rows=100):
    """Sources of very different sizes."""
    return torch.randn(rows, 3, 4) * torch.tensor([0.1, 1.0, 50.0]).view(3, 1)


def test_sources_side_by_side_are_the_same():
    sae, x = make(), batch(12)
    side_by_side = sae.loss(x.flatten(1))
    torch.testing.assert_close(side_by_side.total, sae.loss(x).total)
    assert sae(x.flatten(1)).shape == (12, 12)
    torch.testing.assert_close(sae(x.flatten(1)), sae(x).flatten(1))
    assert sae(x.view(3, 4, 3, 4)).shape == (3, 4, 3, 4)
    assert sae.decode(sae.encode(x)).shape == (12, 3, 4)


def test_one_source_is_an_sae():
    mine = make(sk.ReLU(0.3), n_sources=1)
    plain = sk.SAE(4, 32, sk.ReLU(0.3), generator=torch.Generator().manual_seed(1))
    x = torch.randn(12, 1, 4)
    torch.testing.assert_close(mine.loss(x).total, plain.loss(x.squeeze(1)).total)


def test_the_loss_does_not_depend_on_the_scale_of_a_source():
    sae, x = make(dead_after=1, dtype=torch.float64), batch().double()
    sae.tokens_since_fired[:9] = 1  # AuxK has a part in it
    other, scale = copy.deepcopy(sae), torch.tensor([1.0, 100, 0.01]).double().repeat_interleave(4)
    with torch.no_grad():
        other.W_enc.div_(scale)
        other.W_dec.mul_(scale)
        other.b_dec.mul_(scale)
    parts = other.loss(scale.view(3, 4) * x).parts
    assert parts.keys() == {"reconstruction", "auxk"}
    torch.testing.assert_close(parts, sae.loss(x).parts)


def test_at_the_start_encoder_rows_see_all_sources_and_decoder_rows_write_their_lengths():
    sae, x = make(), batch()
    sae.fit_start_(x)
    read = (sae.W_enc.view(32, 3, 4).square().sum((0, 2)).sqrt() * (x - x.mean(0)).square().sum((0, 2)).sqrt()).detach()
    torch.testing.assert_close(read / read.mean(), torch.ones(3), rtol=0.3, atol=0)
    written = sae.source_norms().square().sum(0).sqrt() / (x - x.mean(0)).square().sum((0, 2)).sqrt()
    torch.testing.assert_close(written / written.mean(), torch.ones(3), rtol=0.3, atol=0)


def test_source_norms_and_their_gradient_are_those_of_torch():
    sae = make(sk.ReLU(), dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec[3] = 0
        sae.W_dec[4, 4:8] = 0
    weight = torch.randn(32, 3).double()
    mine = torch.autograd.grad((weight * sae.source_norms()).sum(), sae.W_dec)[0]
    norms = sae.W_dec.unflatten(1, (3, 4)).norm(dim=2)
    torch.testing.assert_close(sae.source_norms(), norms)
    torch.testing.assert_close(mine, torch.autograd.grad((weight * norms).sum(), sae.W_dec)[0])
    torch.testing.assert_close(sae.latent_norms(), norms.sum(1))
    assert torch.equal(make().latent_norms(), torch.ones(32))


def test_a_constant_source_does_not_stop_the_start():
    sae, x = make(), batch()
    x[:, 1] = 7
    sae.fit_start_(x)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(n_sources=0), "n_sources must be a whole number of at least 1, got 0"),
        (lambda: sk.Crosscoder(2, 0, 8, sk.TopK(1)), "d_in must be a whole number of at least 1, got 0"),
        (lambda: make()(torch.ones(5, 4)), r"x must end in \(3, 4\) or \(12,\), got \(5, 4\)"),
        (lambda: make()(torch.ones(())), r"x must end in \(3, 4\) or \(12,\), got \(\)"),
        (lambda: make().loss(torch.ones(5, 2, 4)), r"x must end in \(3, 4\) or \(12,\), got \(5, 2, 4\)"),
        (lambda: make().loss(torch.ones(5, 3, 4), torch.ones(4, 3, 4)), "target must have shape"),
        (lambda: make().loss(torch.ones(1, 3, 4)), "at least two tokens"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
