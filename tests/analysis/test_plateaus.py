"""Plateaus are found where they were built, and none where there is none."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.plateaus import (
    BASES,
    DIRECTIONS,
    Perturbations,
    Rerun,
    plateaus,
    response_metrics,
    sae_error_kl,
)

SEEDS = range(5)
D, FEATURES, ACTIVE = 32, 24, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Block(nn.Module):
    """Rounds the strengths of features to 0 or 1: no unit notices a change by less than θ; behind a block that does nothing."""

    def __init__(self, features, low, wide):
        super().__init__()
        self.register_buffer("features", features)
        self.low, self.wide = low, wide

    def forward(self, x):
        strengths = x @ self.features.T
        return ((strengths - self.low) / self.wide).clamp(0, 1)


class Planted(nn.Module):
    """Tokens are bags of three of 24 orthonormal features of strength 1, which a saturating layer reads."""

    def __init__(self, seed, low=0.4, wide=0.2):
        super().__init__()
        g = generator(seed)
        self.features = torch.linalg.qr(torch.randn(D, D, generator=g))[0][:FEATURES]
        bags = torch.stack([torch.randperm(FEATURES, generator=g)[:ACTIVE] for _ in range(100)])
        self.embed = nn.Embedding.from_pretrained(self.features[bags].sum(1))
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity(), Block(self.features, low, wide)])
        self.ran = 0

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def sae(self):
        sae = sk.SAE(D, FEATURES, sk.TopK(ACTIVE))
        with torch.no_grad():
            sae.W_enc.copy_(self.features)
            sae.W_dec.copy_(self.features)
        return sae.eval()


def token_ids(seed, contexts=30, positions=6, words=100):
    return torch.randint(words, (contexts, positions), generator=generator(seed))


class Words(nn.Module):
    """Logits of a linear map of the activations: the model that a divergence has no plateau in."""

    def __init__(self, seed, d=8, words=12, scale=1.0):
        super().__init__()
        g = generator(seed)
        self.embed = nn.Embedding.from_pretrained(torch.randn(100, d, generator=g))
        self.block = nn.Identity()
        self.out = nn.Linear(d, words)
        self.out.weight.data = scale * torch.randn(words, d, generator=g)

    def forward(self, ids):
        return self.out(self.block(self.embed(ids)))


# Curves


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(0.1, 10))
def test_metrics_scale_with_the_curve_and_with_alpha(seed, tall, wide):
    alphas = torch.cat([torch.zeros(1).double(), torch.rand(7, generator=generator(seed)).double().cumsum(0) + 0.01])
    values = torch.rand(5, 8, generator=generator(seed + 1)).double()
    values[:, 0] = 0
    one = response_metrics(alphas, values, level=0.3)
    two = response_metrics(wide * alphas, tall * values, level=0.3 * tall)
    for name, factor in {
        "width": wide,
        "onset": wide,
        "slope": tall / wide,
        "steepness": 1,
        "sensitivity": tall / wide,
        "area": 1,
    }.items():
        torch.testing.assert_close(two[name], factor * one[name])


def test_lines_squares_and_steps():
    alphas = torch.linspace(0, 2, 201).double()
    curves = torch.stack([3 * alphas, alphas**2, ((alphas - 1) / 0.01).clamp(0, 1), 0 * alphas, alphas * torch.nan])
    found = response_metrics(alphas, curves, level=0.5)
    approx = lambda *numbers: pytest.approx(numbers, abs=0.01, nan_ok=True)  # noqa: E731
    assert found["width"].tolist() == approx(0.1, 2 * 0.05**0.5, 1.0005, math.nan, math.nan)
    assert found["onset"].tolist() == approx(1 / 6, 0.5**0.5, 1, 2, math.nan)  # the fourth never gets there
    assert found["slope"].tolist() == approx(3, 3.99, 100, 0, math.nan)
    assert found["steepness"].tolist() == approx(1, 1.995, 200, math.nan, math.nan)
    assert found["area"].tolist() == approx(1 / 2, 1 / 3, 1 / 2, math.nan, math.nan)
    assert found["sensitivity"].tolist() == approx(3, 0.01, 0, 0, math.nan)
    squared = response_metrics(alphas, curves, level=0.5, power=2)["sensitivity"]
    assert float(squared[1]) == pytest.approx(2)  # the second derivative


def test_grids_and_levels_are_checked():
    for alphas, values, options in [
        ([0.0], [0.0], {}),
        ([0.1, 0.2], [0, 1.0], {}),
        ([0, 1.0, 1.0], [0, 1, 1.0], {}),
        ([0, 1.0], [0, 1.0, 2.0], {}),
        ([0, 1.0], [0, 1.0], {"share": 1.0}),
        ([0, 1.0], [0, 1.0], {"level": 0.0}),
    ]:
        with pytest.raises(ValueError, match="must"):
            response_metrics(torch.tensor(alphas), torch.tensor(values), **options)


# Planted plateaus


@pytest.mark.parametrize("seed", SEEDS)
def test_a_linear_network_has_no_plateau(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(100, 12), nn.Linear(12, 10), nn.Linear(10, 7))
    found = plateaus(
        model, "1", [token_ids(seed)], measure="distance", alphas=torch.arange(1, 11) / 4, n=20, seed=seed
    )
    torch.testing.assert_close(found.metrics["width"], torch.full_like(found.metrics["width"], 0.125), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.metrics["steepness"], torch.ones_like(found.metrics["width"]), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.metrics["area"], torch.full_like(found.metrics["width"], 0.5), rtol=1e-4, atol=0)
    assert abs(found.differences["real − random"].value) < 1e-5


@pytest.mark.parametrize("seed", SEEDS)
def test_the_width_of_a_planted_plateau_is_found(seed):
    """Along a latent that is off, the saturating layer answers first at 0.4 and fully at 0.6, in strengths."""
    model = Planted(seed)
    found = plateaus(
        model,
        "blocks.1",
        [token_ids(seed)],
        model.sae(),
        ["isotropic", "inactive_latent", "real_difference", "sae_error"],
        measure="distance",
        alphas=torch.arange(1, 101) / 50,
        n=24,
        seed=seed,
    )
    width = found.length * found.metric("width", "real", "inactive_latent")
    # Exactly 0.4 + 5% of 0.2; straight between points of the grid.
    torch.testing.assert_close(width, torch.full_like(width, 0.41), atol=0.02, rtol=0)
    assert found.metrics["steepness"][0, 1].min() > 5
    assert found.values[0, found.directions.index("sae_error")].isnan().all()  # there is no error
    toward, random = (found.metric("onset", "real", kind) for kind in ("real_difference", "isotropic"))
    print(seed, toward.mean(), random.mean(), found.metric("width", "real").mean(), found.metric("width", "random").mean())
    assert found.results["real_difference − isotropic"].p < 0.01
    assert found.differences["real_difference − isotropic"].high < 0
    assert found.differences["real − random"].low > 0
