"""Evaluation against its definition, and the PCA bar."""

import pytest
import torch

import sparsekern as sk
from sparsekern.training import pca_fvu


def test_measures_equal_their_definitions():
    sae = sk.SAE(8, 30, sk.TopK(3))
    with torch.no_grad():
        sae.b_enc.sub_(6.0)  # some slots stay empty
    x = torch.randn(101, 8) + 3
    measured = sk.evaluate(sae, x.split(17))
    y, recon, dense = x.double(), sae(x).double(), sae.encode(x).to_dense()
    assert measured.tokens == 101
    assert measured.fvu == pytest.approx(((y - recon) ** 2).sum().item() / ((y - y.mean(0)) ** 2).sum().item())
    expected = 1 - ((y - recon).var(0).sum() / y.var(0).sum()).item()
    assert measured.explained_variance == pytest.approx(expected)
    assert measured.cosine == pytest.approx(torch.cosine_similarity(y, recon).mean().item())
    assert measured.l0 == pytest.approx((dense > 0).sum(1).double().mean().item())
    assert measured.l0 < 3
    torch.testing.assert_close(measured.density, (dense > 0).double().mean(0))
    assert measured.silent_fraction == pytest.approx((measured.density == 0).double().mean().item())


def test_histogram_counts_every_latent_once():
    sae = sk.SAE(4, 50, sk.TopK(2))
    x = torch.randn(1, 4).repeat(10, 1)  # the same latents on every token: density exactly 1
    histogram = sk.evaluate(sae, [x]).density_histogram()
    assert sum(histogram.values()) == 50
    assert histogram["silent"] >= 48
    assert histogram["1e-1..1e0"] == 50 - histogram["silent"]


def test_pca_fvu_is_the_tail_of_the_spectrum():
    x = torch.randn(5000, 6) * torch.tensor([10.0, 5.0, 2.0, 1.0, 0.5, 0.1]) + 4
    values = torch.linalg.eigvalsh(torch.cov(x.double().T)).flip(0)
    assert pca_fvu(x, x, 2) == pytest.approx((values[2:].sum() / values.sum()).item(), rel=1e-6)
    assert pca_fvu(x, x, 6) == pytest.approx(0, abs=1e-9)
    train, held_out = (torch.randn(20000, 6) + shift for shift in (4, 4.5))  # several blocks, another mean
    axes = torch.pca_lowrank((train - train.mean(0)).double(), 6)[2][:, :3]
    rest = (held_out - train.mean(0)).double()
    rest -= rest @ axes @ axes.T
    expected = rest.square().sum() / (held_out - held_out.mean(0)).double().square().sum()
    assert pca_fvu(train, held_out, 3) == pytest.approx(expected.item(), rel=1e-5)


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="at least two tokens"):
        sk.evaluate(sk.SAE(4, 8, sk.TopK(1)), [torch.randn(1, 4)])
