"""The model of a store, trained and not, and the polytope codes of the held-out tokens in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.polytope import PolytopeCodes, boundaries_on_segments, polytope_codes
from sparsekern.analysis.polytope.watch import Site, sites, watching
from sparsekern.analysis.results import null_generator
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.tokens import HeldOut
from sparsekern.bits import pack_bits
from sparsekern.hooks import named_module, recorded, rewritten

_PIECEWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU)
_ROWS = 4096  # codes that are unpacked at a time


@dataclass(frozen=True, eq=False)
class Watched:
    """A model's codes of held-out tokens, and those of the same architecture with random weights.

    Attributes
    ----------
    harvested : Harvested
        The model and the contexts.
    held_out : HeldOut
        The tokens: a row of the codes each.
    codes, untrained : PolytopeCodes
        All activation modules, signs of their inputs.
    behind : tuple of str
        Those of the layers that are called after the module whose output is in the store.
    random : Any
        The model with random weights.
    """

    harvested: Harvested
    held_out: HeldOut
    codes: PolytopeCodes
    untrained: PolytopeCodes
    behind: tuple[str, ...]
    random: Any

    @staticmethod
    def of(harvested: Harvested, held_out: HeldOut, seed: int) -> Watched:
        """Run the model, and the one with random weights, on the contexts."""
        model = harvested.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(null_generator(seed).initial_seed())  # not what the training may have begun with
            random = type(model)(model.config).eval()
        codes, untrained = (codes_of(harvested, some, len(held_out.x)) for some in (model, random))
        return Watched(harvested, held_out, codes, untrained, _behind(harvested), random)

    @property
    def layers(self) -> list[str]:
        """Names of all layers, in the order of the calls."""
        return [name for name, _ in self.codes.layers]

    @property
    def related(self) -> tuple[str, ...]:
        """The layers that latents are held against: those behind the store's module, or all if there are none."""
        return self.behind or tuple(self.layers)

    def activation(self, layer: str) -> nn.Module:
        """The module of a layer."""
        return named_module(self.harvested.model, layer, "layer")

    @property
    def smooth(self) -> bool:
        """Whether an activation is not piecewise linear, so that codes are surrogates."""
        return not all(isinstance(self.activation(layer), _PIECEWISE) for layer in self.layers)

    @torch.no_grad()
    def inputs_of(self, model: nn.Module, name: str) -> Tensor:
        """What a module of a model reads at each held-out token, ``[B, d]``."""
        rows = []
        for batch in self.harvested.batches:
            with recorded(model, name) as seen:
                model(**self.harvested.inputs(batch))
            ((given, _),) = seen
            assert given is not None
            rows.append(given[self.harvested.rows(batch)])
        return torch.cat(rows)[: len(self.held_out.x)]

    def linear_mlp(self) -> str | None:
        """The module around the first of the `related` activations, if it is piecewise linear."""
        name, _, _ = self.related[0].rpartition(".")
        if not name or not isinstance(self.activation(self.related[0]), _PIECEWISE):
            return None
        x = self.inputs_of(self.harvested.model, name)[:2]
        try:
            boundaries_on_segments(named_module(self.harvested.model, name, "layer"), x[:1], x[1:])
        except ValueError:  # such as a gate: a product of two linear maps is not piecewise linear
            return None
        return name


def codes_of(harvested: Harvested, model: nn.Module, n: int) -> PolytopeCodes:
    """Codes of the first n held-out tokens."""
    parts = [polytope_codes(model, harvested.inputs(batch), where=harvested.rows(batch)) for batch in harvested.batches]
    return PolytopeCodes(torch.cat([part.data for part in parts])[:n], parts[0].layers, parts[0].kind)


def of_rows(codes: PolytopeCodes, rows: slice | Tensor) -> PolytopeCodes:
    """The codes of some samples."""
    return PolytopeCodes(codes.data[rows].contiguous(), codes.layers, codes.kind)


def of_layers(codes: PolytopeCodes, names: Sequence[str]) -> PolytopeCodes:
    """The codes of some layers."""
    parts = [
        pack_bits(torch.cat([codes.unpack(slice(start, start + _ROWS), name) for name in names], 1))
        for start in range(0, len(codes), _ROWS)
    ]
    counts = dict(codes.layers)
    return PolytopeCodes(torch.cat(parts), tuple((name, counts[name]) for name in names), codes.kind)


@torch.no_grad()
def _behind(harvested: Harvested) -> tuple[str, ...]:
    called: list[str] = []

    def see(name: str, site: Site, u: Tensor) -> None:
        called.append(name)

    def mark(given: Tensor | None, output: Tensor) -> Tensor:
        called.append("")  # the name of no layer
        return output

    model = harvested.model
    with watching(sites(model, None), see), rewritten(model, harvested.hook, mark):
        model(**harvested.inputs(harvested.batches[0]))
    place = called.index("")
    return tuple(called[place + 1 :])
