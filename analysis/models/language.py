"""Train a small causal language model: ``python -m sparsekern.analysis.models.language docstrings-relu-0 --seed 0``."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekern.analysis.models.architecture import CONTEXT, HIDDEN, NGRAM_ORDER, SEPARATOR, VOCAB, new_model
from sparsekern.analysis.models.corpus import corpus
from sparsekern.analysis.models.ngram import KneserNey
from sparsekern.analysis.models.report import card
from sparsekern.files import write_atomically, write_json
from sparsekern.progress import Progress

_ADAMW_LR = 2e-2  # embedding and norms
_MUON_LR = 4e-2  # all other matrices
_DECAY = 0.01
_WARMUP = 100  # steps
_MEASURES = 20  # held-out losses over a training
_MEASURED_TOKENS = 65_536  # at each of them but the last


def train_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of :data:`VOCAB` tokens, as a fast tokenizer that puts the separator before each text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SEPARATOR} $A", special_tokens=[(SEPARATOR, tokenizer.token_to_id(SEPARATOR))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SEPARATOR,
        eos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=CONTEXT,
    )


def stream(tokenizer: Any, texts: list[str]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """All texts as one stream of token ids, a separator before each."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts)
    return np.concatenate([np.array(one.ids, dtype=np.int64) for one in encoded])


def train(
    model: Any, ids: Tensor, held_out: Tensor, tokens: int, batch: int, seed: int, shown: bool = True
) -> list[dict[str, float]]:
    """Train a model on windows of a stream; returns the loss curve.

    Every pass over the stream cuts it anew, from another start, and shuffles the windows. Matrices are updated by Muon,
    embedding and norms by AdamW; both rates rise over 100 steps and then fall linearly to 0. bfloat16 autocast.
    """
    device = next(model.parameters()).device
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=_DECAY),
        torch.optim.AdamW(others, lr=_ADAMW_LR, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    steps = tokens // (batch * CONTEXT)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(one, lambda step: min((step + 1) / _WARMUP, 1 - step / steps))
        for one in optimizers
    ]
    batches = _batches(ids, batch, torch.Generator().manual_seed(seed))
    curve, recent = [], []
    with Progress("training", total=steps * batch * CONTEXT, shown=shown) as progress:
        for step in range(1, steps + 1):
            windows = next(batches).to(device)
            loss = _losses(model, windows).mean()
            loss.backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            recent.append(loss.item())
            if step % max(1, steps // _MEASURES) == 0 or step == steps:
                kept = held_out[: _MEASURED_TOKENS if step < steps else None]
                entry = {"tokens": step * batch * CONTEXT, "training": sum(recent) / len(recent)}
                curve.append(entry | {"held_out": held_out_loss(model, kept)})
                recent.clear()
            progress.update(step * batch * CONTEXT, note=f"loss {loss.item():.3f}")
    return curve


def _batches(ids: Tensor, batch: int, generator: torch.Generator) -> Any:
    while True:
        start = int(torch.randint(CONTEXT, (1,), generator=generator))
        windows = _windows(ids[start:])
        order = torch.randperm(len(windows), generator=generator)
        for places in order.split(batch):
            if len(places) == batch:
                yield windows[places]


def _windows(ids: Tensor) -> Tensor:
    return ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def _losses(model: Any, windows: Tensor) -> Tensor:
    """Nats of each token but the first of its window."""
    with torch.autocast(windows.device.type, torch.bfloat16, enabled=model.training):
        logits = model(input_ids=windows).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def held_out_loss(model: Any, ids: Tensor) -> float:
    """Mean nats a token, in windows of the context length; the first token of a window is not counted."""
    model.eval()
    device = next(model.parameters()).device
    losses = [_losses(model, windows.to(device)).cpu() for windows in _windows(ids).split(32)]
    model.train()
    return float(torch.cat(losses).double().mean())


def ngram_losses(ids: Tensor, held_out: Tensor) -> dict[str, float]:
    """Mean nats a token of Kneser–Ney n-grams, by their order."""
    model = KneserNey(ids.numpy(), VOCAB, NGRAM_ORDER)
    return {
        str(order): float(-np.log(model.probabilities(held_out.numpy(), order)).mean())
        for order in range(1, NGRAM_ORDER + 1)
    }


def main() -> None:
    """Train the model and write its folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="docstrings-relu-0 and the like: names the folder, and with it the kind of MLP")
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the text")
    parser.add_argument("--tokens", type=int, default=12_000_000, help="to train on")
    parser.add_argument("--batch", type=int, default=16, help=f"windows of {CONTEXT} tokens a step")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    kinds = [kind for kind in HIDDEN if kind in arguments.name.split("-")]
    if len(kinds) != 1:
        parser.error(f"the name must have one of {', '.join(HIDDEN)} in it, got {arguments.name}")
    text = corpus()
    tokenizer = train_tokenizer(text.training)  # the same for every seed: BPE has no chance in it
    ids, held_out = (torch.from_numpy(stream(tokenizer, part)) for part in (text.training, text.held_out))
    model = new_model(kinds[0], arguments.seed).to(arguments.device).train()
    start, cpu_start = time.perf_counter(), time.process_time()
    curve = train(model, ids, held_out, arguments.tokens, arguments.batch, arguments.seed)
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
    model = model.half()
    folder = arguments.output / arguments.name
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    _name_known_class(folder / "tokenizer_config.json")
    record = {
        "name": arguments.name,
        "kind": kinds[0],
        "seed": arguments.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": curve[-1]["tokens"],
        "text_tokens": len(ids),
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {_threads()}",
        **seconds,
        "held_out": {
            "tokens": len(held_out),
            "characters_per_token": sum(map(len, text.held_out)) / len(held_out),
            "nats_per_token": held_out_loss(model.float(), held_out),
            "ngrams_nats_per_token": ngram_losses(ids, held_out),
        },
        "curve": curve,
        "sources": text.sources,
        "torch": torch.__version__,
    }
    write_json(folder / "training.json", record)
    write_atomically(folder / "README.md", card(record).encode())


def _name_known_class(path: Path) -> None:
    """Name the tokenizer's class as transformers before its release 5 knows it too."""
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(path, settings)


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)} of {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
