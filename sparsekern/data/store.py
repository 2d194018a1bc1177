"""The activation store: a folder of memory-mapped shards with a manifest that says exactly what is in it.

::

    manifest.json            what was harvested and how, and size and SHA-256 of every shard
    vocab.json               optional: the token strings by id, so that contexts can be shown without the model
    shard-00000.safetensors  activations [n, d], token_ids [n] int32, context_offsets [c + 1] int64 (rows of the shard)

A *context* is one chunk of text that went through the model together; its rows are adjacent. Every file appears
atomically and the manifest last, so that a store is consistent after any interruption: what the manifest lists is safe.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsekern.files import write_atomically

__all__ = ["ActivationStore", "ActivationView", "StoreError", "StoreWriter"]

FORMAT = "sparsekern-activations"
VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_MANIFEST = "manifest.json"
_VOCAB = "vocab.json"
_SHARD_NAME = re.compile(r"shard-\d{5,}\.safetensors")
_MAX_OPEN_SHARDS = 256  # each holds a file descriptor; many systems allow 1,024 a process
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


class StoreError(ValueError):
    """Something is wrong with an activation store; the message says what, where, and what to do."""


class StoreWriter:
    """Writes an activation store shard by shard, or continues one that was interrupted.

    On opening, the shards that are already there are verified. Those before the first damaged or missing one are kept;
    the writer continues behind them, at :attr:`cursor`. If nothing is left to do, :attr:`complete` is true.

    Parameters
    ----------
    path
        Folder of the store; created where missing. Must be empty or hold a store of the same ``source``.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: how activations are stored.
    d
        Width of the activations.
    source
        What determines the content (model, hook, digest of the texts, …), as plain JSON values.
    vocab
        Token strings by id.
    shard_tokens
        Rows after which :attr:`full` asks for a :meth:`flush`. A shard is held in memory, about three times, while it
        is written.

    Raises
    ------
    StoreError
        If the folder holds something else, or a store of another source.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        dtype: str,
        d: int,
        source: dict[str, Any],
        vocab: Sequence[str] | None = None,
        shard_tokens: int = 65536,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        if d < 1 or shard_tokens < 1:
            raise ValueError(f"d and shard_tokens must be at least 1, not {d} and {shard_tokens}")
        self.path = Path(path)
        self.dtype = DTYPES[dtype]
        self.d = d
        self.shard_tokens = shard_tokens
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype,
            "d": d,
            "source": json.loads(json.dumps(source)),
            "tokens": 0,
            "contexts": 0,
            "complete": False,
            "shards": [],
        }
        self._activations: list[Tensor] = []
        self._token_ids: list[Tensor] = []
        self._lengths: list[int] = []
        self._pending_tokens = 0

        self._prepare_folder()
        if (self.path / _MANIFEST).exists():
            self._continue_existing()
        if not self.complete:
            self._write_manifest()
            if vocab is not None:
                self._write(_VOCAB, json.dumps(list(vocab), ensure_ascii=False).encode())

    @property
    def tokens(self) -> int:
        """Rows so far, the kept shards included."""
        return int(self._manifest["tokens"]) + self._pending_tokens

    @property
    def contexts(self) -> int:
        """Contexts so far, the kept shards included."""
        return int(self._manifest["contexts"]) + len(self._lengths)

    @property
    def cursor(self) -> Any:
        """What was given to the :meth:`flush` of the last shard; None for a new store."""
        shards = self._manifest["shards"]
        return shards[-1]["cursor"] if shards else None

    @property
    def complete(self) -> bool:
        """Whether the store is finished."""
        return bool(self._manifest["complete"])

    @property
    def full(self) -> bool:
        """Whether enough rows wait for a shard."""
        return self._pending_tokens >= self.shard_tokens

    def add(self, activations: Tensor, token_ids: Tensor, lengths: Sequence[int]) -> None:
        """Add contexts; nothing is written before :meth:`flush`.

        Parameters
        ----------
        activations
            ``[n, d]``, any floating dtype and device.
        token_ids
            ``[n]`` integers, −1 where unknown.
        lengths
            Rows of each context, in order; they sum to ``n`` and none is zero.

        Raises
        ------
        ValueError
            If the shapes disagree, or a value is not finite in the dtype of the store.
        """
        rows = activations.shape[0]
        if activations.shape != (rows, self.d) or token_ids.shape != (rows,) or sum(lengths) != rows:
            raise ValueError(
                f"activations {tuple(activations.shape)}, token_ids {tuple(token_ids.shape)} and lengths with sum "
                f"{sum(lengths)} disagree: expected [n, {self.d}], [n] and n"
            )
        if min(lengths, default=1) < 1:
            raise ValueError("lengths must be at least 1: leave empty contexts out")
        stored = activations.detach().to("cpu", self.dtype)
        bad = first_nonfinite_row(stored)
        if bad is not None:
            context = int(np.searchsorted(np.cumsum(lengths), bad, side="right"))
            raise ValueError(
                f"row {self.tokens + bad} (context {self.contexts + context}) holds a value that is not finite as "
                f"{self._manifest['dtype']}: check the model, or store a wider dtype"
            )
        self._activations.append(stored)
        self._token_ids.append(token_ids.to("cpu", torch.int32))
        self._lengths.extend(lengths)
        self._pending_tokens += rows

    def flush(self, cursor: Any = None) -> None:
        """Write what was added as one shard, and the manifest.

        Parameters
        ----------
        cursor
            Where to go on behind this shard, as plain JSON values: the :attr:`cursor` after an interruption.

        Raises
        ------
        StoreError
            If the disk is full. The shards before remain, and the same run can be resumed.
        """
        self._flush_shard(cursor)
        self._write_manifest()

    def finish(self) -> None:
        """Write what is left and mark the store complete.

        Raises
        ------
        StoreError
            If the disk is full, or if nothing was ever added.
        """
        if self.tokens == 0:
            raise StoreError(f"{self.path}: there was no activation to store")
        self._flush_shard(None)
        self._manifest["complete"] = True
        self._write_manifest()

    def _flush_shard(self, cursor: Any) -> None:
        if not self._lengths:
            return
        file = f"shard-{len(self._manifest['shards']):05d}.safetensors"
        data = save(
            {
                "activations": torch.cat(self._activations),
                "token_ids": torch.cat(self._token_ids),
                "context_offsets": _offsets(self._lengths),
            }
        )
        self._write(file, data)
        self._manifest["shards"].append(
            {
                "file": file,
                "tokens": self._pending_tokens,
                "contexts": len(self._lengths),
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "cursor": cursor,
            }
        )
        self._manifest["tokens"] += self._pending_tokens
        self._manifest["contexts"] += len(self._lengths)
        self._activations, self._token_ids, self._lengths, self._pending_tokens = [], [], [], 0

    def _prepare_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file: give a folder for the store")
        self.path.mkdir(parents=True, exist_ok=True)
        for pattern in ("shard-*.safetensors.tmp", f"{_MANIFEST}.tmp", f"{_VOCAB}.tmp"):
            for leftover in self.path.glob(pattern):  # of a process that was killed
                leftover.unlink()
        if not (self.path / _MANIFEST).exists() and any(self.path.iterdir()):
            raise StoreError(f"{self.path} is not empty and holds no activation store: give a new folder")

    def _continue_existing(self) -> None:
        existing = _read_manifest(self.path)
        there = {**existing["source"], "dtype": existing["dtype"], "d": existing["d"]}
        here = {**self._manifest["source"], "dtype": self._manifest["dtype"], "d": self.d}
        differing = [key for key in {**there, **here} if there.get(key) != here.get(key)]
        if differing:
            listed = "; ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in differing)
            raise StoreError(
                f"{self.path} holds a store of another source: {listed}. Give another folder, or remove this one"
            )
        # Only a leading run of sound shards is worth keeping: what follows is made again from the last one's cursor.
        kept: list[dict[str, Any]] = []
        for shard in existing["shards"]:
            if _fault(self.path, shard, verify=True):
                break
            kept.append(shard)
        self._manifest.update(
            shards=kept,
            tokens=sum(shard["tokens"] for shard in kept),
            contexts=sum(shard["contexts"] for shard in kept),
            complete=existing["complete"] and len(kept) == len(existing["shards"]),
        )

    def _write_manifest(self) -> None:
        self._write(_MANIFEST, json.dumps(self._manifest, indent=1).encode())

    def _write(self, name: str, data: bytes) -> None:
        try:
            write_atomically(self.path / name, data)
        except OSError as error:
            if error.errno not in _DISK_FULL:
                raise
            raise StoreError(
                f"the disk is full: {name} ({len(data):,} bytes) could not be written. "
                f"{self._manifest['tokens']:,} tokens are safely stored in {self.path}; free some space and run the "
                "same command again to resume"
            ) from error


class ActivationStore:
    """Read access to a complete activation store; rows come from memory-mapped shards as they are asked for.

    Parameters
    ----------
    path
        Folder of the store.
    verify
        Whether to compare the SHA-256 of each shard, which reads the whole store once. Sizes are always checked.

    Attributes
    ----------
    path : Path
    d : int
        Width of the activations.
    dtype : torch.dtype
        How the activations are stored; they are handed out as float32.
    tokens, n_contexts : int
    source : dict
        What was harvested, and how.
    manifest : dict

    Raises
    ------
    StoreError
        If there is no complete store of a known version in the folder, or a shard is missing, truncated or corrupted.

    Notes
    -----
    A store can be pickled and copied; the files are opened again where it arrives.
    """

    def __init__(self, path: str | os.PathLike[str], verify: bool = True) -> None:
        self.path = Path(path)
        self.manifest = _read_manifest(self.path)
        if not self.manifest["complete"]:
            raise StoreError(
                f"the store in {self.path} is incomplete: {self.manifest['tokens']:,} tokens are safely stored; "
                "run the same harvest again to resume it"
            )
        for shard in self.manifest["shards"]:
            fault = _fault(self.path, shard, verify)
            if fault:
                raise StoreError(
                    f"{self.path / shard['file']} {fault}. Run the same harvest again: it keeps the shards before this "
                    "one and makes the others anew"
                )
        self.d: int = self.manifest["d"]
        self.dtype = DTYPES[self.manifest["dtype"]]
        self.tokens: int = self.manifest["tokens"]
        self.n_contexts: int = self.manifest["contexts"]
        self.source: dict[str, Any] = self.manifest["source"]
        self._shard_bounds = np.cumsum([0] + [shard["tokens"] for shard in self.manifest["shards"]])
        self._handles: dict[int, Any] = {}

    def __repr__(self) -> str:
        return f"ActivationStore({str(self.path)!r}, tokens={self.tokens}, d={self.d}, contexts={self.n_contexts})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    @cached_property
    def context_bounds(self) -> Tensor:
        """Row offsets, int64 ``[n_contexts + 1]``: context ``c`` is the rows from entry ``c`` up to entry ``c + 1``."""
        starts = [
            self._shard(index).get_tensor("context_offsets")[:-1] + int(self._shard_bounds[index])
            for index in range(len(self.manifest["shards"]))
        ]
        return torch.cat([*starts, torch.tensor([self.tokens])])

    @cached_property
    def token_ids(self) -> Tensor:
        """Token id of every row, int32 ``[tokens]``; −1 where unknown."""
        return torch.cat([self._shard(index).get_tensor("token_ids") for index in range(len(self.manifest["shards"]))])

    @cached_property
    def vocab(self) -> list[str] | None:
        """Token strings by id, or None where the store has none."""
        file = self.path / _VOCAB
        if not file.exists():
            return None
        try:
            vocab = json.loads(file.read_bytes())
        except ValueError as error:
            raise StoreError(f"{file} is not JSON: remove it to see token ids instead") from error
        if not isinstance(vocab, list) or not all(isinstance(piece, str) for piece in vocab):
            raise StoreError(f"{file} is not a list of strings: remove it to see token ids instead")
        return vocab

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the rows ``start:stop`` as float32 ``[stop - start, d]``, across shard borders.

        Raises
        ------
        ValueError
            If the range is not within ``0 … tokens``.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"start and stop must satisfy 0 <= start <= stop <= {self.tokens}, not {start} and {stop}")
        out = torch.empty(stop - start, self.d)
        # NumPy copies on this thread. PyTorch would start a team of threads for each of many short reads, which takes
        # many times as long as the copy when the cores are busy with training.
        rest = out.numpy()
        index = int(np.searchsorted(self._shard_bounds, start, side="right")) - 1
        while start < stop:
            first, last = (int(bound) for bound in self._shard_bounds[index : index + 2])
            end = min(stop, last)
            block = self._shard(index).get_slice("activations")[start - first : end - first]
            rest[: end - start] = block.float().numpy()
            rest, start, index = rest[end - start :], end, index + 1
        return out

    def word_text(self, row: int) -> str:
        """Return the word that the token at a row is a piece of; the token id where there is no vocabulary."""
        if not 0 <= row < self.tokens:
            raise ValueError(f"row must be in 0 … {self.tokens - 1}, not {row}")
        context = int(torch.searchsorted(self.context_bounds, row, right=True)) - 1
        start, stop = self.context_bounds[context : context + 2].tolist()
        pieces = [self._spaced_piece(token) for token in self.token_ids[start:stop].tolist()]
        first, last = row - start, row - start + 1
        while first > 0 and not pieces[first][:1].isspace():
            first -= 1
        while last < len(pieces) and not pieces[last][:1].isspace():
            last += 1
        return "".join(pieces[first:last]).strip()

    def context_text(
        self,
        context: int,
        mark: int | None = None,
        marks: tuple[str, str] = ("**⟦", "⟧**"),
        window: int | None = None,
    ) -> str:
        """Return a context as readable text.

        Parameters
        ----------
        context
            Number of the context.
        mark
            Position of a token within the context that is to be marked.
        marks
            What is put before and after the marked token.
        window
            Show only so many tokens on each side of the marked one, with … where something is cut.

        Returns
        -------
        str
            The pieces of the vocabulary joined by the convention that it follows (WordPiece ``##``, byte-level ``Ġ`` or
            SentencePiece ``▁``); the token ids where there is no vocabulary or no such piece.

        Raises
        ------
        ValueError
            If there is no such context or position.
        """
        if not 0 <= context < self.n_contexts:
            raise ValueError(f"context must be in 0 … {self.n_contexts - 1}, not {context}")
        start, stop = self.context_bounds[context : context + 2].tolist()
        if mark is not None and not 0 <= mark < stop - start:
            raise ValueError(f"mark must be in 0 … {stop - start - 1} for context {context}, not {mark}")
        first, last = 0, stop - start
        if mark is not None and window is not None:
            first, last = max(0, mark - window), min(last, mark + window + 1)
        text = ""
        for position, token in enumerate(self.token_ids[start + first : start + last].tolist(), start=first):
            piece = self._spaced_piece(token)
            if position == mark:
                space = piece[: len(piece) - len(piece.lstrip(" "))]
                piece = f"{space}{marks[0]}{piece.lstrip(' ')}{marks[1]}"
            text += piece
        return ("… " if first > 0 else "") + text.lstrip(" ") + (" …" if last < stop - start else "")

    def split(self, held_out: float = 0.05, seed: int = 0) -> tuple[ActivationView, ActivationView]:
        """Split the store into training data and held-out data, by whole contexts.

        Parameters
        ----------
        held_out
            Share of the contexts that is held out, between 0 and 1; rounded, and at least one context on each side.
        seed
            The same seed gives the same split.

        Returns
        -------
        tuple of ActivationView
            Training data, held-out data: disjoint, together everything, each with its contexts in random order.

        Raises
        ------
        ValueError
            If ``held_out`` is out of range or the store has only one context.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, not {held_out}")
        if self.n_contexts < 2:
            raise StoreError(f"{self.path} has only one context: a split by contexts needs two")
        order = seeded_permutation(self.n_contexts, seed)
        n = min(max(round(held_out * self.n_contexts), 1), self.n_contexts - 1)
        return ActivationView(self, order[n:]), ActivationView(self, order[:n])

    def _spaced_piece(self, token: int) -> str:
        vocab, convention = self.vocab, self._convention
        if vocab is None or not 0 <= token < len(vocab):
            return f" {token}"
        piece = vocab[token]
        if convention == "##":
            return piece[2:] if piece.startswith("##") else f" {piece}"
        return piece.replace("Ġ", " ").replace("Ċ", "\n").replace("▁", " ")

    @cached_property
    def _convention(self) -> str:
        # By majority: byte-level vocabularies hold a few "##" too (Markdown headings).
        starts = [piece[:2] for piece in self.vocab or ()]
        counts = {sign: sum(start.startswith(sign) for start in starts) for sign in ("##", "Ġ", "▁")}
        return max(counts, key=lambda sign: counts[sign])

    def _shard(self, index: int) -> Any:
        handle = self._handles.get(index)
        if handle is None:
            shard = self.manifest["shards"][index]
            file = self.path / shard["file"]
            try:
                handle = safe_open(file, framework="pt")
                shape = handle.get_slice("activations").get_shape()
            except (OSError, SafetensorError) as error:
                raise StoreError(f"{file} cannot be read ({error}): run the same harvest again") from error
            if shape != [shard["tokens"], self.d]:
                raise StoreError(
                    f"{file} holds activations {shape}, not {[shard['tokens'], self.d]} as in the manifest"
                )
            if len(self._handles) >= _MAX_OPEN_SHARDS:
                self._handles.pop(next(iter(self._handles)))
            self._handles[index] = handle
        return handle


@dataclass(frozen=True, eq=False)
class ActivationView:
    """Some contexts of a store, in a certain order.

    Parameters
    ----------
    store
        The store.
    contexts
        Numbers of the contexts, int64 ``[c]``.
    """

    store: ActivationStore
    contexts: Tensor

    @property
    def d(self) -> int:
        """Width of the activations."""
        return self.store.d

    @property
    def n_contexts(self) -> int:
        """Number of contexts."""
        return self.contexts.numel()

    @cached_property
    def starts(self) -> Tensor:
        """First row of each context in the store, int64 ``[c]``."""
        return self.store.context_bounds[self.contexts]

    @cached_property
    def lengths(self) -> Tensor:
        """Rows of each context, int64 ``[c]``."""
        return self.store.context_bounds[self.contexts + 1] - self.starts

    @cached_property
    def tokens(self) -> int:
        """Number of rows."""
        return int(self.lengths.sum())

    @property
    def row_ids(self) -> Tensor:
        """Row in the store of each row of the view, int64 ``[tokens]``."""
        first = torch.repeat_interleave(self.starts - (self.lengths.cumsum(0) - self.lengths), self.lengths)
        return first + torch.arange(self.tokens)

    def load(self, max_tokens: int | None = None) -> Tensor:
        """Read the view into memory.

        Parameters
        ----------
        max_tokens
            Read only so many rows from the start. A view from :meth:`ActivationStore.split` has its contexts in random
            order, so this is a fair sample.

        Returns
        -------
        Tensor
            Float32 ``[min(tokens, max_tokens), d]``, in the order of :attr:`row_ids`.
        """
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        out = torch.empty(self.tokens if max_tokens is None else min(max_tokens, self.tokens), self.d)
        done = 0
        for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True):
            rows = min(length, out.shape[0] - done)
            out[done : done + rows] = self.store.rows(start, start + rows)
            done += rows
            if done == out.shape[0]:
                break
        return out


def seeded_permutation(n: int, *seed: int) -> Tensor:
    """Return the permutation of ``0 … n - 1`` that a sequence of non-negative numbers stands for, int64 ``[n]``."""
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


def first_nonfinite_row(rows: Tensor) -> int | None:
    """Return the first row of ``[n, d]`` with a NaN or an infinity, or None."""
    start = 0
    for block in rows.split(65536):  # bounds the size of the mask
        bad = ~torch.isfinite(block).all(dim=1)
        if bad.any():
            return start + int(bad.int().argmax())
        start += block.shape[0]
    return None


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _offsets(lengths: Iterable[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    if not file.is_file():
        raise StoreError(f"no activation store in {path}: {_MANIFEST} is missing; make one with harvest")
    try:
        manifest = json.loads(file.read_bytes())
    except ValueError as error:
        raise StoreError(f"{file} is not JSON ({error}): remove the folder and harvest again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{file} is not the manifest of an activation store")
    if manifest.get("version") != VERSION:
        raise StoreError(
            f"{path} has format version {manifest.get('version')!r}; this release reads {VERSION}: "
            "harvest again, or use the release that wrote it"
        )
    fault = _manifest_fault(manifest)
    if fault:
        raise StoreError(f"{file} is damaged ({fault}): remove the folder and harvest again")
    return manifest


def _manifest_fault(manifest: dict[str, Any]) -> str | None:
    """Return what is wrong with the fields of a manifest, which may come from anyone."""
    kinds: dict[str, type] = {
        "dtype": str, "d": int, "source": dict, "tokens": int, "contexts": int, "complete": bool, "shards": list,
    }  # fmt: skip
    shard_kinds: dict[str, type] = {"file": str, "tokens": int, "contexts": int, "bytes": int, "sha256": str}
    for key, kind in kinds.items():
        if not isinstance(manifest.get(key), kind):
            return f"{key} is missing or not of type {kind.__name__}"
    if manifest["dtype"] not in DTYPES:
        return f"unknown dtype {manifest['dtype']!r}"
    for shard in manifest["shards"]:
        if not isinstance(shard, dict) or "cursor" not in shard:
            return "an entry of shards is no object or has no cursor"
        for key, kind in shard_kinds.items():
            if not isinstance(shard.get(key), kind):
                return f"{key} of a shard is missing or not of type {kind.__name__}"
        if not _SHARD_NAME.fullmatch(shard["file"]):  # which also keeps every path inside the folder
            return f"{shard['file']!r} is not the name of a shard"
    for key in ("tokens", "contexts"):
        if manifest[key] != sum(shard[key] for shard in manifest["shards"]):
            return f"{key} is not the sum over the shards"
    return None


def _fault(path: Path, shard: dict[str, Any], verify: bool) -> str | None:
    """Return what is wrong with a shard's file, as the end of a sentence, or None."""
    file = path / shard["file"]
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != shard["bytes"]:
        return f"is truncated or overwritten: {size:,} bytes instead of {shard['bytes']:,}"
    if verify and file_sha256(file) != shard["sha256"]:
        return "is corrupted: its SHA-256 differs from the manifest's"
    return None
