"""GatedSAE: which parameters which part of its loss trains, and its arguments."""

import pytest
import torch

import sparsekern as sk


def test_it_is_an_sae_with_the_gated_activation():
    plain = sk.SAE(8, 32, sk.Gated(0.3), generator=torch.Generator().manual_seed(1))
    named = sk.GatedSAE(8, 32, sk.Gated(0.3), generator=torch.Generator().manual_seed(1))
    x = torch.randn(9, 8)
    assert torch.equal(plain.loss(x).total, named.loss(x).total)
    assert named.config() == {**plain.config(), "class": "GatedSAE"}
    assert sk.GatedSAE(8, 32).activation.config() == sk.Gated().config()
    assert type(sk.SAE.from_config(named.config())) is sk.GatedSAE


@pytest.mark.parametrize(
    ("part", "trained"),
    [
        ("reconstruction", {"W_enc", "W_dec", "b_dec", "activation.r_mag", "activation.b_mag"}),
        ("sparsity", {"W_enc", "b_enc", "b_dec"}),  # b_dec through what the encoder subtracts
        ("gate", {"W_enc", "b_enc", "b_dec"}),
    ],
)
def test_which_parameters_a_part_of_the_loss_trains(part, trained):
    sae = sk.GatedSAE(8, 32, unit_decoder=True)
    sae.loss(torch.randn(9, 8)).parts[part].backward()
    moved = {name for name, p in sae.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-6}
    assert moved == trained


def test_magnitudes_are_those_of_the_encoder_before_the_gates_were_lowered():
    for sae in (sk.GatedSAE(8, 32, sk.Gated(start_l0=3)), sk.Transcoder(8, 32, sk.Gated(start_l0=3))):
        x = 2 + torch.randn(100, 8)
        sae.fit_start_(x, "mean")
        pre = (x - x.mean(0)) @ sae.W_enc.T
        codes = sae.encode(x).to_dense()
        torch.testing.assert_close(codes, pre * (codes > 0), rtol=1e-4, atol=1e-4)
        assert (codes > 0).sum() == pytest.approx(300, abs=2)
        assert codes[codes > 0].min() >= 0.999 * pre.flatten().topk(300).values.min()


def test_another_activation_is_refused():
    with pytest.raises(ValueError, match="activation must be a Gated, got TopK"):
        sk.GatedSAE(8, 32, sk.TopK(3))
