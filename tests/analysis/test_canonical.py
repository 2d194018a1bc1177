"""Latents in common: planted permutations, the methods beside each other, nulls."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis import canonical
from sparsekern.analysis.canonical import match, match_by_activation, mmcs

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(n=200, d=48, common=120, noise=0.2, seed=0):
    """Decoders with `common` rows alike, in another order; and where each row of the first is, −1 for nowhere."""
    g = generator(seed)
    D1 = torch.randn(n, d, generator=g)
    D2 = D1 + noise * torch.randn(n, d, generator=g)
    D2[common:] = torch.randn(n - common, d, generator=g)
    order = torch.randperm(n, generator=g)
    where = order.argsort()
    where[common:] = -1
    return D1, D2[order], where


# Planted truth


@pytest.mark.parametrize("method", canonical.METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_planted_pairs_are_found_whatever_their_norms(method, seed):
    D1, D2, where = planted(seed=seed)
    g = generator(seed + 100)
    scaled = D1 * (0.1 + torch.rand(len(D1), 1, generator=g)), D2 * (0.1 + torch.rand(len(D2), 1, generator=g))
    found = match(*scaled, method=method, n_null=5)
    common = where >= 0
    assert torch.equal(found.partner[common], where[common])
    assert torch.equal(found.shared, common)
    wanted = (normalize(D1, dim=1) * normalize(D2, dim=1)[where]).sum(1)[common]
    torch.testing.assert_close(found.cos_dec[common], wanted, atol=1e-5, rtol=0)
    shared = found.results["shared"]
    assert shared.value == pytest.approx(0.6)
    assert float(shared.null.max()) == 0
    assert shared.p == pytest.approx(1 / 6)
    # 0.714 to 0.719 in six seeds (mutual neighbours 0.617 to 0.627), beside 0.19 to 0.37 under the nulls.
    assert found.results["cosine"].value > 0.6 > 0.5 > float(found.results["cosine"].null.max())
    first, second = found.pairs()
    assert torch.equal(second, where[first])
    taken = found.partner[found.partner >= 0]
    assert len(taken.unique()) == len(taken)


def test_a_latent_is_shared_only_where_decoder_and_encoder_agree():
    D1, D2, where = planted(common=200)
    E1, E2 = D1.clone(), D2.clone()
    swapped = where[:2]
    E2[swapped] = E2[swapped.flip(0)]  # encoders of two latents exchanged
    E2[where[2]] = torch.randn(48, generator=generator(9))  # one that belongs to nothing
    found = match(D1, D2, E1, E2, n_null=1)
    assert torch.equal(found.partner, where)
    assert found.partner_enc[:2].tolist() == swapped.flip(0).tolist()
    assert found.shared.tolist() == [False] * 3 + [True] * 197
    assert float(found.cos_dec[:3].min()) > 0.9
    assert float(found.cos_enc[:3].max()) < 0.7
    assert match(D1, D2, n_null=0).shared.all()


def test_encoders_may_have_another_width():
    D1, D2, where = planted(common=200)
    E1 = torch.randn(200, 30, generator=generator(1))
    E2 = torch.empty_like(E1)
    E2[where] = E1
    found = match(D1, D2, E1, E2, n_null=2)
    assert found.shared.all()
    assert float(found.results["encoder_cosine"].null.max()) < 0.5


def test_dead_latents_take_no_part():
    D1, D2, where = planted()
    alive1, alive2 = torch.rand(200, generator=generator(1)) < 0.5, torch.rand(200, generator=generator(2)) < 0.5
    D1[~alive1], D2[~alive2] = torch.nan, 0.0  # looked at, they would be refused
    found = match(D1, D2, alive1=alive1, alive2=alive2, n_null=2)
    common = (where >= 0) & alive1
    common[common.clone()] = alive2[where[common]]
    assert torch.equal(found.shared, common)
    assert found.results["shared"].value == pytest.approx(float(common.sum() / alive1.sum()))
    assert (found.partner[~alive1] == -1).all()
    assert found.cos_dec[~alive1].isnan().all()
    assert alive2[found.partner[found.partner >= 0]].all()
    assert torch.equal(found.alive1, alive1)
    assert torch.equal(found.alive2, alive2)


@pytest.mark.parametrize("method", canonical.METHODS)
@pytest.mark.parametrize(("n1", "n2"), [(30, 50), (50, 30), (1, 50), (50, 1), (1, 1)])
def test_sides_of_different_sizes(method, n1, n2):
    D = torch.randn(50, 12, generator=generator())
    found = match(D[:n1], D[:n2], method=method, n_null=2)
    both = min(n1, n2)
    assert found.partner[:both].tolist() == list(range(both))
    assert found.results["shared"].value == pytest.approx(both / n1)
    assert int((found.partner >= 0).sum()) <= both
    assert found.results["cosine"].value <= 1 + 1e-6


def test_the_random_dictionary_is_not_the_one_that_the_same_seed_makes():
    D = torch.randn(40, 8, generator=generator(3))
    assert float(match(D, D, seed=3).results["cosine"].null.max()) < 0.9
    assert float(mmcs(D, D, seed=3).results["of_first"].null.max()) < 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_unrelated_dictionaries_are_within_the_null(seed):
    D1, D2 = torch.randn(2, 150, 32, generator=generator(seed))
    found = match(D1, D2, n_null=19)
    assert found.results["cosine"].p >= 0.1  # 0.10 to 0.85 in these seeds, and at most one pair of 150
    assert found.results["shared"].value <= 0.01


# Methods beside each other


def test_hungarian_is_at_least_as_good_as_any_other_and_refuses_large_tables(monkeypatch):
    D1, D2, _ = planted(common=60)
    values = {method: match(D1, D2, method=method, n_null=0).results["cosine"].value for method in canonical.METHODS}
    assert values["hungarian"] >= values["sparse"] >= values["mnn"] > 0.3
    assert values["hungarian"] - values["sparse"] < 0.01
    monkeypatch.setattr(canonical, "_HUNGARIAN_ROWS", 199)
    with pytest.raises(ValueError, match=r"of 200 × 200 cosines and is for at most 199 .* use method='sparse'"):
        match(D1, D2)
    match(D1, D2, alive1=torch.arange(200) < 199, alive2=torch.arange(200) > 0, n_null=0)


def test_sparse_is_hungarian_where_every_pair_is_a_candidate(monkeypatch):
    monkeypatch.setattr(canonical, "_ROWS", 17)
    for seed in SEEDS:
        D1, D2 = torch.rand(2, 16, 5, generator=generator(seed))  # all cosines positive
        hungarian, sparse = (match(D1, D2, method=method, n_null=0).partner for method in ("hungarian", "sparse"))
        assert torch.equal(hungarian, sparse)


def test_sparse_leaves_out_what_others_have_taken():
    D1 = torch.eye(40, 3).clamp(min=0)
    D1[:, 0] = 1  # forty rows near one direction, in which there are two columns
    D2 = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [-1.0, 0.0, 0.0]])
    found = match(D1, D2, method="sparse", n_null=0)
    assert sorted(found.partner[found.partner >= 0].tolist()) == [0, 1]
    assert found.results["matched"].value == pytest.approx(2 / 3)


@given(st.integers(1, 25), st.integers(1, 25), st.integers(0, 2**31))
def test_sparse_is_one_to_one_and_at_least_as_good_as_mutual_neighbours(n1, n2, seed):
    D1, D2 = torch.randn(n1, 3, generator=generator(seed)), torch.randn(n2, 3, generator=generator(seed + 1))
    sparse, mutual = (match(D1, D2, method=method, n_null=0) for method in ("sparse", "mnn"))
    for found in (sparse, mutual):
        taken = found.partner[found.partner >= 0]
        assert len(taken.unique()) == len(taken)
        assert (found.cos_dec[found.partner >= 0] > 0).all()
    assert float(sparse.cos_dec.nansum()) >= float(mutual.cos_dec.nansum()) - 1e-6


@given(st.integers(1, 40), st.integers(2, 12), st.integers(0, 2**31))
def test_a_rotation_of_both_changes_nothing(n, d, seed):
    D1, D2, turn = (torch.randn(rows, d, generator=generator(seed + i)) for i, rows in enumerate((n, n, d)))
    turn = torch.linalg.qr(turn)[0]
    for method in canonical.METHODS:
        before, after = match(D1, D2, method=method, n_null=0), match(D1 @ turn, D2 @ turn, method=method, n_null=0)
        assert before.results["cosine"].value == pytest.approx(after.results["cosine"].value, abs=1e-5)


@pytest.mark.slow
def test_sparse_agrees_with_hungarian_on_8192_latents():
    """All pairs of the planted half, and 92.1% of all: chance pairs have almost equal alternatives."""
    D1, D2, where = planted(8192, 384, common=4096, noise=0.7)
    hungarian, sparse = (match(D1, D2, method=method, n_null=0) for method in ("hungarian", "sparse"))
    common = where >= 0
    assert (sparse.partner == hungarian.partner)[common].double().mean() >= 0.99
    assert (sparse.partner == where)[common].double().mean() >= 0.99
    assert torch.equal(sparse.shared, hungarian.shared)
    assert hungarian.results["cosine"].value - sparse.results["cosine"].value < 0.001


# Largest cosines


def test_mmcs_is_the_mean_of_the_largest_cosines():
    D1, D2, _ = planted(n=70, common=30)
    D2 = D2[:50]
    alive2 = torch.rand(50, generator=generator(1)) < 0.7
    found = mmcs(D1, D2, alive2=alive2, n_null=3)
    table = normalize(D1, dim=1) @ normalize(D2[alive2], dim=1).T
    torch.testing.assert_close(found.best1, table.amax(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.best2[alive2], table.amax(0), atol=1e-6, rtol=0)
    assert found.best2[~alive2].isnan().all()
    assert found.results["of_first"].value == pytest.approx(float(table.amax(1).mean()), abs=1e-6)
    assert found.results["of_first"].p == found.results["of_second"].p == 0.25


def test_mmcs_of_opposites_is_negative():
    D = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    assert mmcs(D, -D, n_null=0).results["of_first"].value == pytest.approx(-(1.01**-0.5) / 2 - 0.5, abs=0.01)


def test_the_asymptotic_largest_cosine_is_too_high():
    """Why nulls are simulated: 0.342 to 0.348 over eight seeds, where √(2 ln W / d) says 0.416."""
    for seed in SEEDS:
        D1, D2 = torch.randn(2, 256, 64, generator=generator(seed))
        assert 0.33 < mmcs(D1, D2, n_null=0).results["of_first"].value < 0.36


# Activations


def codes_of(weights, x, k):
    return sk.topk_encode(x, weights, None, k)


@pytest.mark.parametrize("seed", SEEDS)
def test_permuted_latents_are_found_by_their_activations(seed):
    x = torch.randn(3000, 24, generator=generator(seed))
    W = torch.randn(60, 24, generator=generator(seed + 10))
    order = torch.randperm(60, generator=generator(seed + 20))
    noisy = x + 0.3 * torch.randn(3000, 24, generator=generator(seed + 30))
    found = match_by_activation(codes_of(W, x, 6), codes_of(W[order], noisy, 6).to_csr(), n_null=5)
    right = found.partner == order.argsort()
    assert right.double().mean() == 1
    assert found.results["matched"].value == 1
    # 0.82 to 0.83 beside at most 0.05, in six seeds.
    assert float(found.results["correlation"].null.max()) < 0.1 < 0.7 < found.results["correlation"].value
    first, second = found.pairs()
    assert torch.equal(order[second], first)


def test_correlations_are_those_of_the_dense_codes(monkeypatch):
    monkeypatch.setattr(canonical, "_PRODUCTS", 50)
    x = torch.randn(400, 10, generator=generator())
    one, two = (codes_of(torch.randn(n, 10, generator=generator(n)), x, 5) for n in (30, 40))
    found = match_by_activation(one, two, threshold=-1.0, min_active=1, n_null=0)
    dense = torch.cat([one.to_dense(), two.to_dense()], 1)
    wanted = torch.corrcoef(dense.double().T)[:30, 30:].nan_to_num(-1)
    largest = wanted.amax(1).clamp(min=0)
    alive = found.alive1
    assert torch.equal(alive, one.firing_counts() > 0)
    torch.testing.assert_close(found.best[alive].double(), largest[alive], atol=1e-6, rtol=0)
    paired = (found.partner >= 0).nonzero().squeeze(1)
    assert len(found.partner[paired].unique()) == len(paired)
    torch.testing.assert_close(wanted[paired, found.partner[paired]], largest[paired], atol=1e-6, rtol=0)
    # One that many chose went to the one of them with the largest correlation.
    choice = wanted.argmax(1)
    for latent in (alive & (found.partner < 0)).nonzero().squeeze(1).tolist():
        rival = (found.partner == choice[latent]).nonzero()
        assert len(rival) == 1
        assert largest[rival[0, 0]] >= largest[latent]


def test_rare_and_constant_latents_take_no_part():
    values = torch.rand(100, 3, generator=generator()) + 0.5
    values[:, 1] = 2.0  # always active, and always equally
    values[3:, 2] = 0.0  # active on three tokens
    codes = sk.SparseCodes(values, torch.tensor([0, 1, 2], dtype=torch.int32).expand(100, 3).contiguous(), 5)
    found = match_by_activation(codes, codes, min_active=4, n_null=2)
    assert found.alive1.tolist() == [True, False, False, False, False]
    assert found.partner.tolist() == [0, -1, -1, -1, -1]
    assert float(found.best[0]) == pytest.approx(1)


def test_codes_that_never_meet_have_no_pairs():
    values = torch.rand(60, 1, generator=generator()) + 0.5
    tokens = torch.arange(60)[:, None]
    one, two = (sk.SparseCodes(values * (tokens % 2 == odd), torch.zeros(60, 1).int(), 3) for odd in (0, 1))
    found = match_by_activation(one, two, n_null=2)
    assert (found.partner == -1).all()
    assert found.results["correlation"].value == 0


# Plots and errors


def test_plots_show_the_cosines_beside_one_sample_of_each_null():
    pytest.importorskip("matplotlib")
    D1, D2, _ = planted()
    axes = match(D1, D2, n_null=1).plot()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "matched latents",
        "random dictionary",
        "coordinates permuted",
    ]
    assert len(mmcs(D1, D2, n_null=0).plot().get_legend().get_texts()) == 1


def zero_row(D):
    return torch.cat([D[:-1], torch.zeros_like(D[:1])])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda D: match(D, D, method="greedy"), "method must be one of hungarian, sparse, mnn, got 'greedy'"),
        (lambda D: match(D, D[:, :3]), "D1 and D2 must have rows of one width, got 4 and 3"),
        (lambda D: mmcs(D, D[:, :3]), "D1 and D2 must have rows of one width, got 4 and 3"),
        (lambda D: match(D, D, D), "E1 and E2 must both be given, or neither"),
        (lambda D: match(D, D, D, D[:2]), r"E2 must be \[5, d_in\], a row for each of D2, got \(2, 4\)"),
        (lambda D: match(D, D, D, D[:, :2]), "E1 and E2 must have rows of one width"),
        (lambda D: match(D, zero_row(D)), "D2 must have finite rows of a norm above 0 where alive2 is true"),
        (lambda D: match(D, D, D, zero_row(D)), "E2 must have finite rows"),
        (lambda D: match(D * torch.nan, D), "D1 must have finite rows"),
        (lambda D: mmcs(D, D / 0), "D2 must have finite rows"),
        (lambda D: match(D[:0], D), r"D1 must be \[latents, d\], neither of them 0"),
        (lambda D: match(D[0], D), r"D1 must be \[latents, d\]"),
        (lambda D: match(D, D, alive1=torch.zeros(5).bool()), "alive1 must have at least one alive latent"),
        (lambda D: match(D, D, alive2=torch.ones(5)), r"alive2 must be \[5\] bool, got \(5,\) torch.float32"),
        (lambda D: match(D, D, threshold=2.0), "threshold must be in −1 … 1"),
        (lambda D: match(D, D, n_null=-1), "n_null must not be negative"),
        (lambda D: mmcs(D, D, n_null=-1), "n_null must not be negative"),
    ],
)
def test_bad_weights_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(5, 4, generator=generator()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes2": slice(0, 10)}, "codes1 and codes2 must be of the same tokens, got 50 and 10 of them"),
        ({"threshold": 1.0}, "threshold must be at least −1 and below 1"),
        ({"min_active": 0}, "min_active must be at least 1"),
        ({"min_active": 51}, "codes1 must have a latent that is active on at least min_active=51 tokens"),
        ({"n_null": -1}, "n_null must not be negative"),
        ({"nan": True}, "codes1 must be finite"),
    ],
)
def test_bad_codes_are_refused(change, message):
    change = dict(change)
    codes = codes_of(torch.randn(6, 4, generator=generator()), torch.randn(50, 4, generator=generator(1)), 2)
    rows = change.pop("codes2", slice(None))
    other = sk.SparseCodes(codes.values[rows], codes.indices[rows], 6)
    if change.pop("nan", False):
        codes = codes._replace(values=codes.values * torch.nan)
    with pytest.raises(ValueError, match=message):
        match_by_activation(codes, other, **change)
