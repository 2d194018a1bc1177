"""MatryoshkaSAE: its random prefixes, and its arguments."""

import math

import pytest
import torch

import sparsekern as sk


def make(**options):
    return sk.MatryoshkaSAE(8, 256, sk.TopK(3), **options)


def test_random_prefixes_are_pareto_distributed():
    sae = make(n_random=10)
    drawn = []
    for batch in range(400):
        sae.batches_seen.fill_(batch)
        *sizes, last = sae._drawn().tolist()
        assert last == 256
        assert sizes == sorted(sizes)
        drawn += sizes
    assert min(drawn) >= 1
    assert max(drawn) <= 256
    for size in (1, 2, 4, 16, 64, 200):
        expected = (1 / math.sqrt(size) - 1 / 16) / (1 - 1 / 16)  # P(a size of at least this)
        assert sum(other >= size for other in drawn) / 4000 == pytest.approx(expected, abs=0.005)


def test_training_draws_anew_and_evaluation_does_not():
    sae, x = make(n_random=3), torch.randn(9, 8)
    first = sae._drawn().tolist()
    sae.loss(x)
    second = sae._drawn().tolist()
    sae.eval().loss(x)
    assert first != second
    assert sae._drawn().tolist() == second


def test_the_whole_alone_is_an_sae():
    options = {"generator": torch.Generator().manual_seed(1)}
    plain = sk.SAE(8, 256, sk.TopK(3), generator=torch.Generator().manual_seed(1))
    x = torch.randn(9, 8)
    torch.testing.assert_close(make(prefixes=[256], **options).loss(x).total, plain.loss(x).total)


def test_prefixes_by_default():
    assert make().prefixes == (16, 32, 64, 128, 256)
    assert sk.MatryoshkaSAE(8, 5, sk.TopK(3)).prefixes == (1, 2, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prefixes": [16, 8, 256]},
            r"prefixes must be whole numbers that rise from at least 1 to d_sae=256, got \[16",
        ),
        ({"prefixes": [16, 16, 256]}, "prefixes must be whole numbers that rise"),
        ({"prefixes": [16]}, r"to d_sae=256, got \[16\]"),
        ({"prefixes": [0, 256]}, r"at least 1 to d_sae=256, got \[0, 256\]"),
        ({"prefixes": []}, r"got \[\]"),
        ({"prefixes": [2.5, 256]}, r"got \[2.5, 256\]"),
        ({"prefixes": [300]}, r"got \[300\]"),
        ({"n_random": 0}, "n_random must be a whole number of at least 1, got 0"),
        ({"n_random": 2, "prefixes": [256]}, "prefixes must not be given where n_random draws them"),
        ({"weights": [1, 1]}, r"weights must be 5 numbers, one a prefix, .* got \[1, 1\]"),
        ({"weights": [1, 1, 1, 1, 0]}, "the last above 0"),
        ({"weights": [1, -1, 1, 1, 1]}, "none negative"),
        ({"weights": [1, float("nan"), 1, 1, 1]}, "none negative"),
        ({"n_random": 2, "weights": [1, 1]}, "weights must be 3 numbers"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
