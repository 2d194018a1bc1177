"""Fill an activation store: from a model that runs over texts, or from activation files that exist already."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsekern.data.models import (
    EMBEDDED_MODEL,
    Chunk,
    batches_of,
    check_context_length,
    chunk_texts,
    load_model,
    padded,
)
from sparsekern.data.store import ActivationStore, StoreWriter, file_sha256
from sparsekern.data.texts import stdlib_docstrings
from sparsekern.hooks import first_tensor, named_module

__all__ = ["EMBEDDED_MODEL", "harvest", "import_activations"]

_WINDOW = 2048  # texts that are tokenised and sorted by length together
_MATRIX_CONTEXT = 256  # rows of an imported matrix that count as one context
_IMPORT_ROWS = 4096  # rows that are read from a file at a time; a multiple of _MATRIX_CONTEXT

Progress = Callable[[int, int | None], None]


def harvest(
    output: str | os.PathLike[str],
    *,
    model: str = EMBEDDED_MODEL,
    texts: Sequence[str] | None = None,
    hook: str | None = None,
    dtype: str = "float32",
    context_length: int = 128,
    batch_tokens: int = 4096,
    shard_tokens: int = 65536,
    drop_special: bool = True,
    max_tokens: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> ActivationStore:
    """Run a model over texts and store the output of one of its modules, a row a token.

    An interrupted harvest is resumed by the same call, bit for bit (on the same machine, with as many threads): shards
    close at batch borders, and the manifest says with which batch to go on. A finished store of the same settings is
    verified and returned as it is.

    Parameters
    ----------
    output
        Folder of the store.
    model
        :data:`EMBEDDED_MODEL`, a local folder, or the id of a model on the Hugging Face hub. Only safetensors weights
        are loaded, and never code.
    texts
        The texts; by default :func:`stdlib_docstrings`.
    hook
        Name of a module as in ``model.named_modules()``; by default the middle one of the transformer blocks. Its
        output, or the first entry of it, must be ``[batch, positions, d]``. The forward pass stops there.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: how activations are stored. The model runs in float32.
    context_length
        Most tokens of a context, special ones included; longer texts become several contexts.
    batch_tokens
        Tokens that run through the model at a time, padding included: many short contexts, or few long ones.
    shard_tokens
        Tokens after which a shard is closed.
    drop_special
        Whether to leave the special tokens that the tokenizer adds ([CLS], [SEP], …) out of the store.
    max_tokens
        Stop at the first batch border at which so many tokens are stored.
    device
        Where the model runs; by default a CUDA device if there is one, else the CPU.
    progress
        Called after each batch as ``progress(done_tokens, total_tokens)``; the total is an estimate that becomes exact.

    Returns
    -------
    ActivationStore

    Raises
    ------
    ValueError
        If an argument is out of range, a text is empty, the model or the hook does not exist, or an activation is not
        finite.
    StoreError
        If the folder holds something else, or the disk is full.
    ImportError
        If transformers is not installed.
    """
    for name, value in [
        ("batch_tokens", batch_tokens),
        ("shard_tokens", shard_tokens),
        ("max_tokens", max_tokens),
    ]:
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if isinstance(texts, str):
        raise ValueError("texts must be a sequence of strings, not one string")
    texts = stdlib_docstrings() if texts is None else list(texts)
    _check_texts(texts)
    runner = _Runner(model, hook, context_length, drop_special, device)
    writer = StoreWriter(
        output,
        dtype=dtype,
        d=runner.d,
        source={
            "kind": "harvest",
            "model": model,
            "hook": runner.hook,
            "context_length": context_length,
            "drop_special": drop_special,
            "batch_tokens": batch_tokens,
            "shard_tokens": shard_tokens,
            "max_tokens": max_tokens,
            "texts": len(texts),
            "texts_sha256": _texts_sha256(texts),
        },
        vocab=runner.vocab(),
        shard_tokens=shard_tokens,
    )
    if not writer.complete:
        _run(writer, runner, texts, batch_tokens, max_tokens, progress)
    return ActivationStore(output, verify=False)  # the writer has verified what it did not write itself


def _run(
    writer: StoreWriter,
    runner: _Runner,
    texts: Sequence[str],
    batch_tokens: int,
    max_tokens: int | None,
    progress: Progress | None,
) -> None:
    first_window, first_batch = writer.cursor or (0, 0)
    characters_left = sum(map(len, texts[first_window * _WINDOW :]))
    for window in range(first_window, -(-len(texts) // _WINDOW)):
        window_texts = texts[window * _WINDOW : (window + 1) * _WINDOW]
        window_characters = sum(map(len, window_texts))
        characters_left -= window_characters
        chunks = sorted(runner.chunks(window_texts), key=lambda chunk: len(chunk[0]))  # little padding; stable
        batches = batches_of(chunks, batch_tokens)
        first = first_batch if window == first_window else 0
        # What is stored, what is left of this window, and an estimate of what the later texts will give.
        total = writer.tokens + sum(map(_stored, batches[first:]))
        total += _stored(chunks) * characters_left // window_characters
        for number, batch in enumerate(batches[first:], start=first + 1):
            writer.add(*runner(batch))
            if progress is not None:
                progress(writer.tokens, total if max_tokens is None else min(total, max(max_tokens, writer.tokens)))
            if max_tokens is not None and writer.tokens >= max_tokens:
                writer.finish()
                return
            if writer.full:
                writer.flush(cursor=[window, number])
    writer.finish()


def _stored(chunks: Sequence[Chunk]) -> int:
    return sum(sum(keep) for _, keep in chunks)


def _check_texts(texts: Sequence[str]) -> None:
    if not texts:
        raise ValueError("texts is empty: there is nothing to run the model over")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{index}] is empty or no string: leave it out")


def _texts_sha256(texts: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)}:".encode() + data)  # the length keeps ["ab"] and ["a", "b"] apart
    return digest.hexdigest()


class _Reached(Exception):  # noqa: N818 - not an error
    """Carries the output of the hooked module out of the forward pass, whose rest is not needed."""


class _Runner:
    """A model and its tokenizer, from texts to the activations at one hook."""

    def __init__(
        self,
        name: str,
        hook: str | None,
        context_length: int,
        drop_special: bool,
        device: torch.device | str | None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.tokenizer, model = load_model(name)
        self.model = model.to(self.device)
        self.drop_special = drop_special
        self.context_length = context_length
        check_context_length(self.tokenizer, model, context_length)
        self.hook = _middle_block(model) if hook is None else hook
        named_module(model, self.hook, "hook").register_forward_hook(_leave)
        self.d = self._outputs([[0]]).shape[-1]

    def vocab(self) -> list[str]:
        """Return the token strings by id."""
        return [piece or "" for piece in self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))]

    def chunks(self, texts: Sequence[str]) -> list[Chunk]:
        """Tokenise texts into contexts; those with no token to store are left out."""
        chunks = [
            (ids, [not self.drop_special or ordinary for ordinary in flags])
            for ids, flags in chunk_texts(self.tokenizer, texts, self.context_length)
        ]
        return [chunk for chunk in chunks if any(chunk[1])]

    def __call__(self, chunks: Sequence[Chunk]) -> tuple[Tensor, Tensor, list[int]]:
        """Return activations ``[n, d]``, token ids ``[n]`` and context lengths of the stored tokens."""
        outputs = self._outputs([ids for ids, _ in chunks])
        keep = padded([kept for _, kept in chunks], torch.bool)
        token_ids = padded([ids for ids, _ in chunks], torch.int32)
        return outputs[keep.to(self.device)], token_ids[keep], keep.sum(1).tolist()

    @torch.inference_mode()
    def _outputs(self, contexts: Sequence[list[int]]) -> Tensor:
        ids = padded(contexts, torch.int64)
        mask = padded([[1] * len(context) for context in contexts], torch.int64)
        try:
            self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        except _Reached as reached:
            output, _ = first_tensor(reached.args[0], self.hook)
        else:
            raise ValueError(f"hook {self.hook!r} does not run in a forward pass: give another")
        if output.ndim != 3 or output.shape[:2] != ids.shape:
            shapes = f"{list(output.shape)} for input {list(ids.shape)}"
            raise ValueError(f"hook {self.hook!r} gives {shapes}, not [batch, positions, d]")
        return output


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    raise _Reached(output)


def _middle_block(model: Any) -> str:
    depth = getattr(model.config, "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return f"{name}.{depth // 2}"
    raise ValueError("the model has no list of transformer blocks: name a module with hook=")


def import_activations(
    output: str | os.PathLike[str],
    source: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    shard_tokens: int = 65536,
    progress: Progress | None = None,
) -> ActivationStore:
    """Make a store of activation files. An interrupted import is resumed by the same call.

    Files are mapped, never loaded whole.

    Parameters
    ----------
    output
        Folder of the store.
    source
        A ``.npy`` or ``.safetensors`` file, or a folder that is searched for them recursively (sorted by name). Each
        array holds floating-point activations: ``[contexts, positions, d]``, or ``[rows, d]``, of which each 256 rows
        count as one context. In a safetensors file every tensor is taken.
    dtype
        ``"float32"``, ``"float16"`` or ``"bfloat16"``: how activations are stored.
    shard_tokens
        Rows after which a shard is closed.
    progress
        Called as ``progress(done_rows, total_rows)``.

    Returns
    -------
    ActivationStore
        Its token ids are −1.

    Raises
    ------
    ValueError
        If nothing is found, or an array is not floating-point, of another shape or width, empty or not finite; the
        message names the file.
    StoreError
        If the folder holds something else, or the disk is full.
    """
    files = _activation_files(Path(source))
    arrays = [array for file in files for array in _arrays_in(file)]
    for array in arrays:
        if array.d != arrays[0].d:
            raise ValueError(f"{array.label} has width {array.d}, but {arrays[0].label} has {arrays[0].d}")
    writer = StoreWriter(
        output,
        dtype=dtype,
        d=arrays[0].d,
        source={
            "kind": "import",
            "files": [file.name for file in files],
            "files_sha256": [file_sha256(file) for file in files],
            "shard_tokens": shard_tokens,
        },
        shard_tokens=shard_tokens,
    )
    if not writer.complete:
        total = sum(array.rows for array in arrays)
        pieces = [(array, start) for array in arrays for start in range(0, array.shape[0], array.step)]
        first = writer.cursor or 0
        for number, (array, start) in enumerate(pieces[first:], start=first + 1):
            rows, lengths = array.read(start)
            try:
                writer.add(rows, torch.full((rows.shape[0],), -1), lengths)
            except ValueError as error:
                raise ValueError(f"{array.label}: {error}") from error
            if progress is not None:
                progress(writer.tokens, total)
            if writer.full:
                writer.flush(cursor=number)
        writer.finish()
    return ActivationStore(output, verify=False)  # the writer has verified what it did not write itself


@dataclass(frozen=True)
class _Array:
    """An activation array in a file, read in pieces along its first axis; ``key`` is None for ``.npy``."""

    file: Path
    key: str | None
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        return str(self.file) if self.key is None else f"{self.file} ({self.key})"

    @property
    def d(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def step(self) -> int:
        return _IMPORT_ROWS if len(self.shape) == 2 else max(1, _IMPORT_ROWS // self.shape[1])

    def read(self, start: int) -> tuple[Tensor, list[int]]:
        """Return the rows ``[n, d]`` of the piece that begins at ``start``, and the lengths of its contexts."""
        # Opened for each piece: a folder may hold more files than a process may keep open.
        if self.key is None:
            mapped = np.load(self.file, mmap_mode="r", allow_pickle=False)[start : start + self.step]
            block = torch.from_numpy(np.array(mapped, dtype=np.float32))  # also puts the bytes in native order
        else:
            block = safe_open(self.file, framework="pt").get_slice(self.key)[start : start + self.step]
        if len(self.shape) == 3:
            return block.reshape(-1, self.d), [self.shape[1]] * block.shape[0]
        full, rest = divmod(block.shape[0], _MATRIX_CONTEXT)
        return block, [_MATRIX_CONTEXT] * full + [rest] * (rest > 0)


def _activation_files(source: Path) -> list[Path]:
    kinds = {".npy", ".safetensors"}
    candidates = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [file for file in candidates if file.suffix in kinds and file.is_file()]
    if not files:
        raise ValueError(f"{source} is or holds no .npy or .safetensors file")
    return files


def _arrays_in(file: Path) -> Iterator[_Array]:
    for key, shape, is_float in _headers(file):
        array = _Array(file, key, shape)
        if not is_float:
            raise ValueError(f"{array.label} is not floating-point")
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(
                f"{array.label} has shape {list(shape)}: give [contexts, positions, d] or [rows, d], not empty"
            )
        yield array


def _headers(file: Path) -> list[tuple[str | None, tuple[int, ...], bool]]:
    """Return key, shape and whether it is floating-point for each array in a file."""
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            return [(None, array.shape, array.dtype.kind == "f")]
        handle = safe_open(file, framework="pt")
        slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
        return [
            (key, tuple(part.get_shape()), part.get_dtype() in {"F64", "F32", "F16", "BF16"})
            for key, part in slices.items()
        ]
    except (OSError, EOFError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
