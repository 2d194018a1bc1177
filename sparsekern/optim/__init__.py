"""Optimizers."""

from sparsekern.optim._adam import Adam

__all__ = ["Adam"]
