"""``snapshot``: a counter as it is now."""

from __future__ import annotations

import torch
from torch import Tensor


def snapshot(counter: Tensor) -> Tensor:
    """`counter` as it is now, for what is differentiated after it has been advanced in place.

    A compiled backward pass computes cheap things again, from inputs that may have changed meanwhile: torch 2.13 then
    gives other gradients without a word (pytorch/pytorch#197039). It never repeats an op that it does not know. In
    eager mode nothing is repeated, and this is `counter` itself.
    """
    return _snapshot(counter) if torch.compiler.is_compiling() else counter


@torch.library.custom_op("sparsekern::snapshot", mutates_args=())
def _snapshot(counter: Tensor) -> Tensor:
    return counter.clone()


@_snapshot.register_fake
def _(counter: Tensor) -> Tensor:
    return torch.empty_like(counter)
