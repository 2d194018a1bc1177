"""Vectors of concepts are what the source says, and the orthogonality that follows from inclusion is told apart."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import roc_auc_score

from sparsekern.analysis.geometry import ABOVE, WORDS, hierarchical_orthogonality, hierarchy, word_groups

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(seed, signal=4.0, V=800, d=24, parents=3, children=3, words=14):
    """Words whose rows are noise, a direction of their parent and one of their own concept, all of one size."""
    g = generator(seed)
    directions = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    gamma = torch.randn(V, d, generator=g)
    groups, above = {}, {}
    for p in range(parents):
        rows = torch.arange(children * words) + p * children * words
        gamma[rows] += signal * directions[p]
        groups[f"p{p}"] = rows
        for c in range(children):
            own = rows[c * words : (c + 1) * words]
            gamma[own] += signal * directions[parents + p * children + c]
            groups[f"c{p}{c}"], above[f"c{p}{c}"] = own, f"p{p}"
    return gamma, groups, above


@pytest.mark.parametrize("seed", SEEDS)
def test_inclusion_alone_makes_vectors_orthogonal(seed):
    """Of words without structure: 0.16 to 0.23 in five seeds, and 0.39 at least where words are not the parent's."""
    gamma, groups, above = planted(seed, signal=0.0)
    found = hierarchical_orthogonality(gamma, groups, above, n_null=5, seed=seed)
    orthogonal = found.results["orthogonal"]
    assert orthogonal.value < 0.3
    assert orthogonal.p_values()["other words"] == pytest.approx(1 / 6)  # what looks like evidence
    assert orthogonal.p > 1 / 6  # and is none
    # Words that were left out are not taken in: 0.47 to 0.54, and −0.09 to 0.04.
    assert abs(found.results["auc"].value - 0.5) < 0.1
    assert abs(found.results["projection"].value) < 0.2


@pytest.mark.parametrize("seed", SEEDS)
def test_words_left_out_tell_planted_concepts_from_chance(seed):
    """In five seeds: AUC 1.00, within parents 0.98 to 0.99, projections 0.86 to 0.89; the nulls near 0.5 and 0."""
    gamma, groups, above = planted(seed)
    found = hierarchical_orthogonality(gamma, groups, above, n_null=5, seed=seed)
    assert found.results["auc"].value > 0.98
    assert found.results["auc_within"].value > 0.95
    assert 0.7 < found.results["projection"].value < 1
    for key in ("projection", "auc", "auc_within"):
        assert found.results[key].p == pytest.approx(1 / 6)
    assert (found.results["auc_within"].nulls["words of the parent"] - 0.5).abs().max() < 0.15
    assert found.results["orthogonal"].value < 0.08  # 0.02 to 0.04; of random words of the parent 0.04 to 0.13
    own, rest, auc = found.held_out["c00"]
    assert own > 0.5 > abs(rest)
    assert auc > 0.9
    # The vector of a child has its own direction and its parent's.
    assert torch.cosine_similarity(found.vectors["c00"], found.vectors["p0"], dim=0) > 0.4


def test_vectors_are_those_of_the_source():
    rows = torch.randn(9, 20, generator=generator()).double() + 1
    mean = rows.mean(0)
    inverse = np.linalg.pinv(ledoit_wolf(rows.numpy())[0])
    direction = torch.from_numpy(inverse) @ mean
    direction = direction / direction.norm()
    torch.testing.assert_close(hierarchy._vector(rows), (mean @ direction) * direction)


def test_whitening_leaves_the_identity():
    gamma = torch.randn(400, 7, generator=generator()) @ torch.randn(7, 7, generator=generator(1)) + 3
    white = hierarchy._whitened(gamma)
    torch.testing.assert_close(white.T @ white / 400, torch.eye(7, dtype=torch.float64))
    flat = hierarchy._whitened(
        gamma @ torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0, 0]))
    )  # two directions without spread
    values = torch.linalg.eigvalsh(flat.T @ flat / 400)
    torch.testing.assert_close(values, torch.tensor([0.0, 0, 1, 1, 1, 1, 1], dtype=torch.float64), atol=1e-5, rtol=0)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31))
def test_a_linear_map_of_all_rows_changes_nothing(seed):
    gamma, groups, above = planted(seed, V=300, d=12, words=8)
    g = generator(seed)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g).double())[0]
    other = 3 * gamma.double() @ turn * torch.linspace(0.5, 2, 12) + 5
    one, two = (hierarchical_orthogonality(rows, groups, above, n_null=0) for rows in (gamma.double(), other))
    for key in one.results:
        assert one.results[key].value == pytest.approx(two.results[key].value, abs=2e-3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_auc_is_that_of_scikit_learn(own, others):
    expected = roc_auc_score([1] * len(own) + [0] * len(others), own + others)
    assert hierarchy._auc(torch.tensor(own), torch.tensor(others)) == pytest.approx(expected)


def test_words_of_one_token_make_groups():
    known = {
        word: place for place, word in enumerate(sorted({word for words in WORDS.values() for word in words.split()}))
    }
    known.pop("cricket")

    def tokenizer(word, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": [known[word]] if word in known else [1, 2]}

    groups, parents = word_groups(tokenizer)
    assert set(groups) == set(WORDS) | set(ABOVE)
    assert len(groups["insect"]) == len(WORDS["insect"].split()) - 1
    assert parents["mammal"] == "animal"
    assert set(parents.values()) == set(ABOVE)
    for child, parent in parents.items():
        assert torch.isin(groups[child], groups[parent]).all()
        assert len(groups[child]) < len(groups[parent])
    few, above = word_groups(lambda word, add_special_tokens: {"input_ids": [7] if word in "red" else [1, 2]})
    assert not few
    assert not above


def test_a_hierarchy_is_shown():
    gamma, groups, above = planted(0, V=400)
    found = hierarchical_orthogonality(gamma, groups, above, n_null=1)
    assert len(found.plot().get_yticks()) == len(groups)
    assert len(found.to_frame()) == 3 + 1 + 1 + 2
    assert set(found.cosines) == set(above)


def test_degenerate_rows_have_an_answer():
    gamma, groups, above = planted(0, V=200, d=12)
    gamma[groups["c00"]] = gamma[0].clone()  # a concept whose words are all the same
    found = hierarchical_orthogonality(gamma, groups, above, n_null=1)
    assert all(math.isfinite(result.value) for result in found.results.values())
    wide = hierarchical_orthogonality(torch.randn(140, 300, generator=generator()), groups, above, n_null=1)
    assert all(math.isfinite(result.value) for result in wide.results.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": torch.full((50, 3), torch.nan)}, "gamma must be finite rows"),
        ({"gamma": torch.ones(50, 3)}, "gamma must have rows that differ"),
        ({"gamma": torch.ones(50)}, "gamma must be finite rows"),
        ({"groups": {"p": torch.arange(8), "c": torch.arange(3)}}, "at least 4 different rows of gamma.*'c'"),
        ({"groups": {"p": torch.arange(8), "c": torch.tensor([0, 1, 2, 2])}}, "at least 4 different rows"),
        ({"groups": {"p": torch.arange(8), "c": torch.tensor([0, 1, 2, 50])}}, "at least 4 different rows"),
        ({"groups": {"p": torch.arange(8), "c": torch.arange(8)}}, "some of its parent's and not all"),
        ({"groups": {"p": torch.arange(8), "c": torch.arange(6, 12)}}, "some of its parent's and not all"),
        ({"groups": {"p": torch.arange(48), "c": torch.arange(6)}}, "as many rows outside"),
        ({"groups": {}}, "groups and parents must each have an entry"),
        ({"parents": {"c": "q"}}, "parents must name groups"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"n_null": -1}, "n_null must not be negative"),
    ],
)
def test_errors_name_the_argument(change, message):
    given = {
        "gamma": torch.randn(50, 3, generator=generator()),
        "groups": {"p": torch.arange(8), "c": torch.arange(4)},
        "parents": {"c": "p"},
    } | change
    with pytest.raises(ValueError, match=message):
        hierarchical_orthogonality(**given)
