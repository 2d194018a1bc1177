"""The assignment of largest total weight in a large sparse table.

Solvers that look at every column at each step of a search, such as that of SciPy, take a time in proportion to the
square of the rows or worse. Here rows first bid for columns, all at once; the few that are left without one are placed
by shortest augmenting paths, each found in a part of the graph that prices keep small.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

try:
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra
except ImportError as error:
    raise ImportError("this analysis needs scipy: pip install 'sparsekern[analysis]'") from error

_ROUNDS = 200  # of bids; later ones place few rows
_STEPS = (1000, 0.1)  # of searches between two settings of the prices: so many, and so many times the rows


def assign(weights: csr_array) -> np.ndarray:
    """Give rows a column each, none to two of them, such that the summed weights of these entries are largest.

    A row stays without where that is better for the sum, or where it has no entry. Exact but for rounding in float64:
    there is a price of every column and a profit of every row, both at least 0, and 0 where nothing is assigned, whose
    sums are at least the weights, and equal to those of the entries taken; so no other choice is worth more.

    Parameters
    ----------
    weights : csr_array [n1, n2]
        Finite entries; those not above 0 are never taken.

    Returns
    -------
    ndarray [n1] int64
        The column of each row, −1 for none.

    References
    ----------
    Jonker and Volgenant, *A shortest augmenting path algorithm for dense and sparse linear assignment problems*
    (Computing 38, 1987), for bids and paths; Bertsekas, *The auction algorithm* (Annals of Operations Research 14,
    1988), for bids all at once.
    """
    state = _bid(weights)
    while len(free := np.flatnonzero((state.partner < 0) & (state.profit > 0))):
        _guide(state)
        _search(state, free.tolist())
    return state.partner


class _State(NamedTuple):
    """Pairs so far, with prices and profits as :func:`assign` says, but that free rows may have a profit still."""

    weights: csr_array
    row: np.ndarray  # of each entry
    price: np.ndarray  # [n2]
    owner: np.ndarray  # [n2], −1 for none
    profit: np.ndarray  # [n1], the largest weight less price in a row, or 0
    partner: np.ndarray  # [n1], −1 for none


def _bid(weights: csr_array) -> _State:
    """In each round every free row bids for its best column all that this is worth to it beyond the second best.

    The highest bid gets the column and is its price from there on. Rows with two best ones wait for the searches.
    """
    n1, n2 = weights.shape
    entries = np.diff(weights.indptr)
    price, owner, partner = np.zeros(n2), np.full(n2, -1), np.full(n1, -1)
    free = np.flatnonzero(entries)
    for _ in range(_ROUNDS):
        if not len(free):
            break
        own = weights[free]
        first = own.indptr[:-1]
        net = own.data - price[own.indices]
        best = np.maximum.reduceat(net, first)
        highest = np.flatnonzero(net == np.repeat(best, entries[free]))
        at = highest[np.searchsorted(highest, first)]
        column = own.indices[at]
        net[at] = 0  # what a row has without a column
        margin = best - np.maximum(np.maximum.reduceat(net, first), 0)
        bidders = np.flatnonzero((best > 0) & ((margin > 0) | (owner[column] < 0)))
        if not len(bidders):
            break
        order = bidders[np.lexsort((-margin[bidders], column[bidders]))]
        won, where = np.unique(column[order], return_index=True)
        winners = order[where]
        lost = owner[won][owner[won] >= 0]
        partner[lost] = -1
        owner[won], partner[free[winners]] = free[winners], won
        price[won] += margin[winners]
        best[winners] = 0  # as those that nothing is worth its price to, they bid no more
        free = np.concatenate([free[best > 0], lost])
    row, profit = np.repeat(np.arange(n1), entries), np.zeros(n1)
    np.maximum.at(profit, row, weights.data - price[weights.indices])
    return _State(weights, row, price, owner, profit, partner)


def _guide(state: _State) -> None:
    """Raise prices, and lower profits, by the distance of each row to where a path of exchanges can end.

    That is at a column without owner, or at a row that gives its own up. Along the shortest way to an end the exchanges
    then cost nothing more, so that a search goes straight there, until another one has used that end up.
    """
    weights, row, price, owner, profit, partner = state
    n1 = len(profit)
    length = (profit[row] + price[weights.indices] - weights.data).clip(min=0)  # rounding may leave less
    to = owner[weights.indices]
    ends = profit.clip(min=0)
    np.minimum.at(ends, row[to < 0], length[to < 0])
    inner = (to >= 0) & (to != row)
    # From the ends, one more node, backwards to each row.
    back = (np.append(to[inner], np.full(n1, n1)), np.append(row[inner], np.arange(n1)))
    far = dijkstra(csr_array((np.append(length[inner], ends), back), shape=(n1 + 1, n1 + 1)), indices=n1)[:n1]
    profit -= far
    matched = partner >= 0
    price[partner[matched]] += far[matched]


def _search(state: _State, free: list[int]) -> None:
    """Place free rows by shortest augmenting paths, Dijkstra's searches, as many as `_STEPS` allow."""
    indptr, indices, data = state.weights.indptr.tolist(), state.weights.indices, state.weights.data
    price, owner, profit, partner = (part.tolist() for part in state[2:])  # lists are faster, one number at a time
    steps = _STEPS[0] + int(_STEPS[1] * len(profit))
    for start in free:
        if steps < 0:
            break
        distance: dict[int, float] = {}  # of columns; −1 once it is certain
        via: dict[int, int] = {}  # the row that a column is reached from
        certain: list[tuple[int, float]] = []
        heap: list[tuple[float, int]] = []
        row, reached = start, 0.0
        # The nearest end so far: a column without owner, or the row `leaving` where that is −1.
        limit, end, leaving = profit[start], -1, start
        while True:
            steps -= 1
            leave = reached + profit[row]
            if leave < limit:
                limit, end, leaving = leave, -1, row
            entries = slice(indptr[row], indptr[row + 1])
            for column, weight in zip(indices[entries].tolist(), data[entries].tolist(), strict=True):
                to = leave - weight + price[column]
                if to < distance.get(column, limit) and to < limit:
                    distance[column], via[column] = to, row
                    if owner[column] < 0:
                        limit, end = to, column
                    else:
                        heapq.heappush(heap, (to, column))
            while heap and heap[0][0] != distance[heap[0][1]]:
                heapq.heappop(heap)
            if not heap or heap[0][0] >= limit:
                break
            reached, column = heapq.heappop(heap)
            certain.append((column, reached))
            distance[column] = -1.0
            row = owner[column]
        profit[start] -= limit
        for column, reached in certain:
            price[column] += limit - reached
            profit[owner[column]] -= limit - reached
        if end < 0:
            profit[leaving] = 0.0
            end, partner[leaving] = partner[leaving], -1
        while end >= 0:  # each row on the way takes the column that it led to and leaves its own to the one before
            owner[end] = row = via[end]
            end, partner[row] = partner[row], end
    for part, new in zip(state[2:], (price, owner, profit, partner), strict=True):
        part[:] = new
