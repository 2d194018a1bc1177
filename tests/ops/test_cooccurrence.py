"""How often pairs of latents are active together, against a dense product."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.backends import reference
from sparsekern.ops._cooccurrence import _cooccurrence


def dense_counts(codes):
    """``[d_sae, d_sae]`` int64, the whole of it."""
    active = (codes.to_dense() != 0).double()
    return (active.T @ active).long()


def assert_right(found, codes, at_least=1):
    """The kept part of the upper triangle, in order."""
    counts = dense_counts(codes)
    upper = counts.triu(1)
    rows, cols = (upper >= at_least).nonzero(as_tuple=True)
    assert torch.equal(found.rows(), rows)
    assert torch.equal(found.col, cols.int())
    assert torch.equal(found.counts, upper[rows, cols].int())
    assert torch.equal(found.active, counts.diagonal())
    assert found.crow[0] == 0
    assert found.crow.shape == (codes.d_sae + 1,)
    assert found.d_sae == codes.d_sae


def random_codes(tokens, d_sae, k, generator):
    """Top-k codes in which some slots hold 0, some latents are on most tokens, and others are dead."""
    order = torch.rand(tokens, d_sae, generator=generator) * torch.linspace(0.3, 1.0, d_sae) ** 2
    order[:, ::5] = -1
    values, indices = order.topk(k, dim=1)
    return sk.SparseCodes(torch.where(values < 0.3, 0.0, values), indices.int(), d_sae)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(0, 60),
    d_sae=st.sampled_from([1, 2, 63, 64, 65, 130]),
    k=st.integers(1, 12),
    at_least=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_equals_the_dense_product(product_backend, tokens, d_sae, k, at_least, seed):
    codes = random_codes(tokens, d_sae, min(k, d_sae), torch.Generator().manual_seed(seed))
    found = sk.cooccurrence(codes, at_least)
    assert_right(found, codes, at_least)
    again = sk.cooccurrence(codes.to_csr(), at_least)
    assert all(map(torch.equal, found, again))


def test_uneven_rows_in_blocks(product_backend, monkeypatch):
    """Rows of none, one and all latents; the reference merges several blocks, of which one row is more than one."""
    monkeypatch.setattr(reference, "WORKSPACE_BYTES", 8 * 100)
    lengths = [0, 1, 50, 0, 3, 50, 7, 0]
    col = [torch.randperm(50)[:n].sort().values for n in lengths]
    crow = torch.tensor([0, *lengths]).cumsum(0)
    codes = sk.CSRCodes(crow, torch.cat(col).int(), torch.randn(sum(lengths)), 50)
    assert_right(sk.cooccurrence(codes), codes)
    assert_right(sk.cooccurrence(codes, 2), codes, 2)


def test_threads_change_nothing(product_backend):
    codes = random_codes(2000, 300, 20, torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        shared = sk.cooccurrence(codes)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, shared, sk.cooccurrence(codes)))
    assert_right(shared, codes)


def test_more_dimensions_and_nothing_active(product_backend):
    codes = random_codes(12, 40, 5, torch.Generator().manual_seed(0))
    folded = sk.SparseCodes(codes.values.view(3, 4, 5), codes.indices.view(3, 4, 5), 40)
    assert all(map(torch.equal, sk.cooccurrence(folded), sk.cooccurrence(codes)))
    empty = sk.cooccurrence(codes._replace(values=torch.zeros(12, 5)))
    assert empty.col.numel() == empty.counts.numel() == empty.active.sum() == 0


def test_opcheck(product_backend):
    crow, col = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 3, 0, 3, 4], dtype=torch.int32)
    torch.library.opcheck(_cooccurrence, (crow, col, 6, 1))


def test_bad_input_is_named():
    codes = random_codes(3, 10, 2, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="codes must be SparseCodes or CSRCodes, got Tensor"):
        sk.cooccurrence(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="at_least must be 1 or more, got 0"):
        sk.cooccurrence(codes, 0)
    twice = codes._replace(values=torch.ones(3, 2), indices=torch.full((3, 2), 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="name a token's active latents once each, by rising index"):
        sk.cooccurrence(twice)
    with pytest.raises(ValueError, match=r"col must lie in \[0, 10\)"):
        sk.cooccurrence(codes._replace(values=torch.ones(3, 2), indices=torch.full((3, 2), -1, dtype=torch.int32)))
