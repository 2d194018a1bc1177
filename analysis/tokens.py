"""Held-out tokens with what is known about them: labels that groups of tokens may correspond to, and what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekern.data import ActivationStore

UNLABELLED = -1
"""A token with this label takes no part in the agreement with these labels."""

LEAST_COUNT = 5
"""Occurrences in a group, for a token to be told."""

_FREQUENT = 200  # tokens whose identity is a label
_LONG_CONTEXT = 20  # tokens of the sample that a context must have to be a label


class Represented(NamedTuple):
    """A token that a group has more of than its share.

    Attributes
    ----------
    token : int
        Its id.
    here, in_all : int
        Occurrences in the group and in the sample.
    score : float
        Its term of N times the mutual information of tokens and groups, in nats.
    """

    token: int
    here: int
    in_all: int
    score: float


LABELS = {
    "token": f"which token it is, for the {_FREQUENT} most frequent ones of the sample",
    "position": "its place in its context, in the classes 0, 1–2, 3–6, 7–14, …",
    "context": f"which chunk of text it stands in, for chunks with at least {_LONG_CONTEXT} tokens in the sample",
}


@dataclass(frozen=True)
class HeldOut:
    """Held-out tokens of a store: activations ``x [B, d]`` and, ``[B]`` each, where they come from."""

    x: Tensor
    rows: Tensor
    tokens: Tensor
    contexts: Tensor
    positions: Tensor

    @staticmethod
    def of(store: ActivationStore, share: float, seed: int, tokens: int) -> HeldOut:
        """The first tokens of the held-out side of the split, whose contexts are in random order."""
        view = store.split(share, seed)[1]
        x = view.load(tokens)
        rows = view.row_ids[: len(x)]
        contexts = torch.searchsorted(store.context_bounds, rows, right=True) - 1
        return HeldOut(x, rows, store.token_ids[rows].long(), contexts, rows - store.context_bounds[contexts])

    def labels(self) -> dict[str, Tensor]:
        """The classes of :data:`LABELS` that this sample has, ``[B]`` each."""
        known = torch.where(self.tokens < 0, UNLABELLED, self.tokens)
        found = {
            "token": _frequent(known, most=_FREQUENT),
            "position": (self.positions + 1).double().log2().floor().long(),
            "context": _frequent(self.contexts, least=_LONG_CONTEXT),
        }
        return {name: labels for name, labels in found.items() if len(labels[labels != UNLABELLED].unique()) > 1}


def _frequent(classes: Tensor, most: int | None = None, least: int = 1) -> Tensor:
    """Classes with at least `least` members, and of these the `most` frequent; the rest unlabelled."""
    known, count = classes[classes != UNLABELLED].unique(return_counts=True)
    kept = known[count.argsort(descending=True, stable=True)[:most]]
    kept = kept[torch.isin(kept, known[count >= least])]
    return torch.where(torch.isin(classes, kept), classes, UNLABELLED)


def over_represented(experts: Tensor, tokens: Tensor, expert: int, least: int = LEAST_COUNT) -> list[Represented]:
    """Tokens that an expert has more of than its share, most telling first.

    The score is the token's term ``n_te · ln(n_te N / (n_t n_e))`` of N times the mutual information of tokens and
    experts. Tokens seen fewer than `least` times by the expert are left out, and those without an id.

    Parameters
    ----------
    experts, tokens : Tensor [B] int64
        Expert and token id of each token; −1 where the id is unknown.
    expert : int
        Whose tokens.
    least : int
        Occurrences in the expert.
    """
    known = tokens >= 0
    experts, tokens = experts[known], tokens[known]
    kinds, which = tokens.unique(return_inverse=True)
    in_all = torch.bincount(which, minlength=len(kinds))
    here = torch.bincount(which[experts == expert], minlength=len(kinds))
    score = here * (here * len(tokens) / (in_all * here.sum().clamp(min=1))).clamp(min=1e-9).log()
    order = score.argsort(descending=True, stable=True)
    order = order[(here[order] >= least) & (score[order] > 0)]
    return [Represented(int(kinds[i]), int(here[i]), int(in_all[i]), float(score[i])) for i in order]
