"""Transcoder: where it starts, its affine path, and its arguments."""

import pytest
import torch

import sparsekern as sk
from sparsekern.modules.transcoder import ridge


def make(**options):
    return sk.Transcoder(8, 64, sk.TopK(4), generator=torch.Generator().manual_seed(1), **options)


def batch(rows=300, d_out=5):
    x = 3 + torch.randn(rows, 8) * torch.logspace(-1, 1, 8)
    return x, torch.relu(x @ torch.randn(8, 12)) @ torch.randn(12, d_out)


def test_the_ridge_regression_is_the_written_out_one():
    x, y = batch()
    x, y = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    penalty = 0.01 * x.square().sum() / 8
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(8).double()])  # least squares with the penalty as further rows
    expected = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(8, 5).double()])).solution.T
    torch.testing.assert_close(ridge(x, y), expected)
    torch.testing.assert_close(ridge(x.float(), y.float()).double(), expected, rtol=1e-4, atol=1e-4)
    few = ridge(x[:3].float(), y[:3].float())  # fewer rows than dimensions
    assert few.isfinite().all()
    assert not ridge(torch.zeros(9, 8), y[:9].float()).any()


def test_decoder_rows_start_at_what_is_linear_of_their_encoder_rows():
    x, y = batch()
    sae = make(d_out=5, unit_decoder=True)
    sae.fit_start_(x, "mean", y)
    linear = ridge(x - x.mean(0), y - y.mean(0))
    torch.testing.assert_close(sae.W_dec.data, torch.nn.functional.normalize(sae.W_enc @ linear.T, dim=1).detach())
    torch.testing.assert_close(sae.b_dec.data, y.mean(0))
    torch.testing.assert_close(sae.b_enc.data, -(sae.W_enc @ x.mean(0)).detach(), rtol=1e-4, atol=1e-4)


def test_with_a_skip_the_start_is_better_than_the_regression_alone():
    x, y = batch()
    sae = make(d_out=5, skip=True, unit_decoder=True)
    sae.fit_start_(x, "mean", y)
    torch.testing.assert_close(sae.W_skip.data, ridge(x - x.mean(0), y - y.mean(0)))
    rest = y - x @ sae.W_skip.T
    torch.testing.assert_close(sae.b_dec.data, rest.mean(0).detach(), rtol=1e-4, atol=1e-4)
    linear_alone = (rest - rest.mean(0)).square().sum() / (y - y.mean(0)).square().sum()
    assert sae.loss(x, y).fvu < 0.98 * linear_alone
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize("skip", [False, True])
def test_free_rows_start_at_zero_unless_their_norms_are_charged(skip):
    x, y = batch()
    free, unit = (make(d_out=5, skip=skip, **options) for options in ({}, {"unit_decoder": True}))
    for sae in (free, unit):
        sae.fit_start_(x, "mean", y)
    assert not free.W_dec.any()
    torch.testing.assert_close(free.W_enc, unit.W_enc)  # its scale was fitted before
    charged = sk.Transcoder(8, 64, sk.ReLU(), d_out=5, skip=skip)
    charged.fit_start_(x, "mean", y)
    assert not charged.unit_decoder
    assert charged.W_dec.norm(dim=1).min() > 0.9
    assert sk.Transcoder(8, 64, sk.JumpReLU(), d_out=5).unit_decoder


def test_a_constant_target_leaves_the_decoder_where_it_was():
    x, _ = batch()
    for skip in (False, True):
        sae, target = make(d_out=5, skip=skip, unit_decoder=True), torch.full((300, 5), 2.0)
        sae.fit_start_(x, "mean", target)
        assert torch.equal(sae.W_dec, make(d_out=5, skip=skip).W_dec)
        torch.testing.assert_close(sae.b_dec.data, target[0])


def test_the_affine_path_adds_to_whatever_the_codes_are():
    sae, x = make(d_out=5, skip=True), torch.randn(2, 3, 8)
    with torch.no_grad():
        sae.W_skip.normal_()
        sae.b_dec.normal_()
    codes = sae.encode(x)
    torch.testing.assert_close(sae(x), sae.decode(codes) + x @ sae.W_skip.T)
    none = codes._replace(values=torch.zeros_like(codes.values))
    torch.testing.assert_close(sae.reconstruct(none, x), sae.b_dec + x @ sae.W_skip.T)
    torch.testing.assert_close(sae.reconstruct(none, x), sae.offset(x))
    for dtype in (torch.bfloat16, torch.float64):  # of what is read, beside weights of another
        assert sae(x.to(dtype)).dtype == dtype
        assert sae.loss(x.to(dtype), torch.randn(2, 3, 5)).total.isfinite()


def test_it_reads_what_goes_into_a_module():
    assert sk.Transcoder.reads == "input"
    assert repr(make(d_out=5)).splitlines()[1].strip() == "d_in=8, d_sae=64, pre_bias=False, d_out=5"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(d_out=0), "d_out must be a whole number of at least 1, got 0"),
        (lambda: make(d_out=2.5), "d_out must be a whole number of at least 1, got 2.5"),
        (lambda: make(tied=True), "tied must be False: encoder and decoder of a transcoder live in two spaces"),
        (lambda: make(pre_bias=True), "pre_bias must be False"),
        (lambda: make(d_out=5).loss(torch.ones(3, 8)), r"target must be given, with shape \(3, 5\): d_out is not d_in"),
        (lambda: make(d_out=5).loss(torch.ones(3, 8), torch.ones(3, 8)), r"target must have shape \(3, 5\), got"),
        (
            lambda: make(d_out=5).fit_start_(torch.ones(3, 8), target=torch.full((3, 5), float("inf"))),
            "target holds NaN or infinity, first in row 0",
        ),
        (lambda: make().fit_start_(torch.ones(3, 8), "median"), "center must be one of geometric_median, mean, zeros"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
