"""Topics in contexts, manifolds and hedging: the data are what they promise, and SAEs do what the laws say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.analysis import toy
from sparsekern.analysis.toy import ContextTopics, ManifoldFeatures, predicted_split

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Data


@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.5, 3), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_a_token_has_a_topic_and_a_context(topics, contexts, magnitude, seed):
    made = ContextTopics(topics, contexts, d=10, magnitude=magnitude, generator=generator(seed))
    activations, x = made.sample(50, generator(seed + 1))
    torch.testing.assert_close(x, activations @ made.features)
    torch.testing.assert_close(made.features @ made.features.T, torch.eye(topics + contexts), atol=1e-5, rtol=0)
    assert ((activations[:, :topics] > 0).sum(1) == 1).all()
    assert ((activations[:, topics:] > 0).sum(1) == 1).all()
    torch.testing.assert_close(activations.amax(1), torch.full((50,), magnitude))


def test_topics_and_contexts_are_even_and_x_has_its_length():
    made = ContextTopics(4, 2, magnitude=1.5, generator=generator())
    activations, x = made.sample(40_000, generator(1))
    share = (activations > 0).double().mean(0)
    assert (share - torch.tensor([0.25] * 4 + [0.5] * 2)).abs().max() < 0.0125  # 5 standard errors
    assert float((x - x.mean(0)).square().sum(1).mean().sqrt()) == pytest.approx(made.length, rel=0.01)


def test_the_dictionary_of_contexts_and_topics_in_them():
    made = ContextTopics(3, 2, d=40, generator=generator())
    parents, children, direction = made.dictionary()
    topics, contexts = made.features[:3], made.features[3:]
    torch.testing.assert_close(parents, contexts)
    torch.testing.assert_close(children, contexts[:, None] + topics)
    assert (made.features @ direction).abs().max() < 1e-5
    noisy = torch.stack([made.dictionary(2.0, generator=generator(seed))[1] - children for seed in range(50)])
    assert float(noisy.square().sum(3).mean().sqrt()) == pytest.approx(2, rel=0.05)
    _, drawn, along = made.dictionary(distractor=2.0, generator=generator(3))
    torch.testing.assert_close(drawn - children, ((drawn - children) @ along)[..., None] * along, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "dimensions"), [("circle", 2), ("torus", 4), ("sphere", 3)])
@pytest.mark.parametrize("points", [None, 5])
def test_manifolds_are_what_they_promise(kind, dimensions, points):
    made = ManifoldFeatures(kind, points, d=7, generator=generator())
    activations, x = made.sample(20_000, generator(1))
    torch.testing.assert_close(x, activations @ made.features)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))
    torch.testing.assert_close(x @ made.axes.T @ made.axes, x, atol=1e-5, rtol=0)
    coordinates = x @ made.axes.T
    if kind == "torus":
        torch.testing.assert_close(coordinates[:, :2].norm(dim=1), torch.full((len(x),), 0.5**0.5))
    if points is None:
        assert coordinates.mean(0).abs().max() < 0.025  # 5 standard errors at most
        assert (coordinates.square().mean(0) - 1 / dimensions).abs().max() < 0.0125
    else:
        assert len(x.mul(1e4).round().unique(dim=0)) == 5
        assert (activations.sum(1) == 1).all()
    noise = ManifoldFeatures(kind, points, d=7, noise=0.3, generator=generator()).sample(20_000, generator(1))
    assert float((noise[1] - noise[0] @ made.features).std()) == pytest.approx(0.3, rel=0.02)


def test_points_of_a_circle_are_evenly_spaced():
    features = ManifoldFeatures("circle", 12, generator=generator()).features
    cosines = (features @ features.T).sort(dim=1, descending=True).values
    torch.testing.assert_close(cosines[:, 1:3], torch.full((12, 2), 0.75**0.5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ContextTopics(0), "topics must be at least 1, got 0"),
        (lambda: ContextTopics(4, 2, d=5), "d must be at least the number of features, 6"),
        (lambda: ContextTopics(magnitude=0), "magnitude_mean must be above 0"),
        (lambda: ContextTopics(4, 2, d=6).dictionary(), r"d must be above topics \+ contexts = 6"),
        (lambda: ContextTopics(4, 2, d=9).dictionary(-1), "noise and distractor must not be negative"),
        (lambda: ManifoldFeatures("klein"), "kind must be one of circle, torus, sphere, got 'klein'"),
        (lambda: ManifoldFeatures(points=0), "points must be at least 1"),
        (lambda: ManifoldFeatures("torus", d=3), "d must be at least the number of features, 4"),
        (lambda: ManifoldFeatures(noise=-1), "noise must not be negative"),
        (lambda: predicted_split(4, 2, 6), "give either l1 or k"),
        (lambda: predicted_split(4, 2, 0, k=1), "width and k must be at least 1"),
        (lambda: toy.splitting_law(start="truth"), "start must be dictionaries or random, got 'truth'"),
        (lambda: toy.splitting_law(widths=()), "widths must not be empty"),
        (lambda: toy.manifold_or_finite(widths=(4, 8)), "with points=12 after the first"),
        (lambda: toy.manifold_or_finite(widths=(8, 4, 12)), "widths must rise"),
        (lambda: toy.manifold_or_finite(l1=2.0), "l1 must be above 0 and below 2"),
        (lambda: toy.manifold_or_finite(n_null=0), "n_null must be at least 1"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The splitting law


def test_the_law_says_when_splitting_pays():
    # Each alone: 2 (λ − λ² / 4) by two latents, √2 λ − λ² / 4 by one.
    parts, split = predicted_split(4, 2, 6, l1=0.1), predicted_split(4, 2, 8, l1=0.1)
    assert parts.loss == pytest.approx(0.2 - 0.005)
    assert (parts.least, parts.most) == (0, 0)
    assert split.loss == pytest.approx(2**0.5 * 0.1 - 0.0025)
    assert (split.least, split.most) == (8, 8)
    assert predicted_split(4, 2, 7, l1=0.02).most == 2
    assert predicted_split(4, 2, 6, l1=0.8).least == 5  # a price at which parts are not worth their price
    # A length m survives below λ = 2 m: parts below 2, pairs below 2.83.
    assert predicted_split(4, 2, 8, l1=2.5).least == 8
    assert predicted_split(4, 2, 8, l1=3.0).loss == pytest.approx(2)
    assert predicted_split(4, 2, 8, l1=6.0, magnitude=3.0).loss < 18
    # TopK: pairs are forced with one latent a token, and free with two.
    assert predicted_split(4, 2, 8, k=1).least == 8
    assert (predicted_split(4, 2, 8, k=2).least, predicted_split(4, 2, 8, k=2).most) == (0, 8)
    assert predicted_split(4, 2, 6, k=2).most == 0


@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 4), st.integers(1, 11))
def test_wider_is_never_worse_and_nothing_beats_a_latent_a_pair(topics, contexts, l1, width):
    losses = [predicted_split(topics, contexts, w, l1=l1).loss for w in (width, width + 1, topics * contexts)]
    assert losses[1] <= losses[0] + 1e-12
    assert losses[2] <= losses[0] + 1e-12
    assert losses[0] <= 2 + 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_saes_split_where_the_law_says(seed):
    options = {"widths": (6, 8), "l1": (0.1, 0.8), "k": (1,), "steps": 100}
    found = toy.splitting_law(seed, **options)
    cheap, dear, one = found.counts
    assert cheap.tolist() == [[4, 2, 0], [0, 0, 8]]
    assert dear[1].tolist() == one[1].tolist() == [0, 0, 8]
    # With six latents at λ = 0.8 parts and five composites cost nearly the same: 1.161 and 1.139, the law 1.222.
    assert (found.loss <= 1.01 * found.predicted_loss + 0.01).all()
    torch.testing.assert_close(found.loss[:2, 1], found.predicted_loss[:2, 1], rtol=0.03, atol=0)
    assert found.results["composites"].value < 1.2  # of eight; 0.17 or 1.00
    assert found.results["composites"].p < 0.2  # six cells
    assert len(found.to_records()) == 6
    assert found.plot().get_xlabel() == "latents"
    assert len(found.to_frame()) == 2


def test_one_step_from_random_rows_and_with_a_bias():
    found = toy.splitting_law(widths=(7,), l1=(0.1,), k=(2,), start="random", n_starts=1, bias=True, steps=1, n_null=3)
    assert found.counts.shape == (2, 1, 3)
    assert found.penalties == ["λ = 0.1", "TopK 2"]
    assert found.loss.isfinite().all()


# Manifolds


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_related_points_have_a_knee_and_a_circle_has_none(seed):
    found = toy.manifold_or_finite(seed, widths=(4, 12, 16), steps=100, n_null=2)
    assert found.knees() == (12, None)
    left = found.results["left"]
    assert left.value < 0.01  # 0.000
    assert left.null.min() > 0.4  # 0.52 to 0.54
    assert left.p == pytest.approx(1 / 3)
    assert found.loss[0, 1] == pytest.approx(found.floor, rel=0.01)
    assert found.alive[1].tolist() == [4, 12, 16]
    assert found.l0[0, 1] == pytest.approx(1, abs=0.01)
    assert found.plot().get_xlabel() == "latents"
    assert len(found.to_frame()) == 1


@pytest.mark.parametrize("kind", ["torus", "sphere"])
def test_other_manifolds_train(kind):
    found = toy.manifold_or_finite(kind=kind, points=3, widths=(1, 3, 5), steps=1, n_null=1)
    assert (found.loss >= found.floor - 1e-3).all()


# Hedging


@pytest.mark.parametrize("seed", SEEDS)
def test_one_latent_hedges_where_the_child_needs_the_parent(seed):
    for hierarchical in (True, False):
        found = toy.hedging(seed, hierarchical=hierarchical, steps=150)
        results = found.scores.results
        if hierarchical:
            assert results["child_in_latent"].value == pytest.approx(0.2 / 1.04**0.5, abs=0.08)  # 0.22 to 0.24
            assert results["child_in_latent"].p == pytest.approx(1 / 101)
            assert abs(results["child_in_bias"].value) < 0.03  # −0.014 to −0.006
            assert results["hedging_rate"].value > 0.05  # 0.11 to 0.16
        else:
            assert abs(results["child_in_latent"].value) < 0.04  # −0.005 to 0.006
            assert results["child_in_bias"].value == pytest.approx(0.05, abs=0.02)  # 0.047 to 0.055
            assert results["child_in_bias"].p < 0.05
            assert results["hedging_rate"].value < 0.04  # 0.000 to 0.004
        assert found.sae.d_sae == 1
        assert found.extended.d_sae == 2


def rows(matrix):
    sae = sk.SAE(matrix.shape[1], len(matrix), sk.TopK(1))
    with torch.no_grad():
        sae.W_dec.copy_(matrix)
    return sae


def test_the_hedging_rate_is_what_goes_to_the_new_rows():
    base = torch.eye(50)
    mixed = base[:2] + 0.6 * base[2]
    clean = toy.hedging_rate(rows(mixed), rows(base[:3]), n_null=200)
    # 0.6 of 1.166 goes, less what a random direction of 50 takes: about 0.8 · 0.6 / √50 / 1.166.
    assert clean.value == pytest.approx((0.6 / 1.36**0.5 - 0.058) / (1 - 0.058), abs=0.01)
    assert clean.p == pytest.approx(1 / 201)
    assert toy.hedging_rate(rows(mixed), rows(torch.cat([mixed, base[5:7]]))).value == 0
    elsewhere = torch.cat([mixed + base[9], base[5:6]])
    assert toy.hedging_rate(rows(mixed), rows(elsewhere)).value == 0
    for control, extended, message in (
        (base[:3], base[:3], "extended must have more latents"),
        (base[:1], torch.cat([base[:1], base]), "must span some of the 50 dimensions, not 50"),
        (base[:1], 0 * base[:2], "must span some of the 50 dimensions, not 0"),
    ):
        with pytest.raises(ValueError, match=message):
            toy.hedging_rate(rows(control), rows(extended))
    with pytest.raises(ValueError, match="n_null must be at least 1"):
        toy.hedging_rate(rows(base[:1]), rows(base[:2]), n_null=0)
