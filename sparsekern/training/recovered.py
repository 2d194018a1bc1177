"""What an SAE costs a language model in whose place it stands: cross-entropy and KL divergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.hooks import evaluating, rewritten
from sparsekern.modules import SAE
from sparsekern.splice import splice

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class LossRecovered:
    """Means over `tokens` predicted tokens, in nats.

    Attributes
    ----------
    ce_clean : float
        Cross-entropy of the model as it is.
    ce_spliced : float
        With the module's output replaced by the SAE's reconstruction.
    ce_zero, ce_mean : float
        With it replaced by zeros; by its mean over all replaced tokens.
    kl : float
        KL divergence of the spliced model's prediction from the clean one's, ``KL(clean ‖ spliced)``.
    """

    tokens: int
    ce_clean: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl: float

    @property
    def recovered_from_zero(self) -> float:
        """``(CE_zero − CE_spliced) / (CE_zero − CE_clean)``: 1 for a perfect SAE, 0 for one that gives zeros."""
        return self._recovered(self.ce_zero)

    @property
    def recovered_from_mean(self) -> float:
        """The same from mean ablation, which destroys less: the stricter of the two."""
        return self._recovered(self.ce_mean)

    def _recovered(self, ablated: float) -> float:
        lost = ablated - self.ce_clean
        return (ablated - self.ce_spliced) / lost if lost else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All measures as plain numbers."""
        return {
            **asdict(self),
            "recovered_from_zero": self.recovered_from_zero,
            "recovered_from_mean": self.recovered_from_mean,
        }


@torch.no_grad()
def loss_recovered(
    model: nn.Module,
    module: str,
    sae: SAE,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    read: str | None = None,
    progress: Progress | None = None,
) -> LossRecovered:
    """How much of a causal language model's loss survives the replacement of a module's output by an SAE.

    Four forward passes a batch. Model and SAE are in evaluation mode meanwhile. Memory holds the log-probabilities
    of a batch, tokens × vocabulary, about four times: keep batches small.

    Parameters
    ----------
    model : Module
        Called as ``model(**batch)``; its output has ``logits [batch, positions, vocabulary]``, those at position t for
        the token at t + 1. For example transformers' ``AutoModelForCausalLM``.
    module : str
        Name of the submodule, as in :func:`sparsekern.splice`.
    sae : SAE
        What takes its place.
    batches : iterable of Tensor, or of mapping of str to Tensor
        Token ids ``[batch, positions]``, or with names, as tokenizers give them: ``input_ids`` and, optionally,
        ``attention_mask``, ``special_tokens_mask`` (not for the model) and others. Padding neither counts nor is
        replaced; special tokens count, but are not replaced, as SAEs are mostly trained without them.
    read : {"output", "input"} or None
        As for :func:`sparsekern.splice`.
    progress : callable or None
        Called as ``progress(done_tokens, total_tokens)``.

    Raises
    ------
    ValueError
        If there is nothing to predict, the output has no such logits, a prediction depends on later tokens (an encoder
        or masked language model), or the module is unknown or does not run.

    References
    ----------
    Bricken et al., *Towards monosemanticity* (2023), and Gao et al. (arXiv 2406.04093), section 4.1, for the measure.
    """
    device = next(model.parameters()).device
    prepared = [_Batch(batch, device) for batch in batches]
    total = sum(batch.tokens for batch in prepared)
    if total == 0:
        raise ValueError("batches must hold contexts of at least two tokens: there is nothing to predict")
    mean = _Mean(module)
    sums = dict.fromkeys(("clean", "spliced", "zero", "mean", "kl"), 0.0)
    with evaluating(model, sae):
        _check_causal(model, prepared)
        done = 0
        for batch in prepared:
            with rewritten(model, module, mean.recorder(batch)):
                clean = batch.log_probabilities(model)
            with splice(model, module, sae, read=read, where=batch.replaced):
                spliced = batch.log_probabilities(model)
            sums["clean"] += batch.loss(clean)
            sums["spliced"] += batch.loss(spliced)
            sums["kl"] += _divergence(clean, spliced)
            del clean, spliced
            with rewritten(model, module, batch.constant(0.0)):
                sums["zero"] += batch.loss(batch.log_probabilities(model))
            done += batch.tokens
            if progress is not None:
                progress(done, 2 * total)
        for batch in prepared:
            with rewritten(model, module, batch.constant(mean.value())):
                sums["mean"] += batch.loss(batch.log_probabilities(model))
            done += batch.tokens
            if progress is not None:
                progress(done, 2 * total)
    means = {name: value / total for name, value in sums.items()}
    return LossRecovered(total, means["clean"], means["spliced"], means["zero"], means["mean"], means["kl"])


class _Batch:
    """A batch of contexts: what the model is given, which tokens are replaced, and which predictions count."""

    def __init__(self, batch: Tensor | Mapping[str, Tensor], device: torch.device) -> None:
        given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        self.given = {name: tensor.to(device) for name, tensor in given.items()}
        special = self.given.pop("special_tokens_mask", None)
        ids = self.given.get("input_ids")
        if ids is None or ids.dim() != 2:
            shape = None if ids is None else tuple(ids.shape)
            raise ValueError(f"a batch must have input_ids [batch, positions], got {shape}")
        self.ids = ids
        self.attended = self.given.get("attention_mask", torch.ones_like(ids)).bool()
        self.replaced = self.attended if special is None else self.attended & ~special.bool()
        self.counted = self.attended[:, :-1] & self.attended[:, 1:]
        self.tokens = int(self.counted.sum())

    def log_probabilities(self, model: nn.Module) -> Tensor:
        """What the model says about each counted token, ``[tokens, vocabulary]``."""
        return logits_of(model, self.given)[:, :-1][self.counted].float().log_softmax(-1)

    def loss(self, log_probabilities: Tensor) -> float:
        targets = self.ids[:, 1:][self.counted]
        return -log_probabilities.gather(1, targets[:, None]).double().sum().item()

    def constant(self, value: Tensor | float) -> Callable[[Tensor | None, Tensor], Tensor]:
        """For :func:`rewritten`: `value` at the replaced tokens."""

        def rewrite(_: Tensor | None, output: Tensor) -> Tensor:
            constant = torch.as_tensor(value, dtype=output.dtype, device=output.device)
            return torch.where(self.replaced[:, :, None], constant, output)

        return rewrite


class _Mean:
    """The mean output of a module over the replaced tokens of all batches."""

    def __init__(self, module: str) -> None:
        self.module, self.sum, self.count = module, torch.zeros(()), 0

    def recorder(self, batch: _Batch) -> Callable[[Tensor | None, Tensor], Tensor]:
        """For :func:`rewritten`: changes nothing."""

        def record(_: Tensor | None, output: Tensor) -> Tensor:
            if output.dim() != 3 or output.shape[:2] != batch.ids.shape:
                shapes = f"{tuple(output.shape)} for input_ids {tuple(batch.ids.shape)}"
                raise ValueError(f"module {self.module!r} gives {shapes}, not [batch, positions, d]")
            rows = output[batch.replaced].double()
            self.sum = self.sum.to(rows) + rows.sum(0)
            self.count += len(rows)
            return output

        return record

    def value(self) -> Tensor:
        if self.count == 0:
            raise ValueError(f"module {self.module!r} does not run in a forward pass, or all tokens are special")
        return self.sum / self.count


def logits_of(model: nn.Module, given: Mapping[str, Tensor]) -> Tensor:
    """The logits ``[batch, positions, vocabulary]`` that the model gives."""
    logits = getattr(model(**given), "logits", None)
    if logits is None:
        raise ValueError(
            f"{type(model).__name__} gives no logits: it has no language-model head, as encoders such as MiniLM have "
            "none. Give a causal language model, such as AutoModelForCausalLM loads"
        )
    if logits.dim() != 3 or logits.shape[:2] != given["input_ids"].shape:
        raise ValueError(f"logits must be [batch, positions, vocabulary], got shape {tuple(logits.shape)}")
    return logits


def _check_causal(model: nn.Module, batches: list[_Batch]) -> None:
    """Raise ValueError where another last token changes what the model says before it."""
    batch = next(batch for batch in batches if batch.tokens)
    row = int(batch.counted.any(1).nonzero()[0])
    size = batch.ids.shape[0]
    given = {name: value[row : row + 1] if len(value) == size else value for name, value in batch.given.items()}
    last = int(batch.attended[row].nonzero()[-1])
    other = given["input_ids"].clone()
    other[0, last] += -1 if other[0, last] > 0 else 1
    before = batch.attended[row, :last].nonzero().squeeze(1)
    one, two = (logits_of(model, {**given, "input_ids": ids})[0, before] for ids in (given["input_ids"], other))
    # Kernels may round otherwise for other values, so that equality to the bit is too much to ask.
    tolerance = max(1e-4, 8 * torch.finfo(one.dtype).eps) * one.abs().max()
    if (one - two).abs().max() > tolerance:
        raise ValueError(
            f"{type(model).__name__} sees the tokens that it would have to predict, as masked language models do: "
            "the loss is defined for causal language models"
        )


def _divergence(clean: Tensor, spliced: Tensor) -> float:
    """``Σ KL(clean ‖ spliced)`` of log-probabilities; what the clean model rules out adds nothing."""
    chance = clean.exp()
    return torch.where(chance > 0, chance * (clean - spliced), 0).double().sum().item()
