"""The crosscoder: one set of latents for several layers or models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsekern.modules.activations import Activation, Codes
from sparsekern.modules.sae import SAE, Batch, at_least_tiny, centred_rows, check_counts
from sparsekern.ops._row_norms import row_norms


class Crosscoder(SAE):
    """An :class:`SAE` that reads and writes several sources at once: layers of a model, or models on the same tokens.

    ``z = activation(Σ_s W_enc[:, s] (x_s − b_dec_s) + b_enc)`` and ``x̂_s = z W_dec[:, s] + b_dec_s``: the
    autoencoder of the concatenated sources, but for two things. Its loss is the mean FVU of the sources, so that none
    counts for more by being larger. And where decoder rows are free, a latent is charged for the sum of its norms in
    the sources: one that is of use in few is cheaper there.

    Parameters
    ----------
    n_sources : int
        Layers or models.
    d_in : int
        Width of each.
    d_sae : int
        Number of latents.
    activation : Activation
        :class:`ReLU` for the published L1 crosscoder, :class:`BatchTopK` for the one that made model-specific latents
        trustworthy.
    **options
        Those of :class:`SAE`.

    Attributes
    ----------
    W_enc, W_dec : Parameter [d_sae, n_sources · d_in]
        Source by source.

    References
    ----------
    Lindsey et al., *Sparse crosscoders for cross-layer features and model diffing* (Anthropic, October 2024); Minder et
    al., *Overcoming sparsity artifacts in crosscoders* (arXiv 2504.02922), for BatchTopK.
    """

    def __init__(self, n_sources: int, d_in: int, d_sae: int, activation: Activation, **options: Any) -> None:
        check_counts(n_sources=n_sources, d_in=d_in)
        super().__init__(n_sources * d_in, d_sae, activation, **options)
        self.n_sources, self.d_source = n_sources, d_in

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"n_sources={self.n_sources}, d_source={self.d_source}, {super().extra_repr()}"

    def encode(self, x: Tensor) -> Codes:
        """Codes of the activations `x` ``[..., n_sources, d_in]``."""
        return super().encode(self._flat(x))

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction ``[..., n_sources, d_in]`` from codes."""
        return super().decode(codes).unflatten(-1, (self.n_sources, self.d_source))

    def reconstruct(self, codes: Codes, x: Tensor) -> Tensor:
        """What the module makes of activations `x` with these codes of theirs, changed or not, in the shape of `x`."""
        return self.decode(codes).reshape(x.shape)

    def source_norms(self) -> Tensor:
        """Norms of each latent's decoder in the sources, ``[d_sae, n_sources]``: where it is of use. Differentiable."""
        return row_norms(self.W_dec, self.n_sources)

    def latent_norms(self) -> Tensor:
        """Sums of :meth:`source_norms`, ``[d_sae]``; 1 where rows are kept at unit norm."""
        return super().latent_norms() if self.unit_decoder else self.source_norms().sum(1)

    def variance_of(self, target: Tensor) -> Tensor:
        """Mean squared length of each source of `target` about its mean, ``[n_sources]`` float32 at least."""
        rows = centred_rows(target.reshape(-1, self.d_in))
        return self._by_source(rows)

    def fvu(self, error: Tensor, batch: Batch) -> Tensor:
        """Mean over the sources of their shares of variance that are `error` ``[B, n_sources · d_in]``."""
        return (self._by_source(error) / at_least_tiny(batch.variance)).mean()

    def _by_source(self, rows: Tensor) -> Tensor:
        """Mean squared lengths, ``[n_sources]``."""
        parts = rows.to(torch.promote_types(rows.dtype, torch.float32)).view(-1, self.n_sources, self.d_source)
        return torch.linalg.vector_norm(parts, dim=(0, 2)).square() / rows.shape[0]

    def _flat(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.n_sources, self.d_source):
            return x.flatten(-2)
        if x.dim() and x.shape[-1] == self.d_in:
            return x
        raise ValueError(f"x must end in ({self.n_sources}, {self.d_source}) or ({self.d_in},), got {tuple(x.shape)}")

    def check_batch(self, x: Tensor, target: Tensor | None = None) -> None:
        """Raise ValueError where :meth:`loss` cannot take this batch; values are looked at later, by the op."""
        super().check_batch(self._flat(x), None if target is None else self._flat(target))

    def _fit_center_(self, target: Tensor, center: str) -> None:
        """Also: encoder rows see sources of one length, and decoder rows write their own."""
        super()._fit_center_(target, center)
        lengths = self.variance_of(target).sqrt()
        if (lengths == 0).any():
            return
        scale = (lengths / lengths.mean()).to(self.W_enc.dtype).repeat_interleave(self.d_source)
        if not self.tied:
            self.W_enc.div_(scale)
            self.W_dec.mul_(scale)
            self.normalize_decoder_()

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        return {**super().config(), "n_sources": self.n_sources, "d_in": self.d_source}
