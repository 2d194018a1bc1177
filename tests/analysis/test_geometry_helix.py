"""Helices and circles of numbers are found where they are, and not where only a smooth curve is."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsekern.analysis.geometry import closure, fourier_power, helix_columns, helix_fit, word_points

SEEDS = range(5)
NUMBERS = torch.arange(100.0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(seed, periods=(2, 5, 10, 100), noise=0.5, d=40, numbers=NUMBERS):
    g = generator(seed)
    columns = helix_columns(numbers, periods).float()
    directions = torch.randn(columns.shape[1], d, generator=g)
    return columns @ directions + noise * torch.randn(len(numbers), d, generator=g)


# Fits


def test_the_columns_are_those_of_the_helix_and_vanishing_ones_are_left_out():
    columns = helix_columns(NUMBERS)
    assert columns.shape == (100, 9)  # sin πa is 0 on whole numbers
    torch.testing.assert_close(columns[:, 2], (math.pi * NUMBERS.double()).cos())
    assert helix_columns(NUMBERS + 0.25).shape == (100, 10)
    assert helix_columns(NUMBERS, (2,), linear=False).shape == (100, 2)
    assert helix_columns(NUMBERS, ()).shape == (100, 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_planted_helix_predicts_numbers_that_were_left_out(seed):
    """Five seeds: R² 0.95, fitted 0.96, the polynomial of degree 9 at most 0.33, other periods at most 0.56."""
    found = helix_fit(planted(seed), NUMBERS, n_null=19, seed=seed)
    helix = found.results["helix"]
    assert 0.93 < helix.value < found.fitted < 0.99
    assert helix.p == pytest.approx(1 / 20)
    assert found.results["gain"].p == pytest.approx(1 / 20)
    assert helix.nulls["numbers permuted"].max() < 0.1
    assert float(helix.controls["polynomial of degree 9"]) < 0.5
    assert float(helix.controls["line"]) < float(helix.controls["projection on 8 principal components"])
    assert found.columns == 9


def test_circles_are_fitted_without_a_line():
    """Seeds 0 to 4: R² of points of a noisy circle of twelve that were left out 0.88 … 0.93, of a line at most 0.09."""
    numbers = torch.arange(12.0)
    for seed in SEEDS:
        g = generator(seed)
        points = helix_columns(numbers, (12,), linear=False).float() @ torch.randn(3, 40, generator=g)
        points = points + 0.3 * torch.randn(12, 40, generator=g)
        found = helix_fit(points, numbers, (12,), linear=False, n_folds=12, n_null=9, seed=seed)
        circle = found.results["helix"]
        assert found.columns == 3
        assert circle.value > 0.8
        assert float(circle.controls["line"]) < 0.3
        assert circle.p_values()["numbers permuted"] == pytest.approx(1 / 10)
        assert "circles, without the line" not in circle.controls


@pytest.mark.parametrize("seed", range(2))
def test_a_smooth_curve_is_no_helix(seed):
    """Five seeds: on a cubic curve the helix has 0.75 to 0.85, a polynomial of as many columns 0.005 to 0.018 more."""
    x = NUMBERS / 50 - 1
    curve = torch.stack([x, x**2, x**3], 1) @ torch.randn(3, 20, generator=generator(seed))
    points = curve + 0.3 * torch.randn(100, 20, generator=generator(seed + 9))
    found = helix_fit(points, NUMBERS, n_null=19, seed=seed)
    assert found.results["helix"].value > 0.5  # a good fit alone says nothing
    assert found.results["gain"].value < 0
    assert found.results["gain"].p > 0.05


def test_numbers_without_a_relation_have_no_r2():
    points = torch.randn(100, 20, generator=generator())
    found = helix_fit(points, NUMBERS, n_null=9)
    assert found.results["helix"].value < 0.05
    assert found.results["helix"].p > 0.1
    assert found.fitted > 0.05  # 8 of 99 degrees of freedom


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100))
def test_turning_moving_and_scaling_do_not_matter(seed, scale):
    numbers = torch.arange(24.0)
    points = planted(seed, (3, 8), numbers=numbers, d=6)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator(seed)))[0]
    one = helix_fit(points, numbers, (3, 8), n_null=2)
    other = helix_fit(scale * points @ turn + 7, numbers + 24, (3, 8), n_null=2)
    for name in ("helix", "gain"):
        assert other.results[name].value == pytest.approx(one.results[name].value, abs=1e-3)


def test_all_points_of_a_number_are_left_out_together():
    g = generator()
    words = torch.randn(20, 8, generator=g)  # each number has a place of its own, in no order
    points = words.repeat(3, 1) + 0.01 * torch.randn(60, 8, generator=g)
    numbers = torch.arange(20.0).repeat(3)
    assert helix_fit(points, numbers, (20,), n_null=0).results["helix"].value < 0.2
    few = helix_fit(points[:4], torch.arange(4.0), (4,), n_folds=10, n_null=1)
    assert few.columns == 4


# Frequencies


@settings(max_examples=10, deadline=None)
@given(st.integers(4, 20), st.integers(0, 2**31))
def test_the_power_is_that_of_the_coordinates(n, seed):
    points = torch.randn(n, 3, generator=generator(seed)).double()
    power = fourier_power(points, n_null=0).power
    assert float(power.sum()) == pytest.approx(1)
    # Regressions on one frequency at a time are orthogonal, and explain the shares of the variance.
    for turns in range(1, n // 2 + 1):
        columns = helix_columns(torch.arange(n), (n / turns,), linear=False)[:, 1:]
        centred = points - points.mean(0)
        fit = torch.linalg.lstsq(columns, centred).solution
        share = float((columns @ fit).square().sum() / centred.square().sum())
        assert float(power[turns - 1]) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("n", [7, 12])
def test_a_circle_has_the_lowest_frequency_and_closes(n):
    turns = 2 * math.pi * torch.arange(n) / n
    points = torch.stack([turns.cos(), turns.sin()], 1) @ torch.randn(2, 9, generator=generator())
    found = fourier_power(points + 0.05 * torch.randn(n, 9, generator=generator(1)))
    assert found.results["lowest"].value > 0.95
    assert found.results["lowest"].p < 0.02
    assert found.results["closure"].value < 1.7  # a circle seen from the side: steps are not all equally long
    assert found.results["closure"].p > 0.02


def test_an_open_curve_has_the_lowest_frequency_too_and_does_not_close():
    line = torch.arange(12.0)[:, None] * torch.ones(5)
    found = fourier_power(line)
    assert found.results["lowest"].p < 0.05
    assert found.results["closure"].value == pytest.approx(11)
    assert found.results["closure"].value == closure(line).value
    assert found.results["closure"].p < 0.02
    assert fourier_power(line + torch.eye(12)[:, :5], detrend=True).results["lowest"].p > 0.05


def test_the_power_at_periods_stands_beside_other_frequencies():
    found = fourier_power(planted(0, noise=0.3), (2, 5, 10), detrend=True)
    assert found.results["periods"].value > 0.5
    assert found.results["periods"].p < 0.02
    assert set(found.results["periods"].nulls) == {"order permuted", "frequencies nearby"}
    x = NUMBERS / 50 - 1
    smooth = fourier_power(torch.stack([x, x**2, x**3], 1), (2, 5, 10), detrend=True)
    assert smooth.results["periods"].p > 0.05
    assert "turns" in found.plot().get_xlabel()


# Points of words


class Words(nn.Module):
    """A model whose module gives for every token its id and its place."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(200, 2)
        with torch.no_grad():
            self.table.weight.copy_(torch.arange(200.0)[:, None].expand(200, 2))
        self.block = nn.Linear(2, 2)
        nn.init.eye_(self.block.weight)
        nn.init.zeros_(self.block.bias)
        self.dropout = nn.Dropout(0.5)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids):
        place = torch.arange(input_ids.shape[1])[None, :, None]
        return self.block(self.dropout(self.table(input_ids) + place))


class Encoded(dict):
    def to(self, device):
        return self


def characters(text, **options):
    """A tokenizer with a token for every two characters, and one before the text that stands for nothing."""
    starts = range(0, len(text), 2)
    ids = torch.tensor([[1, *(ord(text[start]) for start in starts)]])
    offsets = torch.tensor([[[0, 0], *([start, min(start + 2, len(text))] for start in starts)]])
    return Encoded(input_ids=ids, offset_mapping=offsets)


class Tokenizer(SimpleNamespace):
    def __call__(self, text, **options):
        return characters(text, **options)


TOKENIZER, MODEL = Tokenizer(is_fast=True), Words()


def test_words_are_means_over_their_tokens():
    found = word_points(TOKENIZER, MODEL, ["abcd", "xy"])
    assert found.shape == (2, 1, 2)
    assert found[:, 0, 0].tolist() == [(ord("a") + ord("c")) / 2, ord("x")]
    found = word_points(TOKENIZER, MODEL, ["abcd", "xy"], "block", ["{}", "-> {}"])
    # in the second context tokens are "->", " a", "bc", "d", which the word "abcd" overlaps from the second on
    assert found[0, 0, 0] == (ord("a") + 1 + ord("c") + 2) / 2
    assert found[0, 1, 0] == pytest.approx((ord(" ") + 2 + ord("b") + 3 + ord("d") + 4) / 3)
    last = word_points(TOKENIZER, MODEL, ["abcd"], "block", ["{}", "-> {}"], last=True)
    assert last[0, :, 0].tolist() == [ord("c") + 2, ord("d") + 4]
    assert MODEL.training
    assert not MODEL.block._forward_hooks


# Errors

POINTS = torch.randn(8, 3, generator=generator())
EIGHT = torch.arange(8.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: helix_columns(torch.ones(2, 2)), "numbers must be a finite vector"),
        (lambda: helix_columns(EIGHT, (0,)), r"periods must be above 0, got \[0\]"),
        (lambda: helix_fit(POINTS, EIGHT[:7]), r"points must be \[7, d\]"),
        (lambda: helix_fit(POINTS, EIGHT % 3), "numbers must be of at least four kinds, got 3"),
        (lambda: helix_fit(POINTS * torch.nan, EIGHT), "points must be finite"),
        (lambda: helix_fit(torch.ones(8, 3), EIGHT), "points must vary"),
        (lambda: helix_fit(POINTS, EIGHT, n_folds=1), "n_folds must be at least 2, got 1"),
        (lambda: helix_fit(POINTS, EIGHT, n_components=0), "n_components must be at least 1"),
        (lambda: fourier_power(POINTS[:3]), "points must be at least four, got 3"),
        (lambda: fourier_power(POINTS, (3,)), "periods must divide the 8 points"),
        (lambda: fourier_power(POINTS, (1,)), "periods must divide the 8 points and be 2 at least"),
        (lambda: fourier_power(POINTS, n_null=-1), "n_null must not be negative, got -1"),
        (lambda: word_points(TOKENIZER, MODEL, []), "words must be at least one"),
        (lambda: word_points(TOKENIZER, MODEL, ["a"], templates=["x"]), "templates must have {} in them once"),
        (lambda: word_points(Tokenizer(), MODEL, ["a"]), "tokenizer must be a fast one"),
        (lambda: word_points(TOKENIZER, MODEL, ["a"], "blocks"), "'blocks' is not a module of Words"),
        (lambda: word_points(TOKENIZER, nn.Linear(1, 1), ["a"]), "module must be named: Linear"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
