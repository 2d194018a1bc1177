"""Circles are told from what only looks like them; five seeds stand beside bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.geometry import (
    circles,
    closure,
    cluster_search,
    dictionary_clusters,
    mixture_index,
    plane_scores,
    separability,
)

N = 20000


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def shapes(seed, n=N):
    g = generator(seed)
    uniform, normal = (lambda *s: torch.rand(*s, generator=g)), (lambda *s: torch.randn(*s, generator=g))

    def ring(points):
        turns = uniform(n) if points is None else torch.randint(points, (n,), generator=g) / points
        return torch.stack([(2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()], 1)

    strengths, first = -(1 - uniform(n, 2)).log(), uniform(n) < 0.5
    return {
        "circle": ring(None),
        "7 points": ring(7) + 0.1 * normal(n, 2),
        "12 points": ring(12) + 0.1 * normal(n, 2),
        "Gaussian": normal(n, 2),
        "exponentials": -(1 - uniform(n, 2)).log(),
        "disjoint": torch.stack([strengths[:, 0] * first, strengths[:, 1] * ~first], 1),
        "sparse": (uniform(n, 2) < 0.05).float(),
    }


# Points in a plane


def test_only_circles_are_neither_separable_nor_a_mixture():
    """Five seeds, S and M: circle 3.02 and 0.22 to 0.23, seven points 1.45 to 1.46 and 0.22, twelve 1.06 to 1.07 and
    0.17, Gaussian 0.01 and 0.09, exponentials 0.01 and 0.24, disjoint 0.38 to 0.42 and 0.59, sparse 0.00 and 0.95."""
    found = {name: (separability(p), mixture_index(p, n_angles=24)) for name, p in shapes(0).items()}
    for name in ("circle", "7 points", "12 points"):
        assert found[name][0] > 1
        assert found[name][1] < 0.25
    for name in ("Gaussian", "exponentials", "sparse"):
        assert abs(found[name][0]) < 0.03
    assert 0.35 < found["disjoint"][0] < 0.5
    assert found["disjoint"][1] > 0.5
    assert found["sparse"][1] > 0.9
    scores = {name: (1 - m) * s for name, (s, m) in found.items()}
    assert sorted(scores, key=lambda name: -scores[name])[:3] == ["circle", "7 points", "12 points"]


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 60), st.floats(0.05, 0.6), st.integers(0, 2**31))
def test_the_mixture_index_is_the_best_line(n, epsilon, seed):
    p = torch.randn(n, 2, generator=generator(seed)).double()
    p[: n // 2, 0] = 0.3
    p -= p.mean(0)
    angles = torch.arange(4, dtype=p.dtype) * math.pi / 4
    found = circles._near_a_line(p, angles, epsilon)
    c = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None]
    for angle, share in zip(angles, found, strict=True):
        u = p @ torch.stack([angle.cos(), angle.sin()]) + c
        size = u.square().mean(1, keepdim=True).sqrt()
        least, most = ((u.abs() < factor * epsilon * size).double().mean(1).max() for factor in (0.999, 1.1))
        assert least <= share <= most  # on the grid of c, and with room for its spacing
    assert mixture_index(p, epsilon, n_angles=4) >= float(found.max())


def test_on_one_axis_the_mixture_index_has_a_known_value():
    g = generator()
    p = torch.stack([torch.zeros(1000), torch.randn(1000, generator=g)], 1)
    p[:300, 0] = torch.randn(300, generator=g)
    assert mixture_index(p) >= 0.7
    assert mixture_index(torch.outer(torch.randn(50, generator=g), torch.tensor([1.0, 2.0]))) == 1


def test_the_mixture_index_is_at_least_what_gradients_find():
    for name in ("12 points", "exponentials", "disjoint"):
        p = shapes(0, 500)[name].double()
        p -= p.mean(0)
        v, c = torch.tensor([1.0, 0.3], dtype=p.dtype), torch.zeros(1, dtype=p.dtype)
        optimizer = torch.optim.Adam([v.requires_grad_(), c.requires_grad_()], lr=0.1)
        for step in range(200):
            u = p @ v + c
            size = u.abs() / u.square().mean().sqrt()
            optimizer.zero_grad()
            (-torch.sigmoid((0.1 - size) / max(0.02, 0.5 * (1 - step / 150)))).mean().backward()
            optimizer.step()
        u = (p @ v + c).detach()
        climbed = float((u.abs() < 0.1 * u.square().mean().sqrt()).double().mean())
        assert mixture_index(p) >= climbed - 0.005, name


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100), st.floats(-5, 5), st.integers(0, 7))
def test_moving_scaling_and_turning_change_little(seed, scale, offset, turn):
    p = shapes(seed, 400)["7 points"].double()
    angle = math.pi * turn / 16  # on the grid of the separability
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    other = scale * p @ rotation + offset
    assert separability(other) == pytest.approx(separability(p), abs=0.02)  # points on the edge of a bin
    assert mixture_index(other) == pytest.approx(mixture_index(p), abs=0.02)


def test_the_separability_is_that_of_the_definition():
    p = shapes(3, 500)["disjoint"].double()
    least = math.inf
    for angle in range(4):
        turn = math.pi / 8 * angle
        a, b = math.cos(turn) * p[:, 0] + math.sin(turn) * p[:, 1], math.cos(turn) * p[:, 1] - math.sin(turn) * p[:, 0]
        counts = torch.histogramdd(torch.stack([a, b], 1), [6, 6]).hist
        entropies = []
        for c in (counts.sum(0), counts.sum(1), counts.flatten()):
            shares = c[c > 0] / 500
            entropies.append(float(-(shares * shares.log()).sum()) + (len(shares) - 1) / 1000)
        least = min(least, (entropies[0] + entropies[1] - entropies[2]) / math.log(2))
    assert separability(p, 6, 4) == pytest.approx(least, abs=1e-9)


def test_without_the_correction_few_points_depend_on_each_other():
    gaussian = torch.randn(400, 2, generator=generator())
    assert abs(separability(gaussian, 7)) < 0.05
    assert abs(separability(gaussian)) < 0.05


def test_a_plane_stands_beside_its_nulls():
    found = plane_scores(shapes(0, 1000)["12 points"], n_null=4)
    assert found.results["score"].p == pytest.approx(0.2)
    assert found.score == found.results["score"].value
    assert set(found.results["score"].nulls) == {"coordinates permuted", "Gaussian"}
    chance = plane_scores(torch.randn(1000, 2, generator=generator(1)), n_null=4)
    assert chance.results["score"].p > 0.2
    assert len(found.to_frame()) == 6


def test_points_without_a_plane():
    same = torch.ones(5, 2)
    assert math.isnan(separability(same))
    assert math.isnan(mixture_index(same))
    line = torch.arange(10.0)[:, None] * torch.tensor([1.0, 0.0])
    assert mixture_index(line) == 1
    assert mixture_index(torch.tensor([[0.0, 0], [1, 0]])) == 1


# Closure


def test_a_circle_closes_and_a_line_does_not():
    turns = 2 * math.pi * torch.arange(12) / 12
    circle = torch.stack([turns.cos(), turns.sin()], 1)
    found = closure(circle)
    assert found.value == pytest.approx(1)
    assert found.p > 0.1
    line = closure(torch.arange(12.0)[:, None])
    assert line.value == pytest.approx(11)
    assert line.p < 0.02
    noise = [closure(torch.randn(12, 30, generator=generator(seed)), n_null=39).p for seed in range(40)]
    assert sum(p <= 0.1 for p in noise) <= 10  # four are expected; 10 or more have a chance of 0.005
    assert math.isnan(closure(torch.zeros(5, 2)).value)


# Clusters


def planted(seed, W=200, d=64, n=5000, families=2):
    """A dictionary with a circle of seven latents, one of twelve, and families with nothing in common but a parent."""
    g = generator(seed)
    D = normalize(torch.randn(W, d, generator=g), dim=1)
    groups, start = [], 0
    for size in (7, 12):
        frame = torch.linalg.qr(torch.randn(d, 3, generator=g))[0].T
        turns = 2 * math.pi * torch.arange(size)[:, None] / size
        D[start : start + size] = 0.7 * frame[0] + 0.714 * (turns.cos() * frame[1] + turns.sin() * frame[2])
        groups.append(torch.arange(start, start + size))
        start += size
    for _ in range(families):
        parent, children = (normalize(torch.randn(m, d, generator=g), dim=1) for m in (1, 8))
        D[start : start + 8] = normalize(0.75 * parent + 0.66 * children, dim=1)
        groups.append(torch.arange(start, start + 8))
        start += 8
    indices = start + torch.rand(n, W - start, generator=g).argsort(1)[:, :5].int()
    values = 0.5 + torch.rand(n, 5, generator=g)
    kind = torch.randint(len(groups), (n,), generator=g)
    for which, group in enumerate(groups):
        tokens = (kind == which).nonzero().squeeze(1)
        if which > 1:
            indices[tokens, 0] = group[torch.randint(8, (len(tokens),), generator=g)].int()
            continue
        place = len(group) * torch.rand(len(tokens), generator=g)  # between two neighbours of the circle
        left = place.long() % len(group)
        indices[tokens, 0], indices[tokens, 1] = group[left].int(), group[(left + 1) % len(group)].int()
        values[tokens, 0], values[tokens, 1] = 1 - place.frac(), place.frac()
    return D, sk.SparseCodes(values, indices, W), groups


@pytest.mark.parametrize("seed", range(2))
def test_planted_circles_are_found_first_and_families_are_not_taken_for_circles(seed):
    """Five seeds: the circles 1.17 to 1.18 and 1.04 to 1.08, the next 0.73 to 0.83, the nulls at most 0.99."""
    D, codes, groups = planted(seed)
    found = cluster_search(D, codes, n_null=2, n_planes=2, max_points=1200)
    assert sorted(map(len, found.clusters[:2])) == [7, 12]
    for cluster in found.clusters[:2]:
        assert any(torch.equal(cluster, group) for group in groups[:2])
    assert found.scores[1] > found.scores[2] + 0.1
    assert found.p[:2].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert found.p[2] == 1
    assert found.results["best"].p == pytest.approx(1 / 3)
    nulls = found.results["best"].nulls
    assert nulls["coordinates permuted"].max() < 0.2 < nulls["random dictionary"].min()
    assert found.cosine[0] == pytest.approx(0.49 - 0.51 / (len(found.clusters[0]) - 1), abs=0.02)
    assert len(found.to_frame()) == 6
    assert "mixture" in found.plot().get_xlabel()


def test_neighbours_are_those_of_the_full_table(monkeypatch):
    monkeypatch.setattr(circles, "_TILE", 11)
    D = torch.randn(90, 5, generator=generator(4))
    D[[3, 40, 41, 42]] = torch.stack([torch.zeros(5), D[7], D[7], 2 * D[7]])  # none; more copies than neighbours
    cosines = normalize(D.double(), dim=1) @ normalize(D.double(), dim=1).T
    cosines.fill_diagonal_(-2)
    values, near = cosines.topk(2)
    linked = torch.zeros(90, 90, dtype=torch.bool)
    linked[torch.arange(90)[:, None], near] = values > 0.8
    linked = linked | linked.T
    reach = linked | torch.eye(90, dtype=torch.bool)
    for _ in range(8):
        reach = (reach.float() @ reach.float()) > 0
    expected = {tuple(row.nonzero().squeeze(1).tolist()) for row in reach if row.sum() > 1}
    found = [tuple(cluster.tolist()) for cluster in dictionary_clusters(D, cos=0.8)]
    assert any({7, 40, 41, 42} <= set(cluster) for cluster in found)
    assert {cluster for cluster in expected if 7 not in cluster} == {cluster for cluster in found if 7 not in cluster}
    assert list(map(len, found)) == sorted(map(len, found), reverse=True)


def test_spectral_clusters_are_the_planted_ones():
    g = generator()
    centres = torch.linalg.qr(torch.randn(16, 4, generator=g))[0].T
    D = centres.repeat_interleave(10, 0) + 0.05 * torch.randn(40, 16, generator=g)
    order = torch.randperm(40, generator=g)
    found = dictionary_clusters(D[order], "spectral", n_clusters=4)
    assert sorted(sorted(set((order[cluster] // 10).tolist())) for cluster in found) == [[0], [1], [2], [3]]
    some = dictionary_clusters(D, "spectral", n_clusters=2, latents=torch.arange(20))
    assert sorted(cluster.tolist() for cluster in some) == [list(range(10)), list(range(10, 20))]


def test_clusters_of_nothing():
    assert dictionary_clusters(torch.eye(5)) == []
    assert dictionary_clusters(torch.zeros(3, 4)) == []
    assert dictionary_clusters(torch.ones(1, 4)) == []
    assert [c.tolist() for c in dictionary_clusters(torch.ones(2, 4))] == [[0, 1]]


# Errors

P, D = torch.randn(10, 2, generator=generator()), torch.eye(4)
CODES = sk.SparseCodes(torch.ones(6, 1), torch.arange(6).view(6, 1).int() % 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: separability(torch.ones(5, 3)), r"points must be \[n, 2\]"),
        (lambda: separability(P[:1]), "at least 2, got shape"),
        (lambda: separability(P * torch.nan), "points must be finite"),
        (lambda: separability(P, 1), "bins must be at least 2, got 1"),
        (lambda: separability(P, n_angles=0), "n_angles must be at least 1"),
        (lambda: mixture_index(P, 1.0), "epsilon must be above 0 and below 1, got 1.0"),
        (lambda: mixture_index(P, n_angles=0), "n_angles must be at least 1, got 0"),
        (lambda: plane_scores(P, n_null=-1), "n_null must not be negative"),
        (lambda: closure(P[:3]), r"points must be \[n, d\], at least 4"),
        (lambda: closure(P, n_null=-1), "n_null must not be negative"),
        (lambda: dictionary_clusters(D * torch.nan), "decoder must be finite rows"),
        (lambda: dictionary_clusters(D, "k-means"), "method must be neighbours or spectral, got 'k-means'"),
        (lambda: dictionary_clusters(D, cos=1.0), "cos must be above −1 and below 1, got 1.0"),
        (lambda: dictionary_clusters(D, "spectral", n_clusters=1), "n_clusters must be at least 2, got 1"),
        (lambda: dictionary_clusters(D, latents=torch.tensor([4])), r"whole numbers in \[0, 4\)"),
        (lambda: dictionary_clusters(D, latents=torch.tensor([1, 1])), "latents must not repeat"),
        (lambda: cluster_search(torch.eye(5), CODES), r"decoder must be finite rows \[4, d\]"),
        (lambda: cluster_search(D, CODES), "clusters must have one whose latents are active on 100 tokens"),
        (lambda: cluster_search(D, CODES, nulls=["rotation"]), "nulls must be among membership"),
        (lambda: cluster_search(D, CODES, max_points=10), "max_points must be at least 100, got 10"),
        (lambda: cluster_search(D, CODES, n_null=-1), "n_null must be at least 0, got -1"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
