"""The transcoder: reads what goes into a part of a model and writes what comes out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.codes import CSRCodes
from sparsekern.modules.activations import Activation, Codes, Penalized
from sparsekern.modules.initialization import unit_rows
from sparsekern.modules.sae import SAE, at_least_tiny, check_counts
from sparsekern.ops._csr_products import csr_scatter_outer


class Transcoder(SAE):
    """An :class:`SAE` from activations to other activations: ``ŷ = activation(x W_encᵀ + b_enc) W_dec + b_dec``.

    With `skip`, ``+ x W_skipᵀ``: what is linear needs no latents. :meth:`loss` and :meth:`sparsekern.Trainer.step` take
    the target. `b_dec` lives where the target does, so nothing is subtracted from `x`; ``b_enc`` is fitted instead.

    Parameters
    ----------
    d_in : int
        Width of what is read.
    d_sae : int
        Number of latents.
    activation : Activation
        For example ``sparsekern.TopK(32)``.
    d_out : int or None
        Width of what is written; that of `x` by default.
    skip : bool
        Whether there is an affine path around the latents.
    unit_decoder : bool or None
        Whether decoder rows have unit norm. By default they do only where the activation is kept sparse by a penalty,
        as in an :class:`SAE`; free rows of other activations start at zero.
    **options
        Those of :class:`SAE` but ``tied`` and ``pre_bias``.

    Attributes
    ----------
    W_dec : Parameter [d_sae, d_out]
    b_dec : Parameter [d_out]
    W_skip : Parameter [d_out, d_in]
        With `skip` only. Starts at zero, and :meth:`fit_start_` fits it.

    References
    ----------
    Dunefsky et al., *Transcoders find interpretable LLM feature circuits* (arXiv 2406.11944); Paulo et al.,
    *Transcoders beat sparse autoencoders for interpretability* (arXiv 2501.18823), for the skip.
    """

    reads = "input"

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        d_out: int | None = None,
        skip: bool = False,
        unit_decoder: bool | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        for name in ("tied", "pre_bias"):
            if options.pop(name, False):
                raise ValueError(f"{name} must be False: encoder and decoder of a transcoder live in two spaces")
        d_out = d_in if d_out is None else d_out
        check_counts(d_out=d_out)
        if unit_decoder is None and not isinstance(activation, Penalized):
            unit_decoder = False
        super().__init__(
            d_in, d_sae, activation, unit_decoder=unit_decoder, pre_bias=False, generator=generator, **options
        )
        self.d_out, self.skip = d_out, skip
        rows = unit_rows(d_sae, self.d_out, generator).to(self.W_enc)
        self.W_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(rows.new_zeros(self.d_out))
        if skip:
            self.W_skip = nn.Parameter(rows.new_zeros(self.d_out, d_in))

    def offset(self, x: Tensor) -> Tensor:
        """What is added to what the codes of `x` decode to."""
        return self.b_dec + self._around(x) if self.skip else self.b_dec

    def reconstruct(self, codes: Codes, x: Tensor) -> Tensor:
        """What the module makes of activations `x` ``[..., d_in]`` with these codes of theirs, changed or not."""
        decoded = super().reconstruct(codes, x)
        return decoded + self._around(x) if self.skip else decoded

    def _around(self, x: Tensor) -> Tensor:
        """What takes the affine path, in the promoted dtype, as ops have it."""
        dtype = torch.promote_types(x.dtype, self.W_skip.dtype)
        return nn.functional.linear(x.to(dtype), self.W_skip.to(dtype))

    @torch.no_grad()
    def fit_start_(self, x: Tensor, center: str = "geometric_median", target: Tensor | None = None) -> None:
        """As for :class:`SAE`, after a ridge regression of `target` on `x`.

        Without `skip`, decoder rows start at what the regression makes of their encoder rows: a latent that sees a
        direction writes what comes of that direction. With it, ``W_skip`` starts at the regression, and decoder rows at
        what that leaves over where their latents fire. A row of which this tells nothing stays where it was. The scale
        of the encoder is fitted with these rows; if nothing ties or charges their norms, they then go to zero.
        """
        batch = self._start_batch(x, target)
        middle = batch.x.mean(0)
        linear = ridge(batch.x - middle, batch.target - batch.target.mean(0))
        rest = batch.target
        if self.skip:
            self.W_skip.copy_(linear)
            rest = rest - batch.x @ linear.T
        self._fit_center_(rest, center)
        self.b_enc.copy_(-(self.W_enc @ middle))
        self.activation.fit_start_(self, batch)
        if self.skip:
            codes = self._encode(batch.x)[0]
            csr = codes if isinstance(codes, CSRCodes) else codes.to_csr()
            rows = csr_scatter_outer(csr.values, csr.crow, csr.col, rest - self.b_dec, self.d_sae)
        else:
            rows = self.W_enc @ linear.T
        norms = rows.norm(dim=1, keepdim=True)
        self.W_dec.copy_(torch.where(norms > 0, rows / norms, self.W_dec))
        self._fit_scale_(batch)
        if not self.unit_decoder and not isinstance(self.activation, Penalized):
            self.W_dec.zero_()  # rows that begin wrong cost more steps than rows that begin with nothing

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        config = {name: value for name, value in super().config().items() if name not in ("tied", "pre_bias")}
        return {**config, "d_out": self.d_out, "skip": self.skip}


_RIDGE = 0.01


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The map ``[d_out, d_in]`` of centred rows `x` to `y` with the least squared error, shrunk a little.

    The penalty is a hundredth of the mean variance of a dimension of `x`: a batch may have fewer rows than dimensions.
    """
    rows = x.double()
    square = rows.T @ rows
    square.diagonal().add_(at_least_tiny(_RIDGE * square.diagonal().mean()))  # of constant rows the map is 0
    return torch.linalg.solve(square, rows.T @ y.double()).T.to(x.dtype)
