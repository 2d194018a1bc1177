"""The small language models: their training, and those that come with the package."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from sparsekern.analysis.models import corpus as corpus_module
from sparsekern.analysis.models import language
from sparsekern.analysis.models.architecture import new_model
from sparsekern.data import load_model, shipped_models

TEXT = (
    "Return the sum of all elements along the given axis. If the axis is None, the array is flattened before it is "
    "summed. The result is an array of the same shape, with the given axis removed."
)


@pytest.fixture(scope="module")
def ids():
    """Every token is the one before plus 1 or plus 2, so that there is something to learn."""
    steps = torch.randint(1, 3, (20_000,), generator=torch.Generator().manual_seed(0))
    return steps.cumsum(0) % 97


@pytest.mark.parametrize("kind", ["relu", "swiglu"])
def test_training_lowers_the_loss_on_text_that_was_not_seen(kind, ids):
    model = new_model(kind, 0).train()
    curve = language.train(model, ids[:16_000], ids[16_000:17_000], tokens=8 * 2 * 256, batch=2, seed=0, shown=False)
    assert curve[-1]["tokens"] == 8 * 2 * 256
    assert curve[0]["training"] > curve[-1]["training"]
    assert curve[-1]["held_out"] < math.log(2048) - 0.7


def test_a_training_repeats(ids):
    curves = [
        language.train(new_model("relu", 1).train(), ids, ids[:512], 4 * 256, 1, seed=1, shown=False) for _ in range(2)
    ]
    assert curves[0] == curves[1]


def test_the_kinds_differ_in_the_mlp_only():
    relu, swiglu = (dict(new_model(kind, 0).named_parameters()) for kind in ("relu", "swiglu"))
    assert relu.keys() ^ swiglu.keys() == {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(4)}
    sizes = [sum(p.numel() for p in parameters.values()) for parameters in (relu, swiglu)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_the_tokenizer_begins_a_text_and_comes_back(tmp_path):
    tokenizer = language.train_tokenizer([TEXT, "αβγ"])
    assert tokenizer(TEXT)["input_ids"][0] == 0
    assert tokenizer.decode(tokenizer("ünknöwn ⊕")["input_ids"], skip_special_tokens=True) == "ünknöwn ⊕"
    assert language.stream(tokenizer, ["a", "b"]).tolist().count(0) == 2


def test_what_is_held_out_goes_by_files(monkeypatch):
    monkeypatch.setattr(corpus_module, "LICENCES", {"safetensors": "Apache-2.0", "hypothesis": "MPL-2.0"})
    text = corpus_module.corpus()
    assert len(text.held_out) > 5
    assert len(text.training) > 10 * len(text.held_out) / 3
    assert not set(text.training) & set(text.held_out)
    assert text.sources["hypothesis"]["licence"] == "MPL-2.0"


@pytest.mark.parametrize("name", sorted(shipped_models()))
def test_a_shipped_model_predicts_documentation_and_its_card_says_how_well(name):
    folder = shipped_models()[name]
    assert (folder / "model.safetensors").stat().st_size < 8e6
    tokenizer, model = load_model(name, causal=True)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < 3.5  # nothing learned gives ln 2048 = 7.6
    record = json.loads((folder / "training.json").read_text())
    held_out = record["held_out"]
    assert held_out["nats_per_token"] < min(held_out["ngrams_nats_per_token"].values())
    assert f"{math.exp(held_out['nats_per_token']):.2f} a token" in (folder / "README.md").read_text()
