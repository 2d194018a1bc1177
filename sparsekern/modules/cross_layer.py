"""The cross-layer transcoder: latents read at one layer and write at that layer and all after it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.codes import CSRCodes, SparseCodes, entry_rows
from sparsekern.modules.activations import Activation, Codes, Gated, TopK
from sparsekern.modules.crosscoder import Crosscoder
from sparsekern.modules.dead import DeadBound
from sparsekern.modules.last_batch import LastBatch
from sparsekern.modules.sae import Batch, check_counts
from sparsekern.modules.transcoder import Transcoder


class CrossLayerTranscoder(Crosscoder):
    """``z_l = activation(x_l W_enc_lᵀ + b_enc_l)`` and ``ŷ_m = Σ_{l ≤ m} z_l W_dec_lm + b_dec_m``, for layers l and m.

    One transcoder a layer, whose decoder rows hold what a latent writes at its own layer and at all later ones, side by
    side: a code is decoded once for all of them. The loss is the mean FVU of the layers, and what the activations are
    charged for. Latents are counted layer by layer. There is no AuxK.

    Parameters
    ----------
    n_layers : int
    d_in : int
        Width of what is read at each layer, and of what is written.
    d_sae_per_layer : int
        Latents of each layer.
    activation : Activation
        Each layer has a copy: k is that of a layer. No Gated and no Multi-TopK, whose further terms would have one
        layer reconstruct what several do.
    **options
        Those of :class:`Transcoder` but `d_out`, `skip` and what concerns AuxK.

    Attributes
    ----------
    layers : ModuleList of Transcoder
        ``W_dec`` of the l-th has the shape ``[d_sae_per_layer, (n_layers − l) · d_in]``.
    b_dec : Parameter [n_layers · d_in]

    References
    ----------
    Ameisen et al., *Circuit tracing: revealing computational graphs in language models* (Anthropic, 2025), methods.
    """

    def __init__(
        self,
        n_layers: int,
        d_in: int,
        d_sae_per_layer: int,
        activation: Activation,
        *,
        dead_after: int = 10_000_000,
        **options: Any,
    ) -> None:
        nn.Module.__init__(self)
        check_counts(n_layers=n_layers, d_in=d_in, d_sae_per_layer=d_sae_per_layer, dead_after=dead_after)
        if isinstance(activation, Gated) or (isinstance(activation, TopK) and activation.multi_k):
            raise ValueError(f"activation must have no reconstruction term of its own, got {activation!r}")
        for name in ("d_out", "skip", "aux_coefficient", "aux_k"):
            if name in options:
                raise ValueError(f"{name} is no option of a CrossLayerTranscoder")
        self.n_sources, self.d_source, self.d_sae_per_layer = n_layers, d_in, d_sae_per_layer
        self.d_in = self.d_out = n_layers * d_in
        self.d_sae, self.dead_after = n_layers * d_sae_per_layer, dead_after
        self.tied, self.pre_bias, self.aux_coefficient = False, False, 0.0
        layers = []
        for layer in range(n_layers):
            width = (n_layers - layer) * d_in
            layers.append(Transcoder(d_in, d_sae_per_layer, activation, d_out=width, **options))
        self.layers = nn.ModuleList(layers)
        for part in layers[1:]:
            part.b_dec.requires_grad_(False)  # the first one's reaches every layer
        self.unit_decoder = layers[0].unit_decoder
        self.activation = Activation()  # the layers have their own
        self.activation.screen = activation.screen
        since = torch.zeros(self.d_sae, dtype=torch.int64, device=layers[0].device)
        self.register_buffer("tokens_since_fired", since)
        self._dead_bound, self._last_batch = DeadBound(), LastBatch()

    def _parts(self) -> list[Transcoder]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def b_dec(self) -> Tensor:  # type: ignore[override]
        """The decoders' bias, ``[n_layers · d_in]``."""
        return self._parts()[0].b_dec

    @property
    def W_enc(self) -> Tensor:  # type: ignore[override] # noqa: N802
        """All encoder rows, ``[d_sae, d_in]``: made when asked for."""
        return torch.cat([part.W_enc for part in self._parts()])

    @property
    def W_dec(self) -> Tensor:  # type: ignore[override] # noqa: N802
        """All decoder rows, ``[d_sae, n_layers · d_in]``, 0 before a latent's own layer: made when asked for."""
        rows = [nn.functional.pad(part.W_dec, (self.d_in - part.d_out, 0)) for part in self._parts()]
        return torch.cat(rows)

    @property
    def b_enc(self) -> Tensor:  # type: ignore[override]
        """Biases of all latents, ``[d_sae]``."""
        return torch.cat([part.b_enc for part in self._parts()])

    # Forward

    def _encode(self, x: Tensor) -> tuple[Codes, list[tuple[Codes, Any]]]:
        found = []
        for part, rows in zip(self._parts(), self._by_layer(x), strict=True):
            found.append(part._encode(rows))
        codes = [codes for codes, _ in found]
        return _joined(codes, x.shape[:-1]), found

    def _by_layer(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.reshape(-1, self.n_sources, self.d_source).unbind(1)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstruction ``[..., n_layers, d_in]`` from codes."""
        shape = codes.values.shape[:-1] if isinstance(codes, SparseCodes) else (codes.tokens,)
        decoded = self._decode_layers(_split(codes, self.n_sources))
        return decoded.reshape(*shape, self.n_sources, self.d_source)

    def _decode_layers(self, codes: list[Codes]) -> Tensor:
        """``[B, n_layers · d_in]``."""
        parts = self._parts()
        total = parts[0].decode(codes[0])
        for part, own in zip(parts[1:], codes[1:], strict=True):
            total = total + nn.functional.pad(part.decode(own), (self.d_in - part.d_out, 0))
        return total

    def _reconstruction(self, codes: Codes, batch: Batch, trace: Any) -> tuple[Tensor, Tensor | None]:
        return self._decode_layers([own for own, _ in trace]) - batch.target, None

    def _penalties(self, batch: Batch, codes: Codes, trace: Any) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for part, rows, (own, own_trace) in zip(self._parts(), self._by_layer(batch.x), trace, strict=True):
            mine = Batch(rows, batch.target[:, self.d_in - part.d_out :], batch.variance)
            for name, value in part.activation.penalties(part, mine, own, own_trace).items():
                parts[name] = parts[name] + value if name in parts else value
        return parts

    def _count(self, codes: Codes, trace: Any, finite: Tensor) -> None:
        super()._count(codes, trace, finite)
        for part, (own, _) in zip(self._parts(), trace, strict=True):
            part.activation.count_(own, finite)

    def latent_norms(self) -> Tensor:
        """Norms of what each latent writes at all layers together, ``[d_sae]``."""
        return torch.cat([part.latent_norms() for part in self._parts()])

    def source_norms(self) -> Tensor:
        """Norms of what each latent writes at each layer, ``[d_sae, n_layers]``; 0 before its own."""
        return self.W_dec.unflatten(1, (self.n_sources, self.d_source)).norm(dim=2)

    # Weights, the start, and saving

    def latent_weights(self) -> list[nn.Parameter]:
        """The weights of one row a latent."""
        return [weight for part in self._parts() for weight in part.latent_weights()]

    def unit_weights(self) -> list[nn.Parameter]:
        """Those whose rows are kept at unit norm."""
        return [weight for part in self._parts() for weight in part.unit_weights()]

    def screened_weights(self) -> list[nn.Parameter]:
        """Those that see the activations."""
        return [weight for part in self._parts() for weight in part.screened_weights()]

    @torch.no_grad()
    def fit_start_(self, x: Tensor, center: str = "geometric_median", target: Tensor | None = None) -> None:
        """Each layer as a :class:`Transcoder` to what it writes; then one factor for the scale of all encoders."""
        batch = self._start_batch(self._flat(x), None if target is None else self._flat(target))
        for part, rows in zip(self._parts(), self._by_layer(batch.x), strict=True):
            part.fit_start_(rows, center, batch.target[:, self.d_in - part.d_out :])
            part.b_dec.zero_()
        self._fit_center_(batch.target, center)
        self._fit_scale_(batch)

    def _fit_center_(self, target: Tensor, center: str) -> None:
        super(Crosscoder, self)._fit_center_(target, center)

    def _rescale_encoder_(self, factor: Tensor) -> None:
        for part in self._parts():
            part._rescale_encoder_(factor)

    def config(self) -> dict[str, Any]:
        """Arguments that rebuild this module, without its weights."""
        part = self._parts()[0]
        return {
            "class": type(self).__name__,
            "n_layers": self.n_sources,
            "d_in": self.d_source,
            "d_sae_per_layer": self.d_sae_per_layer,
            "activation": {"name": part.activation.name, **part.activation.config()},
            "unit_decoder": self.unit_decoder,
            "dead_after": self.dead_after,
        }


def _joined(codes: list[Codes], shape: torch.Size) -> Codes:
    """The codes of all layers as one, latents counted layer by layer; fixed numbers in the `shape` of the tokens."""
    size, total = codes[0].d_sae, sum(part.d_sae for part in codes)
    fixed = [part for part in codes if isinstance(part, SparseCodes)]
    if fixed:
        values = torch.cat([part.values for part in fixed], 1)
        indices = torch.cat([part.indices + size * layer for layer, part in enumerate(fixed)], 1)
        return SparseCodes(values.view(*shape, -1), indices.view(*shape, -1), total)
    parts = [part for part in codes if isinstance(part, CSRCodes)]
    crow = torch.stack([part.crow for part in parts]).sum(0)
    before = crow[:-1].clone()  # where a layer's entries of each token begin
    places = []
    for part in parts:
        rows = entry_rows(part.crow, part.col)
        inside = torch.arange(len(rows), device=rows.device) - part.crow.index_select(0, rows)
        places.append(before.index_select(0, rows) + inside)
        before += part.crow.diff()
    place = torch.cat(places)
    order = torch.empty_like(place).scatter_(0, place, torch.arange(len(place), device=place.device))
    col = torch.cat([part.col + size * layer for layer, part in enumerate(parts)])
    values = torch.cat([part.values for part in parts])
    return CSRCodes(crow, col.index_select(0, order), values.index_select(0, order), total)


def _split(codes: Codes, layers: int) -> list[Codes]:
    """The codes of each layer, from those of all."""
    size = codes.d_sae // layers
    if isinstance(codes, SparseCodes):
        if codes.k % layers:
            raise ValueError(f"codes must have as many slots for each of the {layers} layers, got {codes.k}")
        values = codes.values.reshape(codes.tokens, layers, -1).unbind(1)
        indices = codes.indices.reshape(codes.tokens, layers, -1).unbind(1)
        return [
            SparseCodes(v, i - size * layer, size) for layer, (v, i) in enumerate(zip(values, indices, strict=True))
        ]
    found: list[Codes] = []
    for layer in range(layers):
        mine = codes.col // size == layer
        crow = torch.cat([mine.new_zeros(1, dtype=torch.int64), mine.cumsum(0)]).index_select(0, codes.crow)
        found.append(CSRCodes(crow, codes.col[mine] - size * layer, codes.values[mine], size))
    return found
