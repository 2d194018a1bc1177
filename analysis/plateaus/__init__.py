"""Plateaus of a model's response: how far an activation can move before the output notices, and which way.

:func:`plateaus` moves activations of a module along random directions, towards other activations and along latents of
an SAE, and reads the curves of the model's response; :func:`response_metrics` is what it reads from one curve, and
:func:`sae_error_kl` compares an SAE's error with perturbations of its length. ``docs/analyses/plateaus.md`` says what
the curves of a network without any plateau look like.
"""

from sparsekern.analysis.plateaus.curves import Difference, Plateaus, plateaus, response_metrics
from sparsekern.analysis.plateaus.errors import SAEErrorKL, sae_error_kl
from sparsekern.analysis.plateaus.perturbations import BASES, DIRECTIONS, Perturbations
from sparsekern.analysis.plateaus.rerun import MEASURES, Rerun, Tokens

__all__ = [
    "BASES",
    "DIRECTIONS",
    "MEASURES",
    "Difference",
    "Perturbations",
    "Plateaus",
    "Rerun",
    "SAEErrorKL",
    "Tokens",
    "plateaus",
    "response_metrics",
    "sae_error_kl",
]
