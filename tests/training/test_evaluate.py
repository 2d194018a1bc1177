"""Evaluation against its definition, and the PCA bar."""

import importlib
import math

import pytest
import torch

import sparsekern as sk
from sparsekern.training import pca_fvu
from sparsekern.training.evaluate import max_cosines, random_max_cosine

evaluate_module = importlib.import_module(
    "sparsekern.training.evaluate"
)  # the package exports the function by this name


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


def test_batches_of_any_shape_and_targets():
    sae = sk.SAE(8, 30, sk.TopK(3))
    x, target = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    whole = sk.evaluate(sae, [x.reshape(20, 8)])
    split = sk.evaluate(sae, x.split(2))
    assert (split.tokens, split.fvu) == (20, pytest.approx(whole.fvu))
    assert sk.evaluate(sae, [(x, x)]).to_dict() == whole.to_dict()
    measured = sk.evaluate(sae, [(x[:1], target[:1]), (x[1:], target[1:])])
    y = target.double().reshape(20, 8)
    wanted = (y - sae(x).reshape(20, 8)).square().sum() / (y - y.mean(0)).square().sum()
    assert measured.fvu == pytest.approx(wanted.item())
    assert measured.l0 == whole.l0
    with pytest.raises(ValueError, match=r"targets must have 8 columns \(d_out of the SAE\), got 7"):
        sk.evaluate(sae, [(x, target[..., :7])])


@pytest.mark.parametrize("block", [7, 8192])
def test_redundancy_equals_its_definition_over_the_latents_that_fire(monkeypatch, block):
    monkeypatch.setattr(evaluate_module, "_BLOCK", block)
    sae = sk.SAE(8, 40, sk.TopK(2))
    with torch.no_grad():
        sae.W_enc[20:] = 0  # these never fire
        sae.b_enc[20:] = -1
        sae.W_dec[1] = 3 * sae.W_dec[0]  # duplicates, at another length
        sae.W_dec[21] = sae.W_dec[5]  # a duplicate that never fires
        sae.W_dec[2] = 0
    x = torch.cat([sae.W_enc[:20].detach(), torch.randn(10, 8)])  # each of the first fires
    measured = sk.evaluate(sae, [x])
    assert measured.silent_fraction == 0.5
    rows = torch.nn.functional.normalize(sae.W_dec[:20].double(), dim=1)
    best = (rows @ rows.T).fill_diagonal_(-1).amax(1)
    assert measured.max_cosine == pytest.approx(best.mean().item(), rel=1e-6)
    assert measured.duplicate_fraction == pytest.approx((best > 0.9).double().mean().item())
    assert measured.duplicate_fraction >= 0.1
    few = sk.evaluate(sae, [x], compared=6)
    assert few.duplicate_fraction * 6 == pytest.approx(round(few.duplicate_fraction * 6))
    assert few.to_dict() == sk.evaluate(sae, [x], compared=6).to_dict()
    with pytest.raises(ValueError, match="compared must be at least 1"):
        sk.evaluate(sae, [x], compared=0)


def test_one_latent_has_no_other_to_be_compared_with():
    measured = sk.evaluate(sk.SAE(4, 5, sk.TopK(1)), [torch.randn(1, 4).repeat(3, 1)])
    assert math.isnan(measured.max_cosine)
    assert math.isnan(measured.duplicate_fraction)
    assert math.isnan(measured.max_cosine_null)


@pytest.mark.parametrize(("n", "d"), [(2, 2), (50, 2), (2, 7), (3000, 3), (2000, 40), (500, 768)])
def test_the_null_of_redundancy_is_what_random_directions_give(n, d):
    repeats = min(1000, max(1, 20_000 // n))
    draws = [max_cosines(torch.randn(n, d), torch.arange(n), n).double() for _ in range(repeats)]
    best = torch.stack(draws)
    mean, share = random_max_cosine(n, d, above=0.5)
    spread = (best.mean(1).std() / repeats**0.5).item() if repeats > 4 else 0.01
    assert best.mean().item() == pytest.approx(mean, abs=5 * spread + 1e-4)
    assert (best > 0.5).double().mean().item() == pytest.approx(share, abs=0.08)


def test_the_null_is_quick_and_sound_at_the_size_of_a_large_dictionary():
    mean, share = random_max_cosine(131_072, 768)
    # Extreme values: √(2 ln n / d) to leading order, with a smaller mean.
    assert 0.12 < mean < math.sqrt(2 * math.log(131_072) / 768)
    assert 0 <= share < 1e-100
