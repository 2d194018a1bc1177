"""Strongest contexts of latents, against a full scan."""

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis.latents import describe_latents, one_line, spread_by_density, top_contexts
from sparsekern.analysis.runs import write_report
from sparsekern.data import ActivationStore, StoreWriter


@pytest.fixture
def store(tmp_path):
    lengths = [5, 9, 1, 7, 8] * 20
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30, (sum(lengths),), generator=generator).int()
    x = torch.randn(30, 8, generator=generator)[ids] + 0.1 * torch.randn(len(ids), 8, generator=generator)
    writer = StoreWriter(
        tmp_path / "acts", dtype="float32", d=8, source={"model": "made"}, vocab=[f"w{i}" for i in range(30)]
    )
    writer.add(x, ids, lengths)
    writer.finish()
    return ActivationStore(tmp_path / "acts")


@pytest.mark.parametrize("pre_bias", [True, False])
def test_equals_a_full_scan(store, pre_bias):
    sae = sk.SAE(8, 40, sk.TopK(4), pre_bias=pre_bias, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_dec.normal_()
        sae.b_enc.normal_(std=0.3)
    dense = sae.encode(store.rows(0, store.tokens)).to_dense().detach()
    context = torch.repeat_interleave(torch.arange(store.n_contexts), store.context_bounds.diff())
    latents = (dense > 0).any(0).nonzero().squeeze(1)
    found = top_contexts(sae, store, latents, count=3, candidates=store.tokens)
    for latent in latents.tolist():
        best = torch.stack([dense[context == c, latent].max() for c in range(store.n_contexts)])
        wanted = best.sort(descending=True).values
        wanted = wanted[wanted > 0][:3]
        torch.testing.assert_close(torch.tensor([a.value for a in found[latent]]), wanted)
        for a in found[latent]:
            assert context[a.row] == a.context
            assert a.position == a.row - int(store.context_bounds[a.context])
            assert dense[a.row, latent] == pytest.approx(a.value)


def test_the_sample_is_spread_over_the_ranks():
    density = torch.zeros(100)
    density[10:60] = torch.linspace(0.5, 0.01, 50)
    chosen = spread_by_density(density, 5)
    assert chosen.tolist() == [15, 25, 35, 45, 55]
    assert spread_by_density(density, 1000).tolist() == list(range(10, 60))
    assert spread_by_density(torch.zeros(9), 3).tolist() == []
    assert spread_by_density(density, 1000, least=0.3).tolist() == list(range(10, 31))


def test_the_page_marks_the_active_token(store):
    sae = sk.SAE(8, 40, sk.TopK(4), generator=torch.Generator().manual_seed(1))
    density = sk.evaluate(sae, [store.rows(0, store.tokens)]).density
    page = describe_latents(sae, store, density, count=4, contexts=2)
    assert page.count("## Latent") == 4
    assert 4 <= page.count("**⟦w") <= 8


def test_markup_in_texts_is_shown_not_obeyed():
    assert one_line("a * b `c` x_y\n<t> ⟦tok⟧en") == r"a * b \`c\` x\_y \<t> **⟦tok⟧**en"


def test_a_report_needs_a_finished_run(store, tmp_path):
    with pytest.raises(ValueError, match="has not finished; resume it first"):
        write_report(tmp_path, store)
