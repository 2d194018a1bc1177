"""The sparse assignment: the same total as dense and sparse solvers of SciPy, in every shape a table can have."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from sparsekern.analysis import assignment
from sparsekern.analysis.assignment import assign


def table(n1, n2, filled, levels, seed):
    """A table with so much of it filled, and weights of so many levels, 0 for all different."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, levels + 1, (n1, n2)) / levels if levels else rng.random((n1, n2))
    return csr_array(weights * (rng.random((n1, n2)) < filled))


def total(weights, column):
    """Sum of the weights taken, once no column was found to be taken twice, and no entry that is not there."""
    rows = np.flatnonzero(column >= 0)
    assert len(np.unique(column[rows])) == len(rows)
    taken = weights.toarray()[rows, column[rows]]
    assert (taken > 0).all()
    return taken.sum()


def best(weights):
    dense = weights.toarray().clip(min=0)
    return dense[linear_sum_assignment(dense, maximize=True)].sum()


tables = st.builds(
    table, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.sampled_from([0, 1, 2, 5]), st.integers(0, 2**31)
)


@pytest.mark.parametrize("rounds", [0, 2, 200])
@pytest.mark.parametrize("steps", [(0, 0.0), (1000, 0.1)])
def test_the_total_is_the_largest(monkeypatch, rounds, steps):
    """Whatever was left to the searches by the bids, and wherever prices are set anew between searches."""
    monkeypatch.setattr(assignment, "_ROUNDS", rounds)
    monkeypatch.setattr(assignment, "_STEPS", steps)

    @given(tables)
    def check(weights):
        assert total(weights, assign(weights)) == pytest.approx(best(weights), abs=1e-12)

    check()


@given(tables, st.integers(0, 2**31))
def test_the_order_of_rows_and_columns_changes_nothing(weights, seed):
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(weights.shape[0]), rng.permutation(weights.shape[1])
    other = csr_array(weights[rows][:, columns])
    assert total(other, assign(other)) == pytest.approx(total(weights, assign(weights)), abs=1e-12)
    turned = csr_array(weights.T)
    assert total(turned, assign(turned)) == pytest.approx(total(weights, assign(weights)), abs=1e-12)


def test_prices_and_profits_prove_it(monkeypatch):
    """No choice is worth more than their sum, and this one is worth as much."""
    states = []
    guide = assignment._guide
    monkeypatch.setattr(assignment, "_guide", lambda state: (states.append(state), guide(state)))
    for seed in range(5):
        weights = table(1500, 1500, 0.01, 0, seed)
        column = assign(weights)
        state = states[-1]
        assert min(state.price.min(), state.profit.min()) > -1e-12
        net = state.profit[state.row] + state.price[weights.indices] - weights.data
        assert net.min() > -1e-12
        assert state.price.sum() + state.profit.sum() == pytest.approx(total(weights, column), abs=1e-9)
    assert len(states) > 5  # of several settings of the prices in one table


@pytest.mark.parametrize(("n1", "n2"), [(2000, 2000), (2500, 1200), (1200, 2500)])
def test_larger_tables_beside_the_sparse_solver_of_scipy(n1, n2):
    """Which gives every row a column: here one of its own, at a weight that any other beats."""
    rng = np.random.default_rng(n1)
    rows, columns = np.repeat(np.arange(n1), 8), rng.integers(n2, size=8 * n1)
    weights = csr_array((rng.random(8 * n1), (rows, columns)), shape=(n1, n2))
    padded = csr_array(
        (
            np.append(weights.data, np.full(n1, 1e-12)),
            (
                np.append(np.repeat(np.arange(n1), np.diff(weights.indptr)), np.arange(n1)),
                np.append(weights.indices, n2 + np.arange(n1)),
            ),
        ),
        shape=(n1, n2 + n1),
    )
    wanted = padded[min_weight_full_bipartite_matching(padded, maximize=True)].sum()
    assert total(weights, assign(weights)) == pytest.approx(wanted, abs=1e-8)


def test_a_row_stays_without_where_that_is_better():
    assert assign(csr_array([[2.0, 3.0], [0.0, 2.5], [0.0, 0.4]])).tolist() == [0, 1, -1]
    assert assign(csr_array([[2.0, 3.0], [0.0, 0.5]])).tolist() == [1, -1]
    assert assign(csr_array([[2.0, 3.0], [0.0, 1.5]])).tolist() == [0, 1]


def test_weights_that_are_not_positive_are_never_taken():
    weights = csr_array((np.array([-1.0, 0.0, 2.0, 3.0]), np.array([0, 1, 0, 1]), np.array([0, 2, 2, 4])), shape=(3, 2))
    assert assign(weights).tolist() == [-1, -1, 1]


@pytest.mark.parametrize(("n1", "n2"), [(0, 0), (0, 3), (3, 0), (3, 3)])
def test_tables_without_entries(n1, n2):
    assert assign(csr_array((n1, n2))).tolist() == [-1] * n1


def test_equal_rows_share_what_there_is():
    """Ties everywhere: a thousand equal rows for ten columns, and for none that any of them likes better."""
    weights = csr_array(np.ones((1000, 10)))
    column = assign(weights)
    assert sorted(column[column >= 0].tolist()) == list(range(10))
    weights = csr_array(np.repeat(np.random.default_rng(0).random((1, 60)), 60, 0))
    assert total(weights, assign(weights)) == pytest.approx(weights.toarray()[0].sum())


def test_a_long_chain_of_exchanges():
    """Each row likes one column best and the next a little less; one more, for the first only, moves them all."""
    n = 3000
    rows = np.arange(n)
    entries = np.concatenate([rows, rows, [n]]), np.concatenate([rows, rows + 1, [0]])
    weights = csr_array((np.repeat([1.0, 1 - 1e-4, 1.0], [n, n, 1]), entries), shape=(n + 1, n + 1))
    assert assign(weights).tolist() == [*range(1, n + 1), 0]
