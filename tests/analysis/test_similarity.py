"""Measures of paired vectors: against their definitions, what they are blind to, and what they must see."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr
from sklearn.cross_decomposition import CCA

import sparsekern as sk
from sparsekern.analysis import similarity
from sparsekern.analysis.similarity import cka, procrustes_transfer, rsa, svcca
from sparsekern.analysis.toy import ZipfFeatures

SEEDS = range(5)
MEASURES = {
    "svcca": svcca,
    "rsa": lambda X, Y, **options: rsa(X, Y, metric="euclidean", **options),
    "cka": cka,
    "plain cka": lambda X, Y, **options: cka(X, Y, debiased=False, **options),
    "cka of batches": lambda X, Y, **options: cka(X, Y, batch_size=8, **options),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rotation(d, g):
    return torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]


def pair(seed=0, n=300, d=12, noise=1.0):
    """Activations, and a turned, scaled, moved and noisy copy of them."""
    g = generator(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64) * torch.linspace(2, 0.5, d, dtype=torch.float64)
    Y = 3 * X @ rotation(d, g) + 5 + noise * 3 * torch.randn(n, d, generator=g, dtype=torch.float64)
    return X, Y


# What they are blind to, and what they see


@pytest.mark.parametrize("name", MEASURES)
@settings(deadline=None)
@given(seed=st.integers(0, 2**31), n=st.integers(8, 60), d=st.integers(1, 70), scale=st.floats(1e-3, 1e3))
def test_rotation_translation_and_scaling_change_nothing(name, seed, n, d, scale):
    g = generator(seed)
    X = torch.randn(n, d, generator=g, dtype=torch.float64)
    value = MEASURES[name](X, scale * X @ rotation(d, g) + 7 * scale, n_null=0).value
    assert value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", MEASURES)
@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_either_order_gives_the_same(name, seed):
    X, Y = pair(seed, n=40)
    one, other = MEASURES[name](X, Y[:, :5], n_null=0), MEASURES[name](Y[:, :5], X, n_null=0)
    assert one.value == pytest.approx(other.value, abs=1e-9)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_noisy_copy_stands_out(name, seed):
    X, Y = pair(seed)
    found = MEASURES[name](X, Y, n_null=50)
    assert found.p == pytest.approx(1 / 51)
    # In six seeds svcca 0.74 to 0.75, rsa 0.65 to 0.70, cka 0.69 to 0.74.
    assert 0.6 < found.value < 0.8
    assert float(found.null.max()) < 0.25


@pytest.mark.parametrize("name", MEASURES)
def test_unrelated_rows_are_within_the_null(name):
    found = [MEASURES[name](pair(seed)[0], pair(seed + 50)[1], n_null=19) for seed in SEEDS]
    assert max(result.value for result in found) < 0.22  # svcca 0.15 to 0.18, the others at most 0.03
    assert np.median([result.p for result in found]) > 0.1


# Definitions


def hsic_1(X, Y):
    """Song et al., equation 5, with its matrices."""
    n = len(X)
    K, L = (rows @ rows.T for rows in (X, Y))
    K.fill_diagonal_(0), L.fill_diagonal_(0)
    ones = torch.ones(n, dtype=torch.float64)
    first = torch.trace(K @ L) + (ones @ K @ ones) * (ones @ L @ ones) / ((n - 1) * (n - 2))
    return float(first - 2 / (n - 2) * ones @ K @ L @ ones) / (n * (n - 3))


@pytest.mark.parametrize("d", [3, 90])
def test_cka_is_that_of_the_kernels(d):
    X = torch.randn(40, d, generator=generator(), dtype=torch.float64) + 2
    Y = X[:, : d // 2 + 1] ** 2
    wanted = hsic_1(X, Y) / (hsic_1(X, X) * hsic_1(Y, Y)) ** 0.5
    assert cka(X, Y, n_null=0).value == pytest.approx(wanted)
    batches = [(X[:20], Y[:20]), (X[20:], Y[20:])]
    halves = [sum(hsic_1(*(part[i] for i in which)) for part in batches) for which in ((0, 1), (0, 0), (1, 1))]
    drawn = torch.randperm(40, generator=similarity.null_generator(3))
    unshuffled = X[drawn.argsort()], Y[drawn.argsort()]
    found = cka(*unshuffled, batch_size=20, n_null=0, seed=3).value
    assert found == pytest.approx(halves[0] / (halves[1] * halves[2]) ** 0.5)
    centre = torch.eye(40, dtype=torch.float64) - 1 / 40
    K, L = centre @ X @ X.T @ centre, centre @ Y @ Y.T @ centre
    wanted = (K * L).sum() / (K.norm() * L.norm())
    assert cka(X, Y, debiased=False, n_null=0).value == pytest.approx(float(wanted))


def test_only_the_debiased_cka_is_0_for_independent_rows_of_many_dimensions():
    """Over 20 seeds: debiased 0.005 ± 0.026; plain 0.790 to 0.812."""
    draws = [torch.randn(2, 50, 200, generator=generator(seed)) for seed in range(20)]
    debiased = torch.tensor([cka(*both, n_null=0).value for both in draws])
    assert abs(float(debiased.mean())) < 0.03
    assert min(cka(*both, debiased=False, n_null=0).value for both in draws) > 0.75


def test_svcca_is_the_mean_canonical_correlation_of_the_leading_components():
    X, Y = pair(n=200, d=6)
    fitted = CCA(6, max_iter=5000, tol=1e-10, scale=False).fit(X.numpy(), Y.numpy())
    scores = fitted.transform(X.numpy(), Y.numpy())
    wanted = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(scores[0].T, scores[1].T, strict=True)])
    assert svcca(X, Y, variance=1.0, n_null=0).value == pytest.approx(wanted, abs=1e-4)
    # One direction of almost all variance, which both sets have: the noise around it is not looked at.
    signal = torch.randn(200, 1, generator=generator(1), dtype=torch.float64)
    noisy = [torch.cat([20 * signal, torch.randn(200, 3, generator=generator(s)).double()], 1) for s in (2, 3)]
    assert svcca(*noisy, variance=0.98, n_null=0).value == pytest.approx(1, abs=1e-3)
    assert svcca(*noisy, variance=1.0, n_null=0).value < 0.5


@pytest.mark.parametrize("metric", similarity.METRICS)
def test_rsa_is_spearmans_correlation_of_the_distances(metric):
    X, Y = pair(n=60)
    wanted = spearmanr(pdist(X.numpy(), metric), pdist(Y.numpy(), metric)).statistic
    assert rsa(X, Y, metric=metric, n_null=0).value == pytest.approx(wanted, abs=1e-9)
    drawn = rsa(X, Y, metric=metric, max_rows=30, n_null=2).value
    assert drawn != pytest.approx(wanted, abs=1e-6)
    assert drawn == pytest.approx(wanted, abs=0.3)


def test_shuffled_rows_of_rsa_are_rows_of_its_distances():
    X, Y = pair(n=30)
    found = rsa(X, Y, metric="cosine", n_null=1, seed=4)
    order = torch.randperm(30, generator=similarity.null_generator(4))
    assert float(found.null[0]) == pytest.approx(rsa(X, Y[order], metric="cosine", n_null=0, seed=4).value)


# Nothing to measure


def test_sets_without_variance_have_no_value():
    X = torch.randn(20, 3, generator=generator())
    flat = torch.full((20, 3), 0.1)
    for measure in (svcca, cka, lambda *a, **o: rsa(*a, metric="euclidean", **o)):
        found = measure(X, flat, n_null=3)
        assert np.isnan(found.value)
        assert np.isnan(found.p)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X: svcca(X, X[1:]), "X and Y must have equally many rows, at least 2, got 9 and 8"),
        (lambda X: svcca(X[:1], X[:1]), "at least 2, got 1 and 1"),
        (lambda X: cka(X[:3], X[:3]), "at least 4, got 3 and 3"),
        (lambda X: rsa(X[:2], X[:2]), "at least 3, got 2 and 2"),
        (lambda X: svcca(X[0], X), r"X must be \[n, d\], got shape \(4,\)"),
        (lambda X: cka(X, X[:, :0]), r"Y must be \[n, d\], got shape \(9, 0\)"),
        (lambda X: cka(X, X / 0), "Y must be finite"),
        (lambda X: svcca(X, X, variance=0.0), "variance must be above 0 and at most 1"),
        (lambda X: rsa(X, X, metric="city"), "metric must be one of correlation, cosine, euclidean"),
        (lambda X: rsa(X, X, max_rows=2), "max_rows must be at least 3"),
        (lambda X: rsa(X, X * 0, metric="cosine"), "Y must have rows with a cosine distance"),
        (lambda X: cka(X, X, batch_size=3), "batch_size must be in 4 … 9"),
        (lambda X: cka(X, X, batch_size=10), "batch_size must be in 4 … 9"),
        (lambda X: cka(X, X, batch_size=5, debiased=False), "batch_size must be None without debiased"),
        (lambda X: cka(X, X, n_null=-1), "n_null must not be negative"),
    ],
)
def test_bad_rows_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(9, 4, generator=generator()))


# One SAE for two models


def knowing(toy):
    """An SAE that has the true features."""
    sae = sk.SAE(toy.d, len(toy.features), sk.TopK(toy.active)).eval()
    with torch.no_grad():
        sae.W_enc.copy_(toy.features)
        sae.W_dec.copy_(toy.features)
    return sae


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rotation_restores_what_another_models_coordinates_lose(seed):
    toy = ZipfFeatures(features=40, d=32, active=3, generator=generator(seed))
    x = toy.sample(2000, generator(seed + 1))[1]
    turn = rotation(32, generator(seed + 2)).float()
    other = x @ turn + 4 + 0.05 * torch.randn(x.shape, generator=generator(seed + 3))
    found = procrustes_transfer(knowing(toy), x, other, n_null=5)
    results = found.results
    (bound,) = results["rotated"].controls["own activations"].tolist()
    # In six seeds: raw −5.9 to −0.2, moved 0.15 to 0.22, turned 0.72 to 0.78 and own 0.74 to 0.79.
    assert results["raw"].value < 0
    assert results["centred"].value < 0.3
    assert results["rotated"].value > 0.65
    assert bound - 0.05 < results["rotated"].value < bound
    assert results["rotated"].p == pytest.approx(1 / 6)
    assert set(results["rotated"].nulls) == {"random rotation", "tokens permuted"}
    assert 0.1 < float(results["rotated"].null.max()) < 0.4  # permuted tokens still align the directions of variance
    assert results["raw"].p == 1
    torch.testing.assert_close(found.rotation, turn.T.double(), atol=0.05, rtol=0)
    torch.testing.assert_close(found.rotation @ found.rotation.T, torch.eye(32).double())
    moved = (other - found.mean_other) @ found.rotation + found.mean
    assert float((moved - x).square().mean().sqrt()) < 0.1


def test_unpaired_tokens_restore_nothing():
    """Permuted tokens are the same then: p 0.2 to 0.9 over six seeds. A random rotation is an easier null: all 0.05."""
    toy = ZipfFeatures(features=40, d=32, active=3, generator=generator())
    x, other = (toy.sample(1000, generator(seed))[1] for seed in (41, 42))
    found = procrustes_transfer(knowing(toy), x, other @ rotation(32, generator(3)).float(), n_null=19)
    assert found.results["rotated"].p > 0.05
    assert found.results["rotated"].value < 0.4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae, x: procrustes_transfer(sae, x, x[1:]), "x and x_other must have equally many rows, at least 4"),
        (lambda sae, x: procrustes_transfer(sae, x[:3], x[:3]), "at least 4, got 3 and 3"),
        (lambda sae, x: procrustes_transfer(sae, x[:, :3], x[:, :3]), r"x and x_other must be \[n, 5\]"),
        (lambda sae, x: procrustes_transfer(sae, x, x, fit_share=1.0), "fit_share must be above 0 and below 1"),
        (lambda sae, x: procrustes_transfer(sae, x, x / 0), "x_other must be finite"),
        (
            lambda sae, x: procrustes_transfer(sk.Transcoder(5, 8, sk.TopK(1), d_out=6), x, x),
            "sae must reconstruct what it",
        ),
    ],
)
def test_bad_activations_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(sk.SAE(5, 8, sk.TopK(1)), torch.randn(9, 5, generator=generator()))
