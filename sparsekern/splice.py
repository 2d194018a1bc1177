"""An SAE in the place of a module's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.codes import CSRCodes, SparseCodes, check_latents
from sparsekern.hooks import rewritten
from sparsekern.modules import SAE

Codes = Any  # SparseCodes or CSRCodes: which, the SAE decides
Edit = Callable[[Codes], Codes]

MODES = ("replace", "ablate", "clamp", "steer")


@dataclass
class Spliced:
    """What :func:`splice` gives its block.

    Attributes
    ----------
    where : Tensor or None
        Tokens of the coming calls whose activations are replaced; may be set between calls.
    codes : SparseCodes, CSRCodes or None
        What the SAE made of the last call, all its tokens, before any edit. None before the first call.
    edited : SparseCodes, CSRCodes or None
        What was decoded. The gradient of a loss with respect to ``edited.values`` is what each latent's writing is
        worth, with or without the error term.
    """

    where: Tensor | None = None
    codes: SparseCodes | CSRCodes | None = None
    edited: SparseCodes | CSRCodes | None = None


@contextmanager
def splice(
    model: nn.Module,
    module: str,
    sae: SAE,
    mode: str = "replace",
    latents: Sequence[int] | Mapping[int, float] | None = None,
    *,
    edit: Edit | None = None,
    error: bool = False,
    read: str | None = None,
    where: Tensor | None = None,
) -> Iterator[Spliced]:
    """Replace the output of a module by an SAE's reconstruction inside a ``with`` block.

    The end of the block undoes it, also after an exception. Blocks nest; of two on one module the outer one acts first.
    Nothing is detached: gradients reach earlier layers through the SAE, and the SAE's own parameters. Whether it is in
    training or in evaluation mode is left as it is.

    Parameters
    ----------
    model : Module
        Any torch module.
    module : str
        Name of one of its submodules, as in ``model.named_modules()``. Its output is a tensor ``[..., d]``, or a tuple,
        mapping or dataclass that begins with one; the rest of it is passed on.
    sae : SAE
        Reads activations ``[..., d_in]`` and gives ``[..., d_out]``, as wide as the output.
    mode : {"replace", "ablate", "clamp", "steer"}
        What is done with `latents` on every token: nothing; their values become 0; their values become those given;
        the given amounts are added to their values, which is as many times their decoder rows in the output.
    latents : sequence of ints, or mapping of int to float
        For "ablate" their numbers, for "clamp" and "steer" a number for each.
    edit : callable or None
        Any other edit, from codes to codes; with mode "replace" only. ``codes.values_of`` and ``codes.with_values``
        help: ``edit=lambda codes: codes.with_values([7], 2 * codes.values_of([7]))``.
    error : bool
        Add the error of the reconstruction, ``y − x̂``, so that what is not edited stays as the model has it, bit for
        bit. The error depends on the activations like the rest: without an edit, gradients to earlier layers are those
        of the model alone, and the SAE's own are zero.
    read : {"output", "input"} or None
        What of the module `sae` reads; by default the input for a transcoder, else the output.
    where : Tensor of bool, or of 0 and 1
        Tokens that are replaced, to be broadcast to the leading dimensions of the output: an attention mask leaves
        padding alone. All tokens are encoded. For batches with masks of their own, set ``spliced.where`` before each.

    Yields
    ------
    Spliced
        With the codes of the last call.

    Raises
    ------
    ValueError
        On an unknown module, with the nearest names, on unknown modes and latents; when the model runs, on an
        output that is no tensor and does not begin with one, and on widths that do not fit.

    Examples
    --------
    >>> with sk.splice(model, "encoder.layer.3", sae, "ablate", [7, 12], error=True) as spliced:
    ...     output = model(**tokens)
    >>> spliced.codes.values  # [batch, positions, k]

    References
    ----------
    Marks et al., *Sparse feature circuits* (arXiv 2403.19647), section 2, for the error term.
    """
    read = sae.reads if read is None else read
    if read not in ("output", "input"):
        raise ValueError(f"read must be output or input, got {read!r}")
    change = _edit(mode, latents, edit, sae.d_sae)
    spliced = Spliced(where)

    def replaced(given: Tensor | None, output: Tensor) -> Tensor:
        x = output if read == "output" else given
        if x is None:
            raise ValueError(f"module {module!r} is called without a tensor that could be read")
        codes = sae.encode(x)
        edited: Codes = codes if change is None else change(codes)
        if edited is codes:  # a node of its own in the graph, or its gradient would hold that of the error term
            edited = codes._replace(values=codes.values.view_as(codes.values))
        spliced.codes, spliced.edited = codes, edited
        recon = sae.reconstruct(edited, x)
        if recon.numel() != output.numel():
            raise ValueError(
                f"module {module!r} gives {output.shape[-1]} columns, the SAE {recon.shape[-1]}: "
                f"shapes {tuple(output.shape)} and {tuple(recon.shape)}"
            )
        if error:  # the difference first: it is exactly zero where nothing was edited
            recon = output + (recon - sae.reconstruct(codes, x)).reshape(output.shape)
        recon = recon.reshape(output.shape).to(output.dtype)
        return recon if spliced.where is None else torch.where(_mask(spliced.where, output), recon, output)

    with rewritten(model, module, replaced):
        yield spliced


def _edit(mode: str, latents: Any, edit: Edit | None, d_sae: int) -> Edit | None:
    """The edit that `mode` stands for."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "replace":
        if latents is not None:
            raise ValueError("latents go with mode ablate, clamp or steer, not with replace")
        return edit
    if edit is not None:
        raise ValueError(f"edit goes with mode replace, not with {mode}")
    if not isinstance(latents, Sequence if mode == "ablate" else Mapping):
        wanted = "a sequence of ints" if mode == "ablate" else "a mapping of ints to numbers"
        raise ValueError(f"latents must be {wanted} for mode {mode}, got {latents!r}")
    named = list(latents)
    check_latents(named, d_sae)
    if mode == "ablate":
        return lambda codes: codes.with_values(named, 0)
    numbers = torch.tensor([latents[latent] for latent in named])

    def clamp(codes: Codes) -> Codes:
        return codes.with_values(named, numbers)

    def steer(codes: Codes) -> Codes:
        values = codes.values_of(named)
        return codes.with_values(named, values + numbers.to(values))

    return clamp if mode == "clamp" else steer


def _mask(where: Tensor, output: Tensor) -> Tensor:
    """`where` as booleans that broadcast to `output`."""
    leading = output.shape[:-1]
    try:
        mask = where.to(output.device).bool().expand(leading)
    except RuntimeError as problem:
        raise ValueError(f"where must fit {tuple(leading)}, got shape {tuple(where.shape)}") from problem
    return mask.unsqueeze(-1)
