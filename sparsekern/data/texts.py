"""Texts to run a model over: files of your own, or the docstrings that every Python carries."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["package_docstrings", "read_texts", "stdlib_docstrings"]

_PLAIN_SUFFIXES = {".txt", ".md", ".rst", ".py"}
_FOREIGN_FOLDERS = {"site-packages", "dist-packages"}
_TESTS = {"test", "tests"}
_SHORTEST_DOCSTRING = 20  # characters; what is shorter is mostly "See PEP 3118." and the like


def stdlib_docstrings() -> list[str]:
    """Return the docstrings of the running Python's standard library: an English corpus that needs no download.

    The sources are parsed, never imported. Installed packages and files that do not parse are left out, as are
    docstrings of fewer than 20 characters and repetitions.

    Returns
    -------
    list of str
        Cleaned (:func:`inspect.cleandoc`) docstrings, by sorted path and then in source order: the same list on every
        machine with the same Python release. Python 3.11 gives 7,100 texts and 1.6 million characters.
    """
    return list(dict.fromkeys(text for _, text in _docstrings_under(Path(sysconfig.get_paths()["stdlib"]))))


def package_docstrings(name: str) -> list[tuple[str, str]]:
    """Return the docstrings of an installed package, each with the file that it is from.

    As in :func:`stdlib_docstrings` sources are parsed and never imported, and short docstrings are left out; tests are
    left out too. A docstring that stands in several files is told once.

    Parameters
    ----------
    name
        Of a package as it is imported, or ``"stdlib"`` for the standard library.

    Returns
    -------
    list of (str, str)
        File, as ``numpy/linalg/_linalg.py``, and docstring, by sorted path and then in source order.

    Raises
    ------
    ValueError
        If no such package is installed.
    """
    if name == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"package {name!r} is not installed: pip install it, or leave it out")
        root = Path(spec.origin).parent
    first: dict[str, str] = {}
    for path, text in _docstrings_under(root):
        if _TESTS.isdisjoint(path.parts):
            first.setdefault(text, f"{name}/{path.as_posix()}")
    return [(file, text) for text, file in first.items()]


def _docstrings_under(root: Path) -> Iterator[tuple[Path, str]]:
    """Relative path and docstring, by sorted path and then in source order."""
    for path in sorted(root.rglob("*.py")):
        file = path.relative_to(root)
        if _FOREIGN_FOLDERS.isdisjoint(file.parts):
            for text in _docstrings_of(path):
                if len(text) >= _SHORTEST_DOCSTRING:
                    yield file, text


def _docstrings_of(path: Path) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in somebody else's source
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return
    # Statements alone hold what has a docstring, and in source order: expressions, most of the tree, are not visited.
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            literal = ast.get_docstring(node, clean=False)
            if literal is not None:
                yield inspect.cleandoc(literal)
        for name in ("cases", "finalbody", "orelse", "handlers", "body"):
            nodes += reversed(getattr(node, name, ()))


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read texts from files and folders.

    Parameters
    ----------
    paths
        Files, or folders that are searched recursively, in UTF-8. ``.txt``, ``.md``, ``.rst`` and ``.py`` files are one
        text each; a ``.jsonl`` file holds one text a line, in the field ``text``. Other files in a folder are ignored.

    Returns
    -------
    list of str
        The texts, in the order of ``paths`` and sorted by name within a folder.

    Raises
    ------
    ValueError
        If a path is missing or of another kind, if a text is empty, not UTF-8 or not what a ``.jsonl`` line should be
        (the message names the file and the line), or if there is no text at all.
    """
    texts = [text for path in paths for file in _text_files(Path(path)) for text in _texts_of(file)]
    if not texts:
        wanted = ", ".join(sorted(_PLAIN_SUFFIXES | {".jsonl"}))
        raise ValueError(f"no text found in {[str(path) for path in paths]}: give files or folders of {wanted}")
    return texts


def _text_files(path: Path) -> list[Path]:
    readable = _PLAIN_SUFFIXES | {".jsonl"}
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.suffix in readable and file.is_file())
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.suffix not in readable:
        raise ValueError(f"{path} is not a text file that is read here: use one of {', '.join(sorted(readable))}")
    return [path]


def _texts_of(file: Path) -> Iterator[str]:
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error}): convert it or leave it out") from error
    if not content.strip():
        raise ValueError(f"{file} is empty: fill it or leave it out")
    if file.suffix in _PLAIN_SUFFIXES:
        yield content
        return
    # Not splitlines(): a JSON string may hold U+2028 and its like unescaped.
    for number, line in enumerate(content.rstrip("\n").split("\n"), start=1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{file}, line {number}: not a JSON object with a field "text"') from error
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'{file}, line {number}: the field "text" is empty or no string; fill it or drop the line')
        yield text
