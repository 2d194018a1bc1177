"""Groups of codes: planted ones, permuted ones, and whether codes tell digits apart; spreads over five seeds."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import sparsekern as sk
from sparsekern.analysis.polytope import PolytopeCodes, cluster_codes, clusters, compare_distances, polytope_codes
from sparsekern.bits import pack_bits

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_bits(bits):
    return PolytopeCodes(pack_bits(bits), (("units", bits.shape[1]),), "sign")


def planted(seed, n=200, groups=4, units=61, flipped=0.1):
    """Bits of random codes, one a group, of which some are flipped; and the groups."""
    g = generator(seed)
    labels = torch.arange(n) % groups
    bits = (torch.rand(groups, units, generator=g) < 0.4)[labels]
    return bits ^ (torch.rand(n, units, generator=g) < flipped), labels


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("method", "metric"), [("hdbscan", "hamming"), ("agglomerative", "jaccard")])
def test_planted_groups_are_found_and_permuted_units_have_none(seed, method, metric):
    bits, labels = planted(seed)
    found = cluster_codes(of_bits(bits), labels, method, metric, n_null=19, n_refit=2, seed=seed)
    assert len(found.sizes) == 4
    assert found.sizes.sum() == (found.clusters >= 0).sum() >= 190
    assert found.purities.min() > 0.95  # one sample is in the wrong group in one of ten
    for name in ("purity", "ami"):
        assert found.results[name].p == pytest.approx(1 / 20)
    assert found.results["purity"].null.max() < 0.45  # 0.375 at most
    assert found.results["silhouette"].value > 0.4  # 0.45 to 0.58
    null = found.results["silhouette"].nulls["units permuted, clustered again"]
    assert not (null > 0.2).any()  # 0.06 at most; NaN of HDBSCAN, which found no cluster


def test_more_samples_than_are_clustered_go_to_the_nearest():
    bits, labels = planted(1, 400)
    few = cluster_codes(of_bits(bits), labels, "agglomerative", most=80, n_null=3, n_refit=0)
    assert few.results["ami"].value == 1
    assert few.sizes.tolist() == [100] * 4
    assert few.results["silhouette"].p != few.results["silhouette"].p  # no null was asked for
    alone = cluster_codes(of_bits(bits), None, "agglomerative", n_clusters=4, n_null=0, n_refit=0)
    assert set(alone.results) == {"clustered", "silhouette"}
    assert alone.purities.shape == (0,)


def test_mixed_bits_keep_their_rates(monkeypatch):
    bits, _ = planted(2, 50, units=21)
    monkeypatch.setattr(clusters, "_ENTRIES", 400)  # a byte at a time
    mixed = clusters._mixed(pack_bits(bits), 21, generator())
    assert mixed.shape == (50, 3)
    unpacked = PolytopeCodes(mixed, (("units", 21),), "sign").unpack()
    assert torch.equal(unpacked.sum(0), bits.sum(0))
    assert not torch.equal(unpacked, bits)


def test_codes_of_one_kind_have_no_groups():
    same = of_bits(torch.ones(30, 9, dtype=torch.bool))
    found = cluster_codes(same, torch.arange(30) % 2, "agglomerative", n_null=2, n_refit=1)
    assert found.results["silhouette"].value == 0
    assert found.results["ami"].value == pytest.approx(0, abs=0.1)
    noise = of_bits(torch.rand(60, 64, generator=generator()) < 0.5)
    lonely = cluster_codes(noise, torch.arange(60) % 2, min_cluster_size=40, n_null=2, n_refit=1)
    assert lonely.results["clustered"].value < 0.2
    assert lonely.results["purity"].value != lonely.results["purity"].value


def test_distances_of_codes_and_of_activations():
    bits, labels = planted(3)
    values = torch.randn(200, 5, generator=generator())
    found = compare_distances(of_bits(bits), {"noise": values}, labels, n_null=4)
    table = found.table()
    assert list(table) == ["hamming of codes", "jaccard of codes", "l2 of noise", "cosine of noise"]
    for name in ("hamming of codes", "jaccard of codes"):
        assert table[name]["knn"] == table[name]["ami"] == 1
        assert found.results[f"knn, {name}"].p == pytest.approx(1 / 5)
    for name in ("l2 of noise", "cosine of noise"):
        assert table[name]["knn"] < 0.45
        assert table[name]["silhouette"] < 0.05
        assert found.results[f"silhouette, {name}"].controls == {}
    assert set(found.results["ami, jaccard of codes"].controls) == {"l2 of noise", "cosine of noise"}
    distances = sk.bit_distances(pack_bits(bits)).fill_diagonal_(1000)
    voted = labels[distances.argmin(1)]
    one = compare_distances(of_bits(bits), {}, labels, neighbors=1, n_null=0)
    assert one.results["knn, hamming of codes"].value == pytest.approx(float((voted == labels).float().mean()))


@pytest.mark.parametrize("seed", SEEDS[:1])
def test_codes_tell_digits_apart_worse_than_activations_do(seed):
    images, labels = (torch.from_numpy(some) for some in load_digits(return_X_y=True))
    images = (images / 16 - images.mean(0) / 16).float()
    torch.manual_seed(seed)
    order = torch.randperm(len(images))
    train, test = order[:900], order[900:1400]
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(200):
        some = train[torch.randint(900, (128,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[some]), labels[some]).backward()
        optimizer.step()
    with torch.no_grad():
        hidden = net[:4](images[test])
    codes = polytope_codes(net, images[test])
    table = compare_distances(codes, {"hidden": hidden}, labels[test], n_null=0).table()
    for of_codes in ("hamming of codes", "jaccard of codes"):
        for of_values in ("l2 of hidden", "cosine of hidden"):
            assert (
                table[of_codes]["silhouette"] < table[of_values]["silhouette"] - 0.1
            )  # 400 steps, both layers: 0.169 at least in five seeds
            assert table[of_codes]["ami"] < table[of_values]["ami"]


def test_bad_input_is_named():
    bits, labels = planted(0, 40)
    codes = of_bits(bits)
    soft = PolytopeCodes(torch.rand(40, 3).half(), (("a", 3),), "soft")
    for function in (lambda: cluster_codes(soft), lambda: compare_distances(soft, {}, labels)):
        with pytest.raises(ValueError, match="kind 'sign' or 'gate', got kind 'soft'"):
            function()
    with pytest.raises(ValueError, match="method must be one of hdbscan, agglomerative, got 'kmeans'"):
        cluster_codes(codes, method="kmeans")
    with pytest.raises(ValueError, match="metric must be one of hamming, jaccard, got 'l2'"):
        cluster_codes(codes, metric="l2")
    with pytest.raises(ValueError, match="n_clusters must be given"):
        cluster_codes(codes, method="agglomerative")
    with pytest.raises(ValueError, match="n_clusters must be in 1 … 40, got 41"):
        cluster_codes(codes, method="agglomerative", n_clusters=41)
    with pytest.raises(ValueError, match="most must be in 2"):
        cluster_codes(codes, most=1)
    with pytest.raises(ValueError, match="labels must be 40 whole numbers"):
        cluster_codes(codes, labels.float())
    with pytest.raises(ValueError, match="labels must be two classes at least"):
        compare_distances(codes, {}, torch.zeros(40, dtype=torch.long))
    with pytest.raises(ValueError, match=r"x\['a'\] must be \[40, d\] and finite"):
        compare_distances(codes, {"a": torch.full((40, 2), torch.nan)}, labels)
    with pytest.raises(ValueError, match="neighbors must be in 1 … 39"):
        compare_distances(codes, {}, labels, neighbors=40)
