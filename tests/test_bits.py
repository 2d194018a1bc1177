"""Boolean tensors as bits."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsekern.bits import pack_bits, unpack_bits


@given(rows=st.integers(0, 4), n=st.integers(0, 40), seed=st.integers(0, 99))
def test_packs_as_numpy_does_and_comes_back(rows, n, seed):
    flags = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(flags)
    assert packed.numpy().tobytes() == np.packbits(flags.numpy(), axis=-1, bitorder="little").tobytes()
    assert torch.equal(unpack_bits(packed, n), flags)


def test_takes_any_strides_and_dimensions():
    flags = torch.rand(11, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(flags.permute(1, 2, 0)), 11), flags.permute(1, 2, 0))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="flags must be a bool tensor"):
        pack_bits(torch.zeros(3))
    with pytest.raises(ValueError, match=r"packed must be a uint8 tensor \[\.\.\., 2\] for n = 9"):
        unpack_bits(torch.zeros(1, 1, dtype=torch.uint8), 9)
