"""Tokens in contexts, and what follows them: does splitting depend on how alike the outputs of features are?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize, relu

import sparsekern as sk
from sparsekern.analysis.results import Result, Results, new_axes, null_generator, samples
from sparsekern.analysis.toy.generators import ContextTopics
from sparsekern.progress import Progress

KINDS = ("token", "context", "composite")
NETS = ("trained", "shuffled context", "untrained")
REPLACEMENTS = ("parent", "context", "nothing")
_OTHERS = ("another latent", "another token's direction")
_STARTS = ("parts", "pairs", "random")
_CONSTANT = 1e-12  # of a response's energy is a variance from rounding


class Bigrams:
    """A token a in a context c, ``x = T_a + C_c``, and how likely each output y is to follow.

    ``p(y | a, c) = softmax(scale · B_c[a])`` with ``B_c = √ρ B_0 + √(1 − ρ) N_c``, tables of independent standard
    normal numbers: those of two contexts have the correlation ρ. At ρ = 1 the context tells nothing about the output,
    at ρ = 0 what follows a token in one context tells nothing about what follows it in another.

    Parameters
    ----------
    tokens, contexts, outputs : int
        I, J and Y.
    rho : float
        ρ, 0 … 1. With the same generator's state all else is the same for every ρ.
    scale : float
        Standard deviation of the logits.
    zipf : float
        Token a has a probability in proportion to ``(a + 1) ** -zipf``.
    correlation : float
        Of inputs, 0 … 1: in so many of its occurrences a token has the context ``a mod J``, else any, evenly.
    generator : torch.Generator or None
        For directions and tables.

    Attributes
    ----------
    features : Tensor [tokens + contexts, d]
        True directions, orthonormal: tokens first. A linear map of `x` can give each any direction: an embedding.
    frequency : Tensor [tokens, contexts]
        Of the pairs; sums up to 1.
    x : Tensor [tokens · contexts, d]
        Of each pair, context by context for the first token, then for the next.
    outputs : Tensor [tokens · contexts, outputs]
        p(y | a, c).

    References
    ----------
    A design of this project. For tokens in contexts in a trained model: Bricken et al., *Towards monosemanticity*
    (2023).
    """

    def __init__(
        self,
        tokens: int = 8,
        contexts: int = 4,
        outputs: int = 16,
        rho: float = 0.0,
        scale: float = 2.0,
        zipf: float = 1.0,
        correlation: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        for name, number, least in (("tokens", tokens, 1), ("contexts", contexts, 1), ("outputs", outputs, 2)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        for name, share in (("rho", rho), ("correlation", correlation)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in 0 … 1, got {share}")
        if not scale > 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        if not zipf >= 0:
            raise ValueError(f"zipf must not be negative, got {zipf}")
        self.tokens, self.contexts, self.rho = tokens, contexts, rho
        self.features = ContextTopics(tokens, contexts, generator=generator).features
        self.d = self.features.shape[1]
        of_token = torch.arange(1, tokens + 1) ** -float(zipf)
        of_context = torch.full((tokens, contexts), (1 - correlation) / contexts)
        of_context[torch.arange(tokens), torch.arange(tokens) % contexts] += correlation
        self.frequency = (of_token / of_token.sum())[:, None] * of_context
        self.x = (self.features[:tokens, None] + self.features[tokens:]).flatten(0, 1)
        shared = torch.randn(tokens, 1, outputs, generator=generator)
        own = torch.randn(tokens, contexts, outputs, generator=generator)
        self.outputs = (scale * (rho**0.5 * shared + (1 - rho) ** 0.5 * own)).softmax(-1).flatten(0, 1)

    def without_context(self) -> Tensor:
        """p(y | a), ``[tokens · contexts, outputs]``: what is left where contexts are shuffled among a token's outputs.

        The inputs stay as they are, and so does how often each output follows a token.
        """
        table = self.outputs.view(self.tokens, self.contexts, -1)
        of_context = (self.frequency / self.frequency.sum(1, keepdim=True))[..., None]
        return (of_context * table).sum(1, keepdim=True).expand_as(table).flatten(0, 1)

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` pairs, as rows of `x`: ``[n]`` int64."""
        return torch.multinomial(self.frequency.flatten(), n, replacement=True, generator=generator)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """`n` tokens: ``(activations [n, tokens + contexts], x [n, d])``."""
        pair = self.draw(n, generator)
        activations = torch.zeros(n, self.tokens + self.contexts)
        places = torch.stack([pair // self.contexts, self.tokens + pair % self.contexts], 1)
        activations.scatter_(1, places, 1.0)
        return activations, self.x[pair]


def response_shares(responses: Tensor) -> Tensor:
    """Of each latent's variance over pairs: what the token explains, what the context does, and what only both do.

    A two-way analysis of variance of a table with one number a pair: the variance of its row means about the grand
    mean, that of its column means, and the rest, the interaction. Every pair counts once, however often it occurs: then
    the three add up. A latent is called composite where the third is the largest. So a latent of one token or of one
    context need not be equally active throughout, and one of several tokens is still no composite; one that is active
    in a single pair is one in any table with at least three rows and columns, as is one of a token in fewer than half
    of at least three contexts. Directions are not looked at, and no threshold has to be chosen.

    Parameters
    ----------
    responses : Tensor [n, tokens, contexts]
        Activations of each latent.

    Returns
    -------
    Tensor [n, 3] float64
        Rows that sum up to 1, or NaN where a latent is equally active everywhere, as one that is silent.

    References
    ----------
    Fisher, *Statistical methods for research workers* (1925).
    """
    if responses.dim() != 3 or 0 in responses.shape[1:]:
        raise ValueError(f"responses must have shape [n, tokens, contexts], got {tuple(responses.shape)}")
    squares = _squares(responses)
    total, energy = squares.sum(1, keepdim=True), responses.double().square().sum((1, 2))[:, None]
    return torch.where(total > _CONSTANT * energy, squares / total, torch.nan)


@dataclass(frozen=True, eq=False)
class BigramSplitting(Results):
    """What :func:`bigram_splitting` returns.

    The first dimensions of the tensors are the nets (`NETS`), the worlds and `rhos`; then `widths` and `l1`. The
    untrained net is the same for each ρ.

    Attributes
    ----------
    results : dict of str to Result
        Trends, the number at the largest ρ less that at the smallest: ``composites``, share of the alive latents;
        ``mass``, share of what the codes sum up to; ``kl``, nats of a composite's replacement by its parent; ``kept``,
        the same in units of its removal. And at each ρ: ``composites_<ρ>`` and ``kl_<ρ>``.
    rhos, widths, l1 : list
    counts : Tensor [3, n_worlds, n_rhos, n_widths, n_l1, 3] int64
        Alive latents of a token, of a context, and composite ones.
    alive : Tensor [3, n_worlds, n_rhos, n_widths, n_l1] int64
        All that are active in some pair.
    mass : Tensor [3, n_worlds, n_rhos, n_widths, n_l1]
        Composites' share of the mean of ``Σ z_i ‖d_i‖``.
    pairs : Tensor [3, n_worlds, n_rhos, n_widths, n_l1]
        In how many pairs a composite is active, ``(Σ z)² / Σ z²``, a mean over composites.
    kl : Tensor [3, n_worlds, n_rhos, n_widths, n_l1, 3]
        Nats, a mean over composites, with each of `REPLACEMENTS` in its place; NaN where there is none.
    fvu, l0 : Tensor [3, n_worlds, n_rhos, n_widths, n_l1]
    hidden : Tensor [3, n_worlds, n_rhos, 3]
        Shares of the variance of the hidden layer: token, context, interaction.
    net_kl : Tensor [3, n_worlds, n_rhos]
        Nats by which the net misses what it was trained on; for the untrained one by which it misses the tables.
    """

    results: dict[str, Result]
    rhos: list[float]
    widths: list[int]
    l1: list[float]
    counts: Tensor
    alive: Tensor
    mass: Tensor
    pairs: Tensor
    kl: Tensor
    fvu: Tensor
    l0: Tensor
    hidden: Tensor
    net_kl: Tensor

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dict for each SAE."""
        axes: tuple[Sequence[Any], ...] = (NETS, range(self.counts.shape[1]), self.rhos, self.widths, self.l1)
        records = []
        for place in product(*(range(len(axis)) for axis in axes)):
            net, world, rho, width, l1 = (axis[index] for axis, index in zip(axes, place, strict=True))
            records.append(
                {
                    "net": net,
                    "world": world,
                    "rho": rho,
                    "width": width,
                    "l1": l1,
                    **dict(zip(KINDS, self.counts[place].tolist(), strict=True)),
                    **{name: float(getattr(self, name)[place]) for name in ("alive", "mass", "pairs", "fvu", "l0")},
                    **{f"kl_{name}": nats for name, nats in zip(REPLACEMENTS, self.kl[place].tolist(), strict=True)},
                }
            )
        return records

    def plot(self, axes: Any = None) -> Any:
        """Composites' share of the alive latents by ρ, a line for each width and penalty, with controls and null."""
        axes = new_axes(8, 4.5) if axes is None else axes
        share = _share(self.counts, self.alive).nanmean(1)  # of the worlds
        at = range(len(self.rhos))
        styles = ("-", "--", ":", "-.")
        for (column, width), (row, l1) in product(enumerate(self.widths), enumerate(self.l1)):
            look = {"color": f"C{column + 2}", "ls": styles[row % len(styles)], "marker": "o", "ms": 4}
            axes.plot(at, share[0, :, column, row].tolist(), label=f"{width} latents, λ = {l1:g}", **look)
        mean = share.flatten(2).nanmean(2)
        axes.plot(at, mean[0].tolist(), color="C0", lw=3, label="trained, mean")
        self._draw_beside(axes, mean, "composites", ("random latents",), ", mean")
        axes.set(ylabel="composites among alive latents", ylim=(-0.02, 1.02))
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return axes

    def plot_kl(self, axes: Any = None) -> Any:
        """Nats by ρ when a composite is replaced, with what replaces it, and the parent's in the control nets."""
        axes = new_axes(8, 4.5) if axes is None else axes
        nats = _pooled(self.kl, self.counts[..., 2]).nanmean(1)
        labels = ("its parent: the token's direction", "the context's direction", "nothing")
        for column, (label, style) in enumerate(zip(labels, ("-", "--", ":"), strict=True)):
            axes.plot(
                range(len(self.rhos)), nats[0, :, column].tolist(), "o", ls=style, color=f"C{2 * column}", label=label
            )
        self._draw_beside(axes, nats[..., 0], "kl", _OTHERS, ": parent")
        axes.set(ylabel="nats, with a composite replaced by …")
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        return axes

    def _draw_beside(self, axes: Any, controls: Tensor, name: str, nulls: Sequence[str], suffix: str) -> None:
        """Draw the nulls of a result at each ρ as bands, and `controls` ``[3, n_rhos]`` as lines."""
        at = range(len(self.rhos))
        for null, hatch in zip(nulls, ("", "////"), strict=False):
            drawn = torch.stack([self.results[f"{name}_{rho:g}"].nulls[null] for rho in self.rhos])
            if not drawn.numel():
                continue
            least, most = drawn.amin(1).tolist(), drawn.amax(1).tolist()
            axes.fill_between(at, least, most, color="0.6", alpha=0.5, lw=0, hatch=hatch, label=null)
        for row, style in ((1, "-"), (2, "--")):
            axes.plot(at, controls[row].tolist(), ls=style, color="C1", lw=2, label=f"{NETS[row]}{suffix}")
        axes.set_xticks(at, [f"{rho:g}" for rho in self.rhos])
        axes.set_xlabel("ρ: correlation of outputs between contexts")


def bigram_splitting(
    seed: int = 0,
    *,
    tokens: int = 8,
    contexts: int = 4,
    outputs: int = 16,
    rhos: Sequence[float] = (0.0, 0.5, 0.9, 1.0),
    scale: float = 2.0,
    zipf: float = 1.0,
    correlation: float = 0.0,
    hidden: int = 32,
    net_steps: int = 500,
    net_lr: float = 1e-2,
    weight_decay: float = 0.0,
    widths: Sequence[int] = (12, 24, 40),
    l1: Sequence[float] = (0.03, 0.3),
    start: str = "parts",
    worlds: int = 2,
    steps: int = 150,
    lr: float = 1e-2,
    batch_size: int = 128,
    n_null: int = 100,
    progress: bool = False,
) -> BigramSplitting:
    """Train small nets on :class:`Bigrams` and SAEs on their hidden layers: where outputs agree, does less split?

    A net is ``softmax(W₂ ReLU(W₁ x + b₁) + b₂)``, trained on the exact p(y | a, c) and the pairs' frequencies. SAEs
    read what the ReLU gives, and are measured on all pairs. Which latents are composite :func:`response_shares` says.
    Each of them stands for the pair in which it is strongest, and there what it writes is replaced by the multiple, not
    negative, of its parent's direction that is nearest to it, while the rest of the hidden layer stays as it is (with
    the error term). The parent's direction is the mean of the hidden layer over the token's contexts, less ``b_dec``:
    what a latent writes that is active with the token in all contexts alike, whether the SAE has one or not. With least
    squares nothing counts but what the direction cannot say; at equal norm the parent would be charged for the length
    of the context's part, and a random latent for writing what was never there. Numbers are the nats of
    ``KL(net ‖ net with the replacement)``.

    Nulls: ρ permuted among a world's nets (trends only; all SAEs of a net move together); random directions in the
    place of the encoder's rows, each active in as many pairs as its latent; in the place of the parent another latent
    of the SAE, or another token's direction. Controls: nets trained with contexts shuffled, and not trained; the
    context's direction in the place of the parent, and nothing.

    Parameters
    ----------
    seed : int
        Determines tables, weights, tokens and nulls.
    tokens, contexts, outputs, scale, zipf, correlation
        Those of :class:`Bigrams`.
    rhos : sequence of float
        Rising, at least two.
    hidden : int
        Units of a net.
    net_steps, net_lr, weight_decay
        Of a net's training, by AdamW on all pairs at once.
    widths : sequence of int
        Numbers of latents.
    l1 : sequence of float
        λ beside an FVU, that of :class:`sparsekern.ReLU`.
    start : {"parts", "pairs", "random"}
        Decoder and encoder rows that training starts from: directions of tokens and contexts, then of pairs; of pairs
        first; or random ones, which are also what is left.
    worlds : int
        So many draws of tables and weights. All ρ of a world share them.
    steps, lr, batch_size
        Of each SAE's training.
    n_null : int
        Samples of each null.
    progress : bool
        Show progress.

    References
    ----------
    A design of this project, without a published number; published toys correlate what features are active together,
    not what they do: Chanin et al., *A is for absorption* (arXiv 2409.14507); Chanin and Garriga-Alonso, *Sparse but
    wrong* (arXiv 2508.16560).
    """
    if len(rhos) < 2 or list(rhos) != sorted(set(rhos)):
        raise ValueError(f"rhos must be at least two rising numbers, got {list(rhos)}")
    if not widths or not l1:
        raise ValueError("widths and l1 must not be empty")
    for name, number, least in (
        ("tokens", tokens, 3),  # with two of either a pair's interaction is no more than a main effect
        ("contexts", contexts, 3),
        ("hidden", hidden, 1),
        ("net_steps", net_steps, 1),
        ("steps", steps, 1),
        ("worlds", worlds, 1),
        ("n_null", n_null, 0),
    ):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if start not in _STARTS:
        raise ValueError(f"start must be one of {', '.join(_STARTS)}, got {start!r}")
    generator, null = torch.Generator().manual_seed(seed), null_generator(seed)
    cells = list(product(range(len(widths)), range(len(l1))))
    shape = (len(NETS), worlds, len(rhos))
    shares, net_kl = torch.zeros(*shape, 3, dtype=torch.float64), torch.zeros(shape)
    measured: dict[tuple[int, ...], _Cell] = {}
    total = worlds * (len(rhos) + sum(rho < 1 for rho in rhos) + 1) * len(cells)
    with Progress("bigrams", total, "SAEs", shown=progress) as bar:
        done = 0
        for world in range(worlds):
            state = generator.get_state()
            toys = []
            for rho in rhos:
                generator.set_state(state)
                toys.append(Bigrams(tokens, contexts, outputs, rho, scale, zipf, correlation, generator))
            first = _Net.drawn(toys[0].d, hidden, outputs, generator)
            nets = _nets(first, toys, net_steps, net_lr, weight_decay)
            seeds = torch.randint(2**31, (len(cells),), generator=generator).tolist()
            for net, toy, x, places in nets:
                squares = _squares(x.T.reshape(-1, tokens, contexts)).sum(0)
                if not squares.sum() > 0:
                    raise ValueError(f"hidden must be so many units that some is active, which none of {hidden} is")
                for kind, index in places:
                    shares[kind, world, index] = squares / squares.sum()
                    target = toys[index].without_context() if kind == 1 else toys[index].outputs
                    net_kl[kind, world, index] = toy.frequency.flatten() @ net.kl(x, target)
                for (column, row), cell_seed in zip(cells, seeds, strict=True):
                    own = torch.Generator().manual_seed(cell_seed)
                    sae = _sae(x, toy, widths[column], l1[row], start, steps, lr, batch_size, own)
                    cell = _measure(sae, net, x, toy, n_null if places[0][0] == 0 else 0, null)
                    measured |= {(kind, world, index, column, row): cell for kind, index in places}
                    done += 1
                    bar.update(done)
    return _summary(measured, shares, net_kl, list(rhos), list(widths), list(l1), n_null, null)


class _Net(NamedTuple):
    """A net, or many side by side in a leading dimension of all tensors."""

    w_in: Tensor  # [d, hidden]
    b_in: Tensor  # [1, hidden]
    w_out: Tensor  # [hidden, outputs]
    b_out: Tensor  # [1, outputs]

    @classmethod
    def drawn(cls, d: int, hidden: int, outputs: int, generator: torch.Generator) -> _Net:
        """One that is not trained."""
        w_in = torch.randn(d, hidden, generator=generator) / 2**0.5  # x has two coordinates
        w_out = torch.randn(hidden, outputs, generator=generator) / hidden**0.5
        return cls(w_in, torch.zeros(1, hidden), w_out, torch.zeros(1, outputs))

    def hidden(self, x: Tensor) -> Tensor:
        """What the SAEs read."""
        return relu(x @ self.w_in + self.b_in)

    def log_p(self, hidden: Tensor) -> Tensor:
        """Log-probabilities of the outputs."""
        return log_softmax(hidden @ self.w_out + self.b_out, -1)

    def kl(self, hidden: Tensor, p: Tensor) -> Tensor:
        """``KL(p ‖ net)`` in nats, without the last dimension."""
        return (torch.special.xlogy(p, p) - p * self.log_p(hidden)).sum(-1)


def _nets(
    first: _Net, toys: Sequence[Bigrams], steps: int, lr: float, weight_decay: float
) -> list[tuple[_Net, Bigrams, Tensor, list[tuple[int, int]]]]:
    """The nets of a world, all from the same start.

    With each the data of its inputs, its hidden layer for all pairs, and as which of `NETS`, and at which ρ, it counts.
    At ρ = 1 there is no context to shuffle, and a net that is not trained knows no ρ.
    """
    own = list(range(len(toys)))
    shuffled = [index for index in own if toys[index].rho < 1]
    targets = torch.stack(
        [toys[index].outputs for index in own] + [toys[index].without_context() for index in shuffled]
    )
    nets = _Net(*(tensor.repeat(len(targets), 1, 1).requires_grad_() for tensor in first))
    x, frequency = toys[0].x, toys[0].frequency.flatten()
    optimizer = torch.optim.AdamW(nets, lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 5 * (steps - step) / steps)  # falls over the last fifth
        optimizer.zero_grad()
        (nets.kl(nets.hidden(x), targets) * frequency).sum().backward()
        optimizer.step()
    places = [[(0, index)] if index in shuffled else [(0, index), (1, index)] for index in own]
    places += [[(1, index)] for index in shuffled] + [[(2, index) for index in own]]
    made = [_Net(*(tensor.detach()[index] for tensor in nets)) for index in range(len(targets))]
    return [
        (net, toys[counts[0][1]], net.hidden(x), counts) for net, counts in zip([*made, first], places, strict=True)
    ]


def _sae(
    x: Tensor,
    toy: Bigrams,
    width: int,
    l1: float,
    start: str,
    steps: int,
    lr: float,
    batch_size: int,
    generator: torch.Generator,
) -> sk.SAE:
    """Train on the hidden layer's activations `x` ``[pairs, hidden]``, pairs as frequent as they are."""
    sae = sk.SAE(x.shape[1], width, sk.ReLU(l1, start_l0=2), generator=generator)  # as parts: a token and a context
    if start != "random":
        centre = toy.frequency.flatten() @ x
        parts = torch.cat(_means(x - centre, toy))
        rows = normalize(torch.cat([parts, x - centre] if start == "parts" else [x - centre, parts])[:width], dim=1)
        given = rows.norm(dim=1) > 0
        with torch.no_grad():
            for weight in sae.latent_weights():
                weight[: len(rows)][given] = rows[given]
    trainer = sk.Trainer(sae, lr=lr, steps=steps, b_dec_init="mean")
    for batch in toy.draw(steps * batch_size, generator).view(steps, batch_size):
        trainer.step(x[batch])
    return sae.eval()


@dataclass(frozen=True, eq=False)
class _Cell:
    """One SAE: numbers of :class:`BigramSplitting`, and samples of the nulls."""

    counts: Tensor
    alive: int
    mass: float
    pairs: float
    kl: Tensor  # [3]
    others: Tensor  # [2, n_null], nats with those of _OTHERS in a composite's place
    random: Tensor  # [n_null], composites' share of random latents
    fvu: float
    l0: float


@torch.no_grad()
def _measure(sae: sk.SAE, net: _Net, x: Tensor, toy: Bigrams, n_null: int, null: torch.Generator) -> _Cell:
    frequency = toy.frequency.flatten()
    codes = sae.encode(x)
    z, written = codes.to_dense(), sae.W_dec
    alive = (z > 0).any(0).nonzero().squeeze(1)
    responses = z.T.view(-1, toy.tokens, toy.contexts)
    kinds = _kinds(responses)
    composites = (kinds == 2).nonzero().squeeze(1)
    size = frequency @ z * written.norm(dim=1)
    of_composites = z[:, composites]
    error = (frequency @ (sae.decode(codes) - x).square()).sum()
    variance = (frequency @ (x - frequency @ x).square()).sum()
    kl, others = _replaced(sae, net, x, z, composites, alive, toy, n_null, null)
    return _Cell(
        torch.stack([(kinds == kind).sum() for kind in range(len(KINDS))]),
        len(alive),
        float(size[composites].sum() / size.sum()),
        float((of_composites.sum(0).square() / of_composites.square().sum(0)).mean()),
        kl,
        others,
        _random_share(x, (z[:, alive] > 0).sum(0), toy, n_null, null),
        float(error / variance),
        float(frequency @ (z > 0).float().sum(1)),
    )


def _replaced(
    sae: sk.SAE,
    net: _Net,
    x: Tensor,
    z: Tensor,
    composites: Tensor,
    alive: Tensor,
    toy: Bigrams,
    n_null: int,
    null: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mean nats over composites with each of the replacements ``[3]``, and with random ones ``[2, n_null]``."""
    if not len(composites):
        return samples([torch.nan] * 3), torch.full((len(_OTHERS), n_null), torch.nan, dtype=torch.float64)
    # In float64: what a small write does would be lost to rounding.
    x, net, decoder = x.double(), _Net(*(tensor.double() for tensor in net)), sae.W_dec.double()
    strength, pair = z[:, composites].max(0)
    token, context = pair // toy.contexts, pair % toy.contexts
    write = strength[:, None] * decoder[composites]
    rest, clean = x[pair] - write, net.log_p(x[pair]).exp()

    def nats(directions: Tensor) -> Tensor:
        """With the nearest multiples of directions ``[n_composites, n, hidden]``: ``[n_composites, n]``."""
        squared = directions.square().sum(2).clamp(min=torch.finfo(x.dtype).tiny)
        amount = ((directions * write[:, None]).sum(2) / squared).clamp(min=0)
        return net.kl(rest[:, None] + amount[..., None] * directions, clean[:, None])

    of_tokens, of_contexts = _means(x - sae.b_dec, toy)
    own = nats(torch.stack([of_tokens[token], of_contexts[context], torch.zeros_like(write)], 1))
    drawn = []
    for directions, taken in ((decoder[alive], torch.searchsorted(alive, composites)), (of_tokens, token)):
        if len(directions) < 2:
            drawn.append(samples([torch.nan] * n_null))
            continue
        away = torch.randint(1, len(directions), (len(composites), n_null), generator=null)
        of_all = nats(directions.expand(len(composites), -1, -1))
        drawn.append(of_all.gather(1, (taken[:, None] + away) % len(directions)).mean(0))
    return own.mean(0), torch.stack(drawn)


def _random_share(x: Tensor, active: Tensor, toy: Bigrams, n_null: int, null: torch.Generator) -> Tensor:
    """Share of composites among random directions, active in as many pairs as `active` says: ``[n_null]``."""
    if not len(active):
        return samples([torch.nan] * n_null)
    products = x @ torch.randn(x.shape[1], n_null * len(active), generator=null)
    least = products.sort(0, descending=True).values.gather(0, active.clamp(max=len(x) - 1).repeat(n_null)[None])
    kinds = _kinds(relu(products - least).T.reshape(-1, toy.tokens, toy.contexts))
    return (kinds == 2).view(n_null, len(active)).double().mean(1)


def _kinds(responses: Tensor) -> Tensor:
    """Index of the largest of a response's shares; −1 where it has none."""
    shares = response_shares(responses)
    return torch.where(shares.isnan().any(1), -1, shares.nan_to_num().argmax(1))


def _squares(responses: Tensor) -> Tensor:
    """Sums of squares of the main effects of tokens and contexts, and of the interaction: ``[n, 3]`` float64."""
    table = responses.double()
    table = table - table.mean((1, 2), keepdim=True)
    of_token, of_context = table.mean(2, keepdim=True), table.mean(1, keepdim=True)
    parts = (of_token.expand_as(table), of_context.expand_as(table), table - of_token - of_context)
    return torch.stack([part.square().sum((1, 2)) for part in parts], 1)


def _means(x: Tensor, toy: Bigrams) -> tuple[Tensor, Tensor]:
    """Means of `x` ``[pairs, hidden]`` for each token and for each context."""
    table = x.view(toy.tokens, toy.contexts, -1)
    return table.mean(1), table.mean(0)


def _share(counts: Tensor, alive: Tensor) -> Tensor:
    """Composites among alive latents; NaN where none is."""
    return counts[..., 2].double() / alive


def _pooled(nats: Tensor, composites: Tensor) -> Tensor:
    """Means over all composites of a net ``[..., n]`` of what are means over those of an SAE ``[..., W, λ, n]``."""
    counted = composites[..., None] * nats.isfinite()
    return (nats.double().nan_to_num() * counted).sum((-3, -2)) / counted.sum((-3, -2))


def _summary(
    measured: dict[tuple[int, ...], _Cell],
    hidden: Tensor,
    net_kl: Tensor,
    rhos: list[float],
    widths: list[int],
    l1: list[float],
    n_null: int,
    null: torch.Generator,
) -> BigramSplitting:
    """Tables of all SAEs, and the results."""
    shape = (*net_kl.shape, len(widths), len(l1))

    def table(of: Callable[[_Cell], Any], nets: int = len(NETS)) -> Tensor:
        places = product(range(nets), *(range(size) for size in shape[1:]))
        made = torch.stack([torch.as_tensor(of(measured[place])) for place in places])
        return made.view(nets, *shape[1:], *made.shape[1:])

    counts, alive, kl = table(lambda cell: cell.counts), table(lambda cell: cell.alive), table(lambda cell: cell.kl)
    mass = table(lambda cell: cell.mass)
    # All of these: nets (those that are trained only, for nulls), worlds, ρ, samples.
    share = _share(counts, alive).flatten(3).nanmean(3)
    random = table(lambda cell: cell.random, 1).flatten(3, 4).nanmean(3)[0]
    nats = _pooled(kl, counts[..., 2])
    drawn = _pooled(table(lambda cell: cell.others.flatten(), 1), counts[:1, ..., 2])[0]
    others = dict(zip(_OTHERS, drawn.unflatten(2, (len(_OTHERS), n_null)).unbind(2), strict=True))

    def trend(name: str, of_world: Tensor, nulls: dict[str, Tensor]) -> Result:
        permuted = []
        for _ in range(n_null):
            order = torch.rand(of_world.shape[1:], generator=null).argsort(1)
            permuted.append(_change(of_world[0].gather(1, order)))
        return Result(
            f"{name}, at ρ = {rhos[-1]:g} less at ρ = {rhos[0]:g}",
            float(_change(of_world[0])),
            {"ρ permuted": samples(map(float, permuted)), **{key: _change(drawn) for key, drawn in nulls.items()}},
            {NETS[1]: of_world[1, :, -1] - of_world[1, :, 0]},
            tail="less",
        )

    replaced = "nats with parents in the place of composites"
    results = {
        "composites": trend("composites among alive latents", share, {"random latents": random}),
        "mass": trend("composites' share of the codes", mass.double().flatten(3).nanmean(3), {}),
        "kl": trend(replaced, nats[..., 0], others),
        "kept": trend(
            f"{replaced}, in units of those with nothing",
            nats[..., 0] / nats[..., 2],
            {name: drawn / nats[0, ..., 2:] for name, drawn in others.items()},
        ),
    }
    for index, rho in enumerate(rhos):
        results[f"composites_{rho:g}"] = Result(
            f"composites among alive latents at ρ = {rho:g}",
            float(share[0, :, index].nanmean()),
            {"random latents": random[:, index].nanmean(0)},
            {NETS[row]: share[row, :, index] for row in (1, 2)},
            tail="two-sided",
        )
        results[f"kl_{rho:g}"] = Result(
            f"{replaced} at ρ = {rho:g}",
            float(nats[0, :, index, 0].nanmean()),
            {name: drawn[:, index].nanmean(0) for name, drawn in others.items()},
            {
                "the context's direction": nats[0, :, index, 1],
                "nothing": nats[0, :, index, 2],
                **{NETS[row]: nats[row, :, index, 0] for row in (1, 2)},
            },
            tail="less",
        )
    fvu, l0, pairs = table(lambda cell: cell.fvu), table(lambda cell: cell.l0), table(lambda cell: cell.pairs)
    return BigramSplitting(results, rhos, widths, l1, counts, alive, mass, pairs, kl, fvu, l0, hidden, net_kl)


def _change(of_world: Tensor) -> Tensor:
    """Mean over worlds of ``[n_worlds, n_rhos, ...]`` at the last ρ less at the first."""
    return (of_world[:, -1] - of_world[:, 0]).nanmean(0)
