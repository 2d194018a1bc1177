"""The trainer: one object, one call a batch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekern.modules import SAE
from sparsekern.ops._checks import check_finite
from sparsekern.optim import Adam
from sparsekern.training.config import TrainerConfig
from sparsekern.training.graph import StepGraphs
from sparsekern.training.schedule import default_lr, warmup_and_decay


class StepStats(NamedTuple):
    """What one step did. Tensors are 0-dimensional and stay on the device until somebody reads them.

    Attributes
    ----------
    step : int
        Steps done, this one included.
    tokens : int
        Tokens seen, this step's included.
    lr : float
        Learning rate of this step.
    loss, fvu, l0, grad_norm, dead_fraction : Tensor []
        Loss and FVU of the batch before the update, active latents a token, global gradient norm before clipping,
        share of latents that count as dead.
    skipped : Tensor []
        Batches so far whose loss was not finite, as from NaN in them or by overflow. They change nothing and are
        noticed when these numbers are read; on a CPU, NaN and infinity in a batch raise at once.
    measures : dict[str, Tensor]
        What else the module measures, such as the loads of experts.
    """

    step: int
    tokens: int
    lr: float
    loss: Tensor
    fvu: Tensor
    l0: Tensor
    grad_norm: Tensor
    dead_fraction: Tensor
    skipped: Tensor
    measures: dict[str, Tensor]

    def to_floats(self) -> dict[str, float]:
        """All entries as Python numbers; waits for the device.

        Raises
        ------
        ValueError
            If batches were skipped, for not being finite.
        """
        if self.skipped > 0:
            raise ValueError(
                f"x held NaN or infinity, or made the loss overflow, in {int(self.skipped)} of {self.step} batches, "
                "which changed nothing; remove or repair such rows. validate=True tells at once which"
            )
        found = self._asdict()
        found |= found.pop("measures")
        return {name: value.item() if isinstance(value, Tensor) else value for name, value in found.items()}


class Trainer:
    """Trains an SAE one batch at a time: forward, backward, clip, optimizer, decoder norm.

    Parameters
    ----------
    sae : SAE
        Trained in place, on the device where it is.
    config : TrainerConfig or None
        Options; those given by keyword come on top.
    **options
        Any field of :class:`TrainerConfig`: ``lr``, ``optimizer``, ``steps``, ``warmup_steps``, ``clip_norm`` …

    Examples
    --------
    >>> sae = sk.SAE(384, 24576, sk.TopK(32))
    >>> trainer = sk.Trainer(sae, lr=1e-3, steps=len(batches))
    >>> for x in batches:
    ...     stats = trainer.step(x)
    """

    def __init__(self, sae: SAE, config: TrainerConfig | None = None, **options: Any) -> None:
        given = {} if config is None else {name: getattr(config, name) for name in TrainerConfig.names()}
        self.config = config = TrainerConfig.of({**given, **options})
        self.sae = sae
        self.steps_done = 0
        self.tokens_seen = 0
        self.peak_lr = default_lr(sae.d_sae) if config.lr is None else config.lr
        if config.warmup_steps is not None:
            self.warmup_steps = config.warmup_steps
        else:
            self.warmup_steps = 1000 if config.steps is None else min(1000, config.steps // 20)
        self._skipped = torch.zeros((), dtype=torch.int64, device=sae.device)
        self._graphs = StepGraphs(self) if config.cuda_graph and sae.device.type == "cuda" else None
        self._named = {name: p for name, p in sae.named_parameters() if p.requires_grad}
        self.optimizer = Adam(sae, betas=(config.beta1, config.beta2), eps=config.eps, rest_after=config.rest_after)

    def step(self, x: Tensor, target: Tensor | None = None) -> StepStats:
        """One step on the batch `x` ``[..., d_in]``; a ValueError for bad input leaves everything as it was."""
        sae, config = self.sae, self.config
        device = sae.device
        x = x.to(device)
        target = None if target is None else target.to(device)
        sae.check_batch(x, target)
        if target is not None and (config.validate or device.type == "cpu"):
            check_finite("target", target)
        if config.validate and device.type != "cpu":
            check_finite("x", x)
        if config.fit_start and self.steps_done == 0 and sae.is_fresh():
            sae.fit_start_(x, config.b_dec_init, target)
        sae.train()
        lr = self.peak_lr * warmup_and_decay(self.steps_done, self.warmup_steps, config.steps, config.decay_share)
        room = sae.dead_room()
        if self._graphs is None:
            measures = self.device_step(x, target, room, lr)
        else:
            measures = self._graphs.step(x, target, room, lr)
        tokens = x.numel() // sae.d_in
        sae.ask_for_dead(tokens)
        self.steps_done += 1
        self.tokens_seen += tokens
        of_step = {name: measures.pop(name) for name in StepStats._fields if name in measures}
        return StepStats(self.steps_done, self.tokens_seen, lr, **of_step, measures=measures)

    def device_step(self, x: Tensor, target: Tensor | None, room: int | None, lr: float | Tensor) -> dict[str, Tensor]:
        """What of a step is work for the device: loss, gradients, update, and the tensors of its statistics."""
        out = self.sae.loss_with_room(x, target, room)
        grad_norm = self.optimizer.step(out.total, lr=lr, clip_norm=self.config.clip_norm or float("inf"))
        loss = out.total.detach()
        self.sae.after_step_(loss.isfinite())
        self._skipped += ~loss.isfinite()
        return {
            "loss": loss,
            "fvu": out.fvu,
            "l0": out.codes.l0().float().mean(),
            "grad_norm": grad_norm,
            "dead_fraction": self.sae.dead_mask().float().mean(),
            "skipped": self._skipped.clone(),
            **out.measures,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that a bit-identical continuation needs, as flat named tensors: weights, optimizer, counters."""
        state = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        for name, parameter in self._named.items():
            for key, value in self.optimizer.state[parameter].items():
                state[f"optimizer.{name}.{key}"] = value
        state["trainer.steps_done"] = torch.tensor(self.steps_done)
        state["trainer.tokens_seen"] = torch.tensor(self.tokens_seen)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned, on a trainer of the same configuration.

        Raises
        ------
        ValueError
            If the state is of another shape of SAE or another optimizer.
        """
        weights = {name.removeprefix("sae."): t for name, t in state.items() if name.startswith("sae.")}
        try:
            self.sae.load_state_dict(weights)
            for name, parameter in self._named.items():
                prefix = f"optimizer.{name}."
                moments = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
                self.optimizer.state[parameter] = {key: t.to(parameter.device, copy=True) for key, t in moments.items()}
            self.steps_done = int(state["trainer.steps_done"])
            self.tokens_seen = int(state["trainer.tokens_seen"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"the state does not fit this trainer: {error}") from error
