"""What codes have to do with latents: planted units, subspaces, directions and examples; spreads over five seeds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import hypergeom
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.polytope import (
    PolytopeCodes,
    code_feature_relation,
    polytope_codes,
    pulled_directions,
    relation,
    shared_examples,
    similarity,
)
from sparsekern.analysis.polytope.blocks import shuffled
from sparsekern.bits import pack_bits

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_bits(bits):
    return PolytopeCodes(pack_bits(bits), (("units", bits.shape[1]),), "sign")


def of_dense(z):
    values, indices = z.topk(z.shape[1], 1)
    return sk.SparseCodes(values, indices.int(), z.shape[1])


def planted(seed, n=800):
    """48 of 100 units follow one of twelve latents, four each, but for 5% of the samples; the others are noise."""
    g = generator(seed)
    z = (torch.rand(n, 12, generator=g) < 0.1) * (torch.rand(n, 12, generator=g) + 0.5)
    bits = torch.rand(n, 100, generator=g) < 0.3
    bits[:, :48] = (z > 0).repeat(1, 4) ^ (torch.rand(n, 48, generator=g) < 0.05)
    bits[:, 47] ^= True  # a unit that is off when its latent is active
    return bits, z


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_units_are_found_and_counted(seed):
    bits, z = planted(seed)
    found = code_feature_relation(of_bits(bits), of_dense(z), n_null=3, components=8, seed=seed)
    assert (found.best_unit % 12 == found.latents).all()
    assert (found.best_unit < 48).all()
    aucs = torch.tensor([roc_auc_score(z[:, j] > 0, bits[:, i]) for j, i in enumerate(found.best_unit)])
    torch.testing.assert_close(found.best_auc, torch.maximum(aucs, 1 - aucs).double())
    assert torch.equal(found.best_sign > 0, aucs > 0.5)
    # Four a latent, and false ones at a rate of 5%: 4.08 to 4.33 on average.
    assert (found.n_units >= 4).all()
    assert found.n_units.double().mean() < 5
    # Least and most in five seeds: AUC 0.960 and 0.576, found 1 and 0.17, CKA 0.467 and 0.004, CCA 0.61 and 0.02.
    for name, least, most in (("best_auc", 0.94, 0.62), ("found", 1, 0.35), ("cka", 0.4, 0.03), ("cca", 0.5, 0.15)):
        result = found.results[name]
        assert result.value >= least, name
        assert result.null.max() < most, name
        assert result.p <= 1 / 4
    assert found.results["discovered"].null.max() < 0.01
    assert (found.null_best["samples permuted"].amax(0) < found.best_auc).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 200), st.integers(0, 2**31))
def test_tails_are_hypergeometric(n, seed):
    rng = np.random.default_rng(seed)
    active, on = rng.integers(1, n, 20), rng.integers(1, n, 20)
    both = hypergeom.rvs(n, on, active, random_state=seed)
    tails = np.minimum(hypergeom.sf(both - 1, n, on, active), hypergeom.cdf(both, n, on, active))
    np.testing.assert_allclose(relation.two_sided_p(both, active, on, n), np.minimum(1, 2 * tails), rtol=1e-6)


def test_tables_in_blocks_and_codes_in_csr_form_are_the_same(monkeypatch):
    bits, z = planted(0, 300)
    whole = code_feature_relation(of_bits(bits), of_dense(z), n_null=0, components=4)
    monkeypatch.setattr(relation, "_TABLE", 500)
    pieces = code_feature_relation(of_bits(bits), of_dense(z).to_csr(), n_null=0, components=4)
    torch.testing.assert_close(whole.best_auc, pieces.best_auc)
    assert torch.equal(whole.n_units, pieces.n_units)
    some = code_feature_relation(of_bits(bits), of_dense(z), latents=torch.tensor([5, 2]), n_null=0, components=4)
    assert some.latents.tolist() == [5, 2]
    torch.testing.assert_close(some.best_auc, whole.best_auc[[5, 2]])
    assert some.results["best_auc"].p != some.results["best_auc"].p  # no null, no p


def test_what_is_slow_fools_samples_but_not_contexts():
    """A context has one latent and, independently of it, one code: the samples in it say the same 40 times."""
    g = generator(2)
    contexts = torch.arange(20).repeat_interleave(40)
    z = (torch.rand(20, 6, generator=g) < 0.4).float()[contexts]
    bits = (torch.rand(20, 80, generator=g) < 0.4)[contexts]
    found = code_feature_relation(of_bits(bits), of_dense(z), contexts=contexts, n_null=9, components=4)
    discovered = found.results["discovered"]
    assert discovered.nulls["samples permuted"].max() < 0.1
    assert discovered.nulls["contexts permuted"].min() > 0.6  # three quarters of all pairs are discovered
    assert discovered.p_values()["samples permuted"] == 0.1
    assert discovered.p_values()["contexts permuted"] > 0.1
    assert found.results["best_auc"].p > 0.1


def test_runs_stay_together():
    contexts = torch.tensor([7] * 3 + [2] * 5 + [9])
    order = shuffled(9, contexts, generator(1))
    assert sorted(order.tolist()) == list(range(9))
    apart = (order.diff() != 1).sum()
    assert apart <= 2  # three contexts
    turned = shuffled(9, torch.zeros(9, dtype=torch.long), generator(1))
    assert (turned.diff() % 9 == 1).all()


def test_cka_is_the_dense_formula_and_knows_no_rotation_or_scale():
    g = generator(3)
    x, z = torch.randn(60, 7, generator=g), torch.rand(60, 9, generator=g)
    z = z + 0.2 * x[:, :1].abs()
    turn = torch.linalg.qr(torch.randn(7, 7, generator=g))[0]
    codes = PolytopeCodes(torch.rand(60, 5, generator=g).half(), (("a", 5),), "soft")
    controls = {"x": x, "turned": 3 * x @ turn + 1}
    found = similarity(codes, of_dense(z), control=controls, components=3, n_null=2)["cka"]

    def hsic(k, m):
        n = len(k)
        k, m = (some - some.diag().diag() for some in (k, m))
        return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(0))

    def cka(a, b):
        a, b = a.double() @ a.double().T, b.double() @ b.double().T
        return float(hsic(a, b) / (hsic(a, a) * hsic(b, b)) ** 0.5)

    assert found.value == pytest.approx(cka(codes.unpack(), z), abs=1e-5)
    assert found.controls["x"].item() == pytest.approx(cka(x, z), abs=1e-5)
    assert found.controls["turned"].item() == pytest.approx(cka(x, z), abs=1e-4)


def net_of(seed, d=12, width=64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_units_pulled_back_are_their_weights_and_match_their_directions(seed):
    net = net_of(seed)
    x = torch.randn(40, 12, generator=generator(seed))
    components = torch.zeros(4, 128)
    components[range(4), [0, 1, 2, 3]] = 1.0  # units of the first layer, whose Jacobian is the weight
    components[3, 64:] = torch.rand(64, generator=generator(seed))
    decoder = torch.cat([torch.randn(20, 12, generator=generator(seed)), -net[0].weight.detach()[:3]])
    found = pulled_directions(net, x, components, decoder, n_null=4, seed=seed)
    torch.testing.assert_close(found.directions[:3], net[0].weight.detach()[:3])
    assert found.latent[:3].tolist() == [20, 21, 22]
    torch.testing.assert_close(found.cosine[:3], torch.ones(3))
    torch.testing.assert_close(found.constancy[:3], torch.ones(3))
    assert found.constancy[3] < 0.999
    result = found.results["cosine"]
    assert result.value > 0.85 > 0.76 > result.null.max()  # 0.880 to 0.910, and at most 0.714
    assert found.results["each"].value > found.results["each"].null.max()
    # The second layer: by the masks of every sample.
    on = (net[0](x) > 0).float()
    expected = ((components[3, 64:] @ net[2].weight) * on @ net[0].weight).mean(0) + net[0].weight[3]
    torch.testing.assert_close(found.directions[3], expected.detach())


def test_directions_at_a_module_and_of_tokens():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU())
    ids = torch.randint(11, (5, 4), generator=generator())
    where = torch.arange(4).expand(5, 4) < 3
    component = torch.eye(8)[:2]
    found = pulled_directions(net, ids, component, at="0", where=where, n_null=1)
    torch.testing.assert_close(found.directions, net[1].weight.detach()[:2])
    assert found.latent.tolist() == [-1, -1]
    assert set(found.results) == {"constancy"}
    with pytest.raises(ValueError, match="at must name a module where x is not a tensor of floats"):
        pulled_directions(net, ids, component)
    with pytest.raises(ValueError, match="they come before it"):
        pulled_directions(net, ids, component, at="2", n_null=0)
    with pytest.raises(ValueError, match=r"components must be \[R, 8\]"):
        pulled_directions(net, ids, torch.ones(1, 7), at="0", n_null=0)
    with pytest.raises(ValueError, match="none of them 0"):
        pulled_directions(net, ids, torch.zeros(1, 8), at="0")
    with pytest.raises(ValueError, match=r"decoder must be \[W, 6\]"):
        pulled_directions(net, ids, component, torch.ones(3, 5), at="0")
    with pytest.raises(ValueError, match="with a row that is not 0"):
        pulled_directions(net, ids, component, torch.zeros(3, 6), at="0")


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_examples(seed):
    g = generator(seed)
    z = torch.rand(300, 20, generator=g) * (torch.rand(300, 20, generator=g) < 0.3)
    scores = z[:, [4, 9]] + 0.05 * torch.randn(300, 2, generator=g)
    found = shared_examples(scores, of_dense(z), 10, n_null=19, seed=seed)
    assert found.latent.tolist() == [4, 9]
    # 0.70 to 0.90; by chance at most 0.25.
    assert found.results["overlap"].value >= 0.6 > 0.4 > found.results["overlap"].null.max()
    same = shared_examples(of_dense(z), of_dense(z), 10, n_null=0)
    assert same.overlap.tolist() == [1.0] * 20
    assert same.latent.tolist() == list(range(20))


def test_codes_of_a_net_know_the_features_of_its_input_and_shuffled_input_does_not():
    g = generator(1)
    dictionary = normalize(torch.randn(16, 12, generator=g), dim=1)
    z = (torch.rand(800, 16, generator=g) < 0.15) * (torch.rand(800, 16, generator=g) + 1)
    codes = polytope_codes(net_of(0), z @ dictionary)
    found = code_feature_relation(codes, of_dense(z), n_null=3, components=8)
    assert found.results["found"].value > 0.9 > 0.5 > found.results["found"].null.max()
    away = polytope_codes(net_of(0), (z @ dictionary)[torch.randperm(800, generator=g)])
    nothing = code_feature_relation(away, of_dense(z), n_null=3, components=8, control={"unshuffled": codes})
    assert nothing.results["found"].value < 0.5
    assert nothing.results["cka"].value < 0.05 < nothing.results["cka"].controls["unshuffled"]


def test_bad_input_is_named():
    bits, z = planted(0, 100)
    codes, sparse = of_bits(bits), of_dense(z)
    soft = PolytopeCodes(torch.rand(100, 3).half(), (("a", 3),), "soft")
    with pytest.raises(ValueError, match="kind 'sign' or 'gate', got kind 'soft'"):
        code_feature_relation(soft, sparse)
    with pytest.raises(ValueError, match="sae_codes must have 100 rows"):
        code_feature_relation(codes, of_dense(z[:50]))
    with pytest.raises(ValueError, match="control 'other' must have 100 samples"):
        code_feature_relation(codes, sparse, control={"other": of_bits(bits[:9])})
    with pytest.raises(ValueError, match="sae_codes must have a latent that is active"):
        code_feature_relation(codes, of_dense(torch.zeros(100, 3)))
    with pytest.raises(ValueError, match="codes must have a unit that is on in some"):
        code_feature_relation(of_bits(torch.ones(100, 4, dtype=torch.bool)), sparse, least=2)
    with pytest.raises(ValueError, match=r"latents must be whole numbers \[m\] in 0 … 11"):
        code_feature_relation(codes, sparse, latents=torch.tensor([12]))
    with pytest.raises(ValueError, match="contexts must be in runs"):
        code_feature_relation(codes, sparse, contexts=torch.arange(100) % 2)
    with pytest.raises(ValueError, match="at least 104 samples for 24 components"):
        similarity(codes, sparse, components=24)
    with pytest.raises(ValueError, match="sae_codes must be finite"):
        similarity(codes, of_dense(z.masked_fill(z > 0, torch.nan)), components=2)
    with pytest.raises(ValueError, match="top must be in 1 … 100"):
        shared_examples(z, sparse, 0)
    with pytest.raises(ValueError, match="scores must have 100 rows"):
        shared_examples(z[:9], sparse)
    with pytest.raises(ValueError, match="something that is active"):
        shared_examples(z, of_dense(torch.zeros(100, 3)))
