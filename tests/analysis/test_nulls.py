"""Draws that nulls are made of: what they change, and what they leave."""

import pytest
import torch
from torch.nn.functional import normalize

from sparsekern.analysis.nulls import permuted, second_moment_root


@pytest.mark.parametrize("dim", [0, 1])
def test_permuted_keeps_the_numbers_of_every_line_and_nothing_else(dim):
    rows = torch.arange(144.0).view(12, 12)
    mixed = permuted(rows, dim, torch.Generator().manual_seed(0))
    assert torch.equal(mixed.sort(dim).values, rows)
    orders = mixed.argsort(dim).unbind(1 - dim)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)  # each has a permutation of its own
    assert torch.equal(mixed, permuted(rows, dim, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("n", [3, 40])  # of less than full rank, and more
def test_second_moment_root_gives_draws_the_moment_of_the_rows(n):
    generator = torch.Generator().manual_seed(1)
    rows = normalize(torch.randn(n, 7, generator=generator) * torch.arange(1.0, 8), dim=1)
    root = second_moment_root(rows)
    moment = rows.T @ rows / n
    torch.testing.assert_close(root.T @ root, moment, rtol=0, atol=1e-6)
    drawn = torch.randn(200_000, 7, generator=generator) @ root
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), moment, rtol=0, atol=0.01)
