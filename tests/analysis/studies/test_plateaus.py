"""The study of plateaus writes what it promises, of a causal model and of one that is not."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sparsekern.analysis.models import language
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.studies.options import PlateausOptions
from sparsekern.analysis.studies.plateaus import _Claim, _contexts, _Outcome, study
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import harvest, import_activations

TEXTS = [f"Return item number {i} of the list" + (", or the last word of it." if i % 2 else ".") for i in range(24)]
OPTIONS = PlateausOptions(quick=True, device="cpu", held_out=0.5, context_length=10, moved=3)


def store_of(kind, tmp_path):
    """Of a tiny untrained model."""
    import transformers

    tokenizer = language.train_tokenizer(TEXTS)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "causal":
        model = transformers.ArceeForCausalLM(
            transformers.ArceeConfig(**shape, num_key_value_heads=2, hidden_act="relu")
        )
    else:
        model = transformers.BertModel(transformers.BertConfig(**shape))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hook = "layers.1" if kind == "causal" else "encoder.layer.1"
    return harvest(tmp_path / "store", model=str(folder), texts=TEXTS, hook=hook)


@pytest.mark.parametrize("kind", ["causal", "other"])
def test_a_quick_study_writes_a_page_pictures_and_numbers(kind, tmp_path):
    out, causal = tmp_path / "out", kind == "causal"
    options = OPTIONS if causal else dataclasses.replace(OPTIONS, lower=0)
    written = study(store_of(kind, tmp_path), options, out, progress=False)
    page, record = written[0].read_text(), json.loads(written[-1].read_text(), parse_constant=pytest.fail)
    assert [written[0].name, written[-1].name] == ["page.md", "results.json"]
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written[1:-1]} == set(shown)
    assert all((out / file).read_bytes().startswith(b"\x89PNG") for file in shown)
    assert "{" not in page
    assert "nan" not in re.findall(r"\w+", page.lower())
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    measures = ["kl", "distance"] if causal else ["distance"]
    assert ("KL(p" in page) == causal
    assert ("no KL divergence" in page) == (not causal)
    assert list(record["expected"]) == measures
    assert len(record["curves"]) == 2
    assert all(len(found[measure]) == 6 * 4 * 8 for found in record["curves"].values() for measure in measures)
    assert ("lower" in record) == ("lower.png" in shown) == causal
    for claims in record["expected"].values():
        assert len(claims) == (15 if causal else 13)
    if causal:
        assert (out / "saes-k1" / "64-seed0" / "sae").is_dir()
        one = record["expected"]["kl"][0]["found"]["seed 1"]
        assert one["low"] <= one["value"] <= one["high"]


def test_contexts_of_causal_models_are_cut_and_of_others_have_to_be_short(tmp_path):
    for kind, causal in (("causal", True), ("other", False)):
        store = store_of(kind, tmp_path / kind)
        held_out = HeldOut.of(store, 0.5, 0, 1000)
        harvested = Harvested.of(store, held_out)
        sizes = [int(rows.sum()) for batch in harvested.batches for rows in harvested.rows(batch)]
        least, most = min(sizes), max(sizes)
        assert least < most
        kept = _contexts(harvested, dataclasses.replace(OPTIONS, context_length=least))
        assert [int(harvested.rows(one).sum()) for one in kept] == [least] * (
            len(sizes) if causal else sizes.count(least)
        )
        with pytest.raises(ValueError, match="context_length must leave 2000 tokens"):
            _contexts(harvested, dataclasses.replace(OPTIONS, moved=2000))


def test_what_holds_follows_from_the_intervals():
    above, below, both = _Outcome(1.5, 1.2, 1.8), _Outcome(0.5, 0.2, 0.8), _Outcome(1, 0.5, 1.5)
    nothing = _Outcome(*[float("nan")] * 3)

    def holds(side, *outcomes):
        return _Claim("", "", "", 1, side, dict(enumerate(outcomes))).holds

    assert holds(1, above) == "**yes**"
    assert holds(1, above, above) == "**yes**, in all"
    assert holds(-1, above, above) == "no, the opposite in all"
    assert holds(1, above, both) == "yes in 1 of 2"
    assert holds(1, below, above) == "yes in 1 of 2, the opposite in 1 of 2"
    assert holds(1, both, nothing) == "not seen"
    assert holds(0, both, below) == "**yes**, in all"
    assert holds(0, above) == "no, the opposite"
    assert (above.cell, nothing.cell) == ("1.50 (1.20 … 1.80)", "–")


def test_activations_without_a_model_are_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((600, 4), dtype=np.float32))
    store = import_activations(tmp_path / "store", tmp_path / "x.npy")
    with pytest.raises(ValueError, match="the store must be a harvest"):
        study(store, OPTIONS, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()  # before any training
