"""Activation functions: what an encoder does with its pre-activations, and what it is charged for.

An activation owns the choice of op, so that an SAE is the same class whichever it uses. To add one: subclass
:class:`Activation`, give it a ``name`` and an ``encode``, and list it in :data:`ACTIVATIONS`.

Coefficients stand beside an FVU, as if activations had length 1 about their mean; so do thresholds and bandwidths that
are given as numbers. :meth:`Activation.fit_start_` turns those into the units of the data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from sparsekern.codes import CSRCodes, SparseCodes
from sparsekern.ops import batch_topk_encode, routed_topk_encode, sparse_decode, threshold_encode, topk_encode
from sparsekern.ops._checks import SCREENS
from sparsekern.ops._snapshot import snapshot
from sparsekern.ops._sparse_decode import _gather_dot
from sparsekern.routing import Routing

if TYPE_CHECKING:
    from sparsekern.modules.sae import SAE, Batch

Codes = SparseCodes | CSRCodes


class Activation(nn.Module):
    """Base of all activation functions.

    Attributes
    ----------
    name : str
        What a saved configuration calls it.
    aux_coefficient : float
        Weight of AuxK where an SAE is given none: its published one.
    unit_decoder : bool
        Whether decoder rows have unit norm where an SAE is not told.
    absolute : bool
        Whether codes have signs.
    exact : tuple of str
        Its tensors that keep their dtype when the module is cast, because they change by steps that round away in less.
    """

    name: ClassVar[str]
    aux_coefficient: ClassVar[float] = 1 / 32
    unit_decoder: ClassVar[bool] = True
    absolute: ClassVar[bool] = False
    exact: ClassVar[tuple[str, ...]] = ()
    screen: str

    def __init__(self) -> None:
        super().__init__()

    def bind_(self, d_sae: int) -> None:
        """Make what has an entry a latent; ValueError where this activation cannot serve `d_sae` of them."""

    def encode(self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None) -> tuple[Codes, Any]:
        """Codes of the activations `x` ``[..., d_in]``, and what else :meth:`penalties` are made of.

        `center` is subtracted from `x` first.
        """
        raise NotImplementedError(f"{type(self).__name__} must define encode")

    def penalties(self, sae: SAE, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """Parts of the loss beside reconstruction and AuxK, weighted."""
        return {}

    def count_(self, codes: Codes, finite: Tensor) -> None:
        """Advance what is counted in training by one batch, if it is `finite` ``[]``."""

    def fit_start_(self, sae: SAE, batch: Batch) -> None:
        """Fit what is fitted to data."""

    def rescale_(self, factor: Tensor) -> None:
        """The encoder's rows were multiplied by `factor`: do so with what is compared with pre-activations."""

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this activation."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def extra_repr(self) -> str:
        """Arguments that are not the defaults, for printing."""
        defaults = inspect.signature(type(self)).parameters
        return ", ".join(f"{name}={v!r}" for name, v in self.config().items() if v != defaults[name].default)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Moves to a device or casts, all but what is `exact`."""
        before = {name: getattr(self, name).data for name in self.exact}
        super()._apply(fn, recurse)
        for name, old in before.items():
            tensor = getattr(self, name)
            if tensor.dtype != old.dtype:
                tensor.data = old.to(tensor.device)
                if tensor.grad is not None:
                    tensor.grad.data = tensor.grad.to(old.dtype)
        return self


# A fixed number of latents a token


class TopK(Activation):
    """Keeps the `k` largest pre-activations of each token, then ReLU.

    Parameters
    ----------
    k : int
        Latents a token.
    screen : str
        See :func:`sparsekern.topk_encode`; it changes the speed, never the answer.
    multi_k : int or None
        The Multi-TopK loss: the top `multi_k`, a larger number such as ``4 * k``, must reconstruct as well. Its codes
        come from the same pass, and its gradient reaches encoder and decoder.
    multi_coefficient : float
        Weight of that FVU, a part ``multi`` of the loss.

    References
    ----------
    Gao et al., *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), sections 2.3 and 5.3.2 (Multi-TopK:
    ``L(k) + L(4k) / 8``).
    """

    name = "topk"

    def __init__(
        self, k: int, screen: str = "auto", multi_k: int | None = None, multi_coefficient: float = 1 / 8
    ) -> None:
        super().__init__()
        check_k_and_screen(k, screen)
        if multi_k is not None and (not isinstance(multi_k, int) or multi_k <= k):
            raise ValueError(f"multi_k must be a whole number above k={k}, got {multi_k!r}")
        check_coefficients(multi_coefficient=multi_coefficient)
        self.k, self.screen, self.multi_k, self.multi_coefficient = k, screen, multi_k, multi_coefficient

    def bind_(self, d_sae: int) -> None:
        """There must be at least `k` latents."""
        check_at_most(d_sae, k=self.k)
        if self.multi_k is not None:
            check_at_most(d_sae, multi_k=self.multi_k)

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[SparseCodes, SparseCodes | None]:
        """The top k of every token, ``[..., k]``; in training also its top `multi_k`."""
        if self.multi_k is None or not self.training:
            return topk_encode(x, W_enc, b_enc, self.k, self.screen, center), None
        wide = topk_encode(x, W_enc, b_enc, self.multi_k, self.screen, center)
        return SparseCodes(wide.values[..., : self.k], wide.indices[..., : self.k], wide.d_sae), wide

    def penalties(self, sae: SAE, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """The Multi-TopK term."""
        if trace is None:
            return {}
        return {"multi": self.multi_coefficient * sae.fvu(sae.error(trace, batch), batch)}


class AbsTopK(Activation):
    """Keeps the `k` pre-activations of largest size of each token, with their signs: one latent for two directions.

    Parameters
    ----------
    k : int
        Latents a token.
    screen : str
        See :func:`sparsekern.topk_encode`.

    References
    ----------
    Zhu et al., *AbsTopK: rethinking sparse autoencoders for bidirectional features* (arXiv 2510.00404).
    """

    name = "abstopk"
    absolute = True

    def __init__(self, k: int, screen: str = "auto") -> None:
        super().__init__()
        check_k_and_screen(k, screen)
        self.k, self.screen = k, screen

    def bind_(self, d_sae: int) -> None:
        """There must be at least `k` latents."""
        check_at_most(d_sae, k=self.k)

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[SparseCodes, None]:
        """The k of every token, ``[..., k]``, by falling size."""
        return topk_encode(x, W_enc, b_enc, self.k, self.screen, center, absolute=True), None


class GroupMax(Activation):
    """Keeps the largest pre-activation of each of `k` groups of neighbouring latents, then ReLU.

    Parameters
    ----------
    k : int
        Groups, and so latents a token; divides the number of latents.
    screen : str
        See :func:`sparsekern.topk_encode`.

    References
    ----------
    The activation of that name in EleutherAI's sparsify; Makhzani and Frey, *Winner-take-all autoencoders* (2015), for
    the idea.
    """

    name = "groupmax"

    def __init__(self, k: int, screen: str = "auto") -> None:
        super().__init__()
        check_k_and_screen(k, screen)
        self.k, self.screen = k, screen

    def bind_(self, d_sae: int) -> None:
        """The groups are equally large."""
        if d_sae % self.k:
            raise ValueError(f"k must divide d_sae={d_sae}, got {self.k}")

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[SparseCodes, None]:
        """The best of each group, ``[..., k]``, group by group."""
        # A mixture whose every expert serves every token.
        rows, device = x.numel() // x.shape[-1], x.device
        groups = torch.arange(self.k, dtype=torch.int32, device=device).expand(rows, -1)
        slots = torch.arange(rows * self.k, dtype=torch.int32, device=device).view(rows, -1)
        offsets = rows * torch.arange(self.k + 1, dtype=torch.int32, device=device)
        every = Routing(groups.contiguous(), torch.ones_like(groups), slots.T.flatten(), offsets, None)
        return routed_topk_encode(x, W_enc, b_enc, every, 1, self.screen, center, per_expert=True), None


# Any number of latents a token


class BatchTopK(Activation):
    """Keeps the ``int(k·B)`` largest pre-activations of a whole batch of B tokens, then ReLU: k a token on average.

    In evaluation mode a token must not depend on its batch. What counts there is `threshold`, which training moves
    towards the least pre-activation that a batch kept; while there is none, the batch decides.

    Parameters
    ----------
    k : float
        Latents a token, on average, not necessarily a whole number.
    screen : str
        See :func:`sparsekern.topk_encode`.
    threshold_rate : float
        What part of the way to a batch's least kept pre-activation the threshold goes.

    Attributes
    ----------
    threshold : Tensor [] float64
        Stays in float64 when the module is cast: a mean that moves by hundredths of itself stalls in less.
    batches_seen : Tensor [] int64
        Batches that moved it.

    References
    ----------
    Bussmann et al., *BatchTopK sparse autoencoders* (arXiv 2412.06410), section 3.
    """

    name = "batchtopk"
    exact = ("threshold",)
    threshold: Tensor
    batches_seen: Tensor

    def __init__(self, k: float, screen: str = "auto", threshold_rate: float = 0.1) -> None:
        super().__init__()
        if not isinstance(k, int | float) or not k > 0:
            raise ValueError(f"k must be a number above 0, got {k!r}")
        check_screen(screen)
        if not 0 < threshold_rate <= 1:
            raise ValueError(f"threshold_rate must be above 0 and at most 1, got {threshold_rate}")
        self.k, self.screen, self.threshold_rate = k, screen, threshold_rate
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("batches_seen", torch.zeros((), dtype=torch.int64))
        self._has_threshold = False  # known to Python, for encode not to wait for the device

    def bind_(self, d_sae: int) -> None:
        """There must be at least `k` latents."""
        check_at_most(d_sae, k=self.k)

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[CSRCodes, None]:
        """In training the best of the batch, in evaluation all above the threshold."""
        if self.training or not self._has_threshold:
            return batch_topk_encode(x, W_enc, b_enc, self.k, self.screen, center), None
        return threshold_encode(x, W_enc, b_enc, self.threshold, self.screen, center), None

    def train(self, mode: bool = True) -> BatchTopK:
        """Into training mode, or out of it: then it looks whether there is a threshold, and waits for the device."""
        if not mode:
            self._has_threshold = bool(self.batches_seen > 0)
        super().train(mode)
        return self

    def count_(self, codes: Codes, finite: Tensor) -> None:
        """Move the threshold."""
        least = torch.where(codes.values > 0, codes.values, torch.inf).min().double()
        counts = finite & least.isfinite()
        rate = torch.where(self.batches_seen == 0, 1.0, self.threshold_rate)
        self.threshold += torch.where(counts, rate * (least - self.threshold), 0)
        self.batches_seen += counts

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._has_threshold = bool(self.batches_seen > 0)

    def rescale_(self, factor: Tensor) -> None:
        """Scales the threshold."""
        self.threshold.mul_(factor)


class Penalized(Activation):
    """What is kept sparse by a penalty, whose weight may rise over the first tokens of training."""

    aux_coefficient = 0.0
    tokens_seen: Tensor

    def __init__(self, warmup_tokens: int, start_l0: int, screen: str) -> None:
        super().__init__()
        check_k_and_screen(start_l0, screen, "start_l0")
        if not isinstance(warmup_tokens, int) or warmup_tokens < 0:
            raise ValueError(f"warmup_tokens must be a whole number of at least 0, got {warmup_tokens!r}")
        self.warmup_tokens, self.start_l0, self.screen = warmup_tokens, start_l0, screen
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def warmth(self) -> Tensor | float:
        """What share of the penalty is due."""
        return (snapshot(self.tokens_seen) / self.warmup_tokens).clamp(max=1) if self.warmup_tokens else 1.0

    def count_(self, codes: Codes, finite: Tensor) -> None:
        """Count the tokens."""
        self.tokens_seen += codes.tokens * finite

    def start_cut(self, sae: SAE, x: Tensor) -> Tensor:
        """What pre-activations have to pass for `start_l0` of them to do so a token."""
        codes = batch_topk_encode(x, sae.W_enc, sae.b_enc, min(self.start_l0, sae.d_sae), self.screen, sae.center())
        return codes.values.min()

    def l1(self, sae: SAE, batch: Batch, codes: CSRCodes, p: float = 1.0) -> Tensor:
        """``mean over tokens of Σ_i (z_i ‖d_i‖ / length)^p``, with the length of this batch."""
        size = codes.values * sae.latent_norms().index_select(0, codes.col) / batch.length
        if p < 1:
            size = (size + _LEAST).pow(p) - _LEAST**p
        return size.sum() / codes.tokens


_LEAST = 1e-3


class ReLU(Penalized):
    """Keeps what is positive, at a price: ``l1_coefficient · mean over tokens of Σ_i (z_i ‖d_i‖ / length)^p``.

    With ``p=1`` it is the L1 penalty, weighted by the norms of the decoder's rows, which are then left free: a smaller
    code with a longer row gains nothing. With ``p<1`` it is L_p.

    Parameters
    ----------
    l1_coefficient : float
        Weight of the penalty, a part ``sparsity`` of the loss. On MiniLM, 4,096 latents, 0.1 and 0.15 come to an L0 of
        48 and 31, and with ``p=0.5`` 0.02 to 32.
    p : float
        Its power. Below 1 its slope is unbounded at 0, so it is taken of ``s + 0.001`` less that of 0.001.
    warmup_tokens : int
        Tokens of training over which the weight rises from 0.
    start_l0 : int or None
        ``SAE.fit_start_`` puts the biases where so many latents a token are active, instead of half of them. By default
        128, and 256 where `p` is below 1.
    screen : str
        See :func:`sparsekern.threshold_encode`.

    References
    ----------
    Bricken et al., *Towards monosemanticity* (2023); Conerly et al., *Update on how we train SAEs* (Anthropic, April
    2024), for the decoder's norms; Karvonen et al., *Measuring progress in dictionary learning* (arXiv 2408.00113),
    section 4, for L_p.
    """

    name = "relu"
    unit_decoder = False

    def __init__(
        self,
        l1_coefficient: float = 0.1,
        p: float = 1.0,
        warmup_tokens: int = 0,
        start_l0: int | None = None,
        screen: str = "auto",
    ) -> None:
        if start_l0 is None:
            start_l0 = 128 if p == 1 else 256
        super().__init__(warmup_tokens, start_l0, screen)
        check_coefficients(l1_coefficient=l1_coefficient)
        if not 0 < p <= 1:
            raise ValueError(f"p must be above 0 and at most 1, got {p}")
        self.l1_coefficient, self.p = l1_coefficient, p

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[CSRCodes, None]:
        """All positive pre-activations."""
        return threshold_encode(x, W_enc, b_enc, 0.0, self.screen, center), None

    def penalties(self, sae: SAE, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """The L1 or L_p term."""
        assert isinstance(codes, CSRCodes)
        if self.l1_coefficient == 0:
            return {}
        return {"sparsity": self.l1_coefficient * self.warmth() * self.l1(sae, batch, codes, self.p)}

    def fit_start_(self, sae: SAE, batch: Batch) -> None:
        """Lower the biases."""
        sae.b_enc.sub_(self.start_cut(sae, batch.x))


class JumpReLU(Penalized):
    """Keeps pre-activations above a trained threshold of each latent, at a price a latent.

    The threshold θ is trained through straight-through estimators: with ``K = 1[|pre − θ| < bandwidth / 2]``,
    ``dz/dθ = −(θ / bandwidth) K`` and ``dL0/dθ = −K / bandwidth``. The part ``sparsity`` of the loss is
    ``l0_coefficient · mean L0``, or with a target ``l0_coefficient · (mean L0 / target_l0 − 1)²``, with the mean over
    the batch: one token may have more latents than another at no price.

    Parameters
    ----------
    l0_coefficient : float or None
        Weight of the penalty. By default 0.001, and 1 with a target.
    target_l0 : float or None
        Active latents a token to train for.
    bandwidth : float
        Of the estimators, in units of the data's length.
    pre_act_coefficient : float
        Weight of ``mean over tokens of Σ_i ReLU(θ_i − pre_i) ‖d_i‖ / length``, a part ``pre_act`` of the loss: it draws
        latents that never fire towards firing. Over all latents, yet nothing of tokens × latents is made of it:
        ``ReLU(θ − p) = θ − p + ReLU(p − θ)``, whose first part is one product with the mean token, and whose second is
        sparse. Published: 3e-6 beside a squared error of data of length √d.
    warmup_tokens : int
        Tokens of training over which both weights rise from 0.
    start_l0 : int or None
        ``SAE.fit_start_`` puts the thresholds where so many latents a token are active; by default 128, or four times
        the target.
    screen : str
        See :func:`sparsekern.threshold_encode`.

    Attributes
    ----------
    relative_threshold : Parameter [d_sae] float32
        Thresholds in units of the data's length, its sign without meaning; in float32 whatever the module is cast to.
        Published code trains logarithms: Adam then needs 700 steps at a rate of 0.001 to double a threshold.

    References
    ----------
    Rajamanoharan et al., *Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders* (arXiv
    2407.14435), sections 3 and 4; the ``JumpReluTrainer`` of dictionary_learning for the target (that of Gemma Scope 2
    is for every token); Conerly et al., *Dictionary learning optimization techniques* (Anthropic, January 2025), for
    the pre-activation loss.
    """

    name = "jumprelu"
    exact = ("relative_threshold", "length")
    length: Tensor

    def __init__(
        self,
        l0_coefficient: float | None = None,
        target_l0: float | None = None,
        bandwidth: float = 0.02,
        pre_act_coefficient: float = 0.0,
        warmup_tokens: int = 0,
        start_l0: int | None = None,
        screen: str = "auto",
    ) -> None:
        if target_l0 is not None and not target_l0 > 0:
            raise ValueError(f"target_l0 must be above 0, got {target_l0}")
        if l0_coefficient is None:
            l0_coefficient = 1e-3 if target_l0 is None else 1.0
        if start_l0 is None:
            start_l0 = 128 if target_l0 is None else math.ceil(4 * target_l0)
        super().__init__(warmup_tokens, start_l0, screen)
        check_coefficients(l0_coefficient=l0_coefficient, pre_act_coefficient=pre_act_coefficient)
        if not bandwidth > 0:
            raise ValueError(f"bandwidth must be above 0, got {bandwidth}")
        self.l0_coefficient, self.target_l0, self.bandwidth = l0_coefficient, target_l0, bandwidth
        self.pre_act_coefficient = pre_act_coefficient
        self.register_buffer("length", torch.ones(()))  # of the data, once it is known
        self.relative_threshold = nn.Parameter(torch.empty(0))

    def bind_(self, d_sae: int) -> None:
        """Make the thresholds."""
        self.relative_threshold = nn.Parameter(torch.full((d_sae,), 1e-3))

    @property
    def threshold(self) -> Tensor:
        """The thresholds, ``[d_sae]``."""
        return self.length * self.relative_threshold.abs()

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[CSRCodes, tuple[CSRCodes, Tensor] | None]:
        """What passes the thresholds.

        In training also what fails by less than half the bandwidth, with the value 0: the thresholds learn from it.
        """
        if not self.training:
            return threshold_encode(x, W_enc, b_enc, self.threshold.detach(), self.screen, center), None
        width = self.bandwidth * self.length
        threshold = self.threshold
        near = threshold_encode(x, W_enc, b_enc, threshold.detach() - width / 2, self.screen, center)
        cut = threshold.index_select(0, near.col)
        values = _Jump.apply(near.values, cut, width)
        return near._replace(values=values), (near, cut)

    def penalties(self, sae: SAE, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """The L0 term, and the pre-activation loss."""
        if trace is None:
            return {}
        near, cut = trace
        l0 = _Step.apply(near.values, cut, self.bandwidth * self.length).sum() / codes.tokens
        price = l0 if self.target_l0 is None else (l0 / self.target_l0 - 1).square()
        parts = {"sparsity": self.l0_coefficient * self.warmth() * price}
        if self.pre_act_coefficient > 0:
            below = self._below(sae, batch.x, near, cut)
            parts["pre_act"] = self.pre_act_coefficient * self.warmth() * below / batch.length
        return parts

    def _below(self, sae: SAE, x: Tensor, near: CSRCodes, cut: Tensor) -> Tensor:
        """``mean over tokens of Σ_i ReLU(θ_i − pre_i) ‖d_i‖``."""
        norms, center = sae.latent_norms(), sae.center()
        mean = (x if center is None else x - center).mean(0, keepdim=True)
        every = torch.arange(sae.d_sae, dtype=torch.int32, device=x.device)
        mean_pre = _gather_dot(mean.to(sae.W_enc.dtype), every.unsqueeze(0), sae.W_enc).squeeze(0) + sae.b_enc
        above = (near.values - cut).relu() * norms.index_select(0, near.col)
        return ((self.threshold - mean_pre) * norms).sum() + above.sum() / near.tokens

    def fit_start_(self, sae: SAE, batch: Batch) -> None:
        """Put all thresholds where `start_l0` latents a token pass."""
        if batch.length > 0:
            self.length.copy_(batch.length)
        cut = self.start_cut(sae, batch.x)
        if cut > 0:
            self.relative_threshold.fill_(cut / self.length)

    def rescale_(self, factor: Tensor) -> None:
        """Scales the thresholds."""
        self.relative_threshold.mul_(factor)


class Gated(Penalized):
    """Decides by one pre-activation whether a latent is active, and by another how much: no shrinkage.

    With ``π = W_enc (x − b_dec) + b_enc``, the gate: ``z = 1[π > 0] · ReLU(exp(r_mag) (π − b_enc) + b_mag)``. The gate
    has no gradient of its own, so two parts of the loss train it: ``sparsity``, ``l1_coefficient · mean over tokens of
    Σ_i ReLU(π_i) ‖d_i‖ / length``, and ``gate``, the FVU of what ReLU(π) decodes to, with a frozen decoder.

    Parameters
    ----------
    l1_coefficient : float
        Weight of the penalty. On MiniLM, 4,096 latents, 0.2 and 0.3 come to an L0 of 59 and 31.
    warmup_tokens : int
        Tokens of training over which it rises from 0.
    start_l0 : int
        ``SAE.fit_start_`` puts the gates' biases where so many latents a token are active.
    screen : str
        See :func:`sparsekern.threshold_encode`.

    Attributes
    ----------
    r_mag, b_mag : Parameter [d_sae]

    References
    ----------
    Rajamanoharan et al., *Improving dictionary learning with gated sparse autoencoders* (arXiv 2404.16014), section 3.
    """

    name = "gated"

    def __init__(
        self, l1_coefficient: float = 0.2, warmup_tokens: int = 0, start_l0: int = 128, screen: str = "auto"
    ) -> None:
        super().__init__(warmup_tokens, start_l0, screen)
        check_coefficients(l1_coefficient=l1_coefficient)
        self.l1_coefficient = l1_coefficient
        self.r_mag, self.b_mag = nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))

    def bind_(self, d_sae: int) -> None:
        """Make the magnitudes' parameters."""
        self.r_mag, self.b_mag = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_sae))

    def encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, center: Tensor | None = None
    ) -> tuple[CSRCodes, CSRCodes]:
        """Magnitudes where gates are open, and the gates."""
        gates = threshold_encode(x, W_enc, b_enc, 0.0, self.screen, center)
        plain = gates.values if b_enc is None else gates.values - b_enc.index_select(0, gates.col)
        scale, shift = self.r_mag.exp().index_select(0, gates.col), self.b_mag.index_select(0, gates.col)
        return gates._replace(values=(scale * plain + shift).relu()), gates

    def penalties(self, sae: SAE, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """What trains the gates."""
        by_gate = sparse_decode(trace, sae.W_dec.detach()) + sae.offset(batch.x).detach()
        return {
            "sparsity": self.l1_coefficient * self.warmth() * self.l1(sae, batch, trace),
            "gate": sae.fvu(by_gate - batch.target, batch),
        }

    def fit_start_(self, sae: SAE, batch: Batch) -> None:
        """Lower the gates' biases; magnitudes are what they gate before that."""
        self.b_mag.copy_(sae.b_enc)
        sae.b_enc.sub_(self.start_cut(sae, batch.x))

    def rescale_(self, factor: Tensor) -> None:
        """Scales the magnitudes' biases."""
        self.b_mag.mul_(factor)


class _Jump(torch.autograd.Function):
    """``z = p · 1[p > θ]`` of entries, with the pseudo-derivative to θ."""

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold, width = ctx.saved_tensors
        near = (pre - threshold).abs() < width / 2
        return torch.where(pre > threshold, grad, 0), torch.where(near, -threshold / width * grad, 0), None


class _Step(torch.autograd.Function):
    """``1[p > θ]`` of entries, with the pseudo-derivative to θ."""

    @staticmethod
    def forward(pre: Tensor, threshold: Tensor, width: Tensor) -> Tensor:
        return (pre > threshold).to(torch.promote_types(pre.dtype, threshold.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold, width = ctx.saved_tensors
        near = (pre - threshold).abs() < width / 2
        return None, torch.where(near, -grad / width, 0), None


def check_k_and_screen(k: int, screen: str, name: str = "k") -> None:
    """Arguments that most activations have."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {k!r}")
    check_screen(screen)


def check_screen(screen: str) -> None:
    """It is one that there is."""
    if screen not in SCREENS:
        raise ValueError(f"screen must be one of {', '.join(SCREENS)}, got {screen!r}")


def check_at_most(d_sae: int, **numbers: float) -> None:
    """There are so many latents."""
    for name, number in numbers.items():
        if number > d_sae:
            raise ValueError(f"{name} must be at most d_sae={d_sae}, got {number}")


def check_coefficients(**numbers: float) -> None:
    """None is negative, infinite or NaN."""
    for name, number in numbers.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} must not be negative and must be finite, got {number}")


ACTIVATIONS: dict[str, type[Activation]] = {
    kind.name: kind for kind in (TopK, AbsTopK, GroupMax, BatchTopK, ReLU, JumpReLU, Gated)
}
"""By the name that a saved configuration uses."""
