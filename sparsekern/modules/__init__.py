"""Modules: encoder, activation, decoder and loss put together. A module calls ops and never names a backend."""

from sparsekern.modules.activations import Activation, TopK
from sparsekern.modules.hierarchical import HierarchicalSAE
from sparsekern.modules.sae import SAE, LossOutput
from sparsekern.modules.switch import SwitchSAE

__all__ = ["SAE", "Activation", "HierarchicalSAE", "LossOutput", "SwitchSAE", "TopK"]
