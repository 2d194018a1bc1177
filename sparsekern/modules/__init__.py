"""Modules: encoder, activation, decoder and loss put together. A module calls ops and never names a backend."""

from sparsekern.modules.activations import AbsTopK, Activation, BatchTopK, Gated, GroupMax, JumpReLU, ReLU, TopK
from sparsekern.modules.cross_layer import CrossLayerTranscoder
from sparsekern.modules.crosscoder import Crosscoder
from sparsekern.modules.gated import GatedSAE
from sparsekern.modules.hierarchical import HierarchicalSAE
from sparsekern.modules.matryoshka import MatryoshkaSAE
from sparsekern.modules.sae import SAE, LossOutput
from sparsekern.modules.switch import SwitchSAE
from sparsekern.modules.transcoder import Transcoder

__all__ = [
    "SAE",
    "AbsTopK",
    "Activation",
    "BatchTopK",
    "CrossLayerTranscoder",
    "Crosscoder",
    "Gated",
    "GatedSAE",
    "GroupMax",
    "HierarchicalSAE",
    "JumpReLU",
    "LossOutput",
    "MatryoshkaSAE",
    "ReLU",
    "SwitchSAE",
    "TopK",
    "Transcoder",
]
