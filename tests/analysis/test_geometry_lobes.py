"""Planted lobes and subspaces are found, and none where nothing was planted."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import orthogonal_mp
from sklearn.metrics import adjusted_mutual_info_score
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.geometry import (
    PlantedLobes,
    capacity,
    lobes,
    one_space_or_many,
    subspace_clusters,
    union_of_subspaces,
)
from sparsekern.analysis.geometry.counts import Active

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def agreement(found, block):
    return adjusted_mutual_info_score(found.lobe.numpy(), block[found.latents].numpy())


# Lobes


@pytest.mark.parametrize(("lift", "least", "most"), [(10, 0.99, 1), (3, 0.9, 1), (1, -0.1, 0.1)])
def test_blocks_are_found_at_high_lift_and_not_without(lift, least, most):
    """4,000 chunks, five seeds: AMI 1.00 at lifts 10 and 3 and −0.01 to 0.02 at 1."""
    for seed in SEEDS:
        g = generator(seed)
        planted = PlantedLobes(lift, share=0.04, generator=g)
        found = one_space_or_many(planted.sample(4000, g), planted.decoder, n_lobes=6, n_null=1, seed=seed)
        assert least <= agreement(found, planted.block) <= most
        within = found.results["within"]
        if lift > 1:
            assert within.value > 2 * float(within.null.max())
        else:  # lobes of chance are as good: 0.90 to 1.03 of it
            assert within.value == pytest.approx(float(within.null.mean()), rel=0.2)
        # The rows know of nothing.
        assert abs(found.results["ami"].value) < 0.06
        assert found.results["accuracy"].value < 0.4


@pytest.mark.parametrize("seed", SEEDS)
def test_a_decoder_that_knows_of_the_blocks_is_told_from_one_that_does_not(seed):
    g = generator(seed)
    planted = PlantedLobes(5, share=0.04, spread=1.0, generator=g)
    found = one_space_or_many(planted.sample(4000, g), planted.decoder, n_lobes=6, n_null=2, seed=seed)
    assert found.results["ami"].value > 0.9  # 0.99 to 1 in five seeds
    assert found.results["accuracy"].value > 0.9  # 1.00
    for key in ("ami", "accuracy"):
        assert found.results[key].p == pytest.approx(1 / 3)
        assert set(found.results[key].nulls) == {"tokens shuffled", "latents permuted", "random decoder"}
    assert (found.phi.diagonal() > 2.5 * found.phi[0, 1].abs()).all()  # at least 4.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(3, 60), st.integers(2, 9))
def test_phi_is_the_correlation_of_presence(seed, tokens, latents):
    on = torch.rand(tokens, latents, generator=generator(seed)) < 0.4
    on[0], on[1] = True, False  # none is everywhere or nowhere
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), on.sum(1).cumsum(0)])
    codes = sk.CSRCodes(crow, on.nonzero()[:, 1].int(), torch.ones(int(on.sum())), latents)
    phi = lobes._Phi(Active.of(codes), torch.arange(latents)) @ torch.eye(latents, dtype=torch.float64).numpy()
    n11 = on.double().T @ on.double()
    n10, n01, n00 = (a.double().T @ b.double() for a, b in ((on, ~on), (~on, on), (~on, ~on)))
    expected = (n11 * n00 - n10 * n01) / ((n11 + n10) * (n00 + n01) * (n11 + n01) * (n00 + n10)).sqrt()
    torch.testing.assert_close(torch.from_numpy(phi), expected, atol=1e-9, rtol=0)


def test_lobes_are_the_clusters_of_the_full_matrix():
    planted = PlantedLobes(4, blocks=3, size=20, share=0.05, generator=generator())
    codes = planted.sample(3000, generator(1))
    found = one_space_or_many(codes, planted.decoder, n_lobes=3, n_null=0)
    affinity = torch.corrcoef(codes.to_dense().double().T[found.latents]) + 1
    scale = affinity.sum(1).rsqrt()
    _, vectors = torch.linalg.eigh(scale[:, None] * affinity * scale)
    overlap = torch.linalg.svdvals(vectors[:, -3:].T @ found.embedding)
    torch.testing.assert_close(overlap, torch.ones(3, dtype=torch.float64), atol=1e-4, rtol=0)  # the same space
    one = found.lobe == 0
    among = (affinity - 1)[one][:, one]
    mean = (among.sum() - len(among)) / (len(among) * (len(among) - 1))
    assert float(found.phi[0, 0]) == pytest.approx(float(mean))


def test_chunks_and_rare_latents():
    planted = PlantedLobes(6, blocks=2, size=10, share=0.03, generator=generator())
    codes = planted.sample(4000, generator(1))
    with torch.no_grad():
        codes = codes._replace(values=torch.where(codes.col == 3, 0.0, codes.values))
    found = one_space_or_many(codes, planted.decoder, torch.arange(4000) // 2, n_lobes=2, n_null=1, max_latents=12)
    assert 3 not in found.latents.tolist()  # never active
    assert len(found.latents) == 19
    assert (found.cluster >= 0).sum() == 12
    assert found.plot().axes
    assert len(found.to_frame()) == 1 + 3 + 3


def test_one_lobe_that_is_far_larger_leaves_accuracy_undefined():
    assert math.isnan(lobes._accuracy(torch.randn(30, 4, generator=generator()), torch.tensor([0] * 28 + [1] * 2), 0))


# Subspaces


def union(seed, noise=0.0, d=24, dim=4, rows=40, parts=4):
    g = generator(seed)
    bases = [torch.linalg.qr(torch.randn(d, dim, generator=g))[0] for _ in range(parts)]
    unit = normalize(torch.cat([torch.randn(rows, dim, generator=g) @ basis.T for basis in bases]), dim=1)
    unit = unit + noise * normalize(torch.randn(unit.shape, generator=g), dim=1)
    return unit, torch.arange(parts).repeat_interleave(rows)


@pytest.mark.parametrize("seed", SEEDS)
def test_subspaces_are_found_and_random_rows_have_none(seed):
    rows, labels = union(seed, noise=0.1)
    found = subspace_clusters(rows, 4, sparsity=3, n_null=4, seed=seed)
    assert adjusted_mutual_info_score(found.cluster.numpy(), labels.numpy()) > 0.95  # 1.00 in five seeds
    assert found.results["own"].value > 0.9  # 0.97 to 0.98, random rows about 0.7
    assert found.results["own"].p == pytest.approx(1 / 5)
    # Four ranks of 4 over one of 10 or 11 that holds 90%; random rows at least 3.1.
    assert found.results["ranks"].value < 2
    assert float(found.results["ranks"].nulls["random rows"].min()) > 2.5
    random = torch.randn(160, 24, generator=generator(seed + 9))
    without = subspace_clusters(random, 4, sparsity=3, n_null=4, seed=seed)
    own, ranks = without.results["own"], without.results["ranks"]
    assert own.value == pytest.approx(float(own.null.mean()), abs=0.05)  # 0.67 to 0.70
    # Clusters of nothing are flatter than random parts of it: only the harder null says that it is nothing.
    assert ranks.p_values()["clusters permuted"] == pytest.approx(1 / 5)  # in all five seeds
    assert ranks.value == pytest.approx(float(ranks.nulls["random rows"].mean()), rel=0.1)


def test_matching_pursuit_is_that_of_scikit_learn_without_the_row_itself():
    unit = normalize(torch.randn(30, 12, generator=generator(), dtype=torch.float64), dim=1)
    used, values = lobes._matching_pursuit(unit @ unit.T, 4)
    for row in range(30):
        rest = [other for other in range(30) if other != row]
        expected = torch.zeros(30, dtype=torch.float64)
        expected[rest] = torch.from_numpy(orthogonal_mp(unit[rest].T.numpy(), unit[row].numpy(), n_nonzero_coefs=4))
        torch.testing.assert_close(torch.zeros(30).double().index_put((used[row],), values[row]), expected)


def test_rows_that_are_there_twice_make_each_other_up():
    unit = normalize(torch.randn(20, 8, generator=generator(), dtype=torch.float64), dim=1).repeat(2, 1)
    used, values = lobes._matching_pursuit(unit @ unit.T, 3)
    assert torch.equal(used[:, 0], (torch.arange(40) + 20) % 40)
    torch.testing.assert_close(values[:, 0], torch.ones(40, dtype=torch.float64))
    assert (values[:, 1:] == 0).all()


def test_ranks_add_up_for_independent_subspaces():
    rows, labels = union(0, d=40)
    rows = torch.linalg.qr(torch.randn(40, 40, generator=generator()))[0][:16].repeat(10, 1)  # four frames, exact
    labels = (torch.arange(160) % 16) // 4
    result = union_of_subspaces(rows, labels, energy=0.99, n_null=19)
    assert result.value == 1
    assert result.p == pytest.approx(1 / 20)
    assert result.null.min() > 2
    assert union_of_subspaces(rows, torch.arange(160) % 2, energy=0.99, n_null=0).value == 1


# Capacity


def test_one_space_holds_more_than_two_halves():
    """Five seeds each, exclusive groups: recall 0.62 … 0.65 (one), 0.46 … 0.49 (two), 0.58 … 0.59 (at random)."""
    found = capacity(k=4, tokens=512)
    one, two, mixed = (found.recall[name] for name in ("one", "two", "two, at random"))
    assert one.min() > mixed.max()
    assert mixed.min() > two.max()  # the worst is to give each token half the dimensions only
    assert found.results["recall"].p == 1
    even = capacity(k=4, tokens=512, exclusive=0.0)
    assert (even.recall["two"] - even.recall["two, at random"]).abs().max() < 0.04  # 0.014: no groups, nothing to match
    assert even.recall["one"].mean() > even.recall["two"].mean()


def test_a_trained_toy_prefers_one_space_too():
    """120 steps, five seeds: FVU 0.34 … 0.38 (one) and 0.48 … 0.50 (two)."""
    found = capacity(d=8, n_features=32, k=2, tokens=64, seeds=2, trained=120)
    assert found.fvu["one"].max() < found.fvu["two"].min()
    assert set(found.results) == {"recall", "fvu"}


# Input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_lobes": 1}, "n_lobes must be at least 2"),
        ({"at_least": 0}, "at_least must be at least 1"),
        ({"max_latents": 3}, "max_latents must be at least 4"),
        ({"n_null": -1}, "n_null must not be negative"),
        ({"decoder": torch.ones(19, 32)}, "decoder must have a row for each of the 20"),
        ({"decoder": torch.full((20, 32), torch.nan)}, "decoder must be finite rows"),
        ({"decoder": torch.zeros(20, 32)}, "codes must have 4 latents"),
        ({"at_least": 2000}, "codes must have 4 latents"),
        ({"chunks": torch.zeros(3, dtype=torch.int64)}, "chunks must be whole numbers"),
    ],
)
def test_errors_of_lobes_name_the_argument(change, message):
    planted = PlantedLobes(3, blocks=2, size=10, share=0.1, generator=generator())
    given = {"codes": planted.sample(500, generator(1)), "decoder": planted.decoder, "n_lobes": 2} | change
    with pytest.raises(ValueError, match=message):
        one_space_or_many(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subspace_clusters(torch.eye(9), 1), "n_clusters must be at least 2"),
        (lambda: subspace_clusters(torch.zeros(9, 3), 2), "rows must have 7 that are not zero"),
        (lambda: subspace_clusters(torch.eye(9), 2, n_null=-1), "n_null must not be negative"),
        (lambda: union_of_subspaces(torch.eye(4), torch.zeros(4, dtype=torch.int64)), "of two at least"),
        (lambda: union_of_subspaces(torch.eye(4), torch.arange(3)), "one for each of the 4 rows"),
        (lambda: union_of_subspaces(torch.eye(4), torch.arange(4), energy=1), "energy must be above 0"),
        (lambda: union_of_subspaces(torch.zeros(4, 4), torch.arange(4)), "rows must have one that is not zero"),
        (lambda: capacity(d=7), "d and n_features must be even"),
        (lambda: capacity(n_features=4, k=3), "k must be in 1 … 2"),
        (lambda: capacity(exclusive=1.5), "exclusive must be in"),
        (lambda: capacity(seeds=0), "seeds must be at least 1"),
        (lambda: PlantedLobes(30, share=0.1), "must give probabilities"),
        (lambda: PlantedLobes(1, blocks=0), "blocks and size must be at least 1"),
    ],
)
def test_errors_of_the_rest_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
