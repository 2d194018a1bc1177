"""Adam, and what of a training step lies around it: the backward pass, clipping, and decoder rows of unit norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparsekern.backends import cpu, forced
from sparsekern.factors import kept_as_factors
from sparsekern.ops._sparse_decode import _scatter_outer

if TYPE_CHECKING:
    from sparsekern.modules import SAE


class Adam:
    """``torch.optim.Adam`` for a sparse autoencoder.

    Where the CPU kernels serve, the gradients of encoder and decoder stay factored (``B (2k + d)`` numbers each) and
    one pass over memory makes each row of the gradient in the cache, projects, clips, updates, restores the unit norm
    and refreshes the int8 copy that the encoder screens with. Elsewhere torch does the same, with dense gradients and a
    pass for each. Both use the state of ``torch.optim.Adam``, so that a run can move between them.

    With factored gradients ``W_enc.grad`` and ``W_dec.grad`` stay None, and hooks on those gradients do not fire.

    Parameters
    ----------
    sae : SAE
    betas, eps
        As for ``torch.optim.Adam``.
    rest_after : int or None
        Steps without a gradient after which a latent's row is left alone until it has one again; None for never, which
        is Adam. See ``docs/performance.md`` for what it saves and changes.
    """

    def __init__(
        self, sae: SAE, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, rest_after: int | None = None
    ) -> None:
        self.sae, self.betas, self.eps, self.rest_after = sae, betas, eps, rest_after
        self.parameters = [p for p in sae.parameters() if p.requires_grad]
        self.torch = torch.optim.Adam(self.parameters, lr=0.0, betas=betas, eps=eps, fused=True)
        self._copy: cpu.Quantized | None = None
        if rest_after is not None and not self._factored():
            raise ValueError("rest_after needs the CPU kernels and float32 weights; see `sparsekern doctor`")

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Moments and step counts, by parameter."""
        return self.torch.state

    def _factored(self) -> list[nn.Parameter]:
        """The weights of one row a latent, where the CPU kernels can update them."""
        served = cpu.isa() is not None and forced() in (None, "cpu")
        rows = [p for p in self.parameters if p.dim() == 2 and p.shape[0] == self.sae.d_sae]
        return [p for p in rows if served and p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous()]

    def step(self, loss: Tensor, *, lr: float, clip_norm: float) -> Tensor:
        """Differentiate `loss` and update the module; returns the gradient's global norm before clipping.

        Parameters
        ----------
        loss : Tensor []
            To differentiate.
        lr : float
            Learning rate of this step.
        clip_norm : float
            Bound on the global norm; infinite for none.
        """
        self.torch.zero_grad(set_to_none=True)
        for group in self.torch.param_groups:
            group["lr"] = lr
        weights = self._factored()
        with kept_as_factors(weights) as kept:
            loss.backward()
        # A gradient that came in dense as well, as from a penalty of the user's, makes the whole gradient dense.
        factors = {}
        for weight in weights:
            parts = kept[weight.data_ptr()]
            if weight.grad is not None:
                for part in parts:
                    weight.grad += _scatter_outer(*part, weight.shape[0])
            elif parts:
                factors[weight] = cpu.SortedFactors(parts, weight.shape[0])
        self.sae.project_decoder_grad_()
        if not factors:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
            self.torch.step()
            self.sae.normalize_decoder_()
            return norm
        return self._step_with_factors(factors, lr, clip_norm)

    def _step_with_factors(self, factors: dict[nn.Parameter, cpu.SortedFactors], lr: float, clip_norm: float) -> Tensor:
        sae = self.sae
        dense = [p.grad for p in self.parameters if p.grad is not None]
        rest = sum((grad.square().sum(dtype=torch.float64) for grad in dense), torch.zeros((), dtype=torch.float64))
        clip = 1.0
        # The norm takes a pass over the factors of its own, unless it is plain that clipping will not bite: then it
        # comes with the update.
        if rest + sum(found.square_bound() for found in factors.values()) > clip_norm**2:
            squares = [cpu.gradient_squares(found, weight, weight is sae.W_dec) for weight, found in factors.items()]
            norm = torch.stack([rest, *squares]).sum().sqrt()
            clip = min(1.0, clip_norm / (norm.item() + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
            for grad in dense:
                grad.mul_(clip)
        self.torch.step()
        squares = []
        for weight, found in factors.items():
            copy = self._current_copy(weight)
            square = cpu.row_adam(
                found,
                weight,
                weight is sae.W_dec,
                self._state_of(weight),
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                clip=clip,
                rest_after=self.rest_after,
                copy=copy,
            )
            squares.append(square)
            if weight is sae.W_enc and copy is None and cpu.screens(*weight.shape):
                self._copy = cpu.quantized(weight)
        if sae.W_dec not in factors:
            sae.normalize_decoder_()
        return torch.stack([rest, *squares]).sum().sqrt().float()

    def _current_copy(self, weight: nn.Parameter) -> cpu.Quantized | None:
        """The int8 copy of this weight to refresh, if there is one and nobody else changed the weight meanwhile."""
        found = self._copy if weight is self.sae.W_enc else None
        return found if found is not None and found.is_current(weight) else None

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        state = self.torch.state[weight]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)
        return state
