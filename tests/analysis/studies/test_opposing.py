"""The study of opposing directions writes what it promises, of any store."""

import json
import re

import pytest
import torch

import sparsekern as sk
from sparsekern.analysis.studies.opposing import _look, study
from sparsekern.analysis.studies.options import OpposingOptions
from sparsekern.analysis.studies.saes import train_one
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore, StoreWriter


def write_store(path, vocab, ids):
    """Contexts of 24 tokens; token t is direction t, noise, and some of a direction that all have."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(50, 16, generator=generator), dim=1)
    kinds = torch.randint(0, 50, (2400,), generator=generator)
    x = directions[kinds] + 0.05 * torch.randn(2400, 16, generator=generator)
    x[:, 0] += torch.randn(2400, generator=generator)
    writer = StoreWriter(path, dtype="float32", d=16, source={"model": "made", "hook": "up"}, vocab=vocab)
    writer.add(x, kinds.int() if ids else torch.full((2400,), -1).int(), [24] * 100)
    writer.finish()
    return ActivationStore(path)


@pytest.fixture
def store(tmp_path):
    return write_store(tmp_path / "acts", [f"word{i}" if i else "a|`b`" for i in range(50)], True)


def check(written, out):
    page = written[0].read_text()
    assert written[0].name == "page.md"
    assert written[-1].name == "results.json"
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written[1:-1]} == set(shown)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert "{" not in page
    assert "nan" not in re.findall(r"\w+", page.lower())
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.replace("\\|", "").count("|") for line in block.splitlines()}) == 1, block
    return page, json.loads(written[-1].read_text(), parse_constant=pytest.fail), set(shown)


def test_a_quick_study_writes_a_page_pictures_and_numbers(store, tmp_path):
    out = tmp_path / "out"
    options = OpposingOptions(quick=True, device="cpu", held_out=0.4)
    page, record, shown = check(study(store, options, out, progress=False), out)
    assert shown == {"scores.png", "cosines.png", "axis.png", "signed.png", "direction.png", "cloud.png"}
    assert page.count("\n## ") == 7
    assert "`word" in page
    assert set(record["saes"]) == {"32", "64", "128"}
    assert [len(group) for group in record["saes"].values()] == [2, 2, 2]
    one = record["saes"]["64"][1]
    assert {entry["against"] for entry in one["dense"]} == {"as many random latents"}
    of_first = record["saes"]["64"][0]["dense"]
    assert {entry["against"] for entry in of_first} == {"as many random latents", "signs flipped"}
    assert max(pair["score"] for pair in one["strongest"]) <= one["largest_score"]
    assert len(record["signed"]) == 1
    signed = sk.SAE.from_pretrained(out / "saes" / "64-abstopk-seed0" / "sae")
    assert isinstance(signed.activation, sk.AbsTopK)
    assert set(record["toy_direction"]) == {"TopK", "AbsTopK"}
    again = train_one(store, options.resolved(16, out), 64, 0, HeldOut.of(store, 0.4, 0, 300), sk.AbsTopK(4), False)
    assert torch.equal(again.sae.W_dec, signed.W_dec)
    assert again.codes.tokens == 300
    assert (again.codes.values < 0).any()
    # negative values are activity too
    torch.testing.assert_close(again.density, (again.codes.to_dense() != 0).float().mean(0))


def test_activations_without_tokens_can_be_studied(tmp_path):
    out = tmp_path / "out"
    store = write_store(tmp_path / "acts", None, False)
    page, _, shown = check(study(store, OpposingOptions(quick=True, device="cpu"), out, progress=False), out)
    assert "tokens of the first" not in page
    assert "axis.png" in shown


@pytest.mark.parametrize("width", [1, 2, 3])
def test_few_latents_are_looked_at_as_they_are(store, tmp_path, width):
    options = OpposingOptions(k=1, steps=2, batch_size=64, n_null=1, device="cpu").resolved(16, tmp_path)
    held_out = HeldOut.of(store, 0.05, 0, 100)
    one = train_one(store, options, width, 0, held_out, progress=False)
    looked = _look(one, held_out.x, options, nulls=True)
    assert (looked.use is None) == (width < 3 or looked.largest == 0)
    assert len(looked.densest) <= width
    assert looked.numbers["fvu"] == one.fvu


def test_saes_of_other_options_are_refused(store, tmp_path):
    options = OpposingOptions(quick=True, device="cpu", saes=tmp_path / "saes")
    held_out = HeldOut.of(store, 0.05, 0, 100)
    train_one(store, options.resolved(16, tmp_path), 32, 0, held_out, progress=False)
    other = OpposingOptions(quick=True, k=3, device="cpu", saes=tmp_path / "saes")
    with pytest.raises(ValueError, match="a folder of SAEs of these options"):
        study(store, other, tmp_path / "out", progress=False)
