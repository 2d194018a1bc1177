"""The matryoshka sparse autoencoder: every prefix of the latents is an autoencoder of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekern.codes import CSRCodes
from sparsekern.modules.activations import Activation, Codes
from sparsekern.modules.sae import SAE, Batch, check_counts
from sparsekern.ops import sparse_decode
from sparsekern.ops._snapshot import snapshot

_FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
_GOLDEN = 0.6180339887498949


class MatryoshkaSAE(SAE):
    """An :class:`SAE` whose loss is the mean FVU over prefixes of its latents: the first m alone must reconstruct too.

    So early latents cannot leave what is general to be absorbed by later, more special ones. All prefixes are decoded
    in one pass over the codes: a code is decoded once, for the first prefix that holds it, and what prefixes add is
    summed up. Codes are those of the whole dictionary, whichever activation selects them; that of the paper is
    :class:`BatchTopK`.

    Parameters
    ----------
    d_in, d_sae : int
        As for :class:`SAE`.
    activation : Activation
        For example ``sparsekern.BatchTopK(32)``.
    prefixes : sequence of int, or None
        Rising sizes, the last of them `d_sae`; by default 1/16, 1/8, 1/4, 1/2 and all of it.
    weights : sequence of float, or None
        Of the prefixes in the mean; by default equal. Smaller ones for all but the last balance what small prefixes do
        to early latents (feature hedging).
    n_random : int or None
        Instead of `prefixes`: so many random ones a batch, and the whole. Sizes are drawn from the Pareto distribution
        with exponent 1/2 between 1 and `d_sae`, by a golden-ratio sequence on `batches_seen`, so that a resumed run
        draws the same.
    **options
        Those of :class:`SAE`.

    References
    ----------
    Bussmann et al., *Learning multi-level features with matryoshka sparse autoencoders* (arXiv 2503.17547); Nabeshima,
    *Matryoshka sparse autoencoders* (2024), for random prefixes; Chanin et al., *Feature hedging* (arXiv 2505.11756),
    for balanced weights.
    """

    boundaries: Tensor
    batches_seen: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        prefixes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        n_random: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, activation, **options)
        if n_random is not None:
            check_counts(n_random=n_random)
            if prefixes is not None:
                raise ValueError("prefixes must not be given where n_random draws them")
            prefixes = [d_sae] * (n_random + 1)
        elif prefixes is None:
            prefixes = sorted({max(1, round(fraction * d_sae)) for fraction in _FRACTIONS})
        elif (
            not all(isinstance(size, int) for size in prefixes)
            or list(prefixes) != sorted({*prefixes, d_sae})
            or prefixes[0] < 1
        ):
            raise ValueError(
                f"prefixes must be whole numbers that rise from at least 1 to d_sae={d_sae}, got {list(prefixes)}"
            )
        self.prefixes, self.n_random = tuple(prefixes), n_random
        self.weights = (1.0,) * len(self.prefixes) if weights is None else tuple(weights)
        fitting = len(self.weights) == len(self.prefixes) and all(0 <= weight < math.inf for weight in self.weights)
        if not fitting or self.weights[-1] == 0:
            raise ValueError(
                f"weights must be {len(self.prefixes)} numbers, one a prefix, none negative and the last above 0, "
                f"got {list(self.weights)}"
            )
        self.register_buffer("boundaries", self._boundaries(), persistent=False)
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64, device=self.device))

    def _boundaries(self) -> Tensor:
        return torch.tensor(self.prefixes, dtype=torch.int32, device=self.device)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.boundaries = self._boundaries()  # no part of the state, and empty in a module that comes from meta

    def _reconstruction(self, codes: Codes, batch: Batch, trace: Any) -> tuple[Tensor, Tensor]:
        csr = codes if isinstance(codes, CSRCodes) else codes.to_csr()
        prefixes = self._drawn() if self.n_random else self.boundaries
        n, shape = len(self.prefixes), batch.target.shape
        # As codes of tokens × prefixes, each entry with the first prefix that holds it: those of a token are in order.
        place = csr.rows() * n + torch.searchsorted(prefixes, csr.col, right=True)
        counts = torch.zeros(shape[0] * n, dtype=torch.int64, device=place.device)
        counts = counts.scatter_add(0, place, torch.ones_like(place))
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        added = sparse_decode(csr._replace(crow=crow), self.W_dec).view(shape[0], n, shape[1])
        errors = (added.cumsum(1) + (self.offset(batch.x) - batch.target).unsqueeze(1)).unbind(1)
        weighted = [weight * self.fvu(error, batch) for weight, error in zip(self.weights, errors, strict=True)]
        return errors[-1], torch.stack(weighted).sum() / sum(self.weights)

    def _drawn(self) -> Tensor:
        """Random prefixes for the next batch, rising, and the whole."""
        assert self.n_random is not None
        numbers = torch.arange(1, self.n_random + 1, device=self.device) + self.n_random * snapshot(self.batches_seen)
        uniform = (numbers.double() * _GOLDEN).frac()
        sizes = (1 - uniform * (1 - self.d_sae**-0.5)) ** -2
        return torch.cat([sizes.floor().int().sort().values, self.boundaries[-1:]])

    def _count(self, codes: Codes, trace: Any, finite: Tensor) -> None:
        super()._count(codes, trace, finite)
        self.batches_seen += finite

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        prefixes = None if self.n_random else list(self.prefixes)
        own = {"prefixes": prefixes, "weights": list(self.weights), "n_random": self.n_random}
        return {**super().config(), **own}
