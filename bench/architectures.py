"""sparsekern's training steps by architecture, and the table of all contenders.

To add an architecture: its name in :data:`sparsekern.bench.options.ARCHITECTURES`, a class here and in :data:`OURS`,
and the peers that have it in :data:`sparsekern.bench.peers.PEERS`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import sparsekern as sk
from sparsekern.bench import contenders
from sparsekern.bench.contenders import Entry, Sparsekern
from sparsekern.bench.peers import LP, PEERS, largest, prefixes


class MultiTopK(Sparsekern):
    """``Trainer.step`` with ``TopK(k, multi_k=4k)``: FVU and an eighth of the FVU of 4k latents, whose gradient reaches
    the encoder too; otherwise as for TopK.
    """

    def make(self) -> sk.SAE:
        return self.with_activation(sk.TopK(self.case.k, multi_k=4 * self.case.k))


class GroupMax(Sparsekern):
    """``Trainer.step`` with ``GroupMax``; otherwise as for TopK."""

    def make(self) -> sk.SAE:
        return self.with_activation(sk.GroupMax(self.case.k))


class AbsTopK(Sparsekern):
    """``Trainer.step`` with ``AbsTopK``; otherwise as for TopK."""

    def make(self) -> sk.SAE:
        return self.with_activation(sk.AbsTopK(self.case.k))


class BatchTopK(Sparsekern):
    """``Trainer.step`` with ``BatchTopK``; otherwise as for TopK."""

    modes = ("batch", "threshold")

    def make(self) -> sk.SAE:
        return self.with_activation(sk.BatchTopK(self.case.k))


class Matryoshka(BatchTopK):
    """``Trainer.step`` on a ``MatryoshkaSAE`` with ``BatchTopK``: mean FVU of prefixes; otherwise as for TopK."""

    def make(self) -> sk.SAE:
        case = self.case
        activation, nested = sk.BatchTopK(case.k), prefixes(case.d_sae)
        return sk.MatryoshkaSAE(case.d, case.d_sae, activation, prefixes=nested, aux_coefficient=0)


class JumpReLU(Sparsekern):
    """``Trainer.step`` with ``JumpReLU`` and a target for L0; otherwise as for TopK."""

    sparsity, aims = 32.0, True

    def make(self) -> sk.SAE:
        return self.with_activation(sk.JumpReLU(target_l0=self.case.k))

    def set_sparsity(self, sparsity: float) -> None:
        self.sae.activation.target_l0 = sparsity

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        sae = self.sae
        threshold = largest((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc, self.case.k)
        sae.activation.relative_threshold.fill_(threshold / sae.activation.length)


class ReLU(Sparsekern):
    """``Trainer.step`` with ``ReLU``: FVU and L1 weighted by the decoder's norms, which stay free, clip 1.0, fused
    Adam.
    """

    sparsity = 0.15

    def make(self) -> sk.SAE:
        return self.with_activation(sk.ReLU())

    def set_sparsity(self, sparsity: float) -> None:
        self.sae.activation.l1_coefficient = sparsity

    @torch.no_grad()
    def settle(self, x: Tensor) -> None:
        sae = self.sae
        sae.b_enc -= largest((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc, self.case.k)


class Lp(ReLU):
    """``Trainer.step`` with ``ReLU(p=0.5)``: FVU and the sum of the powers; otherwise as for ReLU."""

    sparsity = 0.02

    def make(self) -> sk.SAE:
        return self.with_activation(sk.ReLU(p=LP))


class Gated(ReLU):
    """``Trainer.step`` on a ``GatedSAE``: FVU of the codes and of the gates, L1 of the gates; otherwise as for TopK."""

    sparsity = 0.3

    def make(self) -> sk.SAE:
        return sk.GatedSAE(self.case.d, self.case.d_sae, aux_coefficient=0)


class Tied(Sparsekern):
    """``Trainer.step`` with ``tied=True``: FVU, clip 1.0, fused Adam."""

    def make(self) -> sk.SAE:
        return self.with_activation(sk.TopK(self.case.k), tied=True)


class Transcoder(Sparsekern):
    """``Trainer.step`` on a ``Transcoder``: FVU of the target; otherwise as for TopK."""

    layers = 2
    skip = False

    def make(self) -> sk.SAE:
        case = self.case
        return sk.Transcoder(case.d, case.d_sae, sk.TopK(case.k), skip=self.skip, aux_coefficient=0)

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        return layers[0], layers[1]


class SkipTranscoder(Transcoder):
    """The same with ``skip=True``."""

    skip = True


class Crosscoder(Sparsekern):
    """``Trainer.step`` on a ``Crosscoder`` over 4 layers: mean FVU of the layers; otherwise as for TopK."""

    layers = 4

    def make(self) -> sk.SAE:
        case = self.case
        return sk.Crosscoder(self.layers, case.d, case.d_sae, sk.TopK(case.k), aux_coefficient=0)

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        return (layers.transpose(0, 1).contiguous(),)

    def encoder(self) -> Tensor:
        return self.sae.W_enc.reshape(self.case.d_sae, -1)

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1)


class CrossLayer(Sparsekern):
    """``Trainer.step`` on a ``CrossLayerTranscoder`` of 4 layers: mean FVU of them; otherwise as for TopK."""

    layers = 5

    def make(self) -> sk.SAE:
        case, n = self.case, self.layers - 1
        return sk.CrossLayerTranscoder(n, case.d, case.d_sae // n, sk.TopK(case.k // n))

    def inputs(self, layers: Tensor) -> tuple[Tensor, ...]:
        rows = layers.transpose(0, 1)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def encoder(self) -> Tensor:
        return self.sae.W_enc.reshape(self.case.d_sae, -1)

    def rows(self, x: Tensor) -> Tensor:
        return x[:, 0].contiguous()


OURS: dict[str, type[Sparsekern]] = {
    "topk": Sparsekern,
    "multi-topk": MultiTopK,
    "groupmax": GroupMax,
    "abstopk": AbsTopK,
    "batchtopk": BatchTopK,
    "matryoshka": Matryoshka,
    "jumprelu": JumpReLU,
    "relu": ReLU,
    "lp": Lp,
    "gated": Gated,
    "tied": Tied,
    "transcoder": Transcoder,
    "skip-transcoder": SkipTranscoder,
    "crosscoder": Crosscoder,
    "cross-layer": CrossLayer,
}
"""By architecture."""


def contenders_of(architectures: list[str]) -> list[str]:
    """Names of the contenders of architectures: ours, and ``<architecture>-<peer>``."""
    return [name for architecture in architectures for name in _entries(architecture)]


def _entries(architecture: str) -> dict[str, Entry]:
    peers = {f"{architecture}-{peer}": kind for peer, kind in PEERS[architecture].items()}
    kinds = {architecture: OURS[architecture], **peers}
    return {name: Entry(kind, against=architecture) for name, kind in kinds.items()}


ENTRIES = contenders.ENTRIES | {name: entry for each in OURS for name, entry in _entries(each).items()}
"""All contenders by name."""
