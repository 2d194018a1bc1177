"""The small networks that read digits."""

import json

import pytest
import torch

pytest.importorskip("sklearn")

from sparsekern.analysis.models import digits


@pytest.mark.parametrize("kind", digits.KINDS)
def test_shipped_networks_read_as_well_as_their_record_says(kind):
    record = json.loads((digits.WEIGHTS / f"digits-{kind}" / "training.json").read_text())
    for entry in record["seeds"]:
        training, held_out = digits.accuracy(digits.digits_net(kind, entry["seed"]))
        assert training == pytest.approx(entry["training"], abs=0.002)
        assert held_out == pytest.approx(entry["held_out"], abs=0.005)
        assert held_out > 0.93


def test_a_training_begins_as_the_shipped_ones_did(monkeypatch):
    monkeypatch.setattr(digits, "_EPOCHS", 2)
    state = torch.get_rng_state()
    first, again, other = (digits.train_net("mlp", seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert digits.accuracy(first)[1] > 0.5


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="kind must be one of mlp, conv"):
        digits.new_net("transformer")
    with pytest.raises(ValueError, match="seed must be one of 0, 1, 2"):
        digits.digits_net("mlp", 7)
