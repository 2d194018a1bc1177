"""Adam, and what of a training step lies around it: the backward pass, clipping, and decoder rows of unit norm."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsekern.backends import updater
from sparsekern.factors import identity, kept_as_factors
from sparsekern.ops._sparse_decode import sum_of_outer_products

if TYPE_CHECKING:
    from sparsekern.modules import SAE


class Adam:
    """``torch.optim.Adam`` for a sparse autoencoder.

    Where kernels serve, the gradients of encoder and decoder stay factored (``B (2k + d)`` numbers each) and one pass
    over memory makes each row of the gradient where it is used up, projects, clips, updates, restores the unit norm and
    refreshes the copy of the weights that the encoder screens with. Elsewhere torch does the same, with dense gradients
    and a pass for each. Both use the state of ``torch.optim.Adam``, so that a run can move between them.

    Nothing here waits for a GPU, and a loss that is not finite changes nothing.

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
        capturable = sae.device.type == "cuda"  # in a CUDA graph
        self.torch = torch.optim.Adam(self.parameters, lr=0.0, betas=betas, eps=eps, fused=True, capturable=capturable)
        self._copies: dict[Tensor, Any] = {}
        weights = self._factored()[1]
        if rest_after is not None and (not weights or weights[0].device.type != "cpu"):
            raise ValueError("rest_after needs the CPU kernels and float32 weights; see `sparsekern doctor`")

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """Moments and step counts, by parameter."""
        return self.torch.state

    def _factored(self) -> tuple[ModuleType | None, list[nn.Parameter]]:
        """The backend that updates the weights of one row a latent, and those that it can update."""
        rows = [p for p in self.sae.latent_weights() if p.requires_grad]
        engine = updater(rows[0]) if rows else None
        return engine, [p for p in rows if engine is not None and engine.updates(p)]

    def step(self, loss: Tensor, *, lr: float | Tensor, clip_norm: float) -> Tensor:
        """Differentiate `loss` and update the module; returns the gradient's global norm before clipping.

        Parameters
        ----------
        loss : Tensor []
            To differentiate.
        lr : float or Tensor []
            Learning rate of this step; a tensor on the device can be changed under a CUDA graph.
        clip_norm : float
            Bound on the global norm; infinite for none.
        """
        self.torch.zero_grad(set_to_none=True)
        for group in self.torch.param_groups:
            group["lr"] = lr
        engine, weights = self._factored()
        with kept_as_factors(weights) as kept:
            loss.backward()
        # A gradient that came in dense as well, as from a penalty of the user's, makes the whole gradient dense.
        factors = {}
        for weight in weights:
            parts = kept[identity(weight)]
            if weight.grad is not None:
                for part in parts:
                    weight.grad += sum_of_outer_products(part, weight.shape[0])
            elif parts and engine is not None:
                factors[weight] = engine.SortedFactors(parts, weight.shape[0])
        self.sae.project_decoder_grad_()
        finite = loss.detach().isfinite()
        self.torch.found_inf = (~finite).float()  # type: ignore[attr-defined] # torch's own way to leave out a step
        if engine is not None and factors:
            return self._step_with_factors(engine, factors, finite, lr, clip_norm)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        self.torch.step()
        self.sae.normalize_decoder_(finite)
        return norm

    def _step_with_factors(
        self,
        engine: ModuleType,
        factors: dict[nn.Parameter, Any],
        finite: Tensor,
        lr: float | Tensor,
        clip_norm: float,
    ) -> Tensor:
        sae = self.sae
        dense = [p.grad for p in self.parameters if p.grad is not None]
        rest = torch.zeros((), dtype=torch.float64, device=finite.device)
        for grad in dense:
            rest = rest + grad.square().sum(dtype=torch.float64)
        unit = set(sae.unit_weights())
        gradients = [(found, weight, weight in unit) for weight, found in factors.items()]
        clip = engine.clip_factor(gradients, rest, clip_norm)
        for grad in dense:
            grad.mul_(clip)
        self.torch.step()
        squares, screened = [rest], set(sae.screened_weights())
        for found, weight, unit_rows in gradients:
            copy = self._current_copy(weight)
            options = {"lr": lr, "betas": self.betas, "eps": self.eps, "clip": clip, "copy": copy, "finite": finite}
            state = self._state_of(weight)
            squares.append(engine.row_adam(found, weight, unit_rows, state, **options, rest_after=self.rest_after))
            if copy is None and weight in screened and engine.screens(*weight.shape):
                self._copies[weight] = engine.quantized(weight, sae.screen)
        if not unit <= factors.keys():
            sae.normalize_decoder_(finite)
        return torch.stack(squares).sum().sqrt().float()

    def _current_copy(self, weight: nn.Parameter) -> Any:
        """The copy of this weight to refresh, if there is one and nobody else changed the weight meanwhile."""
        found = self._copies.get(weight)
        return found if found is not None and found.is_current(weight) else None

    def _state_of(self, weight: nn.Parameter) -> dict[str, Tensor]:
        state = self.torch.state[weight]
        if not state:
            # On a GPU the count of steps lives there, as torch's fused Adam has it.
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)
        return state
