"""Whose training steps are timed: one class for each implementation, with the same few methods.

A step is forward, backward, clipping, Adam and whatever the library does to its decoder, on a batch ``[B, d]``, with
weights in float32, without AuxK. Of a peer it is the peer's own code that runs, with the peer's own defaults; what is
given is the shape, the learning rate, the device, and whether its matmuls may run in bfloat16.

The docstring of a class says what its step is, and goes into the record. Those of other architectures than TopK are in
:mod:`sparsekern.bench.architectures` and :mod:`sparsekern.bench.peers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.bench.options import CONTENDERS, Case
from sparsekern.modules.activations import Activation
from sparsekern.training.schedule import warmup_and_decay

RUN_STEPS = 1_000_000  # what trainers with a schedule are told: it never ends here


@dataclass(frozen=True)
class Plan:
    """How long a contender trains; by default for ever, at one learning rate. Every library gets the same schedule."""

    steps: int = RUN_STEPS
    warmup_steps: int = 0
    decay_share: float = 0.0

    def factor(self, step: int) -> float:
        """On the learning rate at `step`, from 0."""
        return warmup_and_decay(step, self.warmup_steps, self.steps, self.decay_share)


class Contender:
    """Weights and optimizer of one implementation.

    Parameters
    ----------
    case : Case
        The shape.
    lr : float
        Learning rate.
    device
        Where it trains.
    dtype : torch.dtype
        Of the matmuls: with bfloat16 they run under autocast, where the library leaves that to its user.
    plan : Plan
        Schedule of the learning rate.

    Attributes
    ----------
    imports : tuple of str
        Modules that it needs.
    distribution : str
        The package whose version it is.
    layers : int
        Activations of how many layers a batch is made of.
    modes : tuple of str
        Ways to encode after training, the one to compare by first.
    sparsity : float or None
        Where the number of active latents varies: what :meth:`set_sparsity` may start from.
    aims : bool
        Whether that is a number of active latents, and no coefficient of a penalty.
    ramps : bool
        Whether a comparison of quality raises the penalty from 0, for a start at which half of all latents are active.
    module, optimizer
        What the step trains, and with what.
    """

    imports: tuple[str, ...] = ()
    distribution = "torch"
    layers = 1
    modes: tuple[str, ...] = ("eval",)
    sparsity: float | None = None
    aims = False
    ramps = True
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        case: Case,
        lr: float,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        plan: Plan | None = None,
    ) -> None:
        self.case, self.lr, self.device, self.dtype = case, lr, torch.device(device), dtype
        self.plan = plan or Plan()
        with self.device:  # starting weights are drawn where they will be
            self.build()

    @classmethod
    def load(cls) -> None:
        """Import what it needs, which is done before its memory is measured."""
        for module in cls.imports:
            importlib.import_module(module)

    def build(self) -> None:
        """Make ``module`` and ``optimizer``."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        """What a step's matmuls run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        """What a step takes, from activations ``[layers, B, d]``: `x`, and a target where there is one."""
        return (layers[0],)

    def step(self, x: Tensor) -> Tensor:
        """One training step; returns the loss, which each library scales in its own way."""
        raise NotImplementedError

    def encoder(self) -> Tensor:
        """The encoder's weight as ``[N, d]``, for the matmul that the step is compared with."""
        raise NotImplementedError

    def rows(self, x: Tensor) -> Tensor:
        """The rows ``[B, d]`` that :meth:`encoder` is multiplied with in that matmul."""
        return x

    def input_scale(self, x: Tensor) -> float:
        """The factor that the library's documentation has activations like `x` multiplied with."""
        return 1.0

    def set_sparsity(self, sparsity: float) -> None:
        """Weigh the sparsity penalty so from now on; where the contender aims, aim for so many active latents."""
        raise NotImplementedError

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        """The library's reconstruction of `x`, and how many latents each token has active ``[B]``."""
        raise NotImplementedError

    def settle(self, x: Tensor) -> None:
        """Where the number of active latents varies: move biases or thresholds so that on `x` it is k on average."""

    def state_bytes(self) -> int:
        """Bytes of the parameters and of the optimizer's state."""
        state = [t for moments in self.optimizer.state.values() for t in moments.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.module.parameters(), *state])


class Sparsekern(Contender):
    """``sparsekern.Trainer.step``: FVU, projected gradient, clip 1.0, fused Adam, unit-norm decoder."""

    distribution = "sparsekern"
    ramps = False  # it starts where few latents are active

    def build(self) -> None:
        self.module = self.sae = self.make()
        plan = self.plan
        self.trainer = sk.Trainer(
            self.sae, lr=self.lr, steps=plan.steps, warmup_steps=plan.warmup_steps, decay_share=plan.decay_share
        )
        self.optimizer = self.trainer.optimizer.torch

    def make(self) -> sk.SAE:
        """The module that it trains."""
        return self.with_activation(sk.TopK(self.case.k))

    def with_activation(self, activation: Activation, **options: Any) -> sk.SAE:
        """An SAE of the case's shape."""
        return sk.SAE(self.case.d, self.case.d_sae, activation, aux_coefficient=0, **options)

    def step(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        return self.trainer.step(x, target).loss

    def encoder(self) -> Tensor:
        return self.sae.W_enc

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        self.sae.train(mode == "batch")
        return self.sae(x), self.sae.encode(x).l0()


class Switch(Sparsekern):
    """``sparsekern.Trainer.step`` on a ``SwitchSAE`` of 32 experts, one active: FVU, Switch loss, projected gradient,
    clip 1.0, fused Adam, unit-norm decoder.
    """

    n_experts = 32

    def make(self) -> sk.SAE:
        case = self.case
        experts = min(self.n_experts, case.d_sae // case.k)
        return sk.SwitchSAE(case.d, case.d_sae, sk.TopK(case.k), n_experts=experts, aux_coefficient=0)


class Switch8(Switch):
    """The same with 8 experts."""

    n_experts = 8


class Switch16(Switch):
    """The same with 16 experts."""

    n_experts = 16


class Torch(Contender):
    """The same step in plain PyTorch: dense matmul, ReLU, topk, scatter, dense matmul; clip 1.0, fused Adam."""

    def build(self) -> None:
        d_sae, width = self.case.d_sae, self.width()
        rows = nn.functional.normalize(torch.randn(d_sae, width), dim=1)
        self.W_enc, self.b_enc = nn.Parameter(rows), nn.Parameter(torch.zeros(d_sae))
        self.W_dec, self.b_dec = nn.Parameter(rows.clone()), nn.Parameter(torch.zeros(width))
        self.module = nn.ParameterList([self.W_enc, self.b_enc, self.W_dec, self.b_dec])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self.lr, fused=True)

    def width(self) -> int:
        """Columns of the weights."""
        return self.case.d

    def step(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = self.loss(x)
        loss.backward()
        self.project()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.normalize()
        return loss.detach()

    def encoder(self) -> Tensor:
        return self.W_enc

    def codes(self, x: Tensor) -> Tensor:
        """Codes, dense ``[B, N]``."""
        pre = nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        top = pre.topk(self.case.k, dim=1)
        return torch.zeros_like(pre).scatter(1, top.indices, top.values)

    def loss(self, x: Tensor) -> Tensor:
        residual = x - (self.codes(x) @ self.W_dec + self.b_dec)
        return residual.square().sum() / (x - x.mean(0)).square().sum()

    @torch.no_grad()
    def project(self) -> None:
        grad = self.W_dec.grad
        assert grad is not None
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def normalize(self) -> None:
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True))


class SwitchMasked(Torch):
    """A switch SAE of 16 experts in the form of its released trainer, in plain PyTorch: the dense encoder of all
    experts, ReLU, times the gate of the chosen expert and 0 for the others, top k of all; ``embedding_bag`` for its
    sparse decoder; squared error and Switch loss; clip 1.0, projected gradient, Adam, unit-norm decoder.
    """

    n_experts = 16

    def build(self) -> None:
        super().build()
        case = self.case
        self.experts = min(self.n_experts, case.d_sae // case.k)
        self.router = nn.Parameter(nn.functional.normalize(torch.randn(self.experts, case.d), dim=1))
        self.module = nn.ParameterList([self.W_enc, self.W_dec, self.b_dec, self.router])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self.lr)

    def loss(self, x: Tensor) -> Tensor:
        pre = nn.functional.linear(x - self.b_dec, self.W_enc).relu()
        probability = nn.functional.linear(x - self.b_dec.detach(), self.router).softmax(1)
        best = probability.topk(1, dim=1)
        gate = torch.zeros_like(probability).scatter(1, best.indices, best.values)
        top = (pre * gate.repeat_interleave(self.case.d_sae // self.experts, 1)).topk(self.case.k, sorted=False)
        recon = nn.functional.embedding_bag(top.indices, self.W_dec, per_sample_weights=top.values, mode="sum")
        share = nn.functional.one_hot(best.indices.squeeze(1), self.experts).float().mean(0)
        balance = self.experts * (share * probability.mean(0)).sum()
        return (x - recon - self.b_dec).square().sum(1).mean() + 3 * self.case.d * balance


class TorchCompile(Torch):
    """The plain PyTorch step with loss, projection and normalization through ``torch.compile``."""

    imports = ("torch._dynamo", "torch._inductor.compile_fx")

    def build(self) -> None:
        super().build()
        for name in ("loss", "project", "normalize"):
            setattr(self, name, torch.compile(getattr(self, name)))


class Sparsify(Contender):
    """``sparsify.SparseCoder`` in the order of sparsify's ``Trainer.fit``: unit norm, FVU, gradient projected,
    ``torch.optim.Adam``; it clips nothing. On a GPU its forward pass is in bfloat16 by its own choice.
    """

    imports = ("sparsify",)
    distribution = "eai-sparsify"
    options: ClassVar[dict[str, Any]] = {}

    def build(self) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=self.case.d_sae, k=self.case.k, **self.options)
        self.module = self.coder = SparseCoder(self.case.d, config, self.device, torch.float32)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=self.lr)
        self.steps_done = 0

    def step(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        coder = self.coder
        if self.steps_done == 0:
            self.start(x, target)
        self.optimizer.param_groups[0]["lr"] = self.lr * self.plan.factor(self.steps_done)
        if not coder.cfg.transcode:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(x, target)
        loss = out.fvu + out.multi_topk_fvu / 8
        loss.backward()
        if not coder.cfg.transcode:
            coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps_done += 1
        return loss.detach()

    def start(self, x: Tensor, target: Tensor | None) -> None:
        """What the forward hook in ``Trainer.fit`` does to the biases before the first step."""
        if self.coder.cfg.transcode:
            self.coder.encoder.bias.data = -x.mean(0) @ self.coder.encoder.weight.data.T
        self.coder.b_dec.data = (x if target is None else target).mean(0)

    def encoder(self) -> Tensor:
        return self.coder.encoder.weight

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        top = self.coder.encode(x)
        recon = self.coder.decode(top.top_acts, top.top_indices)
        if self.coder.W_skip is not None:
            recon = recon + x @ self.coder.W_skip.mT
        return recon, (top.top_acts > 0).sum(1)


class Saelens(Contender):
    """``sae_lens.training.sae_trainer.SAETrainer.step`` on a ``TopKTrainingSAE``: squared error, clip 1.0, its Adam,
    firing statistics; it scales activations by the decoder's norms instead of normalizing.
    """

    imports = ("sae_lens", "sae_lens.training.sae_trainer")
    distribution = "sae-lens"
    kind = "TopKTrainingSAE"

    def options(self) -> dict[str, Any]:
        """Arguments of the configuration beside the shape."""
        return {"k": self.case.k, "aux_loss_coefficient": 0.0}

    def build(self) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        case, plan = self.case, self.plan
        config = getattr(sae_lens, f"{self.kind}Config")(
            d_in=case.d, d_sae=case.d_sae, device=str(self.device), **self.options()
        )
        self.module = self.sae = getattr(sae_lens, self.kind)(config)
        run = SAETrainerConfig(
            total_training_samples=plan.steps * case.rows,
            train_batch_size_samples=case.rows,
            lr=self.lr,
            lr_end=self.lr / 10,
            device=str(self.device),
            autocast=self.dtype == torch.bfloat16,
        )
        self.trainer: Any = SAETrainer(run, self.sae, data_provider=iter(()))
        self.optimizer = self.trainer.optimizer
        self.trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, plan.factor)

    def step(self, x: Tensor) -> Tensor:
        loss = self.trainer.step(x).loss.detach()
        self.trainer.n_training_steps += 1
        return loss

    def encoder(self) -> Tensor:
        return self.sae.W_enc.T

    def input_scale(self, x: Tensor) -> float:
        """Its ``expected_average_only_in``: a mean norm of √d."""
        return self.case.d**0.5 / x.norm(dim=1).mean().item()

    def set_sparsity(self, sparsity: float) -> None:
        for scheduler in self.trainer.coefficient_schedulers.values():
            scheduler.final_value = scheduler.current_value = sparsity

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        self.sae.eval()
        codes = self.sae.encode(x)
        return self.sae.decode(codes), codes.bool().sum(1)


class SaelensSparse(Saelens):
    """The same with ``use_sparse_activations``, codes as a COO tensor; for that it does without the scaling by the
    decoder's norms, whose gradient torch has not for sparse tensors on a CPU.
    """

    def options(self) -> dict[str, Any]:
        return super().options() | {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}


class DictionaryLearning(Contender):
    """``dictionary_learning.trainers.top_k.TopKTrainer.update``: squared error, projected gradient, clip 1.0, its Adam,
    unit-norm decoder.
    """

    imports = ("dictionary_learning", "dictionary_learning.trainers")
    distribution = "dictionary-learning"
    kind = "top_k.TopKTrainer"

    def options(self) -> dict[str, Any]:
        """Arguments of the trainer beside the shape."""
        return {"k": self.case.k, "auxk_alpha": 0}

    def build(self) -> None:
        file, name = self.kind.split(".")
        make = getattr(importlib.import_module(f"dictionary_learning.trainers.{file}"), name)
        self.trainer: Any = make(
            steps=self.plan.steps,
            activation_dim=self.case.d,
            dict_size=self.case.d_sae,
            layer=0,
            lm_name="none",
            lr=self.lr,
            warmup_steps=0,
            device=str(self.device),
            **self.options(),
        )
        self.module, self.optimizer = self.trainer.ae, self.trainer.optimizer
        self.trainer.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.plan.factor)
        self.steps_done = 0
        self._watch_loss()

    def _watch_loss(self) -> None:
        """Keep the loss of each step: not every trainer returns it."""
        loss: Callable[..., Tensor] = self.trainer.loss

        def watched(*arguments: Any, **options: Any) -> Tensor:
            found = loss(*arguments, **options)
            self.loss = found.detach()
            return found

        self.trainer.loss = watched

    def step(self, x: Tensor) -> Tensor:
        with self.autocast():
            self.trainer.update(self.steps_done, x)
        self.steps_done += 1
        return self.loss

    def encoder(self) -> Tensor:
        ae = self.trainer.ae
        return ae.W_enc.T if hasattr(ae, "W_enc") else ae.encoder.weight

    def input_scale(self, x: Tensor) -> float:
        """Its ``normalize_activations``: a mean squared norm of 1."""
        return x.square().sum(1).mean().item() ** -0.5

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        codes = self.trainer.ae.encode(x)
        return self.trainer.ae.decode(codes), (codes != 0).sum(1)


@dataclass(frozen=True)
class Entry:
    """How a contender is run: its class, what its step is compared with, and what differs in its process."""

    kind: type[Contender]
    against: str = "sparsekern"
    threads: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


ENTRIES = dict(
    zip(
        CONTENDERS,
        [
            Entry(Sparsekern),
            Entry(Torch),
            Entry(TorchCompile),
            Entry(Sparsify),
            Entry(Saelens),
            Entry(SaelensSparse),
            Entry(DictionaryLearning),
            Entry(Sparsekern, threads=1),
            Entry(Sparsekern, environment={"SPARSEKERN_CPU_ISA": "avx2"}),
            Entry(Switch8),
            Entry(Switch16),
            Entry(Switch),
            Entry(SwitchMasked),
        ],
        strict=True,
    )
)
"""By the names of :data:`sparsekern.bench.options.CONTENDERS`."""
