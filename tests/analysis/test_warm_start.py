"""Copied latents respond as before; and what two seeds have in common saves tokens."""

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis.toy import ZipfFeatures
from sparsekern.analysis.warm_start import CanonicalRows, seeds, warm_start, warm_start_saving


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def trained_like(seed=0, d=8, latents=20, activation=None, **options):
    """An SAE whose every weight is some number."""
    g = generator(seed)
    sae = sk.SAE(d, latents, activation or sk.TopK(3), generator=g, **options).eval()
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=g))
    return sae


def pre_activations(sae, x):
    seen = x - sae.b_dec if sae.pre_bias else x
    return (seen @ sae.W_enc.T + sae.b_enc).detach()


# Copies


@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("other_pre_bias", [True, False])
def test_copied_latents_respond_as_before_and_the_rest_stays(pre_bias, other_pre_bias):
    source, sae = trained_like(0, pre_bias=pre_bias), trained_like(1, pre_bias=other_pre_bias)
    before = {name: weight.clone() for name, weight in sae.named_parameters()}
    sae.tokens_since_fired.fill_(7)
    mask = torch.rand(20, generator=generator(2)) < 0.4
    known = CanonicalRows.of(source, mask)
    into = torch.randperm(20, generator=generator(3))
    places = warm_start(sae, known, into=into)
    assert len(known) == len(places) == int(mask.sum())
    assert torch.equal(places, into[: len(known)])
    x = torch.randn(30, 8, generator=generator(4))
    torch.testing.assert_close(pre_activations(sae, x)[:, places], pre_activations(source, x)[:, mask])
    assert torch.equal(sae.W_dec[places], source.W_dec[mask])
    rest = torch.ones(20, dtype=torch.bool).index_fill_(0, places, False)
    for name, weight in sae.named_parameters():
        assert torch.equal(
            weight[rest] if len(weight) == 20 else weight, before[name][rest if len(weight) == 20 else ...]
        )
    assert (sae.tokens_since_fired == torch.where(rest, 7, 0)).all()


def test_a_share_is_copied_at_random():
    source = trained_like(latents=40)
    known = CanonicalRows.of(source, torch.arange(40))
    copies = []
    for seed in (1, 1, 2):
        sae = trained_like(3, latents=40)
        places = warm_start(sae, known, share=0.25, generator=generator(seed))
        assert places.tolist() == list(range(10))
        copies.append(sae.W_dec.detach()[:10])
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])
    same = (copies[0][:, None] == source.W_dec[None]).all(2)
    assert same.sum() == 10
    sae = trained_like(3, latents=40)
    assert len(warm_start(sae, known, share=0.0)) == 0
    assert torch.equal(sae.W_enc, trained_like(3, latents=40).W_enc)


def test_thresholds_are_copied():
    source, sae = (trained_like(seed, activation=sk.JumpReLU()) for seed in (0, 1))
    source.activation.length.fill_(3.0)
    with torch.no_grad():
        source.activation.relative_threshold.uniform_(0.05, 0.2)
    warm_start(sae, CanonicalRows.of(source, torch.tensor([4, 2])))
    torch.testing.assert_close(sae.activation.threshold[:2], source.activation.threshold[[4, 2]])
    x = torch.randn(30, 8, generator=generator(4))
    torch.testing.assert_close(sae.encode(x).to_dense()[:, :2], source.encode(x).to_dense()[:, [4, 2]])


def test_rows_are_a_copy_and_permuting_keeps_their_angles():
    source = trained_like()
    known = CanonicalRows.of(source, torch.arange(20))
    turned = known.permuted(generator(1))
    with torch.no_grad():
        source.W_dec.zero_()
    assert known.decoder.abs().min() > 0
    torch.testing.assert_close(turned.decoder @ turned.decoder.T, known.decoder @ known.decoder.T)
    torch.testing.assert_close(turned.encoder @ turned.decoder.T, known.encoder @ known.decoder.T)
    assert torch.equal(turned.bias, known.bias)
    assert not torch.equal(turned.decoder, known.decoder)


def test_the_trainer_leaves_a_fitted_and_copied_start_alone():
    toy = ZipfFeatures(32, 16, 2, generator=generator())
    x = toy.sample(256, generator(1))[1]
    sae = sk.SAE(16, 32, sk.TopK(2), generator=generator(2))
    sae.fit_start_(x)
    warm_start(sae, CanonicalRows.of(trained_like(3, d=16), torch.arange(5)))
    copied = sae.W_dec[:5].clone()
    sk.Trainer(sae, lr=1e-6, steps=1, warmup_steps=0).step(x)
    torch.testing.assert_close(sae.W_enc[:5], trained_like(3, d=16).W_enc[:5], atol=1e-5, rtol=0)
    torch.testing.assert_close(sae.W_dec[:5], torch.nn.functional.normalize(copied, dim=1), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda sae, known: warm_start(sae, known, share=1.5), "share must be in 0 … 1, got 1.5"),
        (
            lambda sae, known: warm_start(trained_like(d=9), known),
            r"canonical must have encoder and decoder .*\(9, 9\)",
        ),
        (lambda sae, known: warm_start(trained_like(latents=5), known), "canonical must have at most as many latents"),
        (lambda sae, known: warm_start(sae, known, into=torch.tensor([1, 1])), "into must name latents in"),
        (lambda sae, known: warm_start(sae, known, into=torch.tensor([20])), "into must name latents in"),
        (lambda sae, known: warm_start(sae, known, into=torch.tensor([2])), "as are overwritten, 1, got 6"),
        (
            lambda sae, known: warm_start(trained_like(activation=sk.JumpReLU()), known),
            "canonical must have thresholds",
        ),
        (lambda sae, known: warm_start(trained_like(tied=True), known), "sae must have an encoder and a decoder row"),
        (lambda sae, known: CanonicalRows.of(sae, torch.ones(3).bool()), r"latents must be indices, or a mask \[20\]"),
        (lambda sae, known: CanonicalRows.of(sk.GatedSAE(4, 8), torch.arange(2)), "without weights other than thresh"),
        (lambda sae, known: warm_start_saving(steps=100, early=15), "early and steps must be multiples of every=10"),
        (lambda sae, known: warm_start_saving(steps=100), "early and steps must be multiples of every=10"),
        (lambda sae, known: warm_start_saving(steps=1, early=1, every=1), "the two SAEs must share latents"),
    ],
)
def test_bad_starts_are_refused(call, message):
    sae = trained_like()
    with pytest.raises(ValueError, match=message):
        call(sae, CanonicalRows.of(trained_like(1), torch.arange(6)))


# Experiments

SMALL = {"toy": ZipfFeatures(24, 16, 2, generator=generator()), "k": 2, "batch_size": 128, "lr": 1e-2}


def test_two_seeds_share_what_is_true():
    """Five seeds: recovered 0.69 to 0.85 (random 0.00), shared 0.42 to 0.67 (0.04), decoder 0.67 to 0.75 (0.12)."""
    pair = seeds(0, width=24, steps=150, n_null=3, **SMALL)
    assert pair.results["recovered"].value == pytest.approx(float(pair.recovered.mean()))
    assert pair.results["recovered"].value > 0.6 > 0.1 > float(pair.results["recovered"].null.max())
    assert pair.results["decoder_shared"].value > 0.55
    assert pair.results["shared"].value > 0.3
    assert float(pair.results["shared"].null.max()) < 0.1
    assert float(pair.results["decoder_shared"].null.max()) < 0.2
    assert not torch.equal(pair.saes[0].W_dec, pair.saes[1].W_dec)
    assert (pair.fvu < 0.5).all()
    again = seeds(0, width=24, steps=150, n_null=0, **SMALL)
    assert torch.equal(again.saes[1].W_dec, pair.saes[1].W_dec)


def test_a_warm_start_leads_and_its_lead_shrinks():
    """Five seeds: early 0.77 to 0.86 (half 0.71 to 0.79, cold 0.66 to 0.70, permuted 0.62 to 0.68); at the end 0.88 to
    0.92 (cold 0.87 to 0.92): in one of the five the cold start is ahead by then, and nothing is saved.
    """
    found = warm_start_saving(3, width=24, steps=150, early=30, n_null=1, **SMALL)
    early, late, saving = (found.results[name] for name in ("early", "late", "saving"))
    assert found.tokens.tolist() == [1280 * step for step in range(1, 16)]
    assert {name: len(curve) for name, curve in found.fvu.items()} == dict.fromkeys(
        ("cold", "half", "full", "permuted 0"), 15
    )
    assert early.value == pytest.approx(1 - float(found.fvu["full"][2]))
    assert late.value == pytest.approx(1 - float(found.fvu["full"][-1]))
    assert early.value > float(early.controls["half of the latents"]) > float(early.controls["cold"])
    lead, last = (result.value - float(result.controls["cold"]) for result in (early, late))
    assert lead > 0.06 > last  # 0.09 to 0.17, then −0.01 to 0.02
    assert early.value - float(early.null) > 0.06  # 0.11 to 0.22
    assert float(saving.controls["cold"]) == 0
    assert saving.value > 0.1  # 0.27; five seeds 0 to 0.34
    goal = float(found.fvu["cold"][-1])
    reached = (found.fvu["full"] <= goal).nonzero()[0, 0]
    assert saving.value == pytest.approx(1 - float(found.tokens[reached] / found.tokens[-1]))


def test_the_saving_is_drawn():
    pytest.importorskip("matplotlib")
    found = warm_start_saving(0, width=24, steps=40, early=20, n_null=2, **SMALL)
    labels = [text.get_text() for text in found.plot().get_legend().get_texts()]
    assert labels == ["cold", "half", "full", "coordinates permuted"]


@pytest.mark.slow
def test_wider_saes_recover_more_and_share_less():
    """Five seeds after 500 steps: 64 latents share 0.55 to 0.63 and recover 0.14 to 0.16; 1,024 share 0.47 to 0.50 and
    recover 0.80 to 0.81.
    """
    narrow, wide = (seeds(0, width=width, n_null=1) for width in (64, 1024))
    assert narrow.results["shared"].value - wide.results["shared"].value > 0.04
    assert narrow.results["recovered"].value < 0.25 < 0.7 < wide.results["recovered"].value
    assert int(wide.matching.alive1.sum()) < 512  # the others are dead: 357 to 418 are not
    assert float(wide.results["cosine"].null.max()) < 0.4 < 0.6 < wide.results["cosine"].value
