"""The part of the study of polytope codes that follows straight lines from one linear piece to the next."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekern.analysis.models.digits import SEEDS, accuracy, digits_data, digits_net, new_net
from sparsekern.analysis.polytope import BoundaryDensity, boundary_density
from sparsekern.analysis.results import Result, new_panels, null_generator
from sparsekern.analysis.studies.options import PolytopeOptions
from sparsekern.analysis.studies.page import Page, sentence
from sparsekern.analysis.studies.polytope_nets import Watched
from sparsekern.hooks import named_module

_LEVEL = 0.05
_SAMPLES = 1000  # tokens from which segments are drawn; Gaussian points of them take their square
_NULLS = {
    "between_over_within": ("kinds permuted", "kinds permuted at a length"),
    "data": ("Gaussian of the same covariance", "coordinates permuted"),
    "local": ("Gaussian of the same covariance", "coordinates permuted"),
}
_TITLES = {"between_over_within": "between over within", "data": "between samples", "local": "about samples"}
_HEADER = ["", *(f"{title} ({', '.join(_NULLS[key])})" for key, title in _TITLES.items())]
_MEANING = (
    "*Between over within*: boundaries per unit length on segments between samples of different classes over that "
    "within a class. Above 1 a line between classes crosses more pieces than a line of its length within one. In "
    "brackets the largest of 999 samples with the kinds of segments permuted, and permuted among segments of about the "
    "same length, since segments within a class are shorter, and the larger p. *Between samples* and *about samples*: "
    "boundaries per unit length on segments between two samples, and on short ones around one; in brackets the means "
    "for Gaussian points with the covariance of the data, and for points with every coordinate permuted over the "
    "samples."
)


def digits(page: Page, options: PolytopeOptions) -> None:
    """Networks small enough that every boundary on a segment is found, and whose classes are known."""
    page.section("Where pieces meet: networks that read digits")
    _, _, images, truth = digits_data()
    found: dict[str, list[BoundaryDensity]] = {"trained": [], "untrained": []}
    read = []
    for seed in SEEDS[:1] if options.quick else SEEDS:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(null_generator(options.seed + seed).initial_seed())
            nets = {"trained": digits_net(seed=seed), "untrained": new_net().eval()}
        read.append(accuracy(nets["trained"])[1])
        for name, net in nets.items():
            found[name].append(_density(net, images, truth, options, options.n_costly))
    page.text(
        "Three hidden layers of 64 ReLUs that read the 8 × 8 digits of scikit-learn, for which every boundary on a "
        f"segment is found exactly. Held-out images, {len(images)}, of which the networks read "
        f"{', '.join(f'{share:.1%}' for share in read)} rightly; {options.segments} segments of each measure at most."
    )
    page.table(
        _HEADER,
        ([f"{name}, seed {seed}", *_cells(one)] for name, group in found.items() for seed, one in enumerate(group)),
    )
    page.text(_MEANING, *_counted(found))
    figure, panels = new_panels(2, width=4.5)
    for axes, (name, group) in zip(panels, found.items(), strict=True):
        group[0].plot(axes).set_title(f"{name}, seed 0", fontsize=10)
    page.picture("digits", figure, "Every segment between two images: its length, and boundaries per unit of it")
    page.record(digits={name: [one.results for one in group] for name, group in found.items()})


def _density(net: torch.nn.Module, x: Tensor, labels: Tensor, options: PolytopeOptions, n_null: int) -> BoundaryDensity:
    return boundary_density(
        net, x, labels, segments=options.segments, n_null=n_null, seed=options.seed, batch_size=2048
    )


def _cells(one: BoundaryDensity) -> list[str]:
    cells = []
    for key, nulls in _NULLS.items():
        result = one.results[key]
        of_null = torch.Tensor.max if key == "between_over_within" else torch.Tensor.mean
        told = ", ".join(f"{float(of_null(result.nulls[null])):.3g}" for null in nulls if len(result.nulls[null]))
        p = f"; p {result.p:.2g}" if key == "between_over_within" else ""
        cells.append(f"{result.value:.3g} ({told or '–'}{p})")
    return cells


def _counted(found: dict[str, list[BoundaryDensity]]) -> list[str]:
    """In how many networks each measure stands out against its nulls."""
    told = []
    for name, group in found.items():
        every = [one.results for one in group]
        more = sum(results["between_over_within"].p <= _LEVEL for results in every)
        above = [f"{_TITLES[key]} in {sum(_above(results[key]) for results in every)}" for key in ("data", "local")]
        told.append(
            f"{name.capitalize()}, of {len(group)}: more between classes than within, p ≤ {_LEVEL:g}, in {more}; above "
            f"all samples of both nulls {' and '.join(above)}."
        )
    return told


def _above(result: Result) -> bool:
    return all(result.value > float(some.max()) for some in result.nulls.values())


def lines(page: Page, watched: Watched, options: PolytopeOptions) -> None:
    """One MLP of the model, between tokens."""
    page.section("Where pieces meet: an MLP of the model")
    name = watched.linear_mlp()
    if name is None:
        page.text("Left out: an MLP of this model is not piecewise linear, so that there are no boundaries to find.")
        return
    held_out = watched.held_out
    following = torch.where(held_out.contexts[1:] == held_out.contexts[:-1], held_out.tokens[1:], -1)
    labels = {"token": held_out.tokens, "next token": torch.cat([following, torch.tensor([-1])])}
    found: dict[str, dict[str, BoundaryDensity]] = {"trained": {}, "untrained": {}}
    for net, model in (("trained", watched.harvested.model), ("untrained", watched.random)):
        x = watched.inputs_of(model, name)
        mlp = named_module(model, name, "layer")
        for label, classes in labels.items():
            known = (classes >= 0).nonzero().squeeze(1)
            generator = torch.Generator().manual_seed(options.seed)
            chosen = known[torch.randperm(len(known), generator=generator)[:_SAMPLES]]
            n_null = options.n_costly if label == "token" else 0  # of what does not depend on the labels
            found[net][label] = _density(mlp, x[chosen], classes[chosen], options, n_null)
    of_tokens = {net: [group["token"]] for net, group in found.items()}
    page.text(
        f"`{name}` alone, in the space that it reads: the activations behind the norm before it, whose scale therefore "
        "does not change along a segment. Classes are which token it is, and which one comes next; "
        f"{_SAMPLES:,} random tokens, {options.segments} segments of each measure at most."
    )
    page.table(
        _HEADER,
        ([f"{net}, by {label}", *_cells(one)] for net, group in found.items() for label, one in group.items()),
    )
    page.text(
        _MEANING,
        "With one hidden layer a unit changes its side at most once on a segment, so that boundaries are the units in "
        "which the codes of the two ends differ, and directions and distances decide all: compare with the untrained "
        "model, whose tokens of one kind are near each other as well.",
        *(f"By {label}: {sentence(one.results['between_over_within'])}" for label, one in found["trained"].items()),
        *_counted(of_tokens),
    )
    figure, panels = new_panels(2, width=4.5)
    for axes, (net, group) in zip(panels, found.items(), strict=True):
        group["token"].plot(axes).set_title(f"{net}, by token", fontsize=10)
    page.picture("mlp", figure, "Every segment between two tokens: its length, and boundaries per unit of it")
    page.record(lines={net: {label: one.results for label, one in group.items()} for net, group in found.items()})
