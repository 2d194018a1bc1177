"""``recorded``: what a module is given and gives, call by call. (`rewritten` is tested through ``sk.splice``.)"""

import pytest
import torch
from torch import nn

from sparsekern.hooks import recorded


class Pairs(nn.Module):
    """Gives its input doubled, with something beside it."""

    def forward(self, *, states):
        return 2 * states, "beside"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Pairs()

    def forward(self, x):
        for _ in range(2):
            x, beside = self.part(states=x)
            assert beside == "beside"
        return x


def test_recorded_has_every_call_in_order_and_changes_nothing():
    model, x = Model(), torch.ones(3)
    with recorded(model, "part") as seen:
        assert torch.equal(model(x), 4 * x)
    assert [(given.tolist(), output.tolist()) for given, output in seen] == [([1] * 3, [2] * 3), ([2] * 3, [4] * 3)]
    model(x)
    assert len(seen) == 2  # the hook went with the block


def test_a_module_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match=r"'parts' is not a module of Model; the nearest names: part"):
        recorded(Model(), "parts").__enter__()
