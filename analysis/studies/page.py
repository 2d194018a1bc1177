"""What every study writes: ``page.md``, the pictures that it shows, and ``results.json`` with the numbers of both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekern.analysis.results import Result, plain
from sparsekern.data import ActivationStore
from sparsekern.files import write_atomically, write_json
from sparsekern.options import Options
from sparsekern.training import versions

PAGE, RECORD = "page.md", "results.json"

HOW_TO_READ = """Every number stands beside the same number for something that cannot know the answer (a **null**:
coordinates, labels or latents permuted, random directions), or for a simple rival (a **control**). In the pictures the
blue line is the number, grey dots are nulls, orange dots are controls. p is the share of a null's samples that are as
extreme, the number itself counted in: with n samples it cannot be less than 1/(n + 1)."""


@dataclass
class Page:
    """A study's page while it is written.

    Parameters
    ----------
    output : Path
        Folder for all of it, made if it is not there.
    title : str
        Heading of the page.
    """

    output: Path
    title: str
    _parts: list[str] = field(default_factory=list)
    _pictures: list[Path] = field(default_factory=list)
    _record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        self._parts.append(f"# {self.title}")

    def section(self, title: str) -> None:
        """Begin a section."""
        self._parts.append(f"## {title}")

    def text(self, *paragraphs: str) -> None:
        """Markdown."""
        self._parts += paragraphs

    def short(self, findings: Sequence[str]) -> None:
        """What was found, in a list before the first section."""
        first = next(i for i, part in enumerate(self._parts) if part.startswith("## "))
        self._parts[first:first] = ["## In short", "\n".join(f"- {finding}" for finding in findings)]

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of cells that are written as they should be read."""
        lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
        self._parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))

    def picture(self, name: str, drawn: Any, meaning: str) -> None:
        """A matplotlib figure, or axes of one, and what it shows."""
        path = self.output / f"{name}.png"
        getattr(drawn, "figure", drawn).savefig(path)
        self._pictures.append(path)
        self._parts += [f"![{meaning}]({path.name})", f"*{meaning}*"]

    def record(self, **numbers: Any) -> None:
        """Numbers for ``results.json``; a Result, and a mapping of them, as records."""
        self._record |= {name: _recorded(entry) for name, entry in numbers.items()}

    def write(self, options: Options, store: ActivationStore | None = None) -> list[Path]:
        """Write the page and the record; returns all files, the page first and the record last."""
        known = versions()
        self._parts.append(
            f"All numbers are in [{RECORD}]({RECORD}); the formulas, sources and limits of each measure are in "
            f"`docs/analyses.md`. sparsekern {known['sparsekern']}, torch {known['torch']}."
        )
        write_atomically(self.output / PAGE, ("\n\n".join(self._parts) + "\n").encode())
        start = {"options": {name: str(v) if isinstance(v, Path) else v for name, v in options.to_dict().items()}}
        if store is not None:
            start["store"] = store.source
        write_json(self.output / RECORD, plain(start | self._record | {"versions": known}))
        return [self.output / PAGE, *self._pictures, self.output / RECORD]


def _recorded(entry: Any) -> Any:
    if isinstance(entry, Result):
        return entry.to_records()
    if isinstance(entry, Mapping):
        return {str(key): _recorded(value) for key, value in entry.items()}
    return [_recorded(value) for value in entry] if isinstance(entry, list | tuple) else entry


def source_of(store: ActivationStore) -> str:
    """Where the activations come from, in words."""
    where = f"{store.source.get('model', 'imported activations')}, {store.source.get('hook', '–')}"
    return f"{where}; {store.tokens:,} tokens of width {store.d}"


def token_text(store: ActivationStore, token: int) -> str:
    """A token as it stands in the vocabulary, fit for code in a cell of a table; its id where there is none."""
    vocab = store.vocab
    piece = vocab[token] if vocab is not None and 0 <= token < len(vocab) else str(token)
    return piece.replace("|", "¦").replace("`", "ˋ")


def sentence(result: Result) -> str:
    """The value beside each null and control, in words."""
    name = f"{result.name[:1].upper()}{result.name[1:]}"
    if result.value != result.value:
        return f"{name}: not defined here."
    against = []
    for null, numbers in result.nulls.items():
        low, high, mean = numbers.min(), numbers.max(), numbers.mean()
        where = "above all" if result.value > high else "below all" if result.value < low else "within the"
        against.append(f"{where} {len(numbers)} samples of {null} (mean {mean:.3g})")
    against += [f"{control} gives {numbers.mean():.3g}" for control, numbers in result.controls.items()]
    return f"{name}: {result.value:.3g}; {'; '.join(against)}."
