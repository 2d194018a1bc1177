"""Implications among latents are found where they were planted, and not where chance makes them."""

import math

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom

import sparsekern as sk
from sparsekern.analysis.geometry import implication, implication_graph
from sparsekern.analysis.geometry.counts import Active

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def codes_of(on, values=None):
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), on.sum(1).cumsum(0)])
    col = on.nonzero()[:, 1].int()
    return sk.CSRCodes(crow, col, torch.ones(len(col)) if values is None else values[on], on.shape[1])


def trees(seed, tokens=8000, roots=4, dense=None):
    """Trees of a root, three children and two grandchildren of each, 20 unrelated latents, and a dense one.

    Returns where they are active and the edges of the trees.
    """
    g = generator(seed)
    columns, edges = [], set()

    def add(column, parent=None):
        if parent is not None:
            edges.add((parent, len(columns)))
        columns.append(column)
        return len(columns) - 1

    def part(share):
        return torch.rand(tokens, generator=g) < share

    for _ in range(roots):
        root = add(part(0.25))
        for _ in range(3):
            child = add(columns[root] & part(0.3), root)
            for _ in range(2):
                add(columns[child] & part(0.3), child)
    for _ in range(20):
        add(part(0.1))
    if dense:
        add(part(dense))
    return torch.stack(columns, 1), edges


def found_edges(graph):
    return set(zip(graph.parent.tolist(), graph.child.tolist(), strict=True))


@pytest.mark.parametrize("seed", SEEDS)
def test_planted_trees_are_found_and_chance_makes_none(seed):
    on, edges = trees(seed)
    graph = implication_graph(codes_of(on), n_null=9, seed=seed)
    assert found_edges(graph) == edges  # 36 of 36 and no other, in all five seeds
    assert graph.n_implications == 60  # with the 24 from roots to grandchildren
    assert graph.depth.tolist() == [0, *([1, 2, 2] * 3)] * 4 + [-1] * 20
    for key in ("implications", "placed", "depth"):
        assert graph.results[key].p == pytest.approx(1 / 10)
        assert all((null == 0).all() for null in graph.results[key].nulls.values())
    assert graph.results["placed"].value == pytest.approx(36 / 60)
    assert graph.results["one_parent"].value == 1
    assert (graph.share == 1).all()
    assert math.isnan(graph.results["one_parent"].p)  # without edges the null has no share


@pytest.mark.parametrize("seed", SEEDS)
def test_independent_latents_imply_nothing(seed):
    on = torch.rand(4000, 60, generator=generator(seed)) < torch.linspace(0.02, 0.9, 60)
    graph = implication_graph(codes_of(on), n_null=2)
    assert graph.n_implications == 0
    assert (graph.depth == -1).all()
    assert graph.results["implications"].p == 1
    assert graph.plot() is not None


def test_a_dense_latent_covers_all_and_the_nulls_say_so():
    # Active on 99% of the tokens: whatever is frequent enough to be tested implies it, its tokens shuffled as well.
    on = torch.rand(20000, 30, generator=generator()) < 0.05
    on[:, 0] = torch.rand(20000, generator=generator(1)) < 0.99
    graph = implication_graph(codes_of(on), n_null=9)
    assert graph.results["implications"].value == 29
    assert graph.results["implications"].p > 0.3
    assert graph.results["implications"].nulls["tokens shuffled"].min() >= 27


def test_near_duplicates_are_merged_first():
    on, edges = trees(0)
    n = on.shape[1]
    twin = on[:, 0].clone()
    twin[on[:, 0].nonzero()[:20, 0]] = False  # 99% of the root's tokens: each implies the other
    graph = implication_graph(codes_of(torch.cat([on, twin[:, None]], 1)), n_null=1)
    assert found_edges(graph) == edges
    assert int(graph.merged[n]) == 0  # the more frequent one stands for both
    assert graph.results["equivalent"].value == 1
    assert graph.graph().nodes[0]["members"] == [0, n]


def test_a_chain_of_twins_is_one_latent():
    # The first and the third overlap less than the bound asks, but both are as good as the second.
    on = torch.zeros(6000, 4, dtype=torch.bool)
    for latent in range(3):
        on[30 * latent : 1000 + 30 * latent, latent] = True
    on[100:400, 3] = True
    graph = implication_graph(codes_of(on), n_null=0)
    assert graph.merged[:3].tolist() == [0, 0, 0]
    assert found_edges(graph) == {(0, 3)}


def test_bounds_are_clopper_and_pearson():
    # n_AB of B's n tokens pass at α exactly where the lower bound at α reaches the share that is asked for.
    n, alpha, least = 200, 0.01, 0.9
    both = torch.arange(150, 201)
    passes = implication._above(both, torch.full_like(both, n), least) <= alpha
    lower = torch.tensor([beta.ppf(alpha, int(k), n - int(k) + 1) for k in both])
    assert torch.equal(passes, lower >= least)
    assert passes.any()
    assert not passes.all()


def test_few_tokens_prove_nothing_among_many_latents():
    # Forty of forty tokens: the bound alone is 0.93 at 95%, and no number of them passes 0.95.
    on = torch.zeros(4000, 2, dtype=torch.bool)
    on[:1000, 0], on[:100, 1] = True, True
    assert implication_graph(codes_of(on), n_null=0).n_implications == 1
    crowd = torch.rand(4000, 98, generator=generator()) < 0.05
    assert implication_graph(codes_of(torch.cat([on, crowd], 1)), n_null=0).n_implications == 0  # one of 4,950 tests
    on[100:, 1] = False
    on[40:, 1] = False
    assert implication_graph(codes_of(on), n_null=0, at_least=1).n_implications == 0


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(0, 60), st.floats(0.001, 0.5))
def test_the_false_discovery_rate_is_that_of_scipy(p, more, rate):
    from scipy.stats import false_discovery_control

    kept = implication._kept(torch.tensor(p, dtype=torch.float64), len(p) + more, rate)
    if p:
        adjusted = torch.from_numpy(false_discovery_control([*p, *[1.0] * more]))[: len(p)]
        sure = (adjusted - rate).abs() > 1e-9
        assert torch.equal(kept[sure], (adjusted <= rate)[sure])
    else:
        assert not len(kept)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31))
def test_order_of_tokens_and_latents_and_values_change_nothing(seed):
    g = generator(seed)
    on, _ = trees(seed, tokens=4000, roots=2)
    graph = implication_graph(codes_of(on), n_null=0)
    latents, tokens = torch.randperm(on.shape[1], generator=g), torch.randperm(len(on), generator=g)
    other = on[tokens][:, latents]
    values = torch.randn(other.shape, generator=g)
    moved = implication_graph(codes_of(other, values), n_null=0)
    assert {(int(latents[a]), int(latents[b])) for a, b in found_edges(moved)} == found_edges(graph)
    assert moved.n_implications == graph.n_implications
    assert torch.equal(moved.depth, graph.depth[latents])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.55, 0.98), st.floats(0.05, 0.5))
def test_there_are_no_cycles_and_parents_are_denser(seed, least, reverse):
    g = generator(seed)
    centre = torch.rand(600, 1, generator=g)
    on = torch.rand(600, 25, generator=g) * torch.rand(25, generator=g) > centre
    graph = implication_graph(codes_of(on), least, reverse, 0.6, n_null=0, at_least=2)
    assert nx.is_directed_acyclic_graph(graph.graph())
    assert (graph.active[graph.parent] > graph.active[graph.child] * least / reverse).all()
    assert (graph.depth[graph.parent] < graph.depth[graph.child]).all()
    assert (graph.share >= least).all()
    assert (graph.reverse <= reverse).all()


def test_pairs_are_those_of_the_product():
    on = torch.rand(500, 37, generator=generator()) < 0.3
    expected = on.double().T @ on.double()
    i, j, both = Active.of(codes_of(on)).pairs(45)
    assert torch.equal(torch.stack([i, j], 1), (expected >= 45).triu(1).nonzero())
    assert torch.equal(both.double(), expected[i, j])


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 200))
def test_nulls_keep_what_they_say(seed, latents, tokens):
    g = generator(seed)
    on = torch.rand(tokens, latents, generator=g) < torch.rand(latents, generator=g)
    active = Active.of(codes_of(on))
    shuffled, exchanged = active.shuffled(g), active.exchanged(g)
    assert torch.equal(shuffled.counts(), active.counts())
    for made in (shuffled, exchanged):
        assert len((made.token * latents + made.latent).unique()) == len(active.token)
        assert made.latent.max() < latents if len(made.latent) else True
    l0 = torch.bincount(active.token, minlength=tokens)
    assert torch.equal(torch.bincount(exchanged.token, minlength=tokens), l0)
    order = active.counts().argsort(descending=True, stable=True)
    for group in order.split(16):
        before, after = (
            torch.bincount(made.token[torch.isin(made.latent, group)], minlength=tokens) for made in (active, exchanged)
        )
        assert torch.equal(before, after)  # each token has as many of every density


def test_chunks_say_whether_and_not_how_often():
    on = torch.tensor([[1, 0], [1, 1], [0, 0], [0, 1]], dtype=torch.bool)
    active = Active.of(codes_of(on), torch.tensor([7, 7, 3, 3]))
    assert active.tokens == 2
    assert active.counts().tolist() == [1, 2]


# Vectors


def written(on, seed, mixed=0.0, d=48, noise=0.05):
    """An SAE whose codes are exact up to noise, on orthogonal rows; children mix in `mixed` of another parent."""
    g = generator(seed)
    n = on.shape[1]
    rows = torch.linalg.qr(torch.randn(max(d, n), max(d, n), generator=g))[0][:n]
    z = on * (0.5 + torch.rand(on.shape, generator=g))
    x = z @ rows + noise * torch.randn(len(on), rows.shape[1], generator=g) / math.sqrt(rows.shape[1])
    sae = sk.SAE(rows.shape[1], n, sk.TopK(4))
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.b_dec.zero_()
    return sae, z, x


@pytest.mark.parametrize("seed", SEEDS)
def test_trees_are_hierarchical_and_coverage_by_a_dense_latent_is_not(seed):
    on, edges = trees(seed, tokens=8000, roots=2, dense=0.995)
    sae, z, x = written(on, seed)
    graph = implication_graph(codes_of(on, z), sae=sae, x=x, n_null=5, seed=seed)
    dense = on.shape[1] - 1
    of_dense = graph.parent == dense
    assert of_dense.sum() >= 2  # the roots imply it, as all else does
    assert {edge for edge, good in zip(zip(*ends(graph), strict=True), of_dense, strict=True) if not good} == edges
    reconstruction = graph.reconstruction
    assert reconstruction.hierarchical[~of_dense].all()
    # Few rows are about a leaf, so chance puts the dense one among its five nearest of 41 at times: 1 to 3 of 22.
    assert reconstruction.hierarchical[of_dense].double().mean() < 0.25
    # Strengths of both are alike, so that each explains about a half: 0.48 to 0.53 in five seeds.
    assert (reconstruction.parent_gain - 0.5).abs().max() < 0.06
    assert (reconstruction.child_gain - 0.5).abs().max() < 0.06
    assert graph.results["hierarchical"].p == pytest.approx(1 / 6)


def ends(graph):
    return graph.parent.tolist(), graph.child.tolist()


def test_gains_are_those_of_the_definition():
    on, _ = trees(1, roots=1)
    sae, z, x = written(on, 1, noise=0.5)
    codes = codes_of(on, z)
    graph = implication_graph(codes, sae=sae, x=x, n_null=2)
    rows = sae.W_dec.detach()
    error = x - sae.decode(codes).detach()
    for edge, (a, b) in enumerate(zip(*ends(graph), strict=True)):
        both = on[:, a] & on[:, b]
        e, one, two = error[both], z[both, a, None] * rows[a], z[both, b, None] * rows[b]
        energy = (e + one + two).square().sum()
        added = [((e + part).square().sum() - e.square().sum()) / energy for part in (one, two)]
        assert float(graph.reconstruction.parent_gain[edge]) == pytest.approx(float(added[0]), rel=1e-4)
        assert float(graph.reconstruction.child_gain[edge]) == pytest.approx(float(added[1]), rel=1e-4)


def test_a_row_that_writes_nothing_of_use_is_no_parent():
    on, edges = trees(0, roots=2)
    sae, z, x = written(on, 0)
    with torch.no_grad():
        sae.W_dec[0] = -sae.W_dec[0]  # the first root is active where it was, and writes the opposite
    graph = implication_graph(codes_of(on, z), sae=sae, x=x, n_null=0)
    assert found_edges(graph) == edges
    of_first = graph.parent == 0
    assert not graph.reconstruction.hierarchical[of_first].any()
    assert (graph.reconstruction.parent_gain[of_first] < 0).all()
    assert graph.reconstruction.hierarchical[graph.parent >= 10].all()


# What it is made of


def test_a_graph_is_shown():
    on, edges = trees(0)
    sae, z, x = written(on, 0)
    graph = implication_graph(codes_of(on, z), sae=sae, x=x, n_null=2)
    drawn = graph.graph()
    assert set(drawn.edges) == edges
    assert drawn.nodes[0]["active"] == int(on[:, 0].sum())
    assert all(drawn.edges[edge]["hierarchical"] for edge in edges)
    groups, parents = graph.families(3)
    assert groups["0"].tolist() == list(range(10))
    assert groups["1"].tolist() == [1, 2, 3]
    assert parents == {str(child): str(10 * (child // 10)) for child in range(40) if child % 10 in (1, 4, 7)}
    axes = graph.plot(trees=2, labels={0: "root", 39: "of another tree"})
    assert len(axes.lines) == 18  # nine edges of each of two trees
    assert [text.get_text() for text in axes.texts] == ["root"]
    assert len(graph.to_frame()) == 2 * 5 + 3


def test_degenerate_codes_have_an_answer():
    silent = implication_graph(codes_of(torch.zeros(50, 3, dtype=torch.bool)), n_null=2)
    assert silent.n_implications == 0
    assert (silent.merged == -1).all()
    assert math.isnan(silent.results["placed"].value)
    single = implication_graph(codes_of(torch.ones(100, 1, dtype=torch.bool)), n_null=2)
    assert single.results["placed"].value == 0
    same = implication_graph(codes_of(torch.ones(300, 4, dtype=torch.bool)), n_null=2)
    assert same.results["equivalent"].value == 3
    assert same.n_implications == 0
    zeros = sk.SparseCodes(torch.zeros(70, 2), torch.tensor([[0, 1]] * 70, dtype=torch.int32), 5)
    assert (implication_graph(zeros, n_null=1).active == 0).all()  # slots of value 0 are not active
    sae = sk.SAE(6, 4, sk.TopK(2))
    none = implication_graph(codes_of(torch.zeros(50, 4, dtype=torch.bool)), sae=sae, x=torch.zeros(50, 6), n_null=2)
    assert math.isnan(none.results["hierarchical"].value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"least": 0.5, "reverse": 0.5}, "least and reverse must be between"),
        ({"least": 1.0}, "least and reverse must be between"),
        ({"confidence": 1.0}, "confidence must be above 0"),
        ({"at_least": 0}, "at_least must be at least 1"),
        ({"top": 0}, "top must be at least 1"),
        ({"n_null": -1}, "n_null must not be negative"),
        ({"x": torch.zeros(9, 6)}, "sae and x must be given together"),
        ({"sae": sk.SAE(6, 7, sk.TopK(1)), "x": torch.zeros(9, 6)}, "codes must be those of sae"),
        ({"sae": sk.SAE(6, 4, sk.TopK(1)), "x": torch.zeros(8, 6)}, r"x must be finite, \[9, 6\]"),
        ({"sae": sk.SAE(6, 4, sk.TopK(1)), "x": torch.full((9, 6), torch.nan)}, "x must be finite"),
    ],
)
def test_errors_name_the_argument(given, message):
    with pytest.raises(ValueError, match=message):
        implication_graph(codes_of(torch.ones(9, 4, dtype=torch.bool)), **given)


def test_codes_that_are_not_finite_are_refused():
    codes = sk.CSRCodes(torch.tensor([0, 1]), torch.tensor([0], dtype=torch.int32), torch.tensor([torch.nan]), 2)
    with pytest.raises(ValueError, match="codes must be finite"):
        implication_graph(codes)
    with pytest.raises(ValueError, match="codes must have a token"):
        implication_graph(codes_of(torch.zeros(0, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="chunks must be whole numbers"):
        Active.of(codes_of(torch.ones(3, 2, dtype=torch.bool)), torch.zeros(3))


def test_p_of_a_pair_is_the_larger_of_two():
    # 300 tokens of 600: P(B | A) = 0.5 is not below 0.5 beyond doubt.
    on = torch.zeros(3000, 2, dtype=torch.bool)
    on[:600, 0], on[:300, 1] = True, True
    assert binom.cdf(300, 600, 0.5) > 0.5
    assert implication_graph(codes_of(on), n_null=0).n_implications == 0
    on[200:, 1] = False
    assert implication_graph(codes_of(on), n_null=0).n_implications == 1
