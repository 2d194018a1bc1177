"""A result beside its nulls: p-values, tables, plots."""

import math

import pytest
import torch

from sparsekern.analysis.results import Result, frame, markdown, plain, plot, samples
from sparsekern.analysis.splitting import Factors


@pytest.fixture
def result():
    return Result("agreement", 0.5, {"permuted": samples(range(9))}, {"k-means": samples([0.6, 0.8])})


@pytest.mark.parametrize(("tail", "p"), [("greater", 0.9), ("less", 0.2), ("two-sided", 0.4)])
def test_p_counts_the_value_among_the_samples(tail, p):
    assert Result("r", 0.5, {"n": samples(range(9))}, tail=tail).p_values()["n"] == pytest.approx(p)


def test_p_is_never_zero_and_ties_count_against_the_value():
    assert Result("r", 9.0, {"n": samples(range(9))}).p_values()["n"] == 0.1
    assert Result("r", 0.0, {"n": torch.zeros(9)}).p_values()["n"] == 1


def test_p_is_uniform_under_the_null():
    draws = torch.randn(2000, 20, generator=torch.Generator().manual_seed(0))
    p = torch.tensor([Result("r", float(row[0]), {"n": row[1:]}).p_values()["n"] for row in draws])
    for level in (0.05, 0.25, 0.5):  # 2,000 draws: a standard error of at most 0.011
        assert float((p <= level + 1e-9).double().mean()) == pytest.approx(level, abs=0.04)


def test_the_null_hardest_to_beat_counts():
    result = Result("r", 5.0, {"low": samples(range(4)), "high": samples(range(9)), "none": samples([])})
    assert result.p == 0.5
    assert torch.equal(result.null, samples(range(9)))
    bare = Result("r", 5.0, {})
    assert math.isnan(bare.p)
    assert len(bare.null) == 0


def test_an_undefined_value_has_no_p_and_still_prints():
    result = Result("r", float("nan"), {"n": samples([])})
    assert math.isnan(result.p_values()["n"])
    assert "| r | **–** | n | – | – |" in markdown([result])
    result.plot()


def test_table_and_frame_have_a_row_for_each_null_and_control(result):
    table = result.to_frame()
    assert list(table["against"]) == ["permuted", "k-means"]
    assert list(table["kind"]) == ["null", "control"]
    assert table["mean"].tolist() == [4, pytest.approx(0.7)]
    assert math.isnan(table["p"][1])
    assert len(frame([result, result])) == 4
    assert "| agreement | **0.5** | permuted | 4 (0 … 8) | 0.9 |" in markdown([result])


def test_plots_draw_every_sample_and_the_value(result, tmp_path):
    axes = result.plot()
    drawn = [tuple(line.get_xdata()) for line in axes.lines]
    assert tuple(map(float, range(9))) in drawn
    assert (0.5, 0.5) in drawn
    plot([result, result]).savefig(tmp_path / "two.png")
    assert (tmp_path / "two.png").stat().st_size > 1000


def test_json_gets_no_nan():
    assert plain({"a": [float("nan"), (1.0, "x")], "b": float("inf")}) == {"a": [None, [1.0, "x"]], "b": None}


def test_an_unknown_tail_is_refused():
    with pytest.raises(ValueError, match="tail must be one of greater, less, two-sided, got 'up'"):
        Result("r", 0.0, {}, tail="up")


def test_what_an_analysis_returns_has_a_table_and_a_picture():
    pytest.importorskip("matplotlib")
    measures = {name: Result(name, 1.0, {"null": torch.zeros(3)}) for name in ("one", "two")}
    found = Factors(measures, torch.eye(2), torch.eye(2), torch.zeros(2))
    assert found.to_frame()["measure"].tolist() == ["one", "two"]
    assert [axes.get_xlabel() for axes in found.plot().axes] == ["one", "two"]
