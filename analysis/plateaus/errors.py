"""Whether an SAE's error disturbs a model more than other perturbations of its length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.analysis.plateaus.curves import bootstrap_means, interval
from sparsekern.analysis.plateaus.perturbations import DIRECTIONS, OF_SAE, Perturbations
from sparsekern.analysis.plateaus.rerun import Batch, Rerun
from sparsekern.analysis.results import Result, Results
from sparsekern.hooks import evaluating


@dataclass(frozen=True, eq=False)
class SAEErrorKL(Results):
    """What :func:`sae_error_kl` returns; n tokens.

    Attributes
    ----------
    results : dict of str to Result
        ``kl``, mean response to x̂ in the place of x, beside that to each kind of perturbation.
    kl : Tensor [n] float64
        Response to x̂ at each token.
    null_kl : dict of str to Tensor [n, n_null] float64
        Response to perturbations of the same length.
    length : Tensor [n]
        ‖x̂ − x‖.
    sites : Tensor [n, 3] int64
        Batch, row and position of each token.
    seed : int
    """

    results: dict[str, Result]
    kl: Tensor
    null_kl: dict[str, Tensor]
    length: Tensor
    sites: Tensor
    seed: int

    def ratio(self, null: str) -> tuple[float, float, float]:
        """Mean response to x̂ over the mean one under a null, and the ends of its 90% bootstrap interval over tokens."""
        if null not in self.null_kl:
            raise ValueError(f"null must be one of {', '.join(self.null_kl)}, got {null!r}")
        both = torch.stack([self.kl, self.null_kl[null].mean(1)], 1)
        means = bootstrap_means(both, self.seed)
        low, high = interval(means[:, :1] / means[:, 1:]).flatten().tolist()
        return float(both[:, 0].mean() / both[:, 1].mean()), low, high


@torch.no_grad()
def sae_error_kl(
    model: nn.Module,
    hook: str,
    sae: sk.SAE,
    batches: Iterable[Batch],
    *,
    nulls: Sequence[str] = ("isotropic", "cov_difference", "cov_mixture"),
    n: int = 64,
    n_null: int = 19,
    seed: int = 0,
    measure: str = "kl",
    last: str | None = None,
    later: bool = False,
    skip: int = 1,
    batch_tokens: int = 8192,
) -> SAEErrorKL:
    """How much an SAE's reconstruction of one token changes the output, beside perturbations of the same length.

    Errors were called pathological because x̂ changes the output more than isotropic perturbations do, which leave most
    of what the model reads alone. Perturbations like the activations themselves are the fair null: ``cov_mixture``,
    and not ``cov_difference``, which takes x away as well.

    Parameters
    ----------
    model, hook, batches
        As for :func:`plateaus`.
    sae : SAE
        Of the activations of `hook`.
    nulls : sequence of str
        Of :data:`DIRECTIONS`, those that need no SAE.
    n : int
        Tokens, replaced one at a time.
    n_null : int
        Perturbations of each kind and token, and so samples of each null.
    seed : int
        Determines tokens and perturbations.
    measure, last, later, skip, batch_tokens
        As for :class:`Rerun`.

    Returns
    -------
    SAEErrorKL

    Raises
    ------
    ValueError
        For unknown nulls, counts below 1, and what :class:`Rerun` and :class:`Perturbations` refuse.

    References
    ----------
    Gurnee, *SAE reconstruction errors are (empirically) pathological* (2024); Lee & Heimersheim (arXiv 2410.12555).
    """
    known = [name for name in DIRECTIONS if name not in OF_SAE]
    if isinstance(nulls, str) or not len(nulls) or len(set(nulls)) < len(nulls) or not set(nulls) <= set(known):
        raise ValueError(f"nulls must be different names among {', '.join(known)}, got {nulls!r}")
    if n_null < 1:
        raise ValueError(f"n_null must be at least 1, got {n_null}")
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model, sae):
        rerun = Rerun(
            model, hook, batches, measure=measure, last=last, later=later, skip=skip, batch_tokens=batch_tokens
        )
        tokens = rerun.tokens()
        chosen = tokens.choose(n, generator)
        made = Perturbations(tokens.x, sae)
        x = tokens.x[chosen]
        error = made.error(x)
        length = error.norm(dim=1)
        moves = [error]
        for name in nulls:
            for _ in range(n_null):
                unit = normalize(made.direction(name, x, chosen, generator).nan_to_num(0), dim=1)
                moves.append(length[:, None] * unit)
        rows = x[:, None] + torch.stack(moves, 1)
        found = [rerun.responses(site, x[i], rows[i]) for i, site in enumerate(tokens.sites[chosen].tolist())]
    responses = torch.stack(found)
    kl = responses[:, 0]
    null_kl = dict(zip(nulls, responses[:, 1:].split(n_null, 1), strict=True))
    name = "mean " + ("KL, nats" if measure == "kl" else "distance") + ", of the SAE's reconstruction of one token"
    result = Result(name, float(kl.mean()), {null: samples.mean(0) for null, samples in null_kl.items()})
    return SAEErrorKL({"kl": result}, kl, null_kl, length, tokens.sites[chosen], seed)
