"""The model of a store, and its held-out contexts."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sparsekern.analysis.models import language
from sparsekern.analysis.models.architecture import new_model
from sparsekern.analysis.studies.harvested import Harvested
from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import EMBEDDED_MODEL, harvest, import_activations
from sparsekern.hooks import rewritten

TEXTS = [f"Return item number {i} of the list, or the {i}th word of a longer text, as it was given." for i in range(12)]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """An untrained causal model of our own in a folder."""
    folder = tmp_path_factory.mktemp("model")
    new_model("relu", 0).save_pretrained(folder)
    language.train_tokenizer(TEXTS).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("drop_special", [True, False])
@pytest.mark.parametrize("kind", ["own", "embedded"])
def test_rows_of_all_batches_are_the_held_out_activations(kind, drop_special, own, tmp_path):
    name = own if kind == "own" else EMBEDDED_MODEL
    store = harvest(tmp_path / "store", model=name, texts=TEXTS, drop_special=drop_special, dtype="float16")
    held_out = HeldOut.of(store, 0.5, 0, 10_000)
    harvested = Harvested.of(store, held_out, batch_contexts=4)
    assert harvested.causal == (kind == "own")
    rows = []

    def see(_, output):
        rows.append(output)
        return output

    for batch in harvested.batches:
        with torch.no_grad(), rewritten(harvested.model, harvested.hook, see):
            harvested.model(**harvested.inputs(batch))
        rows[-1] = rows[-1][harvested.rows(batch)]
    torch.testing.assert_close(torch.cat(rows), held_out.x, atol=5e-3 * held_out.x.abs().max().item(), rtol=0)


def test_another_model_is_noticed(own, tmp_path):
    store = harvest(tmp_path / "store", model=own, texts=TEXTS)
    new_model("relu", 1).save_pretrained(own)
    with pytest.raises(ValueError, match="now is: harvest it again"):
        Harvested.of(store, HeldOut.of(store, 0.5, 0, 100))


def test_imported_activations_have_no_model(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((600, 4), dtype=np.float32))
    store = import_activations(tmp_path / "store", tmp_path / "x.npy")
    with pytest.raises(ValueError, match="the store must be a harvest"):
        Harvested.of(store, HeldOut.of(store, 0.5, 0, 100))
