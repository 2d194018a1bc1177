"""What an analysis returns: a number beside the same number under null hypotheses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TAILS = ("greater", "less", "two-sided")


@dataclass(frozen=True)
class Result:
    """A number, the same number where chance made it, and the same number where a rival method made it.

    A *null* removes what the number is meant to show and keeps the rest (labels permuted, a random router): values
    beyond its samples are evidence, counted by :meth:`p_values`. A *control* is another way to get a good number (a
    k-means router): it says how remarkable the value is, not whether it is chance, and so has no p.

    Parameters
    ----------
    name : str
        What is measured, as a reader without the code would say it.
    value : float
        NaN where the input does not define it.
    nulls : mapping of str to Tensor [n]
        Samples of the number under each null, by what was made random.
    controls : mapping of str to Tensor [n]
        Samples of the number under each control.
    tail : {"greater", "less", "two-sided"}
        Which deviation from the nulls speaks against them.
    """

    name: str
    value: float
    nulls: Mapping[str, Tensor]
    controls: Mapping[str, Tensor] = field(default_factory=dict)
    tail: str = "greater"

    def __post_init__(self) -> None:
        if self.tail not in TAILS:
            raise ValueError(f"tail must be one of {', '.join(TAILS)}, got {self.tail!r}")

    def p_values(self) -> dict[str, float]:
        """For each null the share of its samples at least as extreme as the value, the value counted among them.

        So it is never below ``1 / (n + 1)``, and a valid p-value for any n (Phipson & Smyth 2010, arXiv 1603.05766).
        """
        return {null: self._p(samples) for null, samples in self.nulls.items()}

    @property
    def p(self) -> float:
        """The largest of :meth:`p_values`: a value has to stand out against every null. NaN without any."""
        return self._hardest()[1]

    @property
    def null(self) -> Tensor:
        """Samples of the null against which the value stands out least; none without any."""
        return self._hardest()[0]

    def _hardest(self) -> tuple[Tensor, float]:
        p_values = {name: p for name, p in self.p_values().items() if p == p}
        if not p_values:
            return torch.empty(0, dtype=torch.float64), float("nan")
        name = max(p_values, key=lambda null: p_values[null])
        return self.nulls[name], p_values[name]

    def _p(self, samples: Tensor) -> float:
        if self.value != self.value or len(samples) == 0:
            return float("nan")
        above = (1 + int((samples >= self.value).sum())) / (1 + len(samples))
        below = (1 + int((samples <= self.value).sum())) / (1 + len(samples))
        return {"greater": above, "less": below, "two-sided": min(1.0, 2 * min(above, below))}[self.tail]

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dict for each null and each control: mean and range of its samples, and p for a null."""
        p_values = self.p_values()
        records = []
        for kind, group in (("null", self.nulls), ("control", self.controls)):
            for name, samples in group.items():
                has = len(samples) > 0
                records.append(
                    {
                        "measure": self.name,
                        "value": self.value,
                        "kind": kind,
                        "against": name,
                        "mean": samples.mean().item() if has else float("nan"),
                        "least": samples.min().item() if has else float("nan"),
                        "largest": samples.max().item() if has else float("nan"),
                        "samples": len(samples),
                        "p": p_values.get(name, float("nan")),
                    }
                )
        return records

    def to_frame(self) -> Any:
        """:meth:`to_records` as a pandas.DataFrame."""
        return frame([self])

    def plot(self, axes: Any = None) -> Any:
        """Draw the samples of each null and control as dots, a row each, and the value as a line; returns the axes."""
        groups = {name: (samples, "0.45") for name, samples in self.nulls.items()}
        groups |= {name: (samples, "C1") for name, samples in self.controls.items()}
        axes = new_axes(height=0.9 + 0.3 * len(groups)) if axes is None else axes
        strip(axes, groups)
        axes.set_xlabel(self.name)
        if self.value == self.value:
            axes.axvline(self.value, color="C0", lw=2)
            axes.annotate(
                f"{self.value:.3g}",
                (self.value, 1),
                xycoords=("data", "axes fraction"),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                color="C0",
            )
        drawn = [self.value, *(number for numbers, _ in groups.values() for number in numbers.tolist())]
        if min(drawn) == max(drawn):  # else the axis would be one of rounding errors
            axes.set_xticks([self.value])
        return axes


class Results:
    """Base of what an analysis returns: a dataclass with its numbers as `results`, and tensors beside them."""

    results: dict[str, Result]

    def to_frame(self) -> Any:
        """All results as one pandas.DataFrame."""
        return frame(self.results.values())

    def plot(self) -> Any:
        """A panel for each result, one above the other; returns the matplotlib figure."""
        return plot(self.results.values())


def frame(results: Iterable[Result]) -> Any:
    """The records of several results as one pandas.DataFrame."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError("to_frame needs pandas: pip install 'sparsekern[analysis]'") from error
    return pd.DataFrame([record for result in results for record in result.to_records()])


def markdown(results: Iterable[Result]) -> str:
    """Several results as one Markdown table: the value, and for each null or control its mean, range and p."""
    lines = ["| measure | value | beside | mean (least … largest) | p |", "|---|---|---|---|---|"]
    for result in results:
        for index, record in enumerate(result.to_records()):
            first = (f"{record['measure']}", f"**{_number(record['value'])}**") if index == 0 else ("", "")
            numbers = [_number(record[key]) for key in ("mean", "least", "largest")]
            p = "control" if record["kind"] == "control" else _number(record["p"])
            lines.append(f"| {first[0]} | {first[1]} | {record['against']} | {_range(*numbers)} | {p} |")
    return "\n".join(lines)


def plot(results: Iterable[Result]) -> Any:
    """A panel for each result, one above the other; returns the matplotlib figure."""
    kept = list(results)
    heights = [0.75 + 0.27 * (len(result.nulls) + len(result.controls)) for result in kept]
    panels = _figure(7.5, sum(heights)).subplots(len(kept), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes, result in zip(panels, kept, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        result.plot(axes)
    return panels[0].figure


def strip(axes: Any, groups: Mapping[str, tuple[Tensor, str]]) -> None:
    """Draw groups of numbers as dots, a row each from the top, in the colour beside them."""
    for y, (numbers, color) in enumerate(groups.values()):
        axes.plot(numbers.tolist(), [y] * len(numbers), "o", ms=5, mew=0, alpha=0.5, color=color, clip_on=False)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.margins(x=0.08)
    axes.locator_params(axis="x", nbins=6)


def plain(value: Any) -> Any:
    """`value` with None for NaN and infinity, which JSON does not have, at any depth."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_axes(width: float = 7, height: float = 4) -> Any:
    """Axes of a new matplotlib figure, in the look of all plots here; ``axes.figure.savefig`` writes it."""
    axes = _figure(width, height).subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def new_panels(count: int, width: float = 4, height: float = 3.5) -> tuple[Any, list[Any]]:
    """A matplotlib figure and its axes, `count` of them side by side, in the same look."""
    figure = _figure(width * count, height)
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'sparsekern[analysis]'") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def samples(numbers: Iterable[float]) -> Tensor:
    """Numbers as samples of a null: ``[n]`` float64."""
    return torch.tensor(list(numbers), dtype=torch.float64)


def null_generator(seed: int) -> torch.Generator:
    """A generator for nulls, whose numbers are not those of ``manual_seed(seed)``.

    Those may have made what is measured: an SAE's first weights are random rows of a seed, and the same seed's random
    dictionary would be the SAE itself.
    """
    return torch.Generator().manual_seed((seed + 1) * 0x9E3779B97F4A7C15 % 2**63)


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3g}"


def _range(mean: str, least: str, largest: str) -> str:
    return mean if least == largest else f"{mean} ({least} … {largest})"
