"""Whose training steps are timed: one class for each implementation, with the same few methods.

A step is forward, backward, clipping, Adam and whatever the library does to its decoder, on a batch ``[B, d]``, with
weights in float32, without AuxK. Of a peer it is the peer's own code that runs, with the peer's own defaults; what is
given is the shape, the learning rate, the device, and whether its matmuls may run in bfloat16.

The docstring of a class says what its step is, and goes into the record.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sparsekern as sk
from sparsekern.bench.options import CONTENDERS, Case

RUN_STEPS = 1_000_000  # what trainers with a schedule are told: it never ends here


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

    Attributes
    ----------
    imports : tuple of str
        Modules that it needs, loaded before its memory is measured.
    distribution : str
        The package whose version it is.
    module, optimizer
        What the step trains, and with what.
    """

    imports: tuple[str, ...] = ()
    distribution = "torch"
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, case: Case, lr: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.case, self.lr, self.device, self.dtype = case, lr, torch.device(device), dtype
        with self.device:  # starting weights are drawn where they will be
            self.build()

    def build(self) -> None:
        """Make ``module`` and ``optimizer``."""
        raise NotImplementedError

    def autocast(self) -> torch.autocast:
        """What a step's matmuls run under."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def step(self, x: Tensor) -> Tensor:
        """One training step; returns the loss, which each library scales in its own way."""
        raise NotImplementedError

    def encoder(self) -> Tensor:
        """The encoder's weight as ``[N, d]``, for the matmul that the step is compared with."""
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Bytes of the parameters and of the optimizer's state."""
        state = [t for moments in self.optimizer.state.values() for t in moments.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in [*self.module.parameters(), *state])


class Sparsekern(Contender):
    """``sparsekern.Trainer.step``: FVU, projected gradient, clip 1.0, fused Adam, unit-norm decoder."""

    distribution = "sparsekern"

    def build(self) -> None:
        case = self.case
        self.module = self.sae = sk.SAE(case.d, case.d_sae, sk.TopK(case.k), aux_coefficient=0)
        self.trainer = sk.Trainer(self.sae, lr=self.lr, warmup_steps=0)
        self.optimizer = self.trainer.optimizer.torch

    def step(self, x: Tensor) -> Tensor:
        return self.trainer.step(x).loss

    def encoder(self) -> Tensor:
        return self.sae.W_enc


class Switch(Sparsekern):
    """``sparsekern.Trainer.step`` on a ``SwitchSAE`` of 32 experts, one active: FVU, Switch loss, projected gradient,
    clip 1.0, fused Adam, unit-norm decoder.
    """

    n_experts = 32

    def build(self) -> None:
        case = self.case
        experts = min(self.n_experts, case.d_sae // case.k)
        self.module = self.sae = sk.SwitchSAE(case.d, case.d_sae, sk.TopK(case.k), n_experts=experts, aux_coefficient=0)
        self.trainer = sk.Trainer(self.sae, lr=self.lr, warmup_steps=0)
        self.optimizer = self.trainer.optimizer.torch


class Switch8(Switch):
    """The same with 8 experts."""

    n_experts = 8


class Switch16(Switch):
    """The same with 16 experts."""

    n_experts = 16


class Torch(Contender):
    """The same step in plain PyTorch: dense matmul, ReLU, topk, scatter, dense matmul; clip 1.0, fused Adam."""

    def build(self) -> None:
        case = self.case
        rows = nn.functional.normalize(torch.randn(case.d_sae, case.d), dim=1)
        self.W_enc, self.b_enc = nn.Parameter(rows), nn.Parameter(torch.zeros(case.d_sae))
        self.W_dec, self.b_dec = nn.Parameter(rows.clone()), nn.Parameter(torch.zeros(case.d))
        self.module = nn.ParameterList([self.W_enc, self.b_enc, self.W_dec, self.b_dec])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self.lr, fused=True)

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

    def loss(self, x: Tensor) -> Tensor:
        pre = nn.functional.linear(x - self.b_dec, self.W_enc, self.b_enc).relu()
        top = pre.topk(self.case.k, dim=1)
        codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        residual = x - (codes @ self.W_dec + self.b_dec)
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

    def build(self) -> None:
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=self.case.d_sae, k=self.case.k)
        self.module = self.coder = SparseCoder(self.case.d, config, self.device, torch.float32)
        self.optimizer = torch.optim.Adam(self.coder.parameters(), lr=self.lr)
        self.fresh = True

    def step(self, x: Tensor) -> Tensor:
        if self.fresh:
            self.coder.b_dec.data.copy_(x.mean(0))
            self.fresh = False
        self.coder.set_decoder_norm_to_unit_norm()
        loss = self.coder(x).fvu
        loss.backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def encoder(self) -> Tensor:
        return self.coder.encoder.weight


class Saelens(Contender):
    """``sae_lens.training.sae_trainer.SAETrainer.step`` on a ``TopKTrainingSAE``: squared error, clip 1.0, its Adam,
    firing statistics; it scales activations by the decoder's norms instead of normalizing.
    """

    imports = ("sae_lens", "sae_lens.training.sae_trainer", "sae_lens.saes.topk_sae")
    distribution = "sae-lens"
    sparse = False

    def build(self) -> None:
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.training.sae_trainer import SAETrainer

        case = self.case
        config = TopKTrainingSAEConfig(
            d_in=case.d,
            d_sae=case.d_sae,
            k=case.k,
            device=str(self.device),
            use_sparse_activations=self.sparse,
            aux_loss_coefficient=0.0,
            rescale_acts_by_decoder_norm=not self.sparse,
        )
        self.module = self.sae = TopKTrainingSAE(config)
        run = SAETrainerConfig(
            total_training_samples=RUN_STEPS * case.rows,
            train_batch_size_samples=case.rows,
            lr=self.lr,
            lr_end=self.lr / 10,
            device=str(self.device),
            autocast=self.dtype == torch.bfloat16,
        )
        self.trainer: Any = SAETrainer(run, self.sae, data_provider=iter(()))
        self.optimizer = self.trainer.optimizer

    def step(self, x: Tensor) -> Tensor:
        loss = self.trainer.step(x).loss.detach()
        self.trainer.n_training_steps += 1
        return loss

    def encoder(self) -> Tensor:
        return self.sae.W_enc.T


class SaelensSparse(Saelens):
    """The same with ``use_sparse_activations``, codes as a COO tensor; for that it does without the scaling by the
    decoder's norms, whose gradient torch has not for sparse tensors on a CPU.
    """

    sparse = True


class DictionaryLearning(Contender):
    """``dictionary_learning.trainers.top_k.TopKTrainer.update``: squared error, projected gradient, clip 1.0, its Adam,
    unit-norm decoder.
    """

    imports = ("dictionary_learning", "dictionary_learning.trainers.top_k")
    distribution = "dictionary-learning"

    def build(self) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer: Any = TopKTrainer(
            steps=RUN_STEPS,
            activation_dim=self.case.d,
            dict_size=self.case.d_sae,
            k=self.case.k,
            layer=0,
            lm_name="none",
            lr=self.lr,
            auxk_alpha=0,
            warmup_steps=0,
            device=str(self.device),
        )
        self.module, self.optimizer = self.trainer.ae, self.trainer.optimizer
        self.steps_done = 0

    def step(self, x: Tensor) -> Tensor:
        with self.autocast():
            loss = self.trainer.update(self.steps_done, x)
        self.steps_done += 1
        return torch.tensor(loss)

    def encoder(self) -> Tensor:
        return self.trainer.ae.encoder.weight


@dataclass(frozen=True)
class Entry:
    """How a contender is run: its class, and what differs from the others in its process."""

    kind: type[Contender]
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
