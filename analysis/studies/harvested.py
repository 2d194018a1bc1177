"""The model that a store was harvested from, and held-out contexts as it saw them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsekern.analysis.tokens import HeldOut
from sparsekern.data import ActivationStore, load_model
from sparsekern.data.models import padded
from sparsekern.hooks import recorded

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_CLOSE = 1e-2  # of the largest activation; stores may be in half precision


@dataclass(frozen=True, eq=False)
class Harvested:
    """A model and contexts that its activations in a store are of.

    Attributes
    ----------
    tokenizer, model : Any
        The model with its head where it is causal, in evaluation mode.
    causal : bool
        Whether it predicts the next token.
    hook : str
        Name, in `model`, of the module whose output is in the store.
    batches : list of dict of str to Tensor [contexts, positions]
        ``input_ids``, ``attention_mask``, and ``special_tokens_mask``: 1 where a token is in no row of the store.
    """

    tokenizer: Any
    model: Any
    causal: bool
    hook: str
    batches: list[dict[str, Tensor]]

    @staticmethod
    def of(store: ActivationStore, held_out: HeldOut, batch_contexts: int = 16) -> Harvested:
        """The model of a store, and the contexts of held-out tokens, whole, in the order of the tokens.

        Raises
        ------
        ValueError
            If the store was not harvested from a model, or the model now gives other activations.
        """
        name, hook = store.source.get("model"), store.source.get("hook")
        if name is None or hook is None:
            raise ValueError(f"the store must be a harvest: {store.path} was imported, and its model is not known")
        tokenizer, model = load_model(name)
        causal = any(kind.endswith(_CAUSAL) for kind in model.config.architectures or ())
        if causal:
            _, model = load_model(name, causal=True)
            hook = f"{model.base_model_prefix}.{hook}"
        contexts = _contexts(store, held_out, tokenizer)
        batches = [
            _batch(contexts[start : start + batch_contexts]) for start in range(0, len(contexts), batch_contexts)
        ]
        harvested = Harvested(tokenizer, model, causal, hook, batches)
        harvested._check(store, held_out)
        return harvested

    def rows(self, batch: dict[str, Tensor]) -> Tensor:
        """Which places of a batch are rows of the store: ``[contexts, positions]`` bool."""
        return batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the model takes."""
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def _check(self, store: ActivationStore, held_out: HeldOut) -> None:
        """That the first batch gives what is stored."""
        first = self.batches[0]
        with recorded(self.model, self.hook) as seen:
            self.model(**self.inputs(first))
        found = seen[0][1][self.rows(first)]
        stored = held_out.x[: len(found)]
        if not torch.allclose(found[: len(stored)], stored, rtol=0, atol=_CLOSE * float(stored.abs().max())):
            raise ValueError(f"{store.path} is not of the model that {store.source['model']} now is: harvest it again")


def _contexts(store: ActivationStore, held_out: HeldOut, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Token ids of each context with its special tokens, and which those are."""
    before, after = _specials(tokenizer) if store.source.get("drop_special", True) else ([], [])
    found = []
    for context in held_out.contexts.unique_consecutive().tolist():
        start, stop = store.context_bounds[context : context + 2].tolist()
        ids = store.token_ids[start:stop].tolist()
        found.append((before + ids + after, [1] * len(before) + [0] * len(ids) + [1] * len(after)))
    return found


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a context."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["special_tokens_mask"]
    first = mask.index(0)
    last = len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def _batch(contexts: list[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    return {
        "input_ids": padded([ids for ids, _ in contexts], torch.int64),
        "attention_mask": padded([[1] * len(ids) for ids, _ in contexts], torch.int64),
        "special_tokens_mask": padded([special for _, special in contexts], torch.int64),
    }
