"""The study of completeness writes what it promises, and says what its numbers say."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from sparsekern.analysis.completeness import feature_recovery_curve
from sparsekern.analysis.studies import completeness_found
from sparsekern.analysis.studies.completeness import study
from sparsekern.analysis.studies.options import CompletenessOptions
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore, StoreWriter

PICTURES = {"stitching.png", "meta.png", "atomicity.png", "recovery.png", "totals.png"}


def test_a_quick_study_writes_a_page_pictures_and_numbers(store, tmp_path):
    written = study(store, CompletenessOptions(quick=True, device="cpu"), tmp_path / "out", progress=False)
    page = written[0].read_text()
    shown = set(re.findall(r"!\[.*\]\((.*)\)", page))
    assert shown == PICTURES
    assert {path.name for path in written} == {"page.md", "results.json", *shown}
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert "{" not in page
    assert not re.search(r"\bnan\b", page)
    assert [title for title in re.findall("^## (.*)", page, re.M) if "?" in title] == [
        "Does a wider SAE know what a narrower one lacks?",
        "Do like latents do each other's work?",
        "Are the wide SAE's latents sums of fewer directions?",
        "Which latents are composite, which atomic?",
        "What is found, and how frequent must it be?",
        "How many features are there?",
    ]
    record = json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert set(record["stitching"]) == {"32 → 64", "64 → 128"}
    assert [len(pairs) for pairs in record["atomicity"].values()] == [2, 2]
    assert len(record["meta"]) == 2
    assert set(record["found"]) == {"32", "64", "128"}
    for at in ("0.5", "0.9"):
        assert record["totals"][f"latents, by weights, 64, {at}"]["observed"] > 0
    controls = [entry for entry in record["stitching"]["32 → 64"][0]["max_cos"] if entry["kind"] == "control"]
    assert [entry["against"] for entry in controls] == ["the wider SAE of the same seed"]


def test_one_width_has_nothing_to_be_compared_with(store, tmp_path):
    with pytest.raises(ValueError, match="latents must name two widths at least"):
        study(store, CompletenessOptions(latents=[32], device="cpu"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_activations_without_tokens_can_be_studied(tmp_path):
    x = torch.randn(900, 16, generator=torch.Generator().manual_seed(0))
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"kind": "import"})
    writer.add(x, torch.full((900,), -1), [10] * 90)
    writer.finish()
    options = CompletenessOptions(quick=True, device="cpu")
    written = study(ActivationStore(tmp_path / "acts"), options, tmp_path / "out", progress=False)
    page = written[0].read_text()
    assert "What is found" not in page
    assert "How many features" in page
    assert {path.name for path in written if path.suffix == ".png"} == PICTURES - {"recovery.png"}
    json.loads(written[-1].read_text(), parse_constant=pytest.fail)


def test_concepts_are_tokens_that_can_be_expected_in_the_sample():
    """Token 7 fills one held-out context and is rare in the store; token 3 is in the sample too seldom."""
    held_out = torch.tensor([1] * 60 + [7] * 20 + [2] * 17 + [3] * 2 + [-1])
    everywhere = torch.cat([held_out, torch.tensor([1] * 500 + [2] * 250 + [3] * 130 + [9] * 20)])
    store = SimpleNamespace(token_ids=everywhere.int(), tokens=len(everywhere))
    zero = torch.zeros(len(held_out))
    trained = SimpleNamespace(held_out=HeldOut(zero[:, None], zero, held_out, zero, zero))
    concepts = completeness_found.concepts_of(store, trained, CompletenessOptions(least=5))
    assert concepts.ids.tolist() == [1, 2]
    assert concepts.frequency.tolist() == pytest.approx([560 / 1000, 267 / 1000])
    assert torch.equal(concepts.classes, torch.tensor([0] * 60 + [-1] * 20 + [1] * 17 + [-1] * 3))
    assert completeness_found.concepts_of(store, trained, CompletenessOptions(least=50)) is None


def test_the_page_says_whether_wider_saes_find_rarer_tokens():
    frequency = torch.logspace(-4, -1, 60)

    def curves(*halves):
        return {
            10 * place: [feature_recovery_curve(frequency > half, frequency, n_null=2, n_bootstrap=5)]
            for place, half in enumerate(halves, start=1)
        }

    said = completeness_found._rarer(curves(1e-2, 1e-3))
    assert said.startswith("**The wider the SAE, the rarer the tokens")
    assert "1% (10 latents) → 0.098% (20 latents)" in said
    assert "the more frequent a token must be" in completeness_found._rarer(curves(1e-3, 1e-2))
    assert "the same way" in completeness_found._rarer(curves(1e-3, 1e-3))
    assert "Too few" in completeness_found._rarer(curves(1e-3, 1.0))
    assert completeness_found._within(1e-6, frequency) == "below 0.01%"
    assert completeness_found._within(2.0, frequency) == "above 10%"
