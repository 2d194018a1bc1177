"""The routed sparse autoencoder: a router chooses experts, and only their latents are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.codes import SparseCodes
from sparsekern.modules.activations import Codes, TopK
from sparsekern.modules.initialization import spherical_kmeans, unit_rows
from sparsekern.modules.sae import SAE, Batch, check_counts
from sparsekern.ops import route, routed_topk_encode
from sparsekern.ops._route import GATES
from sparsekern.routing import Routing

BALANCES = ("loss", "bias", "none")
ROUTER_STARTS = ("kmeans", "random")

_START_TOKENS = 8192
"""Tokens of a batch whose clusters the router starts at, at most."""


class SwitchSAE(SAE):
    """A mixture of expert SAEs: ``z = gate · TopK(ReLU(W_enc (x − b_dec) + b_enc))`` over the token's experts.

    Expert `i` owns the latents ``i · d_sae / n_experts`` up to the next expert's first. The router sees
    ``x − b_router``. With several active experts one top k is taken over all their latents together, by
    pre-activation; each latent's value is then multiplied by its expert's gate. What the other experts would have said
    is not computed, in no pass: a step costs about ``n_active / n_experts`` of a plain SAE's encoder.

    Everything of :class:`SAE` holds. AuxK works on the dead latents of all experts, for every token and without gates.

    Parameters
    ----------
    d_in, d_sae : int
        As for :class:`SAE`; `d_sae` is the number of latents of all experts together.
    activation : TopK
        How many latents of a token are kept, over all its experts.
    n_experts : int
        Divides `d_sae`.
    n_active : int
        Experts a token.
    gate : {"sigmoid", "softmax"}
        See :func:`sparsekern.route`. The softmax, over all experts, is the published gate; the sigmoid reconstructs
        much better (``docs/quality.md``): a softmax over many experts is seldom near 1, and what it varies by from
        token to token no latent can make up for.
    balance : {"loss", "bias", "none"}
        How experts are kept evenly loaded: by the Switch loss, a part ``balance`` of the loss; by a bias that only the
        choice of experts sees, raised for those with less than an even share of a batch and lowered for the others; or
        not at all.
    balance_coefficient : float
        Weight of ``n_experts · Σ_i f_i P_i − 1``, with f_i the share of the batch that expert i serves and P_i its mean
        probability: 0 where loads are even. No token is dropped, so uneven loads cost little, and a strong balance
        pulls the router away from the clusters of the data (``docs/quality.md``). The published α stands beside a
        squared error that is not normalized: ``α · d_in / variance of a token`` is the weight here.
    z_coefficient : float
        Weight of the mean squared log-partition function of the router's logits, which keeps these small; a part ``z``.
    bias_rate : float
        What the bias changes by in a step.
    feature_scaling : bool
        Encode with ``W + ω_e (W − mean of W over the expert)``, with a trained ω_e for every expert, at 0 to begin
        with. It writes a second tensor of the size of `W_enc` in every pass and makes its gradient dense: a slow
        option.
    dead_expert_after : int or None
        Tokens without being chosen after which an expert is revived: its router row is set beside that of the busiest
        expert. By default a tenth of `dead_after`.
    router_start : {"kmeans", "random"}
        Where :meth:`fit_start_` puts the router: at clusters of the first batch, or nowhere else than where it is.
    **options
        Those of :class:`SAE`: ``pre_bias``, ``aux_coefficient``, ``aux_k``, ``dead_after``, ``generator``, ``device``,
        ``dtype``.

    Attributes
    ----------
    W_router : Parameter [n_experts, d_in]
    b_router : Parameter [d_in]
    omega : Parameter [n_experts]
        With `feature_scaling` only.
    selection_bias : Tensor [n_experts]
        With ``balance="bias"`` only.
    loads : Tensor [n_experts] int64
        Tokens of each expert in the last batch of training.
    tokens_since_routed : Tensor [n_experts] int64

    References
    ----------
    Mudide et al., *Efficient dictionary learning with switch sparse autoencoders* (arXiv 2410.08201), section 3;
    Fedus et al., *Switch transformers* (arXiv 2101.03961), section 2.2, for the loss; Zoph et al., *ST-MoE* (arXiv
    2202.08906), equation 5, for the z-loss; Wang et al. (arXiv 2408.15664) for the bias; Xu et al., *Beyond
    redundancy* (arXiv 2511.05745) for several experts and feature scaling.
    """

    loads: Tensor
    tokens_since_routed: Tensor
    selection_bias: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: TopK,
        *,
        n_experts: int,
        n_active: int = 1,
        gate: str = "sigmoid",
        balance: str = "loss",
        balance_coefficient: float = 0.003,
        z_coefficient: float = 0.0,
        bias_rate: float = 1e-3,
        feature_scaling: bool = False,
        dead_expert_after: int | None = None,
        router_start: str = "kmeans",
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_in, d_sae, activation, generator=generator, **options)
        check_counts(n_experts=n_experts, n_active=n_active)
        if not isinstance(activation, TopK):
            raise ValueError(f"activation must be a TopK, got {activation!r}")
        if d_sae % n_experts:
            raise ValueError(f"n_experts must divide d_sae={d_sae}, got {n_experts}")
        if n_active > n_experts:
            raise ValueError(f"n_active must be at most n_experts={n_experts}, got {n_active}")
        if activation.k > n_active * d_sae // n_experts:
            most = n_active * d_sae // n_experts
            raise ValueError(f"k must be at most the {most} latents of {n_active} experts, got {activation.k}")
        for name, value, among in (
            ("gate", gate, GATES),
            ("balance", balance, BALANCES),
            ("router_start", router_start, ROUTER_STARTS),
        ):
            if value not in among:
                raise ValueError(f"{name} must be one of {', '.join(among)}, got {value!r}")
        for name, number in {
            "balance_coefficient": balance_coefficient,
            "z_coefficient": z_coefficient,
            "bias_rate": bias_rate,
        }.items():
            if number < 0:
                raise ValueError(f"{name} must not be negative, got {number}")
        if dead_expert_after is not None:
            check_counts(dead_expert_after=dead_expert_after)
        self.n_experts, self.n_active, self.latents_per_expert = n_experts, n_active, d_sae // n_experts
        self.gate, self.balance = gate, balance
        self.balance_coefficient, self.z_coefficient, self.bias_rate = balance_coefficient, z_coefficient, bias_rate
        self.feature_scaling, self.router_start = feature_scaling, router_start
        self.dead_expert_after = dead_expert_after or max(1, self.dead_after // 10)
        self.W_router = nn.Parameter(unit_rows(n_experts, d_in, generator).to(self.W_enc))
        self.b_router = nn.Parameter(self.b_dec.detach().clone())
        if feature_scaling:
            self.omega = nn.Parameter(self.b_enc.new_zeros(n_experts))
        work = torch.promote_types(self.W_enc.dtype, torch.float32)
        bias = torch.zeros(n_experts, dtype=work, device=self.device) if balance == "bias" else None
        self.register_buffer("selection_bias", bias)
        self.register_buffer("loads", torch.zeros(n_experts, dtype=torch.int64, device=self.device))
        self.register_buffer("tokens_since_routed", torch.zeros(n_experts, dtype=torch.int64, device=self.device))

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, n_experts={self.n_experts}, n_active={self.n_active}, balance={self.balance!r}"

    def route(self, x: Tensor) -> Routing:
        """The experts of the activations `x` ``[..., d_in]``."""
        self._check_x(x)
        return route(
            x,
            self.W_router,
            self.n_active,
            gate=self.gate,
            selection_bias=self.selection_bias,
            center=self.b_router,
        )

    def _encode(self, x: Tensor) -> tuple[SparseCodes, Routing]:
        routing = self.route(x)
        activation = self.activation
        assert isinstance(activation, TopK)
        codes = routed_topk_encode(
            x, self._encoder(), self.b_enc, routing, activation.k, activation.screen, self.center()
        )
        return codes._replace(values=codes.values * routing.gates_of(codes).to(codes.values.dtype)), routing

    def _encoder(self) -> Tensor:
        if not self.feature_scaling:
            return self.W_enc
        experts = self.W_enc.view(self.n_experts, self.latents_per_expert, self.d_in)
        own = experts - experts.mean(1, keepdim=True)
        return (experts + self.omega[:, None, None] * own).reshape(self.W_enc.shape)

    # Balance

    def _penalties(self, batch: Batch, codes: Codes, trace: Routing) -> dict[str, Tensor]:
        parts, logits = {}, trace.logits
        assert logits is not None
        if self.balance == "loss" and self.balance_coefficient > 0:
            share = trace.loads() / trace.experts.numel()
            if self.gate == "softmax":
                probability = logits.softmax(1)
            else:
                probability = torch.nn.functional.normalize(logits.sigmoid(), p=1, dim=1)
            uneven = self.n_experts * (share * probability.mean(0)).sum() - 1
            parts["balance"] = self.balance_coefficient * uneven
        if self.z_coefficient > 0:
            parts["z"] = self.z_coefficient * logits.logsumexp(1).square().mean()
        return parts

    def _measures(self, trace: Routing) -> dict[str, Tensor]:
        share = trace.loads() / trace.experts.numel()
        entropy = -torch.xlogy(share, share).sum()
        return {
            "expert_load_max": share.max() * self.n_experts,  # 1 is an even load
            "expert_load_min": share.min() * self.n_experts,
            "experts_effective": entropy.exp() / self.n_experts,
        }

    def _count(self, codes: Codes, trace: Routing, finite: Tensor) -> None:
        super()._count(codes, trace, finite)
        loads = trace.loads()
        self.loads.copy_(torch.where(finite, loads, self.loads))
        self.tokens_since_routed += trace.experts.shape[0] * finite
        self.tokens_since_routed.masked_fill_((loads > 0) & finite, 0)
        if self.selection_bias is not None:
            even = trace.experts.numel() / self.n_experts
            self.selection_bias += self.bias_rate * (even - loads).sign() * finite

    @torch.no_grad()
    def after_step_(self, finite: Tensor) -> None:
        """Revive an expert that no token has chosen for `dead_expert_after` tokens; at most one at a time.

        Its latents need no help: they are dead ones, so AuxK trains them. What it lacks is tokens. So its router row
        becomes that of the busiest expert, a little turned towards what its own decoder rows stand for: it takes over
        the tokens of that expert that are most like its latents.
        """
        dead = self.tokens_since_routed >= self.dead_expert_after
        if self.device.type == "cpu" and not dead.any():
            return
        # Elsewhere nobody waits to see whether there is one: then the first expert's row is written over itself.
        which = dead.int().argmax().view(1)
        wanted = dead.any() & finite
        busiest = self.W_router.index_select(0, self.loads.argmax().view(1))
        rows = self.W_dec.view(self.n_experts, self.latents_per_expert, self.d_in).index_select(0, which)
        turn = torch.nn.functional.normalize(rows.sum(1)) * (0.1 * busiest.norm())
        row = torch.where(wanted, busiest + turn, self.W_router.index_select(0, which))
        self.W_router.index_copy_(0, which, row)
        since = self.tokens_since_routed.index_select(0, which)
        self.tokens_since_routed.index_copy_(0, which, torch.where(wanted, 0, since))

    # The start, and saving

    def is_fresh(self) -> bool:
        """As for :class:`SAE`; the router's bias counts too."""
        return super().is_fresh() and not self.b_router.any()

    @torch.no_grad()
    def fit_start_(self, x: Tensor, center: str = "geometric_median", target: Tensor | None = None) -> None:
        """As for :class:`SAE`; ``b_router`` starts where ``b_dec`` does, ``W_router`` at the batch's clusters.

        The clusters are those of spherical k-means. The logits start with a standard deviation of 1.
        """
        batch = self._start_batch(x, target)
        self._fit_center_(batch.target, center)
        self.b_router.copy_(self.b_dec)
        if self.router_start == "kmeans":
            rows = batch.x[:_START_TOKENS] - self.b_router
            self.W_router.copy_(spherical_kmeans(rows, self.n_experts))
        logits = self.route(batch.x).logits
        assert logits is not None
        spread = logits.std(0).mean()
        if spread > 0:
            self.W_router.div_(spread)
        self._fit_scale_(batch)

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        names = ["n_experts", "n_active", "gate", "balance", "balance_coefficient", "z_coefficient", "bias_rate"]
        names += ["feature_scaling", "dead_expert_after", "router_start"]
        return {**super().config(), **{name: getattr(self, name) for name in names}}
