"""The model to beat: n-grams with interpolated Kneser–Ney smoothing."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


class KneserNey:
    """Interpolated Kneser–Ney n-grams of one discount an order (Chen & Goodman 1999, eq. 20; discount of Ney et al.).

    Parameters
    ----------
    ids : int64 [n]
        The training text as one stream of tokens.
    vocab : int
        Number of tokens; ``vocab ** order`` must fit an int64.
    order : int
        Longest n-gram.

    Raises
    ------
    ValueError
        If an n-gram does not fit, the text is shorter than one, or an id is not a token.
    """

    def __init__(self, ids: Ids, vocab: int, order: int) -> None:
        if order < 1 or vocab**order >= 2**63:
            raise ValueError(f"order must be at least 1 with vocab ** order below 2⁶³, got {order} and vocab {vocab}")
        if len(ids) < order or ids.min() < 0 or ids.max() >= vocab:
            raise ValueError(f"ids must be at least {order} tokens in [0, {vocab}), got {len(ids)}")
        self.vocab, self.order = vocab, order
        self._tables = []
        keys, counts = np.unique(_windows(ids, order, vocab), return_counts=True)
        for length in range(order, 0, -1):
            self._tables.append(_Table(keys, counts, vocab))
            # Below the longest what counts is in how many contexts an n-gram stands, not how often.
            keys, counts = np.unique(keys % vocab ** (length - 1), return_counts=True)
        self._tables.reverse()

    def probabilities(self, ids: Ids, order: int | None = None) -> Probabilities:
        """Probability of each token of a stream given those before it, ``[n − order + 1]``: of the last n."""
        order = self.order if order is None else order
        probability = np.full(len(ids) - self.order + 1, 1 / self.vocab)
        for length, table in enumerate(self._tables[:order], start=1):
            keys = _windows(ids, length, self.vocab)[self.order - length :]
            probability = table.interpolated(keys, probability)
        return probability


class _Table:
    """Discounted counts of the n-grams of one length."""

    def __init__(self, keys: Ids, counts: Ids, vocab: int) -> None:
        self.vocab, self.keys, self.counts = vocab, keys, counts
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        self.discount = once / max(once + 2 * twice, 1)
        # Keys are sorted, so those of one context lie together.
        self.contexts, starts, self.kinds = np.unique(keys // vocab, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(counts, starts)

    def interpolated(self, keys: Ids, shorter: Probabilities) -> Probabilities:
        count = _look_up(self.keys, self.counts, keys)
        total = _look_up(self.contexts, self.totals, keys // self.vocab)
        kinds = _look_up(self.contexts, self.kinds, keys // self.vocab)
        seen = np.maximum(count - self.discount, 0) + self.discount * kinds * shorter
        return np.where(total > 0, seen / np.maximum(total, 1), shorter)


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)


def _windows(ids: Ids, length: int, vocab: int) -> Ids:
    """Each n-gram as one number, the first token its highest digit: ``[n − length + 1]``."""
    keys = np.zeros(len(ids) - length + 1, dtype=np.int64)
    for place in range(length):
        keys = keys * vocab + ids[place : len(ids) - length + 1 + place]
    return keys
