"""Made data are what they promise."""

import pytest
import torch

from sparsekern.analysis.toy import SubspaceClusters


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "shape", [{}, {"d": 40, "clusters": 3, "dim": 5, "features": 12, "active": 3}, {"features": 3}]
)
def test_features_lie_in_orthogonal_subspaces_around_their_axes(shape):
    toy = SubspaceClusters(**shape, generator=generator())
    dim = shape.get("dim", 8)
    torch.testing.assert_close(toy.features.norm(dim=1), torch.ones(len(toy.features)))
    gram = toy.features @ toy.features.T
    other = toy.cluster_of[:, None] != toy.cluster_of
    assert float(gram[other].abs().max()) < 1e-5
    with_axes = toy.features @ toy.axes.T
    own = torch.nn.functional.one_hot(toy.cluster_of, toy.clusters) * dim**-0.5
    torch.testing.assert_close(with_axes, own, atol=1e-5, rtol=0)
    for cluster in range(toy.clusters):
        rows = toy.features[toy.cluster_of == cluster]
        assert int(torch.linalg.matrix_rank(rows, atol=1e-4)) == min(dim, len(rows))


@pytest.mark.parametrize("seed", range(5))
def test_no_two_features_are_duplicates(seed):
    toy = SubspaceClusters(generator=generator(seed))
    gram = toy.features @ toy.features.T - torch.eye(64)
    assert float(gram.max()) < 0.8  # seeds 0 … 4: 0.64 to 0.68


def test_a_token_has_features_of_one_cluster_and_x_is_their_sum():
    toy = SubspaceClusters(noise=0, active=3, generator=generator())
    activations, x = toy.sample(2000, generator(1))
    torch.testing.assert_close(x, activations @ toy.features)
    assert ((activations > 0).sum(1) == 3).all()
    assert float(activations[activations > 0].min()) >= 0.5
    assert float(activations.max()) <= 1.5
    active = activations > 0
    per_cluster = torch.stack([active[:, toy.cluster_of == c].any(1) for c in range(4)])
    assert (per_cluster.sum(0) == 1).all()
    assert torch.equal(per_cluster.int().argmax(0), toy.clusters_of(activations))
    share = per_cluster.double().mean(1)
    assert ((share - 0.25).abs() < 0.05).all()  # 5 standard errors of 0.0097


def test_the_axes_are_a_linear_router_that_makes_no_mistake():
    toy = SubspaceClusters(generator=generator())
    activations, x = toy.sample(5000, generator(1))
    wrong = (x @ toy.axes.T).argmax(1) != toy.clusters_of(activations)
    assert wrong.double().mean() < 1e-3


def test_the_noise_is_as_large_as_promised():
    toy = SubspaceClusters(noise=0.2, generator=generator())
    activations, x = toy.sample(4000, generator(1))
    assert float((x - activations @ toy.features).std()) == pytest.approx(0.2, rel=0.02)


def test_the_seed_determines_everything():
    draws = [SubspaceClusters(generator=generator(3)).sample(10, generator(4)) for _ in range(2)]
    assert torch.equal(draws[0][1], draws[1][1])
    assert not torch.equal(SubspaceClusters(generator=generator(5)).features, SubspaceClusters().features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d": 31}, r"d must be at least clusters \* dim = 32"),
        ({"active": 17}, "active must be in 1 … features=16, got 17"),
        ({"dim": 1}, "dim must be at least 2"),
        ({"clusters": 0}, "clusters must be at least 1"),
        ({"noise": -1.0}, "noise must not be negative"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SubspaceClusters(**options)
