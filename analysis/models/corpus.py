"""The text of the language models: docstrings of packages that the `analysis` and `models` extras bring along."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass

from sparsekern.data.texts import package_docstrings

LICENCES = {
    "stdlib": "PSF-2.0",
    "numpy": "BSD-3-Clause",
    "scipy": "BSD-3-Clause",
    "sklearn": "BSD-3-Clause",
    "pandas": "BSD-3-Clause",
    "matplotlib": "PSF-2.0 (Matplotlib licence)",
    "torch": "BSD-3-Clause",
    "networkx": "BSD-3-Clause",
    "sympy": "BSD-3-Clause",
}
"""Each source, as it is imported, and the licence of its text."""

_DISTRIBUTIONS = {"sklearn": "scikit-learn"}
_HELD_OUT_OF = 20  # one file in so many


@dataclass(frozen=True)
class Corpus:
    """Texts to train on and to measure on.

    Attributes
    ----------
    training, held_out : list of str
        Docstrings. A file's are all in one or all in the other, because those of one file are alike.
    sources : dict
        Of each package its version, licence and characters.
    """

    training: list[str]
    held_out: list[str]
    sources: dict[str, dict[str, str | int]]


def corpus() -> Corpus:
    """Collect the docstrings of all packages in :data:`LICENCES`; takes about a minute.

    Which files are held out follows from a hash of their names, so that other releases of a package, or another
    machine, hold out the same files as far as they have them.

    Raises
    ------
    ValueError
        If one of the packages is not installed.
    """
    parts: dict[bool, dict[str, None]] = {False: {}, True: {}}  # dicts are sets that keep their order
    sources: dict[str, dict[str, str | int]] = {}
    for name, licence in LICENCES.items():
        pairs = package_docstrings(name)
        for file, text in pairs:
            parts[_is_held_out(file)][text] = None
        version = (
            platform.python_version()
            if name == "stdlib"
            else importlib.metadata.version(_DISTRIBUTIONS.get(name, name)).split("+")[0]
        )
        characters = sum(len(text) for _, text in pairs)
        sources[name] = {"version": version, "licence": licence, "characters": characters}
    training = list(parts[False])
    return Corpus(training, [text for text in parts[True] if text not in parts[False]], sources)


def _is_held_out(file: str) -> bool:
    return hashlib.sha256(file.encode()).digest()[0] * _HELD_OUT_OF < 256
