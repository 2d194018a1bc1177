"""What goes into the nonlinearities of a net while it runs: which modules they are, and hooks that see their input."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.hooks import first_tensor, named_module

# Those that have an off side and an on side; found by type where no layers are named.
RECTIFIERS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.PReLU,
    nn.RReLU,
    nn.ELU,
    nn.CELU,
    nn.SELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Softplus,
    nn.Hardswish,
)
# Elementwise too, and watched at their input, but only where they are named: gates and squashed outputs.
_OTHERS = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.LogSigmoid, nn.Softsign, nn.Threshold, nn.Softshrink)


@dataclass(frozen=True)
class Site:
    """A module that is watched, and where: at its ``"input"``, its ``"output"``, or the windows of a ``"pool"``."""

    name: str
    module: nn.Module
    at: str


def is_rectifier(module: nn.Module) -> bool:
    """Whether a module is an elementwise activation with an off side, of torch or of transformers."""
    kind = type(module)
    of_transformers = kind.__module__ == "transformers.activations" and kind.__name__ != "LinearActivation"
    return isinstance(module, RECTIFIERS) or of_transformers


def sites(net: nn.Module, layers: Sequence[str] | None, pools: bool = False) -> list[Site]:
    """The modules to watch: those named, or all rectifiers; with `pools` all max pools too.

    Raises
    ------
    ValueError
        For names that are no modules, an empty sequence, and a net without rectifiers where none are named.
    """
    if isinstance(layers, str):
        raise ValueError(f"layers must be a sequence of names, got the string {layers!r}")
    if layers is not None and (len(layers) == 0 or len(set(layers)) < len(layers)):
        raise ValueError(f"layers must name each module once, and one at least, got {list(layers)}")
    if layers is None:
        found = [
            _site(name or type(module).__name__, module)
            for name, module in net.named_modules()
            if is_rectifier(module) or (pools and isinstance(module, nn.MaxPool2d))
        ]
        if not found:
            raise ValueError(
                f"layers must be named: {type(net).__name__} has no activation modules. Activations that are called as "
                "functions, such as torch.relu, cannot be seen; name the linear layers before them"
            )
        return found
    return [_site(name, named_module(net, name, "layers")) for name in layers]


def _site(name: str, module: nn.Module) -> Site:
    if isinstance(module, nn.MaxPool2d):
        return Site(name, module, "pool")
    return Site(name, module, "input" if is_rectifier(module) or isinstance(module, _OTHERS) else "output")


@contextmanager
def watching(watched: Sequence[Site], see: Callable[[str, Site, Tensor], None]) -> Iterator[None]:
    """Inside the block, which is for one forward pass, `see` gets every pre-activation in the order of the calls.

    It is called with a name, the site and the tensor. The second call of a module in one pass is named ``"relu#2"``.

    Raises
    ------
    ValueError
        From the forward pass, where a module gives or takes no tensor.
    """
    calls: Counter[str] = Counter()

    def name_of(site: Site) -> str:
        calls[site.name] += 1
        return site.name if calls[site.name] == 1 else f"{site.name}#{calls[site.name]}"

    def before(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if given is None:
                raise ValueError(f"module {site.name!r} takes no tensor")
            see(name_of(site), site, given)

        return hook

    def after(site: Site) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            see(name_of(site), site, first_tensor(output, site.name)[0])

        return hook

    handles = []
    try:
        for site in watched:
            if site.at == "output":
                handles.append(site.module.register_forward_hook(after(site)))
            else:
                handles.append(site.module.register_forward_pre_hook(before(site), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def pool_windows(pool: nn.MaxPool2d, x: Tensor, outside: float) -> Tensor:
    """What each cell of a max pool chooses from: ``[N, C, H, W]`` to ``[N, C · H' · W', kernel size]``.

    `outside` stands for what is beyond the border.

    Raises
    ------
    ValueError
        For input that is not ``[N, C, H, W]``, and for ``ceil_mode``.
    """
    if x.dim() != 4:
        raise ValueError(f"a max pool must get [N, C, H, W] to be watched, got shape {tuple(x.shape)}")
    if pool.ceil_mode:
        raise ValueError("a max pool with ceil_mode cannot be watched: its last windows are cut off")
    kernel, stride, padding, dilation = (
        _pair(value) for value in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)
    )
    padded = nn.functional.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=outside)
    # Copies of strided views, not nn.functional.unfold: that one multiplies nothing, yet has no forward derivative.
    high, wide = (
        (padded.shape[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in (0, 1)
    )
    places = [
        padded[
            :,
            :,
            row * dilation[0] : row * dilation[0] + (high - 1) * stride[0] + 1 : stride[0],
            column * dilation[1] : column * dilation[1] + (wide - 1) * stride[1] + 1 : stride[1],
        ]
        for row in range(kernel[0])
        for column in range(kernel[1])
    ]
    return torch.stack(places, -1).reshape(len(x), -1, len(places))


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
