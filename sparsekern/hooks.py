"""The modules of a model by name, and what goes in and out of them."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def named_module(model: nn.Module, name: str, argument: str = "module") -> nn.Module:
    """The submodule of that name, as in ``model.named_modules()``; `argument` is what the error calls it."""
    modules = dict(model.named_modules())
    modules.pop("", None)  # the model itself
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=5, cutoff=0.3) or list(modules)[:5]
        kind = type(model).__name__
        raise ValueError(f"{argument} {name!r} is not a module of {kind}; the nearest names: {', '.join(near)}")
    return modules[name]


def first_tensor(output: Any, name: str) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor that a module's `output` is or begins with, and a function that puts another one in its place.

    That function leaves `output` as it is and returns one of the same type. Tuples and lists begin with the tensor; of
    a mapping or a dataclass, such as the outputs of transformers, it is the first tensor.
    """
    if isinstance(output, Tensor):
        return output, lambda new: new
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        kind: Any = type(output)
        if hasattr(output, "_fields"):
            return output[0], lambda new: kind(new, *output[1:])
        return output[0], lambda new: kind([new, *output[1:]])
    named: Mapping[Any, Any] = {}
    if isinstance(output, Mapping):
        named = output
    elif dataclasses.is_dataclass(output):
        named = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    for key, value in named.items():
        if isinstance(value, Tensor):
            return value, functools.partial(_with_entry, output, key)
    raise ValueError(
        f"module {name!r} gives {type(output).__name__}: neither a tensor nor something that begins with one"
    )


def _with_entry(output: Any, key: Any, new: Tensor) -> Any:
    if not isinstance(output, Mapping):
        return dataclasses.replace(output, **{key: new})
    changed: Any = copy.copy(output)
    changed[key] = new
    return changed


@contextmanager
def rewritten(model: nn.Module, name: str, function: Callable[[Tensor | None, Tensor], Tensor]) -> Iterator[None]:
    """Inside the block, the module `name` gives ``function(input, output)`` for the tensors that its own begin with."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        tensor, put = first_tensor(output, name)
        return put(function(given, tensor))

    handle = named_module(model, name).register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded(model: nn.Module, name: str) -> Iterator[list[tuple[Tensor | None, Tensor]]]:
    """Inside the block, what the module `name` is given and gives, call by call: the tensors that they begin with."""
    seen: list[tuple[Tensor | None, Tensor]] = []

    def keep(given: Tensor | None, output: Tensor) -> Tensor:
        seen.append((given, output))
        return output

    with rewritten(model, name, keep):
        yield seen


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and what was before it afterwards."""
    before = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, training in before:
            part.training = training
