"""The SAEs that studies share are trained once, and only by the same options."""

import dataclasses

import pytest
import torch

from sparsekern.analysis.studies import saes
from sparsekern.analysis.studies.options import SAEsOptions


def test_saes_are_trained_once_and_measured_on_held_out_tokens(store, tmp_path, monkeypatch):
    options = SAEsOptions(quick=True, device="cpu").resolved(store.d, tmp_path / "out")
    trained = saes.train_saes(store, options, progress=False)
    assert trained.widths == [32, 64, 128]
    first, second = trained.by_width[64]
    assert (first.seed, second.seed) == (0, 1)
    assert not torch.equal(first.sae.W_dec, second.sae.W_dec)
    x = trained.held_out.x
    assert torch.equal(first.density, (first.codes.to_dense() > 0).double().mean(0).float())
    assert torch.equal(first.alive, first.density > 0)
    rest = (x - first.sae(x).detach()).square().sum() / (x - x.mean(0)).square().sum()
    assert first.fvu == pytest.approx(float(rest), rel=1e-4)
    header, rows = trained.table()
    assert [row[0] for row in rows] == ["32", "64", "128"]
    assert len(header) == len(rows[0])

    monkeypatch.setattr(saes.sk, "train", lambda *_, **__: pytest.fail("trained again"))
    again = saes.train_saes(store, options, progress=False)
    assert torch.equal(again.by_width[64][0].sae.W_dec, first.sae.W_dec)
    with pytest.raises(ValueError, match=r"a folder of SAEs of these options; those in .* have steps 20"):
        saes.train_saes(store, dataclasses.replace(options, steps=10), progress=False)


def test_words_are_those_of_the_strongest_tokens(store, tmp_path):
    options = SAEsOptions(quick=True, device="cpu", seeds=2).resolved(store.d, tmp_path / "out")
    trained = saes.train_saes(store, options, progress=False)
    one = trained.by_width[128][0]
    latent = int(one.density.argmax())
    dense = one.codes.to_dense()[:, latent]
    strongest = dense.argsort(descending=True, stable=True)[:8]
    ids = trained.held_out.tokens[strongest].tolist()
    most = max(set(ids), key=ids.count)
    assert f"`word{most}` ×{ids.count(most)}" in one.words(store, trained.held_out, latent)
    silent = (one.density == 0).nonzero()
    if len(silent):
        assert one.words(store, trained.held_out, int(silent[0])) == "–"
