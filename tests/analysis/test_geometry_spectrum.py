"""The dimensions of codes are counted, and what is lost without the rest; five seeds stand beside bounds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekern as sk
from sparsekern.analysis import geometry
from sparsekern.analysis.geometry import Projected, ce_curve, fvu_curve, pca_spectrum, shuffled_codes
from sparsekern.analysis.toy import ZipfFeatures

SEEDS = range(5)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def csr(dense):
    rows, col = dense.nonzero(as_tuple=True)
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=len(dense)).cumsum(0)])
    return sk.CSRCodes(crow, col.int(), dense[rows, col], dense.shape[1])


def sparse(n, width, seed, density=0.2):
    g = generator(seed)
    return torch.rand(n, width, generator=g) * (torch.rand(n, width, generator=g) < density)


def tied(d, width, k, seed):
    sae = sk.SAE(d, width, sk.TopK(k), generator=generator(seed))
    return sae.eval()


# Spectrum


@settings(max_examples=15, deadline=None)
@given(st.integers(3, 40), st.integers(2, 12), st.integers(0, 2**31))
def test_the_spectrum_is_that_of_the_dense_codes(n, width, seed):
    dense = sparse(n, width, seed, 0.5).double()
    dense[0, 0], dense[1, 0] = 2, 0
    found = pca_spectrum(csr(dense), q=width, n_null=0, n_bases=0)
    centred = dense - dense.mean(0)
    expected = torch.linalg.eigvalsh(centred.T @ centred / n).flip(0)
    active = int(dense.any(0).sum())
    torch.testing.assert_close(found.eigenvalues, expected[:active], atol=1e-9, rtol=0)
    assert found.variance == pytest.approx(float(expected.sum()))
    shares = (expected / expected.sum()).clamp(min=0)
    assert found.results["participation"].value == pytest.approx(float(1 / shares.square().sum()))
    entropy = -torch.special.xlogy(shares, shares).sum()
    assert found.results["entropy_rank"].value == pytest.approx(float(entropy.exp()), rel=1e-5)
    assert found.results["q99"].value == int((shares.cumsum(0) < 0.99 - 1e-9).sum()) + 1
    components = found.basis.components.double()
    kept = components[found.eigenvalues > 1e-3 * found.eigenvalues[0]]
    torch.testing.assert_close(kept @ kept.T, torch.eye(len(kept)).double(), atol=1e-5, rtol=0)
    along = (centred @ components.T).square().mean(0)
    torch.testing.assert_close(along, found.eigenvalues, atol=1e-5, rtol=0)


def test_lanczos_agrees_with_the_dense_method_and_says_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(geometry.spectrum, "_BLOCK", 7)
    codes = csr(sparse(300, 60, 3))
    dense, lanczos = (pca_spectrum(codes, 8, method=method, n_null=2) for method in ("dense", "lanczos"))
    torch.testing.assert_close(lanczos.eigenvalues, dense.eigenvalues[:8])
    assert lanczos.variance == pytest.approx(dense.variance)
    ratio = dense.results["participation"].value
    assert lanczos.results["participation"].value == pytest.approx(ratio)
    assert lanczos.results["participation"].null.mean() == pytest.approx(ratio, rel=0.1)
    assert math.isnan(lanczos.results["entropy_rank"].value)
    assert math.isnan(lanczos.results["q99"].value)
    overlap = (lanczos.basis.components @ dense.basis.components.T).abs()
    torch.testing.assert_close(overlap, torch.eye(8), atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_codes_that_vary_together_fill_few_dimensions_and_independent_ones_as_many_as_chance(seed):
    drivers = sparse(2000, 5, seed, 0.3)
    together = torch.cat([drivers * (1 + 0.1 * scale) for scale in range(8)], 1)
    found = pca_spectrum(csr(together), q=10)
    assert found.results["q99"].value == 5
    assert 4.5 < found.results["participation"].value <= 5  # 4.97 to 5.00; permuted 33.4 to 33.8
    for result in found.results.values():
        assert result.null.min() > 30
        assert result.p == pytest.approx(1 / 6)
    alone = pca_spectrum(csr(sparse(2000, 40, seed + 10)), q=10)
    value, null = alone.results["participation"].value, alone.results["participation"].null
    assert value == pytest.approx(float(null.mean()), rel=0.02)  # within 0.4% in five seeds


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 100))
def test_scale_and_order_of_tokens_and_latents_do_not_matter(seed, scale):
    dense = sparse(50, 9, seed).double() + torch.eye(50, 9).double()
    g = generator(seed)
    other = scale * dense[torch.randperm(50, generator=g)][:, torch.randperm(9, generator=g)]
    one, two = (pca_spectrum(csr(rows), n_null=0, n_bases=0) for rows in (dense, other))
    torch.testing.assert_close(one.eigenvalues * scale**2, two.eigenvalues, atol=1e-9 * scale**2, rtol=1e-6)
    for name in ("participation", "entropy_rank", "q99"):
        assert one.results[name].value == pytest.approx(two.results[name].value)


def test_shuffled_codes_keep_what_each_latent_is_and_lose_what_goes_together():
    dense = sparse(400, 6, 0).repeat(1, 2)
    shuffled = shuffled_codes(csr(dense), seed=1)
    again = shuffled.to_dense()
    torch.testing.assert_close(again.sort(0).values, dense.sort(0).values)
    before, after = (torch.corrcoef(rows.T)[0, 6] for rows in (dense, again))
    assert before > 0.999
    assert after.abs() < 0.2
    assert torch.equal(shuffled.to_dense(), shuffled_codes(csr(dense), seed=1).to_dense())


def test_dead_latents_and_zero_slots_are_no_dimensions():
    values = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]])
    indices = torch.tensor([[4, 1], [4, 2], [4, 7]], dtype=torch.int32)
    found = pca_spectrum(sk.SparseCodes(values, indices, 9), n_null=1)
    assert len(found.eigenvalues) == 2
    assert found.basis.components[:, [0, 1, 2, 3, 5, 6, 8]].any() == 0
    assert found.basis.mean[4] == 2


def test_a_spectrum_is_shown():
    found = pca_spectrum(csr(sparse(60, 8, 0)), n_null=2)
    assert len(found.to_frame()) == 3
    assert "components" in found.plot().get_xlabel()


# Curves


def test_all_components_give_the_reconstruction_and_none_the_mean():
    sae = tied(6, 20, 3, 0)
    x = torch.randn(500, 6, generator=generator(1))
    with torch.no_grad():
        codes = sae.encode(x)
        found = pca_spectrum(codes, q=20)
        whole = Projected(sae, found.basis)
        torch.testing.assert_close(whole(x), sae(x), atol=1e-4, rtol=0)
        torch.testing.assert_close(Projected(sae, found.basis, 0)(x), sae(x).mean(0).expand(500, 6), atol=1e-4, rtol=0)
        torch.testing.assert_close(whole(x.view(5, 100, 6)), sae(x).view(5, 100, 6), atol=1e-4, rtol=0)
        z = codes.to_dense().double()
        top = found.basis.components[:4].double()
        around = (z - z.mean(0)) @ top.T @ top + z.mean(0)
        expected = around @ sae.W_dec.double() + sae.b_dec
        torch.testing.assert_close(Projected(sae, found.basis, 4)(x).double(), expected, atol=1e-4, rtol=0)
    curve = fvu_curve(found, sae, x, [0, 4, 20])
    error = (x - expected).square().sum() / (x - x.mean(0)).square().sum()
    assert float(curve.values[1]) == pytest.approx(float(error), rel=1e-4)
    assert float(curve.values[2]) == pytest.approx(curve.full, rel=1e-4)
    assert fvu_curve(found, sae, x).qs == [1, 2, 4, 8, 16, 20]


def test_the_reconstruction_needs_no_more_than_its_own_dimensions():
    sae = tied(6, 40, 4, 0)
    x = torch.randn(800, 6, generator=generator(1))
    with torch.no_grad():
        found = pca_spectrum(sae.encode(x), q=40, n_null=3, n_bases=2)
    curve = fvu_curve(found, sae, x, [3, 6])
    free = curve.results["6"].controls["principal components of the reconstruction"]
    assert float(free[0]) == pytest.approx(curve.full, rel=1e-4)
    assert len(curve.results["6"].null) == 2
    assert len(curve.to_frame()) == 4
    assert "FVU" in curve.plot().get_ylabel()


def trained(activation, x, seed, steps=100):
    g = generator(seed)
    sae = sk.SAE(64, 256, activation, generator=g)
    trainer = sk.Trainer(sae, lr=1e-2, steps=steps)
    for _ in range(steps):
        trainer.step(x[torch.randint(len(x), (256,), generator=g)])
    return sae.eval()


def test_a_dense_sae_lives_in_fewer_dimensions_than_a_sparse_one():
    """Five seeds: 99% in 149 to 153 components, 0.63 of chance, against 216 to 218, 0.99 of it."""
    x = ZipfFeatures(512, 64, 8, generator=generator(0)).sample(6000, generator(100))[1]
    found = {}
    for name, activation in (("topk", sk.TopK(8)), ("dense", sk.ReLU(0.001))):
        sae = trained(activation, x[:4000], 0)
        with torch.no_grad():
            spectrum = pca_spectrum(sae.encode(x[4000:]), q=64, n_null=2)
        found[name] = spectrum.results, fvu_curve(spectrum, sae, x[4000:], [64])
    assert found["dense"][0]["q99"].value < 0.8 * found["topk"][0]["q99"].value
    assert found["dense"][0]["q99"].value < 0.7 * float(found["dense"][0]["q99"].null.min())
    assert found["topk"][0]["q99"].value > 0.95 * float(found["topk"][0]["q99"].null.min())
    dense, topk = found["dense"][1], found["topk"][1]
    assert float(dense.values[0]) - dense.full < 0.02
    assert float(topk.values[0]) - topk.full > 0.05


def test_the_cross_entropy_falls_to_that_of_all_of_the_codes():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ArceeConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    model = transformers.ArceeForCausalLM(config).eval()
    tokens = torch.randint(40, (4, 12), generator=generator(0))
    outputs = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *args: outputs.append(args[2].detach()))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    x = outputs[0].flatten(0, 1)
    sae = tied(16, 24, 4, 0)
    with torch.no_grad():
        found = pca_spectrum(sae.encode(x), q=24, n_null=1)
    seen = []
    most = len(found.basis.components)  # of 24 latents some are never active
    curve = ce_curve(
        found, sae, model, "model.layers.0.mlp", [tokens], [0, most], progress=lambda *done: seen.append(done)
    )
    assert curve.values[1].item() == pytest.approx(curve.full, abs=1e-4)
    assert abs(curve.values[0].item() - curve.full) > 1e-4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(curve.results["0"].controls) == {"model as it is", "mean ablation"}


# Errors

SAE = tied(4, 8, 2, 0)
FOUND = pca_spectrum(csr(sparse(30, 8, 0)), q=4, n_null=0, n_bases=0)
X = torch.randn(5, 4, generator=generator())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pca_spectrum(csr(torch.ones(1, 3))), "at least two tokens, got 1"),
        (lambda: pca_spectrum(csr(torch.zeros(4, 3))), "must have an active latent"),
        (lambda: pca_spectrum(csr(torch.ones(4, 3))), "must vary"),
        (lambda: pca_spectrum(csr(torch.full((4, 3), torch.nan))), "codes must be finite"),
        (lambda: pca_spectrum(csr(torch.eye(4)), 0), "q must be at least 1, got 0"),
        (lambda: pca_spectrum(csr(torch.eye(4)), method="svd"), "method must be one of auto, dense, lanczos"),
        (lambda: pca_spectrum(csr(torch.eye(4)), n_null=0), "n_bases must be in 0 … n_null = 0, got 1"),
        (lambda: fvu_curve(FOUND, SAE, X, [5]), r"qs must be in 0 … 4, the components of the spectrum, got \[5\]"),
        (lambda: fvu_curve(FOUND, SAE, X[:, :3]), r"x must be \[n, 4\]"),
        (lambda: fvu_curve(FOUND, SAE, X * torch.nan), "x must be finite"),
        (lambda: fvu_curve(FOUND, SAE, torch.ones(5, 4)), "x must vary"),
        (lambda: fvu_curve(FOUND, sk.Transcoder(4, 8, sk.TopK(2), d_out=6), X), "sae must"),
        (lambda: Projected(SAE, FOUND.basis, 5), "q must be in 0 … 4"),
        (lambda: Projected(tied(4, 9, 2, 0), FOUND.basis), "basis must be of 9 latents, got 8"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
