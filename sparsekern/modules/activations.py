"""Activation functions: what an encoder does with its pre-activations.

An activation owns the choice of op, so that an SAE is the same class whichever it uses. To add one: subclass
:class:`Activation`, give it a ``name`` and an ``encode``, and list it in :data:`ACTIVATIONS`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from sparsekern.codes import SparseCodes
from sparsekern.ops import topk_encode
from sparsekern.ops._checks import SCREENS


class Activation(nn.Module):
    """Base of all activation functions."""

    name: ClassVar[str]

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None) -> SparseCodes:
        """Codes of the activations `x` ``[..., d_in]``, from which `center` is subtracted first."""
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def check(self, d_sae: int) -> None:
        """Raise ValueError where this activation cannot serve a dictionary of `d_sae` latents."""

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this activation."""
        return {}

    def extra_repr(self) -> str:
        """Arguments, for printing."""
        return ", ".join(f"{key}={value!r}" for key, value in self.config().items())


class TopK(Activation):
    """Keeps the `k` largest pre-activations of each token, then ReLU.

    Parameters
    ----------
    k : int
        Latents a token.
    screen : str
        See :func:`sparsekern.topk_encode`; it changes the speed, never the answer.

    References
    ----------
    Gao et al., *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), section 2.3.
    """

    name = "topk"

    def __init__(self, k: int, screen: str = "auto") -> None:
        super().__init__()
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
        if screen not in SCREENS:
            raise ValueError(f"screen must be one of {', '.join(SCREENS)}, got {screen!r}")
        self.k = k
        self.screen = screen

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None) -> SparseCodes:
        """The top k of every token, ``[..., k]``."""
        return topk_encode(x, W_enc, b_enc, self.k, self.screen, center)

    def check(self, d_sae: int) -> None:
        """There must be at least `k` latents."""
        if self.k > d_sae:
            raise ValueError(f"k must be at most d_sae={d_sae}, got {self.k}")

    def config(self) -> dict[str, Any]:
        """``{"k": …, "screen": …}``."""
        return {"k": self.k, "screen": self.screen}


ACTIVATIONS: dict[str, type[Activation]] = {TopK.name: TopK}
"""By the name that a saved configuration uses."""
