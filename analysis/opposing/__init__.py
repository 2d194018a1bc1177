"""Opposing directions: latents whose encoder and decoder rows both point against those of another one.

A latent that is never negative writes half a line, so a direction that is used both ways costs two of them: an
antipodal pair. :func:`antipodal_pairs` finds them in wide dictionaries, :func:`antipodal_report` tells how many there
are beside dictionaries where chance put them, :func:`dense_latents` whether the dense latents are among them, and
:func:`pair_use` what the two latents of a pair do on tokens. The experiments make data that has such a direction, and
data that has no direction at all.
"""

from sparsekern.analysis.opposing.experiments import (
    CloudPoint,
    DenseDirection,
    DenseDirectionRun,
    GaussianCloud,
    dense_direction,
    gaussian_cloud,
)
from sparsekern.analysis.opposing.pairs import AntipodalPairs, antipodal_pairs
from sparsekern.analysis.opposing.report import AntipodalReport, DenseLatents, antipodal_report, dense_latents
from sparsekern.analysis.opposing.use import PairUse, pair_use, two_sided

__all__ = [
    "AntipodalPairs",
    "AntipodalReport",
    "CloudPoint",
    "DenseDirection",
    "DenseDirectionRun",
    "DenseLatents",
    "GaussianCloud",
    "PairUse",
    "antipodal_pairs",
    "antipodal_report",
    "dense_direction",
    "dense_latents",
    "gaussian_cloud",
    "pair_use",
    "two_sided",
]
