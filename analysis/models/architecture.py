"""The small language models.

The two kinds differ in the MLP only: ``relu`` is ``W_down relu(W_up x)``, piecewise linear between its norms,
``swiglu`` is ``W_down (silu(W_gate x) · W_up x)``, and its hidden width is two thirds as large, for as many weights.
Everything else is transformers' Llama: RMSNorm before each block, rotary positions, no biases.
"""

from __future__ import annotations

from typing import Any

import torch

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 2048, 256, 128, 4, 4
HIDDEN = {"relu": 512, "swiglu": 344}
"""Width of the MLP by kind."""

SEPARATOR = "<|endoftext|>"
"""The token before each text."""

NGRAM_ORDER = 5
"""Tokens of the longest n-gram of the baseline."""


def new_model(kind: str, seed: int) -> Any:
    """An untrained model of that kind."""
    from transformers import ArceeConfig, ArceeForCausalLM, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN[kind],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    torch.manual_seed(seed)
    # Arcee is Llama with an MLP that has no gate.
    if kind == "relu":
        return ArceeForCausalLM(ArceeConfig(**shape, hidden_act="relu"))
    return LlamaForCausalLM(LlamaConfig(**shape, hidden_act="silu"))
