"""Activations: read texts, run a model over them, keep what it computes, and stream it to a trainer.

The data goes one way: :func:`read_texts` or :func:`stdlib_docstrings` → :func:`harvest` (or :func:`import_activations`)
→ :class:`ActivationStore` → :class:`ActivationLoader`.
"""

from sparsekern.data.harvest import harvest, import_activations
from sparsekern.data.joined import JoinedStore
from sparsekern.data.loader import ActivationLoader
from sparsekern.data.models import EMBEDDED_MODEL, load_model, shipped_models, token_batches
from sparsekern.data.store import ActivationStore, ActivationView, StoreError, StoreWriter
from sparsekern.data.synthetic import zipf_activations
from sparsekern.data.texts import package_docstrings, read_texts, stdlib_docstrings

__all__ = [
    "EMBEDDED_MODEL",
    "ActivationLoader",
    "ActivationStore",
    "ActivationView",
    "JoinedStore",
    "StoreError",
    "StoreWriter",
    "harvest",
    "import_activations",
    "load_model",
    "package_docstrings",
    "read_texts",
    "shipped_models",
    "stdlib_docstrings",
    "token_batches",
    "zipf_activations",
]
