"""Components of polytope codes as directions of the activations that a net reads, beside the directions of an SAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.nulls import permuted, second_moment_root
from sparsekern.analysis.polytope.batches import Batch, Where, batches, length_of, moved, rows_of
from sparsekern.analysis.polytope.watch import sites, watching
from sparsekern.analysis.results import Result, Results, null_generator, samples
from sparsekern.hooks import evaluating, rewritten

_TILE = 8192  # directions compared at a time


@dataclass(frozen=True, eq=False)
class PulledDirections(Results):
    """What :func:`pulled_directions` returns; R components.

    Attributes
    ----------
    results : dict of str to Result
        ``cosine``, with a decoder: mean over the components of the largest absolute cosine of their mean direction with
        a decoder row. ``each``: the same of the directions at single samples, averaged over these too. ``constancy``:
        mean length of the mean of a component's directions at unit norm, 1 where they are the same at every sample.
    directions : Tensor [R, d]
        Jᵀ · component, averaged over the samples.
    cosine : Tensor [R]
        Largest absolute cosine with a decoder row; NaN without a decoder.
    latent : Tensor [R] int64
        Of which latent; −1 without a decoder.
    constancy : Tensor [R]
    """

    results: dict[str, Result]
    directions: Tensor
    cosine: Tensor
    latent: Tensor
    constancy: Tensor


def pulled_directions(
    net: nn.Module,
    x: Batch,
    components: Tensor,
    decoder: Tensor | None = None,
    *,
    layers: Sequence[str] | None = None,
    at: str | None = None,
    where: Where | None = None,
    batch_size: int = 256,
    n_null: int = 5,
    seed: int = 0,
) -> PulledDirections:
    """Pull components of codes back to a layer, by the transposed local Jacobian, and compare them with decoder rows.

    A code of kind "sign" is constant on every piece and has no derivative. What is differentiated are the
    pre-activations u whose signs it is: J = ∂u / ∂h, and Jᵀ · component is the direction in which a step raises the
    component's units most. With more units than dimensions they give an overcomplete set of directions.
    For tokens, u of every token is summed: a direction at one token is what it does to its own units and to those of
    all tokens that attend to it.

    Parameters
    ----------
    net : nn.Module
        Runs in evaluation mode and is left as it was.
    x : Tensor [N, …] or mapping of str to Tensor
        As for :func:`~sparsekern.analysis.polytope.polytope_codes`.
    components : Tensor [R, n]
        Such as those of :class:`~sparsekern.analysis.polytope.Decomposition`.
    decoder : Tensor [W, d] or None
        Rows of an SAE of the same activations, of any norm. Rows of 0 are left out.
    layers : sequence of str or None
        As for the codes.
    at : str or None
        The module whose output is h. None: `x` itself, a tensor of floats, each sample flattened.
    where : Tensor, callable or None
        Which tokens count, as for the codes.
    batch_size : int
        Samples at a time.
    n_null : int
        Samples of each null: components whose entries are *permuted within layers*, which keeps norms and signs and
        costs as much as the components themselves, and a *random dictionary* with the decoder's second moment.
    seed : int
        Determines the nulls.

    Raises
    ------
    ValueError
        For shapes that do not fit, numbers that are not finite, components of 0, `x` of integers without `at`, and
        layers that do not depend on h.
    """
    rows = components.detach().float()
    if rows.dim() != 2 or 0 in rows.shape or not rows.isfinite().all() or not rows.any(1).all():
        raise ValueError(f"components must be finite rows [R, n], none of them 0, got shape {tuple(rows.shape)}")
    if batch_size < 1 or n_null < 0:
        raise ValueError(f"batch_size must be at least 1 and n_null not negative, got {batch_size} and {n_null}")
    if at is None and not (isinstance(x, Tensor) and x.is_floating_point()):
        raise ValueError("at must name a module where x is not a tensor of floats, which could be differentiated by")
    generator = null_generator(seed)
    pull = _Pull(net, x, layers, at, where, batch_size)
    widths: list[int] = []
    means, constancy, each = pull(rows, decoder, widths)
    if decoder is not None and (decoder.dim() != 2 or decoder.shape[1] != means.shape[1]):
        raise ValueError(f"decoder must be [W, {means.shape[1]}], the width of h, got {tuple(decoder.shape)}")
    titles = {
        "cosine": "largest cosine of a pulled component with a decoder row",
        "each": "largest cosine of a component pulled at one sample with a decoder row",
        "constancy": "length of the mean of a component's directions at unit norm",
    }
    permuted = [_permuted(rows, widths, generator) for _ in range(n_null)]
    pulled = [pull(some, decoder, widths) for some in permuted]
    name = "entries permuted within layers"
    nulls = {"constancy": {name: samples(float(some[1].mean()) for some in pulled)}}
    values = {"constancy": float(constancy.mean())}
    cosine, latent = torch.full((len(rows),), torch.nan), torch.full((len(rows),), -1)
    if decoder is not None:
        unit = _unit(decoder)
        cosine, latent = _nearest(means, unit)
        latent = decoder.cpu().any(1).nonzero().squeeze(1)[latent]
        nulls["cosine"] = {name: samples(float(_nearest(some[0], unit)[0].mean()) for some in pulled)}
        nulls["each"] = {name: samples(some[2] for some in pulled)}
        root = second_moment_root(unit)
        drawn = (normalize(torch.randn(unit.shape, generator=generator) @ root, dim=1) for _ in range(n_null))
        nulls["cosine"]["random dictionary"] = samples(float(_nearest(means, some)[0].mean()) for some in drawn)
        values |= {"cosine": float(cosine.mean()), "each": each}
    results = {key: Result(titles[key], values[key], nulls[key]) for key in titles if key in values}
    return PulledDirections(results, means, cosine, latent, constancy)


@dataclass(frozen=True, eq=False)
class _Pull:
    net: nn.Module
    x: Batch
    layers: Sequence[str] | None
    at: str | None
    where: Where | None
    batch_size: int

    def __call__(self, components: Tensor, decoder: Tensor | None, widths: list[int]) -> tuple[Tensor, Tensor, float]:
        """Mean directions, the lengths of the means at unit norm, and the mean largest cosine at single samples.

        `widths` becomes the units of each layer.
        """
        unit = None if decoder is None else _unit(decoder)
        parameters = list(self.net.parameters())
        device = parameters[0].device if parameters else None
        total = unit_total = torch.zeros(())
        near, count = 0.0, 0
        with evaluating(self.net), torch.enable_grad():
            for batch, mask in batches(self.x, self.batch_size, self.where):
                pre, h = self._run(moved(batch, device), mask)
                widths[:] = [some.shape[1] for some in pre]
                u = torch.cat(pre, 1)
                if u.shape[1] != components.shape[1]:
                    raise ValueError(
                        f"components must be [R, {u.shape[1]}], one entry a unit, got {components.shape[1]}"
                    )
                weights = components.to(u)
                found = [self._direction(u, h, row, mask) for row in weights]
                directions = torch.stack(found).float().cpu()
                ones = normalize(directions, dim=2)
                total = total + directions.sum(1)
                unit_total = unit_total + ones.sum(1)
                count += directions.shape[1]
                if unit is not None and unit.shape[1] == directions.shape[2]:
                    near += float(_nearest(ones.flatten(0, 1), unit)[0].sum())
        if not count:
            raise ValueError("x must have a sample at least, and where a token")
        return total / count, (unit_total / count).norm(dim=1), near / (count * len(components))

    def _run(self, batch: Batch, mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """Pre-activations of each layer ``[rows, units]``, and what they are differentiated by."""
        seen: list[Tensor] = []
        length = length_of(batch)
        held: list[Tensor] = []

        def see(name: str, site: Any, u: Tensor) -> None:
            if site.at == "pool":
                raise ValueError(f"layers must not name max pools, whose units have no pre-activation: {name!r}")
            seen.append(rows_of(name, u, length, mask))

        def added(_: Tensor | None, output: Tensor) -> Tensor:
            held.append(torch.zeros_like(output, requires_grad=True))
            return output.detach() + held[-1]

        if self.at is None:
            assert isinstance(batch, Tensor)
            batch = batch.detach().clone().requires_grad_()
            held.append(batch)
        with watching(sites(self.net, self.layers), see), self._at(added):
            self.net(**batch) if isinstance(batch, Mapping) else self.net(batch)
        if len(held) != 1:
            raise ValueError(
                f"at must name a module that is called once in a forward pass, {self.at!r} is {len(held)}×"
            )
        return seen, held[0]

    def _at(self, added: Any) -> Any:
        return nullcontext() if self.at is None else rewritten(self.net, self.at, added)

    def _direction(self, u: Tensor, h: Tensor, weights: Tensor, mask: Tensor | None) -> Tensor:
        """``[rows, d]``"""
        found = None
        if u.requires_grad:
            (found,) = torch.autograd.grad((u @ weights).sum(), h, retain_graph=True, allow_unused=True)
        if found is None:
            raise ValueError(f"layers must depend on the output of {self.at!r}: they come before it")
        return rows_of(str(self.at), found, len(h), mask)


def _permuted(components: Tensor, widths: list[int], generator: torch.Generator) -> Tensor:
    return torch.cat([permuted(part, 1, generator) for part in components.split(widths, 1)], 1)


def _unit(decoder: Tensor) -> Tensor:
    rows = decoder.detach().float().cpu()
    if not rows.isfinite().all() or not rows.any():
        raise ValueError("decoder must be finite, with a row that is not 0")
    return normalize(rows[rows.any(1)], dim=1).contiguous()


@torch.no_grad()
def _nearest(directions: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Largest absolute cosine of each direction with a row, and the row; no table of all cosines is made."""
    cosines, places = [], []
    for part in normalize(directions, dim=1).split(_TILE):
        found = [sk.topk_encode(sign * part, unit, None, 1) for sign in (1, -1)]
        values = torch.cat([some.values for some in found], 1)
        best = values.argmax(1, keepdim=True)
        cosines.append(values.gather(1, best).squeeze(1))
        places.append(torch.cat([some.indices for some in found], 1).gather(1, best).squeeze(1).long())
    return torch.cat(cosines), torch.cat(places)
