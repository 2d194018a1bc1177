"""The single operations of a step, on weights that a few training steps have warmed, and the exactness of the encoder.

Beside each C++ kernel stand the reference backend and, for decoding, ``torch.nn.functional.embedding_bag``, with which
other libraries decode on a CPU; beside the encoder, matmul, ReLU and ``torch.topk``, as other libraries encode; beside
the update of the weights, torch's own passes over dense gradients: projection, clipping, fused Adam, unit norm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

import sparsekern as sk
from sparsekern.backends import cpu, reference
from sparsekern.factors import OuterProducts

RECALL_ROWS = 64

ROUTED = ((8, 1), (32, 1), (128, 1), (8, 2), (32, 2))
"""Experts, and how many of them a token has."""


def calls(sae: sk.SAE, k: int, x: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name. `grad` ``[B, d]`` stands for the gradient of the reconstruction."""
    x, weight, bias = (x - sae.b_dec).detach(), sae.W_enc.detach(), sae.b_enc.detach()
    dec, n = sae.W_dec.detach(), sae.d_sae
    codes = sk.topk_encode(x, weight, bias, k)
    values, indices = codes.values, codes.indices
    wide, reused = indices.long(), x.new_empty(x.shape[0], n)

    def bag_and_gradients() -> None:
        w, v = dec.requires_grad_(), values.requires_grad_()
        out = embedding_bag(wide, w, per_sample_weights=v, mode="sum")
        torch.autograd.grad(out, [w, v], grad)
        dec.requires_grad_(False)
        values.requires_grad_(False)

    def products_and_gradients() -> None:
        cpu.sparse_decode(values, indices, dec, None)
        cpu.gather_dot(grad, indices, dec)
        cpu.scatter_outer(values, indices, grad, n)

    fresh = weight.clone()  # whose int8 copy nobody keeps
    update, update_by_torch = updates(sae, x, grad, OuterProducts(values, indices, grad))
    every: dict[str, Callable[[], object]] = {
        "matmul": lambda: x @ weight.T,
        "matmul into an existing tensor": lambda: torch.mm(x, weight.T, out=reused),
        "topk_encode": lambda: sk.topk_encode(x, weight, bias, k),
        "topk_encode, quantizing": lambda: sk.topk_encode(x, fresh, bias, k),
        "topk_encode, reference": lambda: reference.topk_encode(x, weight, bias, k, "auto"),
        "topk_encode, dense torch": lambda: linear(x, weight, bias).relu_().topk(k),
        "topk_encode, absolute": lambda: sk.topk_encode(x, weight, bias, k, absolute=True),
        **routed(x, weight, bias, k),
        "sparse_decode, cpu": lambda: cpu.sparse_decode(values, indices, dec, None),
        "sparse_decode, reference": lambda: reference.sparse_decode(values, indices, dec, None),
        "sparse_decode, embedding_bag": lambda: embedding_bag(wide, dec, per_sample_weights=values, mode="sum"),
        "gather_dot, cpu": lambda: cpu.gather_dot(grad, indices, dec),
        "gather_dot, reference": lambda: reference.gather_dot(grad, indices, dec),
        "scatter_outer, cpu": lambda: cpu.scatter_outer(values, indices, grad, n),
        "scatter_outer, reference": lambda: reference.scatter_outer(values, indices, grad, n),
        "decode and gradients, cpu": products_and_gradients,
        "decode and gradients, embedding_bag": bag_and_gradients,
        "gradients and Adam of both weights, cpu": update,
        "Adam of both weights, torch": update_by_torch,
        **uneven(sae, x, grad, k),
    }
    return {name: call for name, call in every.items() if cpu.isa() or not name.endswith(", cpu")}


def routed(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """The router, and the encoder over the latents of the experts alone, by a random router."""
    found: dict[str, Callable[[], object]] = {}
    for n_experts, n_active in ROUTED:
        if weight.shape[0] % n_experts or k > n_active * weight.shape[0] // n_experts:
            continue
        router = torch.nn.functional.normalize(torch.randn(n_experts, x.shape[1]), dim=1)
        name = f"{n_active} of {n_experts} experts"
        found[f"route, {name}"] = partial(sk.route, x, router, n_active)
        routing = sk.route(x, router, n_active)
        found[f"routed_topk_encode, {name}"] = partial(sk.routed_topk_encode, x, weight, bias, routing, k)
    return found


def uneven(sae: sk.SAE, x: Tensor, grad: Tensor, k: int) -> dict[str, Callable[[], object]]:
    """The encoders that keep any number of latents a token, k on average, and what their codes go through."""
    weight, bias, dec, n = sae.W_enc.detach(), sae.b_enc.detach(), sae.W_dec.detach(), sae.d_sae
    crow, col, values, _ = sk.batch_topk_encode(x, weight, bias, k)
    least = values[values > 0].min() * (1 - 1e-6)  # above which there are as many
    centred, zero = (
        weight - weight.mean(0),
        torch.zeros(()),
    )  # as at the start of a training, half of all latents are above
    update, _ = updates(sae, x, grad, OuterProducts(values, col, grad, crow))
    return {
        "batch_topk_encode": lambda: sk.batch_topk_encode(x, weight, bias, k),
        "batch_topk_encode, reference": lambda: reference.batch_topk_encode(x, weight, bias, k * len(x), "auto"),
        "threshold_encode": lambda: sk.threshold_encode(x, weight, bias, least),
        "threshold_encode, reference": lambda: reference.threshold_encode(x, weight, bias, least, "auto"),
        "threshold_encode, half of all latents": lambda: sk.threshold_encode(x, centred, None, zero),
        "csr_decode, cpu": lambda: cpu.csr_decode(values, crow, col, dec, None),
        "csr_decode, reference": lambda: reference.csr_decode(values, crow, col, dec, None),
        "csr_gather_dot, cpu": lambda: cpu.csr_gather_dot(grad, crow, col, dec),
        "csr_gather_dot, reference": lambda: reference.csr_gather_dot(grad, crow, col, dec),
        "csr_scatter_outer, cpu": lambda: cpu.csr_scatter_outer(values, crow, col, grad, n),
        "csr_scatter_outer, reference": lambda: reference.csr_scatter_outer(values, crow, col, grad, n),
        "gradients and Adam of both weights, CSR, cpu": update,
    }


def updates(
    sae: sk.SAE, x: Tensor, grad: Tensor, decoder_gradient: OuterProducts
) -> tuple[Callable[[], object], Callable[[], object]]:
    """The update of both weights from factors, norm and clipping included, and torch's from dense gradients."""
    ours, theirs = ([w.detach().clone().requires_grad_() for w in (sae.W_enc, sae.W_dec)] for _ in range(2))
    decoder = theirs[1]
    for weight in theirs:
        weight.grad = torch.randn_like(weight)
    adam = torch.optim.Adam(theirs, lr=0.0, fused=True)
    state = [
        {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)} for w in ours
    ]

    def from_factors() -> None:
        _, indices, _, crow = decoder_gradient
        decoder = ours[1].detach()
        if crow is None:
            dz = cpu.gather_dot(grad, indices, decoder)
        else:
            dz = cpu.csr_gather_dot(grad, crow, indices, decoder)
        with torch.no_grad():
            for i, product in enumerate((OuterProducts(dz, indices, x, crow), decoder_gradient)):
                factors = cpu.SortedFactors([product], sae.d_sae)
                cpu.gradient_squares(factors, ours[i], i == 1)
                cpu.row_adam(
                    factors,
                    ours[i],
                    i == 1,
                    state[i],
                    lr=0.0,
                    betas=(0.9, 0.999),
                    eps=1e-8,
                    clip=1.0,
                    rest_after=None,
                    copy=None,
                )

    @torch.no_grad()
    def by_torch() -> None:
        assert decoder.grad is not None
        decoder.grad.addcmul_((decoder.grad * decoder).sum(1, keepdim=True), decoder, value=-1)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
        decoder.div_(decoder.norm(dim=1, keepdim=True))

    return from_factors, by_torch


@torch.no_grad()
def exactness(sae: sk.SAE, k: int, x: Tensor) -> dict[str, Any]:
    """Compare the indices of ``topk_encode`` with the top k in float64, ties to the lower index, on some rows.

    An index is wrong where neither float64 nor the float32 reference has it among its k: pre-activations nearer to each
    other than float32 can tell may be ordered either way. `largest_gap` is how far the worst index that float64 does
    not have lies below the k-th largest pre-activation, relative to it.
    """
    centred = x - sae.b_dec
    found = sk.topk_encode(centred, sae.W_enc, sae.b_enc, k).indices
    screened = cpu.last_encode  # of the whole batch, which was the last call
    some = torch.linspace(0, len(x) - 1, min(len(x), RECALL_ROWS)).long()
    found, rows = found[some].long(), centred[some]
    # The reference walks panels and converts each to the dtype of x: no float64 copy of the weights exists.
    best, exact = reference.topk_encode(rows.double(), sae.W_enc, sae.b_enc, k, "auto")
    _, single = reference.topk_encode(rows, sae.W_enc, sae.b_enc, k, "auto")
    missed = ~_among(found, exact)
    wrong = missed & ~_among(found, single)
    scores = torch.stack([sae.W_enc[i].double() @ row for i, row in zip(found, rows.double(), strict=True)])
    scores = (scores + sae.b_enc[found]).relu()
    gap = (best[:, -1:] - scores) / best[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "rows": len(some),
        "indices": found.numel(),
        "recall_float64": 1 - missed.double().mean().item(),
        "recall_float64_of_reference": _among(single.long(), exact).double().mean().item(),
        "wrong": int(wrong.sum()),
        "largest_gap": gap[missed].max().item() if missed.any() else 0.0,
        "rescored_latents": None if screened is None else screened.rescored / screened.rows,
        "repaired_rows": None if screened is None else screened.repaired,
        "batch_rows": len(x),
    }


def _among(indices: Tensor, sets: Tensor) -> Tensor:
    """Which `indices` ``[B, k]`` are in the row of `sets` ``[B, k]``."""
    return (indices.unsqueeze(2) == sets.unsqueeze(1)).any(2)
