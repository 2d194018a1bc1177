"""The gated sparse autoencoder."""

from __future__ import annotations

from typing import Any

from sparsekern.modules.activations import Gated
from sparsekern.modules.sae import SAE


class GatedSAE(SAE):
    """An :class:`SAE` with the activation :class:`Gated`, by the name that it is known by.

    Parameters
    ----------
    d_in, d_sae : int
        As for :class:`SAE`.
    activation : Gated or None
        Its options; the defaults without.
    **options
        Those of :class:`SAE`.

    References
    ----------
    Rajamanoharan et al., *Improving dictionary learning with gated sparse autoencoders* (arXiv 2404.16014).
    """

    def __init__(self, d_in: int, d_sae: int, activation: Gated | None = None, **options: Any) -> None:
        if activation is not None and not isinstance(activation, Gated):
            raise ValueError(f"activation must be a Gated, got {activation!r}")
        super().__init__(d_in, d_sae, activation or Gated(), **options)
