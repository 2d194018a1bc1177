"""The study of canonical features writes what it promises, and its own measures are what it says."""

import json
import re

import pytest
import torch
from sklearn.metrics import roc_auc_score

from sparsekern.analysis.studies.canonical import _frequent_are_shared, study
from sparsekern.analysis.studies.options import CanonicalOptions
from sparsekern.data import StoreWriter


def test_a_quick_study_writes_a_page_pictures_and_numbers(store, tmp_path):
    options = CanonicalOptions(quick=True, device="cpu", method="hungarian")
    written = study(store, options, tmp_path / "out", progress=False)
    page = written[0].read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written} == {"page.md", "results.json", *shown}
    assert {"cosines.png", "frequency.png"} <= set(shown)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert "{" not in page
    assert "`word" in page
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert set(record["matchings"]) == {"32", "64", "128"}
    assert [len(pairs) for pairs in record["matchings"].values()] == [1, 1, 1]
    nulls = {entry["against"] for entry in record["matchings"]["32"][0]["shared"]}
    assert nulls == {"random dictionary", "coordinates permuted"}
    assert {path.name for path in (tmp_path / "out" / "saes").iterdir()} == {
        "saes.json",
        *(f"{width}-seed{seed}" for width in (32, 64, 128) for seed in (0, 1)),
    }


def test_frequent_latents_are_shared_by_the_area_under_the_curve():
    generator = torch.Generator().manual_seed(0)
    density = torch.randint(1, 20, (200,), generator=generator) / 100
    shared = torch.rand(200, generator=generator) < density * 5
    result = _frequent_are_shared(density, shared, 200, CanonicalOptions(n_null=50))
    assert result.value == pytest.approx(roc_auc_score(shared, density))
    assert result.value > float(result.null.max())
    assert result.null.mean() == pytest.approx(0.5, abs=0.03)
    alone = _frequent_are_shared(density, torch.zeros(200, dtype=torch.bool), 200, CanonicalOptions())
    assert alone.value != alone.value


def test_other_activations_of_the_same_tokens_can_be_compared(store, tmp_path):
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    lengths = store.context_bounds.diff().tolist()
    for name, ids in (("turned", store.token_ids), ("strange", store.token_ids.flip(0))):
        writer = StoreWriter(tmp_path / name, dtype="float32", d=16, source={"model": name})
        writer.add(store.rows(0, store.tokens) @ rotation, ids.int(), lengths)
        writer.finish()
    options = CanonicalOptions(quick=True, device="cpu", other=tmp_path / "turned")
    written = study(store, options, tmp_path / "out", progress=False)
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    first, back = record["other"]["transfer"]
    for transfer in (first, back):
        beside = {entry["against"]: entry["mean"] for entry in transfer["rotated"]}
        turned, raw = transfer["rotated"][0]["value"], transfer["raw"][0]["value"]
        assert turned == pytest.approx(beside["own activations"], abs=1e-3)  # turned back, they are the same
        assert abs(raw - beside["own activations"]) > 0.02
    with pytest.raises(ValueError, match="other must hold the same tokens in the same order"):
        study(store, CanonicalOptions(quick=True, other=tmp_path / "strange"), tmp_path / "out", progress=False)
