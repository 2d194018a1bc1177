"""sparsekern: a custom-kernel engine for sparse autoencoders."""

from sparsekern.backends import backends
from sparsekern.codes import Cooccurrence, CSRCodes, SparseCodes
from sparsekern.modules import (
    SAE,
    AbsTopK,
    BatchTopK,
    Crosscoder,
    CrossLayerTranscoder,
    Gated,
    GatedSAE,
    GroupMax,
    HierarchicalSAE,
    JumpReLU,
    LossOutput,
    MatryoshkaSAE,
    ReLU,
    SwitchSAE,
    TopK,
    Transcoder,
)
from sparsekern.ops import (
    BitNeighbors,
    batch_topk_encode,
    bit_distances,
    bit_neighbors,
    cooccurrence,
    route,
    routed_topk_encode,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from sparsekern.routing import Routing
from sparsekern.splice import splice
from sparsekern.training import Trainer, evaluate, train

__version__ = "0.1.0"

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "BitNeighbors",
    "CSRCodes",
    "Cooccurrence",
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
    "Routing",
    "SparseCodes",
    "SwitchSAE",
    "TopK",
    "Trainer",
    "Transcoder",
    "__version__",
    "backends",
    "batch_topk_encode",
    "bit_distances",
    "bit_neighbors",
    "cooccurrence",
    "evaluate",
    "route",
    "routed_topk_encode",
    "sparse_decode",
    "splice",
    "threshold_encode",
    "topk_encode",
    "train",
]
