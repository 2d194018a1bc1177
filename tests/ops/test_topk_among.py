"""``topk_among``: as ``topk_encode`` of a part of the rows, in shapes that do not depend on how many these are."""

import pytest
import torch

import sparsekern as sk
from sparsekern.ops._topk_among import topk_among


def problem(dtype=torch.float32):
    x, weight = torch.randn(7, 5, dtype=dtype), torch.randn(23, 5, dtype=dtype)
    weight[9] = weight[4]  # a tie
    return x, weight, torch.randn(23, dtype=dtype), torch.randn(5, dtype=dtype)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("latents", [range(23), [4, 9, 11, 2, 20], [9, 4], []], ids=len)
def test_equals_topk_encode_of_those_rows(latents, absolute):
    x, weight, bias, center = problem()
    among = torch.zeros(23, dtype=torch.bool)
    among[list(latents)] = True
    rows = among.nonzero().squeeze(1)
    codes = topk_among(x, weight, bias, among, 3, center=center, absolute=absolute)
    expected = torch.zeros(7, 23)
    if len(rows):
        k = min(3, len(rows))
        part = sk.topk_encode(x, weight[rows], bias[rows], k, center=center, absolute=absolute)
        expected[:, rows] = part.to_dense()
        assert torch.equal(codes.indices[:, :k], rows[part.indices.long()].int())
    assert codes.values.shape == codes.indices.shape == (7, 3)
    torch.testing.assert_close(codes.to_dense(), expected)


@pytest.mark.parametrize("count", [0, 2, 9])
def test_gradients_and_registration(count):
    x, weight, bias, center = (tensor.requires_grad_() for tensor in problem(torch.float64))
    among = torch.arange(23) % 2 * torch.arange(23) < 2 * count
    among &= torch.arange(23) % 2 == 1
    assert among.sum() == count

    def values(x, weight, bias, center):
        return topk_among(x, weight, bias, among, 3, center=center).values

    assert torch.autograd.gradcheck(values, (x, weight, bias, center))
    arguments = (x, weight, bias, center, among, 3, "auto", False)
    torch.library.opcheck(torch.ops.sparsekern.topk_among.default, arguments)


def test_a_mask_of_another_size_is_named():
    x, weight, bias, _ = problem()
    with pytest.raises(ValueError, match=r"among must have shape \(23,\)"):
        topk_among(x, weight, bias, torch.ones(22, dtype=torch.bool), 3)
