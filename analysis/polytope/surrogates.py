"""Whether the codes of smooth activations, which have no polytopes, say the same as each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.analysis.polytope.batches import Where
from sparsekern.analysis.polytope.codes import polytope_codes
from sparsekern.analysis.results import Result, Results, null_generator, samples

_BLOCK = 2**22  # entries of a layer that are unpacked at a time


@dataclass(frozen=True, eq=False)
class SurrogateAgreement(Results):
    """What :func:`surrogate_agreement` returns.

    Attributes
    ----------
    results : dict of str to Result
        ``agreement <layer>``, share of units with sign = (soft > ½); ``correlation <layer>``, that of sign and soft,
        over all units and samples; ``graded <layer>``, share of soft codes between 0.1 and 0.9, which has no null.
    layers : tuple of str
        Names of the layers.
    """

    results: dict[str, Result]
    layers: tuple[str, ...]


def surrogate_agreement(
    net: nn.Module,
    x: Tensor | Mapping[str, Any],
    layers: Sequence[str] | None = None,
    *,
    n_null: int = 20,
    batch_size: int = 256,
    seed: int = 0,
    where: Where | None = None,
) -> SurrogateAgreement:
    """How much the two surrogates of a smooth activation have in common: sign of the input, and derivative there.

    For an activation u · s(u) with s(u) + s(−u) = 1, such as GELU and SiLU, φ'(u) > ½ exactly where u > 0, so that the
    agreement is 1 up to the rounding to float16, whatever the net. What depends on the net is the correlation: how
    many units are between off and on.

    Parameters
    ----------
    net, x, layers, batch_size, where
        As :func:`polytope_codes` takes them; `x` is a tensor or a mapping, since it is run twice. The codes of both
        kinds are in memory: about two bytes for each unit of each sample.
    n_null : int
        Samples of the null: the soft codes of the units of a layer permuted.
    seed : int
        Determines them.

    Raises
    ------
    ValueError
        For wrong arguments, and layers that are not activation modules.
    """
    if not isinstance(x, Tensor | Mapping):
        raise ValueError(f"x must be a tensor or a mapping of tensors, got {type(x).__name__}")
    if n_null < 0:
        raise ValueError(f"n_null must not be negative, got {n_null}")
    sign = polytope_codes(net, x, layers, "sign", batch_size=batch_size, where=where)
    soft = polytope_codes(net, x, layers, "soft", batch_size=batch_size, where=where)
    generator = null_generator(seed)
    results = {}
    for name, count in sign.layers:
        orders = [torch.arange(count), *(torch.randperm(count, generator=generator) for _ in range(n_null))]
        moments, graded = torch.zeros(len(orders), 5, dtype=torch.float64), 0
        agree = torch.zeros(len(orders), dtype=torch.float64)
        step = max(1, _BLOCK // max(1, count))
        for start in range(0, len(sign), step):
            on = sign.unpack(slice(start, start + step), name)
            degree = soft.unpack(slice(start, start + step), name)
            graded += int(((degree > 0.1) & (degree < 0.9)).sum())
            for index, order in enumerate(orders):
                moved = degree[:, order]
                agree[index] += int((on == (moved > 0.5)).sum())
                moments[index] += _moments(on.double(), moved.double())
        total = len(sign) * count
        correlations = [_correlation(one / total) for one in moments]
        values = {
            "agreement": (f"{name}: share of units with sign = (soft > ½)", (agree / total).tolist()),
            "correlation": (f"{name}: correlation of sign and soft", correlations),
        }
        for key, (title, numbers) in values.items():
            results[f"{key} {name}"] = Result(title, numbers[0], {"units permuted": samples(numbers[1:])})
        results[f"graded {name}"] = Result(f"{name}: share of soft codes between 0.1 and 0.9", graded / total, {})
    return SurrogateAgreement(results, tuple(name for name, _ in sign.layers))


def _moments(on: Tensor, degree: Tensor) -> Tensor:
    return torch.stack([on.sum(), degree.sum(), (on * on).sum(), (degree * degree).sum(), (on * degree).sum()])


def _correlation(means: Tensor) -> float:
    one, other, one_square, other_square, product = means.tolist()
    spread = (one_square - one**2) * (other_square - other**2)
    return (product - one * other) / spread**0.5 if spread > 1e-18 else float("nan")
