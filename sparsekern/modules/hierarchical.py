"""The hierarchical sparse autoencoder: latents have children, which are computed only where their parent is active."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.codes import SparseCodes
from sparsekern.modules.activations import Activation, Codes
from sparsekern.modules.initialization import unit_rows
from sparsekern.modules.last_batch import LastBatch
from sparsekern.modules.sae import SAE, Batch, check_counts
from sparsekern.ops import routed_topk_encode, sparse_decode, topk_encode
from sparsekern.ops._checks import SCREENS
from sparsekern.ops._route import routing_of
from sparsekern.ops._sparse_decode import _gather_dot


@dataclass(frozen=True)
class LatentNode:
    """A latent and what is below it.

    Attributes
    ----------
    latent : int
    level : int
        0 at the top.
    density : float or None
        Share of tokens on which it fires, where that was given.
    children : tuple of LatentNode
    """

    latent: int
    level: int
    density: float | None
    children: tuple[LatentNode, ...]

    def __str__(self) -> str:
        """The tree as indented lines."""
        density = "" if self.density is None else f"  {100 * self.density:.3g}%"
        return "\n".join(["  " * self.level + f"{self.latent}{density}", *map(str, self.children)])


class HierarchicalSAE(SAE):
    """A sparse autoencoder whose latents form a forest: ``x̂ = b_dec + Σ over levels of z W_dec``.

    ``levels=[(E1, k1), (E2, k2), …]``: at the top k1 of E1 latents are kept; each latent has E2 children, and of the
    children of every *active* latent k2 are kept, and so on down. So a token has up to k1 + k1·k2 + … active latents,
    and what lies below silent ones is not computed. A child can only fire where its parent does.

    With `subspace_dim` there are two levels, and the children of a latent live in a subspace of its own: they see
    ``W_down (x − b_dec)`` and write through ``W_up``, of that many dimensions each. That is H-SAE, whose published
    sizes are ``levels=[(16384, 32), (16, 1)], subspace_dim=4``.

    Latents are counted level by level: the children of latent j of a level are ``first + j · E``, …, ``first + j · E
    + E − 1`` with `first` the next level's first latent and E its children. :meth:`parent`, :meth:`children` and
    :meth:`tree` read the hierarchy.

    The loss is the FVU of the reconstruction, plus that of the upper levels alone, plus ``mean Σ|z| / mean ‖y − ȳ‖``,
    plus the mean squared cosine of a top decoder row and another latent's encoder row, each with its coefficient. The
    published loss has squared errors where this has FVUs, so that its L1 weight is to be multiplied by the activations'
    length; and it penalizes codes before the selection, which here are not computed. There is no AuxK.

    Parameters
    ----------
    d_in : int
        Width of the activations.
    levels : sequence of (int, int)
        Latents at the top, or children of a latent; and how many of these are kept.
    subspace_dim : int or None
        Dimensions of a latent's subspace; None for children with rows of full width.
    top_coefficient : float
        Weight of the FVU of the levels above the last.
    l1_coefficient, orthogonality_coefficient : float
        Weights of the other two. The orthogonality costs ``E1 · d_in²`` a step and makes the top level's gradients
        dense; by default it is on with `subspace_dim` (.1, as published) and off without.
    threshold : float or None
        A latent below it is not active; by default ``1 / √d_in`` with `subspace_dim`, as published, and 0 without.
    screen : str
        See :func:`sparsekern.topk_encode`.
    pre_bias, dead_after, generator, device, dtype
        As for :class:`SAE`.

    Attributes
    ----------
    levels : tuple of (int, int)
    stages : ModuleList
        The parameters, one module a level.
    b_dec : Parameter [d_in]

    References
    ----------
    Muchane et al., *Incorporating hierarchical semantics in sparse autoencoder architectures* (arXiv 2506.01197).
    """

    def __init__(
        self,
        d_in: int,
        levels: Sequence[Sequence[int]],
        *,
        subspace_dim: int | None = None,
        top_coefficient: float = 0.1,
        l1_coefficient: float = 1e-3,
        orthogonality_coefficient: float | None = None,
        threshold: float | None = None,
        screen: str = "auto",
        pre_bias: bool = True,
        dead_after: int = 10_000_000,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        nn.Module.__init__(self)
        check_counts(d_in=d_in, dead_after=dead_after)
        self.levels = _checked_levels(levels)
        if subspace_dim is not None:
            check_counts(subspace_dim=subspace_dim)
            if len(self.levels) != 2:
                raise ValueError(f"levels must be two with subspace_dim, got {len(self.levels)}")
        if screen not in SCREENS:
            raise ValueError(f"screen must be one of {', '.join(SCREENS)}, got {screen!r}")
        if orthogonality_coefficient is None:
            orthogonality_coefficient = 0.1 if subspace_dim else 0.0
        if threshold is None:
            threshold = d_in**-0.5 if subspace_dim else 0.0
        self.top_coefficient, self.l1_coefficient = top_coefficient, l1_coefficient
        self.orthogonality_coefficient, self.threshold = orthogonality_coefficient, threshold
        for name in ("top_coefficient", "l1_coefficient", "orthogonality_coefficient", "threshold"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        self.d_in, self.subspace_dim, self.pre_bias, self.dead_after = d_in, subspace_dim, pre_bias, dead_after
        self.d_out, self.tied, self.unit_decoder, self.aux_coefficient = d_in, False, True, 0.0
        self.activation = Activation()  # the levels have their own
        self.activation.screen = screen
        sizes = [1]
        for children, _ in self.levels:
            sizes.append(sizes[-1] * children)
        self.firsts = tuple(sum(sizes[1 : level + 1]) for level in range(len(sizes)))  # the last one is d_sae
        self.d_sae = self.firsts[-1]
        stages: list[_Rows | _Subspaces] = []
        for level, size in enumerate(sizes[1:]):
            if level and subspace_dim:
                stages.append(_Subspaces(d_in, sizes[level], self.levels[level][0], subspace_dim, generator))
            else:
                stages.append(_Rows(d_in, size, generator))
        self.stages = nn.ModuleList(stages)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        self.to(device=device, dtype=dtype)
        self.register_buffer("tokens_since_fired", torch.zeros(self.d_sae, dtype=torch.int64, device=self.device))
        self._last_batch = LastBatch()

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"d_in={self.d_in}, levels={list(self.levels)}, subspace_dim={self.subspace_dim}"

    def _stages(self) -> list[_Rows | _Subspaces]:
        return list(self.stages)  # type: ignore[arg-type]

    def _top(self) -> _Rows:
        top = self.stages[0]
        assert isinstance(top, _Rows)
        return top

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override] # noqa: N802
        """All encoder rows as they act, ``[d_sae, d_in]``: made when asked for."""
        return torch.cat([stage.encoder_rows() for stage in self._stages()])

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override] # noqa: N802
        """All decoder rows as they act, ``[d_sae, d_in]``: made when asked for."""
        return torch.cat([stage.decoder_rows() for stage in self._stages()])

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """Biases of all latents, ``[d_sae]``; those of children in subspaces are 0."""
        return torch.cat([stage.bias() for stage in self._stages()])

    # Forward

    def _encode(self, x: Tensor) -> tuple[SparseCodes, None]:
        rows, center = x.reshape(-1, self.d_in), self.center()
        found: list[SparseCodes] = []
        for (_, k), stage in zip(self.levels, self._stages(), strict=True):
            codes = stage.encode(rows, found[-1] if found else None, k, self.screen, center)
            values = codes.values
            if self.threshold:
                values = torch.where(values >= self.threshold, values, 0)
            if found:  # a silent parent has no children
                below = values.shape[1] // found[-1].k
                values = torch.where(found[-1].values.repeat_interleave(below, 1) > 0, values, 0)
            found.append(codes._replace(values=values))
        values = torch.cat([codes.values for codes in found], 1)
        indices = torch.cat([codes.indices + first for codes, first in zip(found, self.firsts, strict=False)], 1)
        shape = (*x.shape[:-1], values.shape[1])
        return SparseCodes(values.reshape(shape), indices.reshape(shape), self.d_sae), None

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction ``[..., d_in]`` from codes, in the order in which :meth:`encode` has the levels."""
        assert isinstance(codes, SparseCodes)
        return torch.stack(list(self._by_level(codes))).sum(0) + self.b_dec

    def _by_level(self, codes: SparseCodes) -> Iterable[Tensor]:
        """What each level adds."""
        slots = 0
        for level, (stage, count) in enumerate(zip(self._stages(), self.slots(), strict=True)):
            mine = slice(slots, slots + count)
            slots += count
            yield stage.decode(codes.values[..., mine], codes.indices[..., mine] - self.firsts[level])
        if slots != codes.k:
            raise ValueError(f"codes must have {slots} slots, as encode makes them, got {codes.k}")

    def slots(self) -> list[int]:
        """Slots of each level in the codes of a token: k1, k1·k2, …"""
        counts = [1]
        for _, k in self.levels:
            counts.append(counts[-1] * k)
        return counts[1:]

    def _penalties(self, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        assert isinstance(codes, SparseCodes)
        parts, target = {}, batch.target
        if self.top_coefficient > 0:
            upper = self.b_dec - target
            for level, part in enumerate(self._by_level(codes)):
                upper = upper + part
                if level + 2 == len(self.levels):
                    parts["top"] = self.top_coefficient * self.fvu(upper, batch)
        if self.l1_coefficient > 0:
            length = (target - target.mean(0)).norm(dim=1).mean()
            parts["l1"] = self.l1_coefficient * codes.values.sum(1).mean() / length
        if self.orthogonality_coefficient > 0:
            parts["orthogonality"] = self.orthogonality_coefficient * self._top().cross_orthogonality()
        return parts

    # The hierarchy

    def level_of(self, latent: int) -> int:
        """The level of a latent, 0 at the top."""
        if not 0 <= latent < self.d_sae:
            raise ValueError(f"latent must lie in [0, {self.d_sae}), got {latent}")
        return max(level for level, first in enumerate(self.firsts[:-1]) if first <= latent)

    def parent_of(self, latent: int) -> int | None:
        """The parent of a latent; None at the top."""
        level = self.level_of(latent)
        if level == 0:
            return None
        return self.firsts[level - 1] + (latent - self.firsts[level]) // self.levels[level][0]

    def children_of(self, latent: int) -> range:
        """The children of a latent; empty at the bottom."""
        level = self.level_of(latent)
        if level + 1 == len(self.levels):
            return range(0)
        count = self.levels[level + 1][0]
        first = self.firsts[level + 1] + (latent - self.firsts[level]) * count
        return range(first, first + count)

    def tree(self, latent: int, density: Tensor | None = None, least: float = 0.0) -> LatentNode:
        """The latent with all that is below it; print it to read it.

        Parameters
        ----------
        latent : int
            The root.
        density : Tensor [d_sae] or None
            Share of tokens on which each latent fires; children are then sorted by it, most frequent first.
        least : float
            Leave out what fires on less than that share.
        """
        below = [child for child in self.children_of(latent) if density is None or density[child] >= least]
        if density is not None:
            below.sort(key=lambda child: -float(density[child]))
        own = None if density is None else float(density[latent])
        nodes = tuple(self.tree(child, density, least) for child in below)
        return LatentNode(latent, self.level_of(latent), own, nodes)

    # Weights, the start, and saving

    def latent_weights(self) -> list[nn.Parameter]:
        """The weights of one row a latent, or a dimension of a subspace."""
        return [weight for stage in self._stages() for weight in stage.parameters() if weight.dim() == 2]

    def unit_weights(self) -> list[nn.Parameter]:
        """Those whose rows are kept at unit norm."""
        return [stage.unit_weight() for stage in self._stages()]

    def screened_weights(self) -> list[nn.Parameter]:
        """Those that see the activations."""
        return [stage.first_weight() for stage in self._stages()]

    def is_fresh(self) -> bool:
        """Whether ``b_dec`` is still at zero; waits for the device."""
        return not self.b_dec.any()

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        names = ["d_in", "subspace_dim", "top_coefficient", "l1_coefficient", "orthogonality_coefficient", "threshold"]
        names += ["screen", "pre_bias", "dead_after"]
        levels = [list(level) for level in self.levels]
        return {"class": type(self).__name__, "levels": levels, **{name: getattr(self, name) for name in names}}


def _checked_levels(levels: Sequence[Sequence[int]]) -> tuple[tuple[int, int], ...]:
    found = []
    for level in levels:
        if len(level) != 2 or not all(isinstance(n, int) for n in level) or not 1 <= level[1] <= level[0]:
            raise ValueError(f"levels must be pairs (latents, kept) with 1 ≤ kept ≤ latents, got {level!r}")
        found.append((int(level[0]), int(level[1])))
    if not found:
        raise ValueError("levels must hold at least one pair (latents, kept)")
    return tuple(found)


class _Rows(nn.Module):
    """A level whose latents have rows of full width."""

    def __init__(self, d_in: int, size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        rows = unit_rows(size, d_in, generator)
        self.W_enc, self.W_dec = nn.Parameter(rows), nn.Parameter(rows.clone())
        self.b_enc = nn.Parameter(torch.zeros(size))

    def encode(self, x: Tensor, parents: SparseCodes | None, k: int, screen: str, center: Tensor | None) -> SparseCodes:
        """The k largest, or those among the children of each of the `parents`."""
        if parents is None:
            return topk_encode(x, self.W_enc, self.b_enc, k, screen, center)
        route = routing_of(parents)
        return routed_topk_encode(x, self.W_enc, self.b_enc, route, k, screen, center, per_expert=True)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        return sparse_decode(SparseCodes(values, indices, self.W_dec.shape[0]), self.W_dec)

    def cross_orthogonality(self) -> Tensor:
        """Mean squared cosine of a decoder row and another latent's encoder row, by ``d × d`` products."""
        n = self.W_enc.shape[0]
        encoder, decoder = (nn.functional.normalize(weight, dim=1) for weight in (self.W_enc, self.W_dec))
        every = ((decoder.T @ decoder) * (encoder.T @ encoder)).sum()  # ‖D Eᵀ‖² without the n × n matrix
        own = (encoder * decoder).sum(1).square().sum()
        return (every - own) / max(1, n * n - n)

    def encoder_rows(self) -> Tensor:
        return self.W_enc

    def decoder_rows(self) -> Tensor:
        return self.W_dec

    def bias(self) -> Tensor:
        return self.b_enc

    def unit_weight(self) -> nn.Parameter:
        return self.W_dec

    def first_weight(self) -> nn.Parameter:
        return self.W_enc


class _Subspaces(nn.Module):
    """A level whose latents live in a subspace of `dim` dimensions of their parent: row ``j · dim + r`` is its r-th."""

    def __init__(self, d_in: int, parents: int, children: int, dim: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.children_each, self.dim = children, dim
        down, rows = unit_rows(parents * dim, d_in, generator), unit_rows(parents * children, dim, generator)
        self.W_down, self.W_up = nn.Parameter(down), nn.Parameter(down.clone())
        self.W_enc, self.W_dec = nn.Parameter(rows), nn.Parameter(rows.clone())

    def encode(self, x: Tensor, parents: SparseCodes | None, k: int, screen: str, center: Tensor | None) -> SparseCodes:
        """The k largest among the children of each of the `parents`. Nothing is as large as ``B × k × d``."""
        assert parents is not None
        inside = _gather_dot(x if center is None else x - center, self._rows(parents.indices), self.W_down)
        children = parents.indices.reshape(-1, 1) * self.children_each
        children = children + torch.arange(self.children_each, dtype=torch.int32, device=x.device)
        scores = _gather_dot(inside.reshape(-1, self.dim), children, self.W_enc)
        best = scores.sort(dim=1, descending=True, stable=True)
        shape = (x.shape[0], -1)
        values = best.values[:, :k].relu().reshape(shape)
        return SparseCodes(values, children.gather(1, best.indices[:, :k]).reshape(shape), self.W_enc.shape[0])

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        each = SparseCodes(values.reshape(-1, 1), indices.reshape(-1, 1), self.W_dec.shape[0])
        inside = sparse_decode(each, self.W_dec).reshape(*values.shape[:-1], values.shape[-1] * self.dim)
        rows = self._rows(indices // self.children_each)
        return sparse_decode(SparseCodes(inside, rows, self.W_up.shape[0]), self.W_up)

    def _rows(self, parents: Tensor) -> Tensor:
        """Rows of `W_down` and `W_up` of some parents, ``[..., k · dim]``."""
        dimension = torch.arange(self.dim, dtype=torch.int32, device=parents.device)
        return (parents.unsqueeze(-1) * self.dim + dimension).flatten(-2)

    def encoder_rows(self) -> Tensor:
        return self._through(self.W_enc, self.W_down)

    def decoder_rows(self) -> Tensor:
        return self._through(self.W_dec, self.W_up)

    def _through(self, inner: Tensor, outer: Tensor) -> Tensor:
        rows = inner.view(-1, self.children_each, self.dim) @ outer.view(-1, self.dim, outer.shape[1])
        return rows.reshape(-1, outer.shape[1])

    def bias(self) -> Tensor:
        return self.W_enc.new_zeros(self.W_enc.shape[0])

    def unit_weight(self) -> nn.Parameter:
        return self.W_dec

    def first_weight(self) -> nn.Parameter:
        return self.W_down
