"""The transcoder: reads what goes into a part of a model and writes what comes out of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.modules.activations import Activation, Codes
from sparsekern.modules.initialization import unit_rows
from sparsekern.modules.sae import SAE, check_counts


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
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        for name in ("tied", "pre_bias"):
            if options.pop(name, False):
                raise ValueError(f"{name} must be False: encoder and decoder of a transcoder live in two spaces")
        super().__init__(d_in, d_sae, activation, pre_bias=False, generator=generator, **options)
        check_counts(d_out=d_out or d_in)
        self.d_out, self.skip = d_out or d_in, skip
        rows = unit_rows(d_sae, self.d_out, generator).to(self.W_enc)
        self.W_dec, self.b_dec = nn.Parameter(rows), nn.Parameter(rows.new_zeros(self.d_out))
        if skip:
            self.W_skip = nn.Parameter(rows.new_zeros(self.d_out, d_in))

    def offset(self, x: Tensor) -> Tensor:
        """What is added to what the codes of `x` decode to."""
        return nn.functional.linear(x, self.W_skip, self.b_dec) if self.skip else self.b_dec

    def reconstruct(self, codes: Codes, x: Tensor) -> Tensor:
        """What the module makes of activations `x` ``[..., d_in]`` with these codes of theirs, changed or not."""
        decoded = super().reconstruct(codes, x)
        return decoded + nn.functional.linear(x, self.W_skip) if self.skip else decoded

    @torch.no_grad()
    def fit_start_(self, x: Tensor, center: str = "geometric_median", target: Tensor | None = None) -> None:
        """As for :class:`SAE`, after a ridge regression of `target` on `x`.

        With `skip` the regression is where ``W_skip`` starts. Without, decoder rows start at what it makes of their
        encoder rows: a latent that sees a direction writes what comes of that direction.
        """
        batch = self._start_batch(x, target)
        middle = batch.x.mean(0)
        linear = ridge(batch.x - middle, batch.target - batch.target.mean(0))
        rest = batch.target
        if self.skip:
            self.W_skip.copy_(linear)
            rest = batch.target - batch.x @ linear.T
        else:
            self.W_dec.copy_(nn.functional.normalize(self.W_enc @ linear.T, dim=1))
        self._fit_center_(rest, center)
        self.b_enc.copy_(-(self.W_enc @ middle))
        self.activation.fit_start_(self, batch)
        self._fit_scale_(batch)

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        config = {name: value for name, value in super().config().items() if name not in ("tied", "pre_bias")}
        return {**config, "d_out": self.d_out, "skip": self.skip}


_RIDGE = 0.01


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The map ``[d_out, d_in]`` of centred rows `x` to `y` with the least squared error, shrunk a little.

    The penalty is a hundredth of the mean variance of a dimension of `x`: a batch may have fewer rows than dimensions.
    """
    square = x.T @ x
    square.diagonal().add_(_RIDGE * square.diagonal().mean())
    return torch.linalg.solve(square.double(), (x.T @ y).double()).T.to(x.dtype)
