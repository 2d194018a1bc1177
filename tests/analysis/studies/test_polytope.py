"""The study of polytope codes writes what it promises, of causal models and of others."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import ArceeConfig, ArceeForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from sparsekern.analysis.models import language
from sparsekern.analysis.studies import polytope
from sparsekern.analysis.studies.options import PolytopeOptions
from sparsekern.data import harvest, import_activations

SHAPE = {"vocab_size": 2048, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TEXTS = [f"Return item number {i} of the list, or the {i}th word of a longer text, as it was given." for i in range(40)]


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
IDS = {"bos_token_id": 0, "eos_token_id": 0}


def new_model(kind, folder):
    """An untrained model in a folder, with the tokenizer of ours."""
    torch.manual_seed(1)
    if kind == "causal":
        net = ArceeForCausalLM(ArceeConfig(**SHAPE, **HEADS, **IDS, hidden_act="relu"))
    elif kind == "gated":
        net = LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, **IDS, hidden_act="silu"))
    else:
        net = BertModel(BertConfig(**SHAPE, num_attention_heads=2))
    net.save_pretrained(folder)
    language.train_tokenizer(TEXTS).save_pretrained(folder)
    return str(folder)


def check(written, out):
    page = written[0].read_text()
    assert [written[0].name, written[-1].name] == ["page.md", "results.json"]
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written[1:-1]} == set(shown)
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in shown)
    assert "{" not in page
    assert "nan" not in re.findall(r"\w+", page.lower())
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    return page, json.loads(written[-1].read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("kind", "hook"), [("causal", "layers.0"), ("bert", "encoder.layer.1")])
def test_a_quick_study_writes_a_page_pictures_and_numbers(kind, hook, tmp_path, monkeypatch):
    model, gated = (new_model(some, tmp_path / some) for some in (kind, "gated"))
    monkeypatch.setattr(polytope, "shipped_models", lambda: {"docstrings-swiglu-0": gated})
    store = harvest(tmp_path / "acts", model=model, texts=TEXTS, hook=hook, context_length=32)
    out = tmp_path / "out"
    page, record = check(
        polytope.study(store, PolytopeOptions(quick=True, device="cpu", held_out=0.4), out, progress=False), out
    )
    causal = kind == "causal"
    # What asks for pieces is left out of a model without them; and nothing can be pulled back past the last layer.
    assert ("an MLP of this model is not piecewise linear" in page) != causal
    assert ("piecewise linear: a sign says all" in page) == causal
    assert ("lines" in record) == ("gates" in record) == causal
    assert ("surrogates" in record) != causal
    assert ("Pulled directions" in page) == causal
    assert {len(looks) for looks in record["codes"].values()} == {2}
    assert set(record["relations"]) == {"64, seed 0", "64, seed 1"}
    controls = {
        entry["against"] for entry in record["relations"]["64, seed 0"]["best_auc"] if entry["kind"] == "control"
    }
    assert controls == {"untrained", "signs of principal components"} | ({"layers before"} if causal else set())
    assert all(0 <= entry["value"] <= 1 for entry in record["near"] for entry in entry)
    # What is nearest by the codes of a random net has to have the same token, the more so in the first of its layers.
    same_token = record["near"][0][0]
    assert same_token["value"] > same_token["largest"]


def test_imported_activations_are_refused_before_any_training(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(600, 4)).astype(np.float32))
    store = import_activations(tmp_path / "store", tmp_path / "x.npy")
    with pytest.raises(ValueError, match="the store must be a harvest"):
        polytope.study(store, PolytopeOptions(quick=True, device="cpu"), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
