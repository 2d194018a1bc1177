"""Peers' training steps of other architectures than TopK, each in the library's own code.

What the libraries differ in beside the architecture, such as their losses' scale and what they do to the decoder, is
said at :class:`~sparsekern.bench.contenders.Sparsify`, :class:`~sparsekern.bench.contenders.Saelens` and
:class:`~sparsekern.bench.contenders.DictionaryLearning`. Where no library has an architecture, it is written out in
plain PyTorch, as the class says.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import tempfile
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.bench.contenders import Contender, DictionaryLearning, Saelens, Sparsify, Torch

MATRYOSHKA = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Shares of the latents that the nested dictionaries have."""

LP = 0.5
"""The power of the L_p penalty."""


def prefixes(d_sae: int) -> tuple[int, ...]:
    """Sizes of the nested dictionaries."""
    return tuple(int(share * d_sae) for share in MATRYOSHKA)


def largest(pre_activations: Tensor, k: int) -> float:
    """The value above which k entries a row are, on average."""
    return pre_activations.flatten().kthvalue(pre_activations.numel() - k * len(pre_activations)).values.item()


# sparsify


class SparsifyMultiTopK(Sparsify):
    """``sparsify.SparseCoder`` with ``multi_topk``, in the order of sparsify's ``Trainer.fit``: FVU and an eighth of
    the FVU of 4k latents, which its backward pass gives to the decoder alone; otherwise as for TopK.
    """

    options: ClassVar[dict[str, Any]] = {"multi_topk": True}


class SparsifyGroupMax(Sparsify):
    """``sparsify.SparseCoder`` with ``activation="groupmax"``; otherwise as for TopK."""

    options: ClassVar[dict[str, Any]] = {"activation": "groupmax"}


class SparsifyTranscoder(Sparsify):
    """``sparsify.SparseCoder`` with ``transcode``, in the order of sparsify's ``Trainer.fit``: FVU of the target,
    ``torch.optim.Adam``, the decoder starts at zero and is not constrained.
    """

    options: ClassVar[dict[str, Any]] = {"transcode": True}
    layers = 2

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        return layers[0], layers[1]


class SparsifySkipTranscoder(SparsifyTranscoder):
    """The same with ``skip_connection``."""

    options: ClassVar[dict[str, Any]] = {"transcode": True, "skip_connection": True}


# SAELens


class SaelensAbsTopK(Saelens):
    """``SAETrainer.step`` on an ``AbsTopKTrainingSAE``; otherwise as for TopK."""

    kind = "AbsTopKTrainingSAE"


class SaelensBatchTopK(Saelens):
    """``SAETrainer.step`` on a ``BatchTopKTrainingSAE``; otherwise as for TopK."""

    kind = "BatchTopKTrainingSAE"
    modes = ("batch", "threshold")

    def reconstruct(self, x: Tensor, mode: str = "batch") -> tuple[Tensor, Tensor]:
        """Its training class encodes by batches, always; its exported form, a JumpReLU SAE, by the threshold."""
        if mode == "batch":
            return super().reconstruct(x)
        import sae_lens

        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            exported = sae_lens.SAE.load_from_disk(folder, device=str(self.device))
        codes = exported.encode(x)
        return exported.decode(codes), (codes != 0).sum(1)


class SaelensMatryoshka(SaelensBatchTopK):
    """``SAETrainer.step`` on a ``MatryoshkaBatchTopKTrainingSAE``: the sum of the squared errors of all prefixes;
    otherwise as for TopK.
    """

    kind = "MatryoshkaBatchTopKTrainingSAE"

    def options(self) -> dict[str, Any]:
        return super().options() | {"matryoshka_widths": list(prefixes(self.case.d_sae))}


class SaelensJumpReLU(Saelens):
    """``SAETrainer.step`` on a ``JumpReLUTrainingSAE`` as its documentation sets it up after Anthropic: squared error,
    the ``tanh`` penalty, straight-through gradient to the encoder too, bandwidth 2, pre-activation loss; clip 1.0, its
    Adam, firing statistics.
    """

    # In its other modes thresholds alone are charged, which Adam moves by the learning rate a step: aimed at 32 active
    # latents, 500 steps of its `quadratic` mode that began at 32 ended at 606.
    sparsity = 3.0
    kind = "JumpReLUTrainingSAE"

    def options(self) -> dict[str, Any]:
        return {
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_ste_to_input": True,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "pre_act_loss_coefficient": 3e-6,
        }

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        self.sae.threshold.fill_(largest((x - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc, self.case.k))


class SaelensReLU(Saelens):
    """``SAETrainer.step`` on a ``StandardTrainingSAE``: squared error and L1 weighted by the decoder's norms, clip 1.0,
    its Adam, firing statistics.
    """

    sparsity = 3.0
    kind = "StandardTrainingSAE"

    def options(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        self.sae.b_enc -= largest((x - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_enc, self.case.k)


class SaelensLp(SaelensReLU):
    """The same with ``lp_norm`` 0.5: the L_p norm instead of L1."""

    sparsity = 0.1

    def options(self) -> dict[str, Any]:
        return {"lp_norm": LP}


class SaelensGated(Saelens):
    """``SAETrainer.step`` on a ``GatedTrainingSAE``: squared errors of the codes and of the gates, L1 of the gates
    weighted by the decoder's norms, clip 1.0, its Adam, firing statistics.
    """

    sparsity = 5.0
    kind = "GatedTrainingSAE"

    def options(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        self.sae.b_gate -= largest((x - self.sae.b_dec) @ self.sae.W_enc + self.sae.b_gate, self.case.k)


# dictionary_learning


class DictionaryLearningBatchTopK(DictionaryLearning):
    """``dictionary_learning``'s ``BatchTopKTrainer.update``; otherwise as for TopK."""

    kind = "batch_top_k.BatchTopKTrainer"
    modes = ("batch", "threshold")

    def options(self) -> dict[str, Any]:
        # Its threshold starts after 1,000 steps: in a shorter run it would never.
        return super().options() | {"threshold_start_step": min(1000, self.plan.steps // 2)}

    def reconstruct(self, x: Tensor, mode: str = "batch") -> tuple[Tensor, Tensor]:
        """It encodes by the threshold unless it is told otherwise."""
        codes = self.trainer.ae.encode(x, use_threshold=mode == "threshold")
        return self.trainer.ae.decode(codes), (codes != 0).sum(1)


class DictionaryLearningMatryoshka(DictionaryLearningBatchTopK):
    """``dictionary_learning``'s ``MatryoshkaBatchTopKTrainer.update``: the mean of the squared errors of all prefixes;
    otherwise as for TopK.
    """

    kind = "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer"

    def options(self) -> dict[str, Any]:
        fractions = [share - before for before, share in zip((0, *MATRYOSHKA), MATRYOSHKA, strict=False)]
        return super().options() | {"group_fractions": fractions}


class DictionaryLearningJumpReLU(DictionaryLearning):
    """``dictionary_learning``'s ``JumpReluTrainer.update``: squared error, a penalty that draws the batch's L0 to a
    target, projected gradient, clip 1.0, its Adam, unit-norm decoder.
    """

    sparsity, aims = 32.0, True
    kind = "jumprelu.JumpReluTrainer"

    def options(self) -> dict[str, Any]:
        return {"target_l0": float(self.case.k), "sparsity_warmup_steps": None}

    def set_sparsity(self, sparsity: float) -> None:
        self.trainer.target_l0 = sparsity

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        ae = self.trainer.ae
        ae.threshold.fill_(largest(x @ ae.W_enc + ae.b_enc, self.case.k))


class DictionaryLearningReLU(DictionaryLearning):
    """``dictionary_learning``'s ``StandardTrainer.update``: squared error and L1, its Adam, which projects the gradient
    and normalizes the decoder; it clips nothing.
    """

    sparsity = 0.15
    kind = "standard.StandardTrainer"

    def options(self) -> dict[str, Any]:
        return {"sparsity_warmup_steps": None}

    def set_sparsity(self, sparsity: float) -> None:
        self.trainer.l1_penalty = sparsity

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        ae = self.trainer.ae
        ae.encoder.bias -= largest(ae.encoder(x - ae.bias), self.case.k)


class DictionaryLearningApril(DictionaryLearningReLU):
    """``dictionary_learning``'s ``StandardTrainerAprilUpdate.update``: squared error and L1 weighted by the decoder's
    norms, clip 1.0, its Adam.
    """

    kind = "standard.StandardTrainerAprilUpdate"


class DictionaryLearningLp(DictionaryLearningReLU):
    """``dictionary_learning``'s ``PAnnealTrainer.update`` at a constant p of 0.5: squared error and the sum of the
    powers, its Adam, which projects the gradient and normalizes the decoder; it clips nothing.
    """

    sparsity = 0.02
    kind = "p_anneal.PAnnealTrainer"

    def options(self) -> dict[str, Any]:
        # Annealing never starts: before it the power is p_start.
        start = self.plan.steps
        powers = {"p_start": LP, "p_end": LP, "sparsity_function": "Lp^p"}
        return super().options() | powers | {"anneal_start": start, "anneal_end": start + 10, "seed": None}

    def set_sparsity(self, sparsity: float) -> None:
        self.trainer.sparsity_coeff = sparsity


class DictionaryLearningGated(DictionaryLearning):
    """``dictionary_learning``'s ``GatedSAETrainer.update``: squared errors of the codes and, with a detached decoder,
    of the gates, L1 of the gates, its Adam, which projects the gradient and normalizes the decoder; it clips nothing.
    """

    sparsity = 0.25
    kind = "gdm.GatedSAETrainer"

    def options(self) -> dict[str, Any]:
        return {"sparsity_warmup_steps": None}

    def set_sparsity(self, sparsity: float) -> None:
        self.trainer.l1_penalty = sparsity

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        ae = self.trainer.ae
        ae.gate_bias -= largest(ae.encoder(x - ae.decoder_bias) + ae.gate_bias, self.case.k)


# overcomplete


class OvercompleteTied(Contender):
    """``overcomplete``'s ``TopKSAE`` tied to its dictionary, in the steps of its ``train_sae``: mean squared error,
    count of dead codes, clip 1.0, ``torch.optim.Adam``; each forward pass normalizes the dictionary.
    """

    imports = ("overcomplete.sae", "overcomplete.sae.trackers")
    distribution = "overcomplete"

    @classmethod
    def load(cls) -> None:
        """Enters the package without its ``__init__``, which wants torchvision for something else."""
        if "overcomplete" not in sys.modules:
            spec = importlib.util.find_spec("overcomplete")
            assert spec is not None, "overcomplete is not installed"
            bare = importlib.machinery.ModuleSpec("overcomplete", None, is_package=True)
            bare.submodule_search_locations = spec.submodule_search_locations
            sys.modules["overcomplete"] = importlib.util.module_from_spec(bare)
        super().load()

    def build(self) -> None:
        self.load()
        from overcomplete.sae import TopKSAE
        from overcomplete.sae.trackers import DeadCodeTracker

        case = self.case
        self.module = self.sae = TopKSAE(case.d, case.d_sae, top_k=case.k).tied(bias=True)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr)
        self.dead = DeadCodeTracker(case.d_sae, str(self.device))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.plan.factor)

    def step(self, x: Tensor) -> Tensor:
        self.sae.train()
        self.optimizer.zero_grad()
        _, codes, recon = self.sae(x)
        loss = (x - recon).square().mean()
        self.dead.update(codes)
        loss.backward()
        nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def encoder(self) -> Tensor:
        return self.sae.dictionary.get_dictionary()

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        self.sae.eval()
        _, codes, recon = self.sae(x)
        self.sae.train()
        return recon, (codes != 0).sum(1)


# Plain PyTorch


def mean_fvu(error: Tensor, target: Tensor) -> Tensor:
    """FVU of each layer of ``[B, layers, d]``, their mean."""
    return (error.square().sum((0, 2)) / (target - target.mean(0)).square().sum((0, 2))).mean()


class TorchCrosscoder(Torch):
    """A TopK crosscoder over 4 layers in plain PyTorch: one dense matmul of all layers' activations, ReLU, topk,
    scatter, dense matmul; mean FVU of the layers, projected gradient, clip 1.0, fused Adam, unit-norm decoder.
    """

    layers = 4

    def build(self) -> None:
        super().build()
        self.W_enc.data *= 3**-0.5  # the norm of rows of nn.Linear
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.plan.factor)
        self.fresh = True

    def width(self) -> int:
        return self.layers * self.case.d

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        return (layers.transpose(0, 1).contiguous(),)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def step(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        if self.fresh:
            self.b_dec.data.copy_(x.mean(0))
            self.fresh = False
        loss = super().step(x)
        self.schedule.step()
        return loss

    def loss(self, x: Tensor) -> Tensor:
        shape = (len(x), self.layers, self.case.d)
        return mean_fvu((x - (self.codes(x) @ self.W_dec + self.b_dec)).view(shape), x.view(shape))

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        codes = self.codes(x.flatten(1))
        return (codes @ self.W_dec + self.b_dec).view_as(x), (codes > 0).sum(1)


class TorchCrossLayer(Contender):
    """A TopK cross-layer transcoder of 4 layers in plain PyTorch: a dense matmul, ReLU, topk and scatter for each
    layer, and a dense matmul from each to itself and every later one; mean FVU of the layers, clip 1.0, fused Adam.
    """

    layers = 5
    n_layers = 4

    def build(self) -> None:
        case, n = self.case, self.n_layers
        wide = case.d_sae // n
        rows = 3**-0.5 * nn.functional.normalize(torch.randn(n, wide, case.d), dim=2)
        self.W_enc, self.b_enc = nn.Parameter(rows), nn.Parameter(torch.zeros(n, wide))
        self.W_dec = nn.ParameterList(torch.zeros(wide, (n - layer) * case.d) for layer in range(n))
        self.b_dec = nn.Parameter(torch.zeros(n, case.d))
        self.module = nn.ParameterList([self.W_enc, self.b_enc, *self.W_dec, self.b_dec])
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=self.lr, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.plan.factor)
        self.fresh = True

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        rows = layers.transpose(0, 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def rows(self, x: Tensor) -> Tensor:
        return x[:, 0].contiguous()

    def step(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        assert target is not None
        if self.fresh:
            self.b_enc.data.copy_(-torch.einsum("ld,lnd->ln", x.mean(0), self.W_enc.data))
            self.b_dec.data.copy_(target.mean(0))
            self.fresh = False
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            recon, _ = self.reconstruct(x)
            loss = mean_fvu(target - recon, target)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def encoder(self) -> Tensor:
        return self.W_enc.flatten(0, 1)

    def reconstruct(self, x: Tensor, mode: str = "eval") -> tuple[Tensor, Tensor]:
        k = self.case.k // self.n_layers
        recon = self.b_dec.expand_as(x).flatten(1)
        active = torch.zeros(len(x))
        for layer in range(self.n_layers):
            pre = nn.functional.linear(x[:, layer], self.W_enc[layer], self.b_enc[layer]).relu()
            top = pre.topk(k, dim=1)
            codes = torch.zeros_like(pre).scatter(1, top.indices, top.values)
            recon = recon + nn.functional.pad(codes @ self.W_dec[layer], (layer * self.case.d, 0))
            active = active + (top.values > 0).sum(1)
        return recon.view_as(x), active


PEERS: dict[str, dict[str, type[Contender]]] = {
    "topk": {"sparsify": Sparsify, "saelens": Saelens, "dictionary-learning": DictionaryLearning},
    "multi-topk": {"sparsify": SparsifyMultiTopK},
    "groupmax": {"sparsify": SparsifyGroupMax},
    "abstopk": {"saelens": SaelensAbsTopK},
    "batchtopk": {"saelens": SaelensBatchTopK, "dictionary-learning": DictionaryLearningBatchTopK},
    "matryoshka": {"saelens": SaelensMatryoshka, "dictionary-learning": DictionaryLearningMatryoshka},
    "jumprelu": {"saelens": SaelensJumpReLU, "dictionary-learning": DictionaryLearningJumpReLU},
    "relu": {
        "saelens": SaelensReLU,
        "dictionary-learning": DictionaryLearningReLU,
        "dictionary-learning-april": DictionaryLearningApril,
    },
    "lp": {"saelens": SaelensLp, "dictionary-learning": DictionaryLearningLp},
    "gated": {"saelens": SaelensGated, "dictionary-learning": DictionaryLearningGated},
    "tied": {"overcomplete": OvercompleteTied},
    "transcoder": {"sparsify": SparsifyTranscoder},
    "skip-transcoder": {"sparsify": SparsifySkipTranscoder},
    "crosscoder": {"torch": TorchCrosscoder},
    "cross-layer": {"torch": TorchCrossLayer},
}
"""By architecture: who has it."""
