"""What single latents respond to: their strongest contexts in a store of activations."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekern import SAE
from sparsekern.data import ActivationStore
from sparsekern.progress import Progress

_BATCH = 8192


@dataclass(frozen=True)
class Activating:
    """One token on which a latent is active.

    Attributes
    ----------
    value : float
        Activation of the latent.
    row : int
        Row of the token in the store.
    context : int
        Context of the token in the store.
    position : int
        Position of the token in its context.
    """

    value: float
    row: int
    context: int
    position: int


@torch.no_grad()
def top_contexts(
    sae: SAE,
    store: ActivationStore,
    latents: Tensor,
    count: int = 10,
    candidates: int = 640,
    progress: bool = False,
) -> dict[int, list[Activating]]:
    """The `count` contexts of `store` in which each of `latents` is most active, one token a context.

    A latent's activation is its pre-activation where that is among the k kept ones. So the tokens are ranked by
    pre-activation, which costs ``len(latents)`` columns instead of all, and only the leading candidates are encoded.
    What is found is exact; what a latent does beyond its candidates is not found.

    Parameters
    ----------
    sae : SAE
        The module.
    store : ActivationStore
        Activations that it reads.
    latents : Tensor [n] of ints
        Which latents.
    count : int
        Contexts a latent; fewer come back where fewer are found.
    candidates : int
        Tokens encoded for each latent, those of its largest pre-activations. A latent that often loses to others needs
        more of them.
    progress : bool
        Show progress.

    Returns
    -------
    dict
        For each latent its tokens, strongest first.
    """
    latents = latents.to(sae.W_enc.device).long()
    best = torch.empty(0, len(latents), device=latents.device)
    rows = torch.empty(0, len(latents), dtype=torch.int64, device=latents.device)
    with Progress("strongest contexts", store.tokens, shown=progress) as bar:
        for start in range(0, store.tokens, _BATCH):
            x = store.rows(start, min(start + _BATCH, store.tokens)).to(latents.device)
            pre = (x - sae.b_dec if sae.pre_bias else x) @ sae.W_enc[latents].T + sae.b_enc[latents]
            merged = torch.cat([best, pre])
            merged_rows = torch.cat([rows, (start + torch.arange(len(x), device=x.device))[:, None].expand_as(pre)])
            best, order = merged.topk(min(candidates, len(merged)), dim=0)
            rows = merged_rows.gather(0, order)
            bar.update(start + len(x))
    bounds = store.context_bounds
    found = {}
    for column, latent in enumerate(latents.tolist()):
        leading = rows[:, column].tolist()
        x = torch.cat([store.rows(row, row + 1) for row in leading]).to(latents.device)
        values = sae.encode(x).values_of([latent]).squeeze(1).tolist()
        seen: dict[int, Activating] = {}
        for row, value in sorted(zip(leading, values, strict=True), key=lambda pair: -pair[1]):
            context = int(torch.searchsorted(bounds, row, right=True)) - 1
            if value > 0 and context not in seen and len(seen) < count:
                seen[context] = Activating(value, row, context, row - int(bounds[context]))
        found[latent] = list(seen.values())
    return found


def spread_by_density(density: Tensor, count: int, least: float = 0.0) -> Tensor:
    """`count` latents that fire, evenly spaced by rank of `density` ``[d_sae]``: a fair sample, frequent to rare.

    Latents with a density below `least` are left out.
    """
    firing = ((density > 0) & (density >= least)).nonzero().squeeze(1)
    ranked = firing[density[firing].argsort(descending=True, stable=True)]
    count = min(count, len(ranked))
    return ranked[((torch.arange(count) + 0.5) * len(ranked) / max(1, count)).long()]


def describe_latents(
    sae: SAE,
    store: ActivationStore,
    density: Tensor,
    count: int = 40,
    contexts: int = 10,
    least_density: float = 1e-4,
    progress: bool = False,
) -> str:
    """A Markdown page: for `count` latents, spread by density, their strongest contexts with the active token marked.

    The latents are not picked by hand: they are evenly spaced by rank of density among those of at least
    `least_density`. Rarer ones seldom have ten contexts to show.
    """
    latents = spread_by_density(density, count, least_density)
    found = top_contexts(sae, store, latents, contexts, progress=progress)
    lines = [
        "# What the latents respond to",
        "",
        f"{len(latents)} of {sae.d_sae:,} latents, evenly spaced by rank of density among the "
        f"{int((density >= least_density).sum()):,} that fire on at least {100 * least_density:g}% of the held-out "
        f"tokens, frequent to rare. For each, the {contexts} "
        f"contexts of {store.n_contexts:,} in which it is most active, with the active token marked.",
        "",
    ]
    for latent in latents.tolist():
        tokens = found[latent]
        common = Counter(store.word_text(a.row) for a in tokens).most_common(5)
        words = ", ".join(f"`{word}`" + (f" ×{n}" if n > 1 else "") for word, n in common)
        lines += [f"## Latent {latent} · density {100 * density[latent]:.2g}% · {words}", ""]
        for a in tokens:
            text = store.context_text(a.context, mark=a.position, marks=("⟦", "⟧"), window=16)
            lines.append(f"- {a.value:.2f} · {one_line(text)}")
        lines.append("")
    return "\n".join(lines)


def one_line(text: str) -> str:
    """A context on one line, its signs of markup shown as they are and its marked token in bold."""
    text = re.sub(r"(?<=\S)[\\`*_<]|[\\`*_<](?=\S)", r"\\\g<0>", " ".join(text.split()))
    return text.replace("⟦", "**⟦").replace("⟧", "⟧**")
