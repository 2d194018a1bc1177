"""What is moved, and where to: activations that are real or made up, and directions to move them in."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

import sparsekern as sk
from sparsekern.hooks import evaluating

BASES = {
    "real": "the activation that the model has at the token",
    "bag": "as many latents as the token has, drawn by how often they fire, with its values, scaled to its norm",
    "structured": "the same with the cosines of the token's latents with its strongest one",
    "random": "a Gaussian with the mean and the covariance of the activations",
}
"""Kinds of bases: what the activation at a token is replaced by before it is moved."""

DIRECTIONS = {
    "isotropic": "ε, Gaussian with the unit matrix as covariance",
    "cov_difference": "g − x, g Gaussian with the mean and the covariance of the activations",
    "cov_mixture": "g − g', two such Gaussians",
    "real_difference": "y − x, y the activation at another token",
    "real_mixture": "y − y', the activations at two other tokens",
    "active_latent": "the decoder row of one of the latents that are active on x",
    "inactive_latent": "the decoder row of another latent that fires on some token",
    "sae_error": "x̂ − x",
}
"""Directions from a base x, before they are scaled to unit norm."""

BASELINES = ("isotropic", "cov_mixture")
"""Directions that know nothing of features: what the others are compared with."""

OF_SAE = ("bag", "structured", "active_latent", "inactive_latent", "sae_error")
"""Kinds of both that need an SAE."""

_TOKENS = 4096  # encoded at a time
_TRIES = 8  # for another activation than a given one
_ROUNDING = 1e-6  # of the length or the base's norm


class Perturbations:
    """Bases and directions that are like a sample of activations.

    Parameters
    ----------
    x : Tensor [N, d]
        Activations on the CPU.
    sae : SAE or None
        Of these activations. Only the kinds that need latents need it.

    Attributes
    ----------
    mean : Tensor [d]
    length : float
        Root mean square distance of `x` from its mean: the unit of α.

    Raises
    ------
    ValueError
        For activations that are all equal, an SAE of another width, and one without a latent that fires.

    References
    ----------
    Heimersheim, *Activation plateaus and sensitive directions in GPT-2* (2024), for differences with x; Lee &
    Heimersheim (arXiv 2410.12555) for mixtures, which do not know x; Giglemiani et al. (arXiv 2409.15019) for bags.
    """

    @torch.no_grad()
    def __init__(self, x: Tensor, sae: sk.SAE | None = None) -> None:
        self.x, self.sae = x, sae
        self.mean = x.mean(0)
        centred = (x - self.mean).double()
        self.length = float(centred.square().sum(1).mean().sqrt())
        if not self.length > _ROUNDING * float(x.norm(dim=1).max()):
            raise ValueError("the activations must not be all equal")
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(x))
        self.root = ((vectors * values.clamp(min=0).sqrt()) @ vectors.T).float()
        if sae is not None:
            if sae.d_in != x.shape[1] or sae.W_dec.shape[1] != x.shape[1]:
                shape = f"d_in={sae.d_in} and a decoder {tuple(sae.W_dec.shape)}"
                raise ValueError(f"sae must read and write rows of {x.shape[1]} numbers, got {shape}")
            self.active = self._active(x, "sae")
            self.counts = torch.bincount(torch.cat([latents for latents, _ in self.active]), minlength=sae.d_sae)
            if not self.counts.any():
                raise ValueError("sae must have a latent that fires on the tokens of batches: all are silent")
            self.decoder, self.bias = (rows.detach().float().cpu() for rows in (sae.W_dec, sae.b_dec))

    def gaussian(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` activations with mean and covariance of the sample, ``[n, d]``."""
        return self.mean + torch.randn(n, len(self.mean), generator=generator) @ self.root

    @torch.no_grad()
    def base(self, kind: str, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """What is moved at the chosen tokens ``[n]``, ``[n, d]``; `kind` is one of :data:`BASES`."""
        if kind not in BASES:
            raise ValueError(f"kind of base must be one of {', '.join(BASES)}, got {kind!r}")
        if kind == "real":
            return self.x[chosen]
        if kind == "random":
            return self.gaussian(len(chosen), generator)
        self._needed(kind)
        bags = torch.stack([self._bag(int(token), kind == "structured", generator) for token in chosen])
        return bags * (self.x[chosen].norm(dim=1) / bags.norm(dim=1).clamp(min=1e-12))[:, None]

    @torch.no_grad()
    def direction(self, kind: str, base: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Unit rows ``[n, d]``, `kind` one of :data:`DIRECTIONS`; NaN where there is no such direction."""
        if kind not in DIRECTIONS:
            raise ValueError(f"kind of direction must be one of {', '.join(DIRECTIONS)}, got {kind!r}")
        n = len(base)
        if kind == "isotropic":
            rows = torch.randn(base.shape, generator=generator)
        elif kind == "cov_difference":
            rows = self.gaussian(n, generator) - base
        elif kind == "cov_mixture":
            rows = self.gaussian(n, generator) - self.gaussian(n, generator)
        elif kind == "real_difference":
            rows = self.x[self._others(chosen, generator)] - base
        elif kind == "real_mixture":
            first = self._others(chosen, generator)
            rows = self.x[first] - self.x[self._others(first, generator)]
        elif kind == "sae_error":
            rows = self.error(base)
        else:
            return self._decoder_rows(base, kind == "active_latent", generator)
        norms = rows.norm(dim=1, keepdim=True)
        # A difference of equal rows is rounding, and has no direction.
        least = _ROUNDING * base.norm(dim=1, keepdim=True).clamp(min=self.length)
        return torch.where(norms > least, rows / norms, torch.nan)

    @torch.no_grad()
    def error(self, base: Tensor) -> Tensor:
        """The SAE's error ``x̂ − x``, ``[n, d]``."""
        sae = self._needed("sae_error")
        there = base.to(sae.W_dec.device)
        with evaluating(sae):
            return sae.reconstruct(sae.encode(there), there).float().cpu() - base

    def _needed(self, kind: str) -> sk.SAE:
        if self.sae is None:
            raise ValueError(f"{kind!r} needs an sae")
        return self.sae

    def _active(self, x: Tensor, kind: str) -> list[tuple[Tensor, Tensor]]:
        """Active latents of each row and their values."""
        sae = self._needed(kind)
        found = []
        with evaluating(sae):
            for part in x.split(_TOKENS):
                codes = sae.encode(part.to(sae.W_dec.device))
                csr = codes.to_csr() if isinstance(codes, sk.SparseCodes) else codes
                sizes = csr.crow.diff().tolist()
                pairs = zip(csr.col.long().cpu().split(sizes), csr.values.float().cpu().split(sizes), strict=True)
                found += [(latents[values != 0], values[values != 0]) for latents, values in pairs]
        return found

    def _others(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """For each token another one with another activation, ``[n]``; the same token where none is found."""
        found = chosen.clone()
        for _ in range(_TRIES):
            same = (self.x[found] == self.x[chosen]).all(1)
            found = torch.where(same, torch.randint(len(self.x), chosen.shape, generator=generator), found)
        return found

    def _decoder_rows(self, base: Tensor, active: bool, generator: torch.Generator) -> Tensor:
        """A decoder row of each base at unit norm, of a latent that is or is not active on it."""
        rows = torch.full_like(base, torch.nan)
        for token, (latents, _) in enumerate(self._active(base, "active_latent" if active else "inactive_latent")):
            if not active:
                silent = self.counts > 0
                silent[latents] = False
                latents = silent.nonzero().squeeze(1)
            if len(latents):
                drawn = latents[torch.randint(len(latents), (), generator=generator)]
                rows[token] = normalize(self.decoder[drawn], dim=0)
        return rows

    def _bag(self, token: int, structured: bool, generator: torch.Generator) -> Tensor:
        latents, values = self.active[token]
        if not len(latents):
            return self.bias
        order = values.abs().argsort(descending=True)
        latents, values = latents[order], values[order]
        drawn = torch.multinomial(self.counts.double(), len(latents), generator=generator)
        if structured:
            drawn = self._like(latents, drawn[0])
        return self.bias + values @ self.decoder[drawn]

    def _like(self, latents: Tensor, first: Tensor) -> Tensor:
        """Latents whose cosines with the first are those of the token's with its strongest, ``[k]``."""
        unit = normalize(self.decoder, dim=1)
        wanted = unit[latents] @ unit[latents[0]]
        cosines = (unit @ unit[first]).masked_fill(self.counts == 0, torch.inf)
        cosines[first] = torch.inf
        found = [int(first)]
        for cosine in wanted[1:]:
            found.append(int((cosines - cosine).abs().argmin()))
            cosines[found[-1]] = torch.inf
        return torch.tensor(found)
