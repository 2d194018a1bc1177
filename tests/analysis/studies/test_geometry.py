"""The study of geometry writes what it promises, of a causal model's activations and of some whose model is unknown."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from sparsekern.analysis.models import language
from sparsekern.analysis.studies.geometry import _by_last_digit, _later, _OneToken, _random_groups, study
from sparsekern.analysis.studies.options import GeometryOptions
from sparsekern.data import ActivationStore, StoreWriter, harvest

WORDS = "list item number of a longer text as it was given on monday or 12 and the sum is $x$"
TEXTS = [f"Return {' '.join(random.Random(i).sample(WORDS.split(), 12))}." for i in range(60)]
OPTIONS = GeometryOptions(quick=True, device="cpu", held_out=0.4, seeds=1, k=8)


def check(written):
    page = written[0].read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert {path.name for path in written} == {"page.md", "results.json", *shown}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:-1])
    assert "{" not in page
    assert "nan" not in re.findall(r"\w+", page.lower())
    for block in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block
    assert page.index("## In short") < page.index("## The SAEs")
    assert page.count("\n## ") == 10
    return page, json.loads(written[-1].read_text(), parse_constant=pytest.fail), set(shown)


def test_a_quick_study_of_a_causal_model(tmp_path):
    language.new_model("relu", 0).save_pretrained(tmp_path / "model")
    language.train_tokenizer(TEXTS).save_pretrained(tmp_path / "model")
    store = harvest(tmp_path / "store", model=str(tmp_path / "model"), texts=TEXTS, hook="layers.1")
    page, record, shown = check(study(store, OPTIONS, tmp_path / "out", progress=False))
    assert {"spectrum.png", "fvu.png", "ce.png", "series.png", "lobes.png"} <= shown
    assert "hierarchy of tokens drawn at random" in page
    assert record["hierarchies_of"] == "random tokens"
    assert set(record["spectrum"]) == {"512, seed 0"}
    assert list(record["ce_curve"]) == list(record["fvu_curve"])
    assert {entry["against"] for entry in record["ce_curve"]["64"]} == {
        "each latent's values permuted over tokens",
        "model as it is",
        "mean ablation",
    }
    assert {name.split(": ")[0] for name in record["words"]} == {"`model.layers.1`"}
    assert set(record["lobes"]) == {"512, seed 0, contexts", "512, seed 0, tokens"}
    other = GeometryOptions(quick=True, k=3, device="cpu", held_out=0.4, seeds=1, saes=tmp_path / "out" / "saes")
    with pytest.raises(ValueError, match="a folder of SAEs of these options"):
        study(store, other, tmp_path / "other", progress=False)


def test_activations_without_a_model_can_be_studied(tmp_path):
    """Token t of 40 is direction t plus noise; there are no words for it."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(40, (2400,), generator=g)
    x = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1)[ids]
    writer = StoreWriter(tmp_path / "acts", dtype="float32", d=16, source={"kind": "import"})
    writer.add(x + 0.05 * torch.randn(2400, 16, generator=g), torch.full((2400,), -1).int(), [24] * 100)
    writer.finish()
    page, record, shown = check(study(ActivationStore(tmp_path / "acts"), OPTIONS, tmp_path / "out", progress=False))
    assert page.count("their model is not known") == 2
    assert not {"words", "hierarchies", "ce_curve"} & set(record)
    assert not {"series.png", "hierarchies.png", "ce.png"} & shown


def test_options_stand_for_one_width_and_two_seeds(tmp_path):
    options = GeometryOptions().resolved(16, tmp_path)
    assert (options.latents, options.seeds) == ([128], 2)
    assert GeometryOptions(latents=[32, 64]).resolved(16, tmp_path).latents == [32, 64]
    with pytest.raises(ValueError, match="lobes"):
        GeometryOptions(lobes=1)


# Parts


class Tokenizer:
    """Two letters a token, but " Hello" and a few numbers as one."""

    def __call__(self, text, add_special_tokens=False):
        whole = {" Hello": 0, " 7": 1, " 12": 2}
        ids = [whole[text]] if text in whole else [3 + ord(letter) for letter in text]
        return {"input_ids": ids}


def test_words_are_looked_up_as_they_stand_in_sentences():
    assert _OneToken(Tokenizer())("hello")["input_ids"] == [0]
    assert len(_OneToken(Tokenizer())("there")["input_ids"]) == 6
    # " 7" and " 12" are tokens; all other numbers end in their last digit
    assert _by_last_digit(SimpleNamespace(tokenizer=Tokenizer())) == (98, 98)


def test_random_groups_are_parts_of_their_parents():
    groups, parents = _random_groups(400, 0)
    assert len(parents) == 9
    for child, parent in parents.items():
        assert torch.isin(groups[child], groups[parent]).all()
    below = torch.cat([groups[child] for child in parents])
    assert len(below) == len(below.unique())


def test_cross_entropy_is_of_contexts_after_the_fitted_ones():
    mask = torch.ones(2, 5)
    batches = [{"attention_mask": mask, "name": index} for index in range(4)]
    harvested = SimpleNamespace(batches=batches, rows=lambda batch: batch["attention_mask"])
    assert [batch["name"] for batch in _later(harvested, 20)] == [2, 3]
    assert [batch["name"] for batch in _later(harvested, 21)] == [3]
    assert [batch["name"] for batch in _later(harvested, 40)] == [3]
