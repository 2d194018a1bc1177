"""The sparse autoencoder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sparsekern.modules.activations import ACTIVATIONS, Activation, Codes, check_coefficients
from sparsekern.modules.dead import DeadBound, dead_rows
from sparsekern.modules.initialization import geometric_median, unit_rows
from sparsekern.modules.last_batch import LastBatch
from sparsekern.modules.pretrained import load_pretrained, save_pretrained
from sparsekern.ops import sparse_decode, topk_encode
from sparsekern.ops._checks import check_finite
from sparsekern.ops._gather_rows import gather_rows
from sparsekern.ops._row_norms import row_norms
from sparsekern.ops._snapshot import snapshot
from sparsekern.ops._topk_among import topk_among


class Batch(NamedTuple):
    """What a loss is made of.

    Attributes
    ----------
    x : Tensor [B, d_in]
        Activations.
    target : Tensor [B, d_out]
        What is to be reconstructed.
    variance : Tensor []
        Mean squared length of a target about the mean target; a :class:`Crosscoder` has one for every source.
    """

    x: Tensor
    target: Tensor
    variance: Tensor

    @property
    def length(self) -> Tensor:
        """Root mean square length of a target about the mean target, ``[]``."""
        return self.variance.sum().sqrt()


class LossOutput(NamedTuple):
    """What :meth:`SAE.loss` returns.

    Attributes
    ----------
    total : Tensor []
        The loss to differentiate: the sum of the parts.
    parts : dict[str, Tensor]
        Weighted terms: ``reconstruction``, those of the activation and of the class, and, where there are dead latents,
        ``auxk``.
    codes : SparseCodes or CSRCodes
        Codes of the batch.
    fvu : Tensor []
        Fraction of variance unexplained over the batch, detached.
    measures : dict[str, Tensor]
        What else to log of the batch, 0-dimensional and detached.
    """

    total: Tensor
    parts: dict[str, Tensor]
    codes: Codes
    fvu: Tensor
    measures: dict[str, Tensor]


class SAE(nn.Module):
    """A sparse autoencoder: ``z = activation((x − b_dec) W_encᵀ + b_enc)``, ``x̂ = z W_dec + b_dec``.

    Called as a module it returns the reconstruction, so that it drops into a forward hook.

    Encoder and decoder start equal, with rows of unit norm, and ``b_dec`` at zero; :meth:`fit_start_` fits that to
    data. With `unit_decoder` the decoder rows are meant to stay at unit norm: call :meth:`project_decoder_grad_` before
    and :meth:`normalize_decoder_` after each step of the optimizer. :class:`sparsekern.Trainer` does all three.

    Parameters
    ----------
    d_in : int
        Width of the activations.
    d_sae : int
        Number of latents.
    activation : Activation
        For example ``sparsekern.TopK(32)``. The module takes a copy.
    tied : bool
        Whether encoder and decoder are one parameter.
    unit_decoder : bool or None
        Whether decoder rows are kept at unit norm. By default as the activation has it, and not where weights are tied.
    pre_bias : bool
        Whether the encoder sees ``x − b_dec`` or `x`.
    aux_coefficient : float or None
        Weight of the AuxK loss, which lets dead latents reconstruct what the live ones left over; 0 turns it off. By
        default as the activation has it: 1/32, and 0 for those with a penalty.
    aux_k : int or None
        Dead latents that each token may use for it; ``d_in // 2`` by default.
    dead_after : int
        Tokens without firing after which a latent counts as dead.
    generator : torch.Generator or None
        For reproducible starting weights (a CPU generator).
    device, dtype
        Of the parameters.

    Attributes
    ----------
    W_enc, W_dec : Parameter [d_sae, d_in]
        One row a latent. The same parameter where weights are `tied`.
    b_enc : Parameter [d_sae]
    b_dec : Parameter [d_in]
    tokens_since_fired : Tensor [d_sae] int64
        Kept by :meth:`loss` in training mode.

    References
    ----------
    Gao et al., *Scaling and evaluating sparse autoencoders* (arXiv 2406.04093), sections 2 and A.2.
    """

    reads: ClassVar[str] = "output"
    """Which end of a model's module the activations come from, as :func:`sparsekern.splice` has it."""

    n_sources = 1
    """How many activations of a token are read and written, side by side; their FVUs are averaged."""

    tokens_since_fired: Tensor

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        activation: Activation,
        *,
        tied: bool = False,
        unit_decoder: bool | None = None,
        pre_bias: bool = True,
        aux_coefficient: float | None = None,
        aux_k: int | None = None,
        dead_after: int = 10_000_000,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        check_counts(d_in=d_in, d_sae=d_sae, dead_after=dead_after)
        if not isinstance(activation, Activation):
            raise ValueError(f"activation must be an Activation such as sparsekern.TopK(32), got {activation!r}")
        if aux_coefficient is not None:
            check_coefficients(aux_coefficient=aux_coefficient)
        if aux_k is not None:
            check_counts(aux_k=aux_k)
        self.d_in, self.d_sae, self.d_out = d_in, d_sae, d_in
        self.tied, self.pre_bias = tied, pre_bias
        self.activation = copy.deepcopy(activation).train()
        self.activation.bind_(d_sae)
        self.activation.to(device=device, dtype=dtype)
        self.unit_decoder = (activation.unit_decoder and not tied) if unit_decoder is None else unit_decoder
        self.aux_coefficient = activation.aux_coefficient if aux_coefficient is None else aux_coefficient
        self.aux_k = aux_k or max(1, d_in // 2)
        self.dead_after = dead_after
        rows = unit_rows(d_sae, d_in, generator).to(device=device, dtype=dtype)
        self.W_enc = nn.Parameter(rows)
        self.b_enc = nn.Parameter(rows.new_zeros(d_sae))
        self.W_dec = self.W_enc if tied else nn.Parameter(rows.clone())
        self.b_dec = nn.Parameter(rows.new_zeros(d_in))
        self.register_buffer("tokens_since_fired", torch.zeros(d_sae, dtype=torch.int64, device=rows.device))
        self._dead_bound, self._last_batch = DeadBound(), LastBatch()

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        shape = f"d_in={self.d_in}, d_sae={self.d_sae}, pre_bias={self.pre_bias}"
        return shape + (f", d_out={self.d_out}" if self.d_out != self.d_in else "") + (", tied" if self.tied else "")

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.b_dec.device

    @property
    def screen(self) -> str:
        """Precision of the encoder's screening pass."""
        return self.activation.screen

    # Forward

    def encode(self, x: Tensor) -> Codes:
        """Codes of the activations `x` ``[..., d_in]``."""
        self._check_x(x)
        return self._encode(x)[0]

    def _encode(self, x: Tensor) -> tuple[Codes, Any]:
        """Codes, and what else of the encoder the loss of this class is made of."""
        return self.activation.encode(x, self._encoder(), self.b_enc, self.center())

    def _encoder(self) -> Tensor:
        """The encoder's rows as they act."""
        return self.W_enc

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction ``[..., d_out]`` from codes; ``[B, d_out]`` from CSR codes."""
        return sparse_decode(codes, self.W_dec, self.b_dec)

    def offset(self, x: Tensor) -> Tensor:
        """What is added to what the codes of `x` decode to."""
        return self.b_dec

    def reconstruct(self, codes: Codes, x: Tensor) -> Tensor:
        """What the module makes of activations `x` ``[..., d_in]`` with these codes of theirs, changed or not."""
        return self.decode(codes).reshape(*x.shape[:-1], self.d_out)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of `x` ``[..., d_in]``, in the shape and dtype of `x`."""
        return self.reconstruct(self.encode(x), x).to(x.dtype)

    def loss(self, x: Tensor, target: Tensor | None = None, variance: Tensor | None = None) -> LossOutput:
        """Loss of a batch: FVU of the reconstruction, what the activation is charged for, and the AuxK term.

        The FVU is ``Σ (y − x̂)² / Σ (y − ȳ)²`` over the batch. AuxK is the FVU of the (detached) residual,
        reconstructed from the top `aux_k` *dead* latents, times `aux_coefficient`; its gradient reaches their encoder
        rows as well as their decoder rows. In training mode this call also advances `tokens_since_fired`.

        To accumulate gradients over equal parts of a batch, give each the whole batch's `variance` and divide their
        losses by their number: this adds up to the loss of the whole batch, but for what a part decides by itself:
        AuxK, what a BatchTopK selects, how far a JumpReLU is from its target, the balance of experts, random prefixes,
        and the length that a hierarchy's L1 is measured in. A penalty that warms up is warmer in a later part.

        Compiled by ``torch.compile`` it is one graph. There AuxK is always a part, 0 where no latent is dead, and has
        `aux_k` slots a token whatever their number; their rows are still all that is encoded for it. On a GPU it waits
        for the device. Gradient checkpointing would count a batch twice, so in training mode it is refused; that of
        :meth:`forward`, :meth:`encode` and :meth:`decode` is not.

        Parameters
        ----------
        x : Tensor [..., d_in]
            Activations, at least two tokens.
        target : Tensor [..., d_out] or None
            What to reconstruct; `x` by default.
        variance : Tensor or None
            The denominator of the FVU over the number of tokens, :meth:`variance_of` a target; by default that of this
            one.
        """
        self.check_batch(x, target)
        if torch.compiler.is_compiling():
            return self.loss_with_room(x, target, None, variance)
        if self.training:
            self._last_batch.next(x)
        out = self.loss_with_room(x, target, self.dead_room(), variance)
        self.ask_for_dead(x.numel() // self.d_in)
        return out

    def loss_with_room(
        self, x: Tensor, target: Tensor | None, room: int | None, variance: Tensor | None = None
    ) -> LossOutput:
        """:meth:`loss` with `room` places for dead latents in AuxK, so that nothing waits for the device."""
        x = x.reshape(-1, self.d_in)
        target = x if target is None else target.reshape(-1, self.d_out)
        batch = Batch(x, target, self.variance_of(target) if variance is None else variance)
        codes, trace = self._encode(x)
        error, reconstruction = self._reconstruction(codes, batch, trace)
        fvu = self.fvu(error, batch)
        parts = {"reconstruction": fvu if reconstruction is None else reconstruction}
        parts |= self._penalties(batch, codes, trace)
        if self.training and self.aux_coefficient > 0 and room != 0:
            auxk = self._auxk(x, -error.detach(), room)
            if auxk is not None:
                parts["auxk"] = self.aux_coefficient * auxk
        total = torch.stack(list(parts.values())).sum()
        if self.training:
            with torch.no_grad():  # a batch that is not finite changes nothing, as in the optimizer
                self._count(codes, trace, total.isfinite())
        return LossOutput(total, parts, codes, fvu.detach(), self._measures(trace))

    def variance_of(self, target: Tensor) -> Tensor:
        """Mean squared length of the rows of `target` ``[..., d_out]`` about their mean, ``[]`` float32 at least."""
        return mean_square(centred_rows(target.reshape(-1, self.d_out)))

    def fvu(self, error: Tensor, batch: Batch) -> Tensor:
        """Share of the variance of the batch that is `error` ``[B, d_out]``."""
        return mean_square(error) / at_least_tiny(batch.variance)

    def error(self, codes: Codes, batch: Batch) -> Tensor:
        """Reconstruction less target, ``[B, d_out]``."""
        return self.reconstruct(codes, batch.x) - batch.target

    def _reconstruction(self, codes: Codes, batch: Batch, trace: Any) -> tuple[Tensor, Tensor | None]:
        """The error, and what is charged for it where that is not its FVU."""
        return self.error(codes, batch), None

    def _penalties(self, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        """Parts of the loss beside reconstruction and AuxK, weighted."""
        return self.activation.penalties(self, batch, codes, trace)

    def _measures(self, trace: Any) -> dict[str, Tensor]:
        """What to log beside the loss."""
        return {}

    def _count(self, codes: Codes, trace: Any, finite: Tensor) -> None:
        """Advance the counters of training by one batch, if it is `finite`."""
        self.tokens_since_fired += codes.tokens * finite
        self.tokens_since_fired.masked_fill_((codes.firing_counts() > 0) & finite, 0)
        self.activation.count_(codes, finite)

    def after_step_(self, finite: Tensor) -> None:
        """To be called after each step of the optimizer; `finite` ``[]`` says whether it changed anything.

        Nothing to do here; routed SAEs revive experts. :class:`sparsekern.Trainer` calls it.
        """

    def dead_room(self) -> int | None:
        """Places that AuxK needs for the dead latents in the next batch; None where they can be counted at once."""
        if not self.training or self.aux_coefficient == 0:
            return 0
        if self.device.type == "cpu":
            return None
        return self._dead_bound.bound(self.tokens_since_fired, self.dead_after)

    def ask_for_dead(self, tokens: int) -> None:
        """After a batch of so many tokens: ask the device how many latents could be dead soon."""
        if self.training and self.aux_coefficient > 0 and self.device.type == "cuda":
            self._dead_bound.ask(self.tokens_since_fired, self.dead_after, tokens)

    def dead_mask(self) -> Tensor:
        """Latents that have not fired for `dead_after` tokens of training: ``[d_sae]`` bool."""
        return snapshot(self.tokens_since_fired) >= self.dead_after

    def check_batch(self, x: Tensor, target: Tensor | None = None) -> None:
        """Raise ValueError where :meth:`loss` cannot take this batch; values are looked at later, by the op."""
        self._check_x(x)
        if x.numel() <= self.d_in:
            raise ValueError(f"x must hold at least two tokens to have a variance, got shape {tuple(x.shape)}")
        expected = (*x.shape[:-1], self.d_out)
        if target is None and self.d_out != self.d_in:
            raise ValueError(f"target must be given, with shape {expected}: d_out is not d_in")
        if target is not None and target.shape != expected:
            raise ValueError(f"target must have shape {expected}, got {tuple(target.shape)}")

    def _check_x(self, x: Tensor) -> None:
        if x.dim() == 0 or x.shape[-1] != self.d_in:
            raise ValueError(f"x must have {self.d_in} columns (d_in), got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"x must be a floating-point tensor, got {x.dtype}; use x.float()")

    def center(self) -> Tensor | None:
        """What the encoder subtracts from activations first."""
        return self.b_dec if self.pre_bias else None

    def latent_norms(self) -> Tensor:
        """Norms of the decoder's rows, ``[d_sae]``; differentiable where they are free."""
        if self.unit_decoder:
            return self.b_enc.new_ones(self.d_sae, dtype=torch.promote_types(self.b_enc.dtype, torch.float32))
        return row_norms(self.W_dec).squeeze(1)

    def _auxk(self, x: Tensor, residual: Tensor, room: int | None) -> Tensor | None:
        """FVU of the residual under its reconstruction from the dead rows; None, or 0, where there are none."""
        center, absolute = self.center(), self.activation.absolute
        if torch.compiler.is_compiling():  # into which sizes that depend on the data do not go
            mask = self.dead_mask()
            k = min(self.aux_k, self.d_sae)
            codes = topk_among(x, self._encoder(), self.b_enc, mask, k, center=center, absolute=absolute)
            return self._fvu_of_rest(sparse_decode(codes, self.W_dec), x, residual) * mask.any()
        dead = dead_rows(self.dead_mask(), room)
        if not dead.rows.numel():
            return None
        # The rows are gathered first: what follows costs in proportion to the dead latents only.
        k = min(self.aux_k, dead.rows.numel())
        bias, rows = self.b_enc[dead.rows], gather_rows(self._encoder(), dead.rows)
        if dead.used is not None:  # the places beyond the dead ones never fire: the least there is, or of no size
            bias = torch.where(dead.used, bias, 0.0 if absolute else -torch.inf)
            rows = torch.where(dead.used.unsqueeze(1), rows, 0) if absolute else rows
        codes = topk_encode(x, rows, bias, k, center=center, absolute=absolute)
        fvu = self._fvu_of_rest(sparse_decode(codes, gather_rows(self.W_dec, dead.rows)), x, residual)
        return fvu if dead.used is None else fvu * dead.used.any()

    def _fvu_of_rest(self, recon: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        return self.fvu(recon - residual, Batch(x, residual, self.variance_of(residual)))

    # The weights with a row a latent, the constraint on the decoder, and the start

    def latent_weights(self) -> list[nn.Parameter]:
        """The weights of one row a latent, whose gradients an optimizer can keep as factors."""
        return [self.W_enc] if self.tied else [self.W_enc, self.W_dec]

    def unit_weights(self) -> list[nn.Parameter]:
        """Those whose rows are kept at unit norm."""
        return [self.W_dec] if self.unit_decoder else []

    def screened_weights(self) -> list[nn.Parameter]:
        """Those that an encoder searches, and may keep a low-precision copy of."""
        return [self.W_enc]

    def is_fresh(self) -> bool:
        """Whether the biases are still at zero, as before :meth:`fit_start_` and training; waits for the device."""
        return not self.b_dec.any() and not self.b_enc.any()

    @torch.no_grad()
    def fit_start_(self, x: Tensor, center: str = "geometric_median", target: Tensor | None = None) -> None:
        """Fit the starting point to activations: ``b_dec`` to their centre, the encoder's scale by least squares.

        Unit rows are too long for an encoder: the k chosen latents of a token overlap, and the reconstruction
        overshoots. The factor that minimises ``‖x − b_dec − s (x̂ − b_dec)‖²`` is applied to the encoder (its root to
        both, where weights are tied); it changes no selection, and training from it is far ahead of training from 1
        (``docs/quality.md``). Thresholds, and the biases of activations that are kept sparse by a penalty, are put
        where few latents are active.

        Parameters
        ----------
        x : Tensor [..., d_in]
            A batch of activations.
        center : {"geometric_median", "mean", "zeros"}
            Where ``b_dec`` starts.
        target : Tensor [..., d_out] or None
            What is to be reconstructed; `x` by default.

        Raises
        ------
        ValueError
            On non-finite activations, and on an unknown `center`.
        """
        batch = self._start_batch(x, target)
        self._fit_center_(batch.target, center)
        self.activation.fit_start_(self, batch)
        self._fit_scale_(batch)

    def _start_batch(self, x: Tensor, target: Tensor | None) -> Batch:
        """Checked, flat and in the dtype of the weights."""
        self.check_batch(x, target)
        rows = x.reshape(-1, self.d_in).to(self.b_dec.dtype)
        check_finite("x", rows)
        wanted = rows if target is None else target.reshape(-1, self.d_out).to(self.b_dec.dtype)
        check_finite("target", wanted)
        return Batch(rows, wanted, self.variance_of(wanted))

    def _fit_center_(self, target: Tensor, center: str) -> None:
        centers = {"geometric_median": geometric_median, "mean": lambda rows: rows.mean(0), "zeros": lambda _: 0}
        if center not in centers:
            raise ValueError(f"center must be one of {', '.join(centers)}, got {center!r}")
        self.b_dec[:] = centers[center](target)

    def _fit_scale_(self, batch: Batch) -> None:
        if self.tied and self.unit_decoder:
            return  # the rows have their length
        offset = self.offset(batch.x)
        decoded = self(batch.x) - offset
        scale = (decoded * (batch.target - offset)).sum() / decoded.square().sum()
        if scale > 0:  # not on constant rows, which have nothing to fit
            self._rescale_encoder_(scale.sqrt() if self.tied else scale)

    def _rescale_encoder_(self, factor: Tensor) -> None:
        for weight in self.screened_weights():
            weight.mul_(factor)
        self.b_enc.mul_(factor)
        self.activation.rescale_(factor)

    @torch.no_grad()
    def normalize_decoder_(self, where: Tensor | None = None) -> None:
        """Scale every decoder row to unit norm; with `where` ``[]`` bool, only if that is true."""
        for weight in self.unit_weights():
            norm = weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
            weight.div_(norm if where is None else torch.where(where, norm, 1))

    @torch.no_grad()
    def project_decoder_grad_(self) -> None:
        """Remove from the decoder's gradient its component along each (unit) row: it could only change the norm."""
        for weight in self.unit_weights():
            if weight.grad is not None:
                weight.grad.addcmul_((weight.grad * weight).sum(1, keepdim=True), weight, value=-1)

    # Saving

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        return {
            "class": type(self).__name__,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "activation": {"name": self.activation.name, **self.activation.config()},
            "tied": self.tied,
            "unit_decoder": self.unit_decoder,
            "pre_bias": self.pre_bias,
            "aux_coefficient": self.aux_coefficient,
            "aux_k": self.aux_k,
            "dead_after": self.dead_after,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> SAE:
        """A module with fresh weights from what :meth:`config` returned, of this class or one derived from it."""
        options = dict(config)
        name = options.pop("class", None)
        kinds = {kind.__name__: kind for kind in _with_subclasses(cls)}
        if name not in kinds:
            raise ValueError(f"the configuration is of class {name!r}, not {' or '.join(kinds)}")
        try:
            if "activation" in options:
                options["activation"] = _activation(dict(options["activation"]))
            return kinds[name](dtype=dtype, **options)
        except TypeError as error:
            raise ValueError(f"the configuration does not fit {name}: {error}") from error

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into the folder `path`, made if needed."""
        save_pretrained(self, path)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, device: torch.device | str | None = None) -> SAE:
        """Load what :meth:`save_pretrained` wrote, from a folder or from a repository on the Hugging Face Hub."""
        return load_pretrained(cls, path_or_hub_id, device)


def check_counts(**numbers: Any) -> None:
    """Each is a whole number of at least 1."""
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {number!r}")


def _with_subclasses(cls: type[SAE]) -> list[type[SAE]]:
    return [cls, *(kind for derived in cls.__subclasses__() for kind in _with_subclasses(derived))]


def _activation(config: dict[str, Any]) -> Activation:
    name = config.pop("name", None)
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name](**config)


def centred_rows(rows: Tensor) -> Tensor:
    """`rows` ``[B, d]`` less their mean, in float32 at least."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows - rows.mean(0)


def mean_square(rows: Tensor) -> Tensor:
    """Mean squared length of `rows` ``[B, d]``, in float32 at least: ``[]``."""
    # A norm, because it takes one pass over memory, and one for its gradient, where squares and sums take two.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.vector_norm(rows).square() / rows.shape[0]


def at_least_tiny(number: Tensor) -> Tensor:
    """To divide by."""
    return number.clamp_min(torch.finfo(number.dtype).tiny)
