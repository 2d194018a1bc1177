"""CrossLayerTranscoder: what reaches which layer, its codes, and its arguments."""

import pytest
import torch

import sparsekern as sk


def make(activation=None, **options):
    generator = torch.Generator().manual_seed(1)
    return sk.CrossLayerTranscoder(3, 4, 10, activation or sk.TopK(2), generator=generator, **options)


def codes_like(sae, dense):
    """Codes of the same kind with these values."""
    row, col = dense.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=len(dense)).cumsum(0)])
    return sk.CSRCodes(crow, col.int(), dense[row, col], sae.d_sae)


def test_a_latent_writes_at_its_layer_and_all_later_ones():
    sae = make()
    written = sae.decode(codes_like(sae, torch.eye(30)))
    assert written.shape == (30, 3, 4)
    for latent in range(30):
        layer = latent // 10
        assert not written[latent, :layer].any()
        assert written[latent, layer:].abs().sum(1).min() > 0
    torch.testing.assert_close(written.flatten(1), sae.W_dec)
    torch.testing.assert_close(sae.source_norms(), written.norm(dim=2))
    torch.testing.assert_close(sae.latent_norms(), torch.ones(30))


def test_a_layer_reads_its_own_activations_only():
    sae, x = make(), torch.randn(6, 3, 4)
    codes = sae.encode(x).to_dense()
    other = x.clone()
    other[:, 1] += 1
    changed = (sae.encode(other).to_dense() != codes).any(0)
    assert changed[10:20].any()
    assert not changed[:10].any()
    assert not changed[20:].any()


@pytest.mark.parametrize("activation", [sk.TopK(2), sk.ReLU(), sk.BatchTopK(2)])
def test_codes_are_joined_layer_by_layer(activation):
    sae, x = make(activation), torch.randn(7, 3, 4)
    dense = sae.encode(x).to_dense()
    alone = [part.encode(x[:, layer]).to_dense() for layer, part in enumerate(sae.layers)]
    torch.testing.assert_close(dense, torch.cat(alone, 1))
    torch.testing.assert_close(sae.decode(codes_like(sae, dense.detach())), sae(x))
    csr = sae.encode(x)
    if isinstance(csr, sk.CSRCodes):  # in order, and with rows that hold nothing of some layer
        assert all((csr.col[a:b].diff() > 0).all() for a, b in zip(csr.crow, csr.crow[1:], strict=False))
    assert sae.encode(x.view(7, 1, 3, 4)).to_dense().shape[-1] == 30


def test_the_first_layers_bias_reaches_every_layer_and_the_others_stay_zero():
    sae = make()
    trainer = sk.Trainer(sae, lr=1e-2)
    for _ in range(3):
        trainer.step(torch.randn(20, 3, 4), 5 + torch.randn(20, 3, 4))
    torch.testing.assert_close(sae.b_dec.view(3, 4).mean(1), torch.full((3,), 5.0), rtol=0.1, atol=0)
    assert not any(part.b_dec.any() for part in list(sae.layers)[1:])
    assert sae.loss(torch.randn(20, 3, 4), 5 + torch.randn(20, 3, 4)).fvu < 1.5


def test_it_prints_and_its_weights_can_be_looked_at():
    sae = make()
    assert "n_sources=3, d_source=4, d_in=12, d_sae=30" in repr(sae)
    assert sae.W_enc.shape == (30, 4)
    assert sae.b_enc.shape == (30,)
    assert len(sae.latent_weights()) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sk.CrossLayerTranscoder(0, 4, 8, sk.TopK(1)), "n_layers must be a whole number of at least 1, got 0"),
        (lambda: sk.CrossLayerTranscoder(2, 4, 0, sk.TopK(1)), "d_sae_per_layer must be a whole number of at least 1"),
        (lambda: make(sk.Gated()), "activation must have no reconstruction term of its own, got Gated"),
        (lambda: make(sk.TopK(2, multi_k=4)), "activation must have no reconstruction term of its own, got TopK"),
        (lambda: make(3), "activation must be an Activation"),
        (lambda: make(skip=True), "skip is no option of a CrossLayerTranscoder"),
        (lambda: make(d_out=3), "d_out is no option"),
        (lambda: make(aux_coefficient=0.1), "aux_coefficient is no option"),
        (lambda: make(aux_k=2), "aux_k is no option"),
        (lambda: make(tied=True), "tied must be False"),
        (lambda: make(sk.TopK(11)), "k must be at most d_sae=10, got 11"),
        (lambda: make().encode(torch.ones(5, 2, 4)), r"x must end in \(3, 4\) or \(12,\)"),
        (
            lambda: make().decode(sk.SparseCodes(torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32), 30)),
            "codes must have as many slots for each of the 3 layers, got 4",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
