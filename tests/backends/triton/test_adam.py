"""Adam over factored gradients against torch.optim.Adam in float64, and the copy of the weights that it keeps."""

import copy
import os

import pytest
import torch

if not os.environ.get("CI"):
    pytest.importorskip("triton")

import sparsekern as sk
from sparsekern.backends import reference, triton
from sparsekern.backends.triton import adam, encode, products
from sparsekern.factors import OuterProducts

pytestmark = pytest.mark.usefixtures("triton_device", "poisoned_memory")

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8}
N, D = 9, 19


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch):
    """So that latents of a few entries are long."""
    monkeypatch.setattr(products, "SPLIT", 4)
    monkeypatch.setattr(adam, "SPLIT", 4)


def random_weight(device):
    return torch.nn.functional.normalize(torch.randn(N, D), dim=1).to(device)


def random_parts(device, parts):
    """Outer products of several widths, where latent 0 has many entries and the last two latents none.

    Of `parts`, a number or a kind each, those of the kind "csr" have from none to all latents a row.
    """
    made = []
    for part, kind in enumerate(["fixed"] * parts if isinstance(parts, int) else parts):
        if kind == "csr":
            made.append(csr_part(device))
            continue
        rows, k = (7, 2) if part != 1 else (5, 3)
        indices = torch.randint(1, N - 2, (rows, k), dtype=torch.int32)
        indices[:, 0] = 0
        values = torch.randn(rows, k) * (torch.rand(rows, k) > 0.2)
        made.append(OuterProducts(values.to(device), indices.to(device), torch.randn(D, rows).T.to(device)))
    return made


def csr_part(device, rows=6):
    """Entries of rows of which the first and the last have none, and one has all; latent 0 is in all others."""
    dense = torch.randn(rows, N - 2) * (torch.rand(rows, N - 2) > 0.6)
    dense[:, 0] = 1.0
    dense[2] = torch.randn(N - 2)
    dense[0] = dense[-1] = 0
    row, col = dense.nonzero(as_tuple=True)
    values = dense[row, col] * (torch.rand(len(row)) > 0.2)  # some entries that are zero
    crow = torch.nn.functional.pad((dense != 0).sum(1).cumsum(0), (1, 0))
    vectors = torch.randn(D, rows).T
    return OuterProducts(*(t.to(device) for t in (values, col.int(), vectors, crow)))


def fresh_state(weight):
    zeros = torch.zeros_like(weight)
    return {"step": torch.zeros((), device=weight.device), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def dense_gradient(parts, weight, unit_rows):
    """In float64, projected where the rows are to keep their norm."""
    gradient = sum(dense_part(*(None if t is None else t.cpu() for t in part)) for part in parts)
    return gradient - (gradient * weight).sum(1, keepdim=True) * weight if unit_rows else gradient


def dense_part(values, indices, vectors, crow):
    if crow is None:
        return reference.scatter_outer(values.double(), indices, vectors.double(), N)
    return reference.csr_scatter_outer(values.double(), crow, indices, vectors.double(), N)


@pytest.mark.parametrize(
    ("parts", "unit_rows", "clip_norm"),
    [
        *[(1, False, float("inf")), (1, True, 0.5), (2, False, 0.5), (2, True, 1e4), (3, False, 1e4), (3, True, 0.5)],
        *[(["csr"], True, 0.5), (["fixed", "csr"], False, 0.5), (["csr", "fixed"], True, 1e4)],
        *[(["csr", "csr"], False, 0.5), (["csr", "fixed", "csr"], True, 0.5)],
    ],
)
def test_equal_to_torch_adam(triton_device, parts, unit_rows, clip_norm):
    weight = random_weight(triton_device)
    other = torch.nn.Parameter(weight.cpu().double())
    optimizer = torch.optim.Adam([other], **OPTIONS)
    state, finite = fresh_state(weight), torch.tensor(True, device=triton_device)
    rest = torch.tensor(2.0, dtype=torch.float64)
    for _ in range(3):
        made = random_parts(triton_device, parts)
        factors = adam.SortedFactors(made, N)
        clip = adam.clip_factor([(factors, weight, unit_rows)], rest.to(triton_device), clip_norm)
        squares = adam.row_adam(factors, weight, unit_rows, state, **OPTIONS, clip=clip, copy=None, finite=finite)
        other.grad = dense_gradient(made, other.detach(), unit_rows)
        torch.testing.assert_close(squares.cpu(), other.grad.square().sum(), rtol=1e-5, atol=0)
        factor = min(1.0, clip_norm / float((rest + other.grad.square().sum()).sqrt() + 1e-6))
        assert clip.item() == pytest.approx(factor, rel=1e-6)
        assert (factor < 1) == (clip_norm < 1)
        other.grad *= factor
        optimizer.step()
        if unit_rows:
            other.data /= other.data.norm(dim=1, keepdim=True)
    for mine, theirs in [(weight, other.detach())] + [(state[name], optimizer.state[other][name]) for name in state]:
        torch.testing.assert_close(mine.cpu().double(), theirs.double(), rtol=1e-5, atol=1e-6)


def test_clipping_has_one_norm_for_all_weights(triton_device):
    weights = [random_weight(triton_device) for _ in range(2)]
    parts = [random_parts(triton_device, 1), random_parts(triton_device, 2)]
    found = [
        (adam.SortedFactors(p, N), weight, i == 1) for i, (p, weight) in enumerate(zip(parts, weights, strict=True))
    ]
    exact = sum(
        dense_gradient(p, weight.cpu().double(), i == 1).square().sum()
        for i, (p, weight) in enumerate(zip(parts, weights, strict=True))
    )
    rest = torch.tensor(5.0, dtype=torch.float64, device=triton_device)
    clip = adam.clip_factor(found, rest, 0.25)
    assert clip.item() == pytest.approx(0.25 / float((exact + 5).sqrt()), rel=1e-6)


def test_the_bound_on_the_norm_may_be_loose_but_never_low(triton_device):
    """Where it is above the clipping norm and the norm is not, nothing is clipped."""
    weight, rest = random_weight(triton_device), torch.zeros((), device=triton_device)
    (one,) = random_parts(triton_device, 1)
    opposite = one._replace(values=-0.999 * one.values)
    apart = OuterProducts(one.values[:, :1], torch.arange(7, dtype=torch.int32)[:, None].to(triton_device), one.vectors)
    entries = csr_part(triton_device)
    for parts, least, most in [([apart], 1, 1.01), ([one], 1.1, 10), ([entries], 1.1, 10), ([one, opposite], 1e3, 1e9)]:
        factors = adam.SortedFactors(parts, N)
        exact = dense_gradient(parts, weight.cpu().double(), False).square().sum()
        assert least <= factors.square_bound().item() / exact <= most
        for share in (0.99, 1.01):
            clip = adam.clip_factor([(factors, weight, False)], rest, share * exact.sqrt().item())
            assert clip.item() == pytest.approx(min(share, 1), rel=1e-3)


def test_without_entries_the_moments_decay(triton_device):
    weight, finite = random_weight(triton_device), torch.tensor(True, device=triton_device)
    state, before = fresh_state(weight), weight.clone()
    state["exp_avg"] += 1
    none = [
        t.to(triton_device) for t in (torch.zeros(0), torch.zeros(0).int(), torch.randn(3, D), torch.zeros(4).long())
    ]
    factors = adam.SortedFactors([OuterProducts(*none)], N)
    rest = torch.tensor(1.0, dtype=torch.float64, device=triton_device)
    clip = adam.clip_factor([(factors, weight, False)], rest, 0.25)
    assert clip.item() == pytest.approx(0.25, rel=1e-5)
    options = {**OPTIONS, "clip": clip, "copy": None, "finite": finite}
    assert adam.row_adam(factors, weight, False, state, **options) == 0
    torch.testing.assert_close(state["exp_avg"], torch.full_like(weight, 0.9))
    assert (weight < before).all()


def test_entries_in_csr_form_are_updated_without_waiting(triton_device, no_waiting):
    weight, finite = random_weight(triton_device), torch.tensor(True, device=triton_device)
    state, rest = fresh_state(weight), torch.ones((), dtype=torch.float64, device=triton_device)
    for kinds in (["csr", "fixed"], ["csr", "fixed", "csr"]):
        parts = random_parts(triton_device, kinds)
        with no_waiting():
            factors = adam.SortedFactors(parts, N)
            clip = adam.clip_factor([(factors, weight, True)], rest, 0.5)
            adam.row_adam(factors, weight, True, state, **OPTIONS, clip=clip, copy=None, finite=finite)


@pytest.mark.parametrize("unit_rows", [False, True])
def test_a_step_that_is_not_finite_changes_no_byte(triton_device, unit_rows):
    weight, finite = random_weight(triton_device), torch.tensor(True, device=triton_device)
    state, kept, options = fresh_state(weight), encode.quantized(weight), {**OPTIONS, "clip": finite.float()}
    parts = random_parts(triton_device, 2)
    adam.row_adam(adam.SortedFactors(parts, N), weight, unit_rows, state, **options, copy=kept, finite=finite)
    before = copy.deepcopy((weight, state, kept.cast))
    broken = [part._replace(vectors=part.vectors * torch.nan) for part in parts]
    options["clip"] = torch.full_like(options["clip"], torch.nan)
    factors = adam.SortedFactors(broken, N)
    assert adam.row_adam(factors, weight, unit_rows, state, **options, copy=kept, finite=~finite) == 0
    assert torch.equal(weight, before[0])
    assert all(torch.equal(state[name], before[1][name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(kept.cast, before[2], strict=True) if a is not None)
    assert kept.is_current(weight)
    assert kept.unchanged(weight)


@pytest.mark.parametrize("screen", ["auto", "fp8"])
@pytest.mark.parametrize("unit_rows", [False, True])
def test_the_copy_follows_the_weight(triton_device, unit_rows, screen):
    weight, finite = random_weight(triton_device), torch.tensor(True, device=triton_device)
    other, kept = (
        encode.Quantized(weight, encode.cast_rows(weight, encode.SCREEN_DTYPE)),
        encode.quantized(weight, screen),
    )
    factors = adam.SortedFactors(random_parts(triton_device, 1), N)
    options = {**OPTIONS, "clip": finite.float(), "copy": kept, "finite": finite}
    adam.row_adam(factors, weight, unit_rows, fresh_state(weight), **options)
    assert kept.is_current(weight)
    assert kept.unchanged(weight)
    assert encode.current_copy(weight) is kept
    assert not other.is_current(weight)
    fresh = encode.cast_rows(weight, kept.cast.rows.dtype)
    rows, scale = kept.cast.rows.float(), kept.cast.scale.unsqueeze(1)
    assert torch.equal(rows, fresh.rows.float())
    assert torch.equal(kept.cast.scale, fresh.scale)
    torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / (448 if screen == "fp8" else 1))
    share = 1 / 16 if screen == "fp8" else 1 / 2048
    assert ((rows * scale - weight).abs() <= share * weight.abs() + scale / 512).all()
    torch.testing.assert_close(kept.cast.norm, weight.norm(dim=1), rtol=1e-6, atol=0)
    torch.testing.assert_close(kept.cast.error, (weight - rows * scale).norm(dim=1), rtol=1e-5, atol=1e-7)


def test_a_copy_is_dropped_when_somebody_else_changes_the_weight(triton_device):
    weight = random_weight(triton_device)
    kept = encode.quantized(weight)
    assert encode.current_copy(weight) is kept
    assert encode.current_copy(weight.clone()) is None
    assert encode.current_copy(weight[:5]) is None
    weight[3] += 1
    assert encode.current_copy(weight) is None
    kept = encode.quantized(weight)
    del kept
    assert encode.current_copy(weight) is None  # its owner has gone


def test_a_change_through_data_repairs_every_token(triton_device):
    """It leaves no trace in the version of the tensor, but one in the first column, which is seen on the device."""
    weight, x = torch.randn(70, 5).to(triton_device), torch.randn(2, 5).to(triton_device)
    kept = encode.quantized(weight)
    sk.topk_encode(x, weight, None, 2)
    assert triton.last_encode().repaired == 0
    weight.data.neg_()
    assert kept.is_current(weight)
    assert not kept.unchanged(weight)
    codes = sk.topk_encode(x, weight, None, 2)
    assert triton.last_encode().repaired == 2
    values, indices = reference.topk_encode(x, weight, None, 2, "none")
    assert torch.equal(codes.indices, indices)
    torch.testing.assert_close(codes.values, values)
