"""A model that runs again and again from one of its modules on, with another activation at one token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekern.hooks import first_tensor, named_module, recorded, rewritten

MEASURES = ("kl", "distance")

Batch = Tensor | Mapping[str, Tensor]

_AGREEMENT = 1e-3  # of the change that a perturbation makes, between the short and the full run


@dataclass(frozen=True)
class _Contexts:
    """One batch: what the model is given, and which of its tokens may be moved."""

    given: Batch
    rows: int
    usable: Tensor  # [rows, positions]
    attended: Tensor  # [rows, positions]

    @classmethod
    def of(cls, batch: Batch, skip: int) -> _Contexts:
        given = batch if isinstance(batch, Tensor) else dict(batch)
        special = None if isinstance(given, Tensor) else given.pop("special_tokens_mask", None)
        tensors = [given] if isinstance(given, Tensor) else list(given.values())
        if not tensors or tensors[0].dim() < 2 or tensors[0].shape[0] == 0:
            shape = tuple(tensors[0].shape) if tensors else None
            raise ValueError(f"a batch must begin with a tensor [contexts, positions, …], got shape {shape}")
        rows, positions = tensors[0].shape[:2]
        attended = torch.ones(rows, positions, dtype=torch.bool)
        if not isinstance(given, Tensor) and "attention_mask" in given:
            attended = given["attention_mask"].bool().cpu()
        usable = attended.clone()
        if special is not None:
            usable &= ~special.bool().cpu()
        usable[:, :skip] = False
        return cls(given, rows, usable, attended)

    def only(self, row: int, times: int, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Arguments for one context, so many times."""

        def repeated(tensor: Tensor) -> Tensor:
            tensor = tensor.to(device)
            return tensor[row : row + 1].expand(times, *tensor.shape[1:]) if len(tensor) == self.rows else tensor

        if isinstance(self.given, Tensor):
            return (repeated(self.given),), {}
        return (), {name: repeated(tensor) for name, tensor in self.given.items()}

    def all(self, device: torch.device) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Arguments for the batch as it is."""
        if isinstance(self.given, Tensor):
            return (self.given.to(device),), {}
        return (), {name: tensor.to(device) for name, tensor in self.given.items()}


@dataclass(frozen=True, eq=False)
class Tokens:
    """Activations of a module on the tokens that may be moved.

    Attributes
    ----------
    x : Tensor [N, d]
        In float32 on the CPU.
    sites : Tensor [N, 3] int64
        Batch, row and position of each.
    """

    x: Tensor
    sites: Tensor

    def choose(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` different tokens ``[n]`` int64, of as many contexts as there are, in random order."""
        if not 1 <= n <= len(self.x):
            raise ValueError(f"n must be in 1 … {len(self.x)}, the tokens of batches that can be moved, got {n}")
        order = torch.randperm(len(self.x), generator=generator)
        contexts = self.sites[order, :2].unique(dim=0, return_inverse=True)[1]
        turn = torch.empty_like(contexts)  # a token is the how-manieth of its context
        seen: dict[int, int] = {}
        for place, context in enumerate(contexts.tolist()):
            turn[place] = seen.get(context, 0)
            seen[context] = int(turn[place]) + 1
        return order[turn.argsort(stable=True)[:n]]


class Rerun:
    """Responses of a model to other activations at one token.

    Modules that come before `hook` are not computed again: the earlier ones of every list of modules that holds it give
    what they gave before. That is checked once against a full run, and left off where the two differ. Use it in
    evaluation mode and without gradients.

    Parameters
    ----------
    model : Module
        Called as ``model(batch)`` for tensors and ``model(**batch)`` for mappings.
    hook : str
        Module whose output ``[contexts, positions, d]`` is moved; the tensor that its output is or begins with.
    batches : iterable of Tensor, or of mapping of str to Tensor
        As :func:`sparsekern.data.token_batches` gives them. What ``special_tokens_mask`` or ``attention_mask`` leave
        out is not moved.
    measure : {"kl", "distance"}
        KL(p ‖ p_α) of the next token's distributions, in nats; or Euclidean distance in the output of `last`.
    last : str or None
        Module whose output is compared for "distance"; by default the last one of the list of modules that holds
        `hook`, else the model's own output.
    later : bool
        Mean over the token and those after it in place of the token alone.
    skip : int
        First positions of every context that are not moved.
    batch_tokens : int
        Tokens of a forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        hook: str,
        batches: Iterable[Batch],
        *,
        measure: str = "kl",
        last: str | None = None,
        later: bool = False,
        skip: int = 1,
        batch_tokens: int = 8192,
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if skip < 0:
            raise ValueError(f"skip must not be negative, got {skip}")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be at least 1, got {batch_tokens}")
        named_module(model, hook, "hook")
        if last is not None:
            named_module(model, last, "last")
        self.model, self.hook, self.measure, self.later = model, hook, measure, later
        self.last = _last_of_list(model, hook) if last is None and measure == "distance" else last
        self.batch_tokens = batch_tokens
        self.contexts = [_Contexts.of(batch, skip) for batch in batches]
        if not self.contexts:
            raise ValueError("batches must hold a batch at least")
        parameter = next(model.parameters(), None)
        self.device = torch.device("cpu") if parameter is None else parameter.device
        self.skipped: list[str] | None = None  # None until it is known what may be
        self._clean: tuple[tuple[int, int], dict[str, Any]] | None = None

    def tokens(self) -> Tokens:
        """Activations on all tokens that may be moved."""
        found, sites = [], []
        for number, contexts in enumerate(self.contexts):
            outputs = self._record([self.hook], contexts.all(self.device))
            tensor = first_tensor(outputs[self.hook], self.hook)[0]
            if tensor.dim() != 3 or tensor.shape[:2] != contexts.usable.shape:
                shapes = f"{tuple(tensor.shape)} for a batch of {tuple(contexts.usable.shape)}"
                raise ValueError(f"hook {self.hook!r} gives {shapes}, not [contexts, positions, d]")
            places = contexts.usable.nonzero()
            found.append(tensor[places[:, 0].to(tensor.device), places[:, 1].to(tensor.device)].float().cpu())
            sites.append(torch.cat([torch.full((len(places), 1), number), places], 1))
        x = torch.cat(found)
        if len(x) < 2:
            raise ValueError("batches must have two tokens at least that are neither special, padding nor skipped")
        if not x.isfinite().all():
            raise ValueError(f"the activations of hook {self.hook!r} must be finite, got NaN or infinity")
        return Tokens(x, torch.cat(sites))

    def responses(self, site: Sequence[int], base: Tensor, rows: Tensor) -> Tensor:
        """What the model makes of activations ``[m, d]`` in the place of `base` ``[d]``, ``[m]`` float64."""
        if self.skipped is None:
            self._find_skipped(site, base)
        contexts = self.contexts[site[0]]
        reference, size = None, max(1, self.batch_tokens // contexts.usable.shape[1])
        found = []
        for chunk in torch.cat([base[None], rows]).split(size):
            outputs = self._outputs(site, chunk)
            if reference is None:
                reference, outputs = outputs[:1], outputs[1:]
            found.append(self._compare(reference, outputs))
        return torch.cat(found).cpu()

    def _compare(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Mean over the positions that are read of what `measure` says."""
        if self.measure == "kl":
            p = reference.exp()  # a word that the model rules out counts nothing
            apart = torch.where(p > 0, p * (reference - outputs), 0).sum(-1).clamp(min=0)
        else:
            apart = (reference - outputs).norm(dim=-1)
        return apart.mean(-1)

    def _outputs(self, site: Sequence[int], rows: Tensor) -> Tensor:
        """Log-probabilities, or outputs of the last layer, ``[m, positions read, …]`` float64."""
        number, row, position = (int(part) for part in site)
        contexts = self.contexts[number]
        read = torch.tensor([position])
        if self.later:
            read = contexts.attended[row].nonzero().squeeze(1)
            read = read[read >= position]
        read = read.to(self.device)
        args, kwargs = contexts.only(row, len(rows), self.device)
        seen: list[tuple[Tensor | None, Tensor]] = []
        with ExitStack() as stack:
            head = self._head() if self.skipped else None
            if head is not None:
                handle = head.register_forward_pre_hook(lambda _, given: (given[0][:, read], *given[1:]))
                stack.callback(handle.remove)
            if self.skipped:
                clean = self._clean_outputs(number, row)
                for name in self.skipped:
                    stack.enter_context(_giving(named_module(self.model, name), _repeated(clean[name], len(rows))))
            stack.enter_context(rewritten(self.model, self.hook, _placed(rows, position, self.hook)))
            if self.last is not None and self.measure == "distance":
                seen = stack.enter_context(recorded(self.model, self.last))
            output = self.model(*args, **kwargs)
        if self.measure == "kl":
            logits = _logits(self.model, output)
            return (logits if head is not None else logits[:, read]).double().log_softmax(-1)
        final = seen[-1][1] if seen else first_tensor(output, "the model")[0]
        if final.dim() < 3 or final.shape[:2] != (len(rows), contexts.usable.shape[1]):
            raise ValueError(
                f"last must name a module with an output [contexts, positions, …], got shape {tuple(final.shape)}"
            )
        return final[:, read].flatten(2).double()

    def _head(self) -> nn.Module | None:
        """What makes logits of the last layer, where it is known: of the other positions they are not needed."""
        get = getattr(self.model, "get_output_embeddings", None)
        return get() if get is not None and self.measure == "kl" else None

    def _find_skipped(self, site: Sequence[int], base: Tensor) -> None:
        """Set which modules need not run: those before the hook, if a run without them gives what a full run does."""
        rows = torch.stack([base, base + base.roll(1), -base])
        self.skipped = []
        full = self._outputs(site, rows)
        names = [*_before(self.model, self.hook)]
        if not names:
            return
        outputs = self._record(names, self.contexts[site[0]].only(int(site[1]), 1, self.device))
        self.skipped = [name for name in names if _is_alone(outputs.get(name))]
        try:
            short = self._outputs(site, rows)
            change = (full[1:] - full[:1]).abs().max()
            agrees = short.shape == full.shape and bool((short - full).abs().max() <= _AGREEMENT * change)
        except Exception:  # a model that does not bear it runs in full
            agrees = False
        if not agrees:
            self.skipped = []

    def _clean_outputs(self, number: int, row: int) -> dict[str, Any]:
        """Outputs of the skipped modules on one context; those of the last one asked for are kept."""
        assert self.skipped is not None
        if self._clean is None or self._clean[0] != (number, row):
            arguments = self.contexts[number].only(row, 1, self.device)
            self._clean = (number, row), self._record(self.skipped, arguments)
        return self._clean[1]

    def _record(self, names: Sequence[str], arguments: tuple[tuple[Tensor, ...], dict[str, Tensor]]) -> dict[str, Any]:
        """Outputs of the named modules in one forward pass."""
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            for name in names:

                def keep(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
                    if name in found and name == self.hook:
                        raise ValueError(f"hook {name!r} runs more than once in a forward pass")
                    found[name] = output

                handle = named_module(self.model, name).register_forward_hook(keep)
                stack.callback(handle.remove)
            self.model(*arguments[0], **arguments[1])
        if self.hook in names and self.hook not in found:
            raise ValueError(f"hook {self.hook!r} does not run in a forward pass")
        return found


def _lists_with(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, int]]:
    """Lists of modules that hold the named one, the outermost first, and at which place."""
    parts = name.split(".")
    for depth, part in enumerate(parts):
        prefix = ".".join(parts[:depth])
        holder = model.get_submodule(prefix) if prefix else model
        if isinstance(holder, nn.ModuleList | nn.Sequential):
            yield prefix, holder, list(dict(holder.named_children())).index(part)


def _before(model: nn.Module, hook: str) -> Iterator[str]:
    """Names of the modules that come before the hook in every list that holds it, and the hook itself."""
    for prefix, holder, place in _lists_with(model, hook):
        for name in list(dict(holder.named_children()))[:place]:
            yield f"{prefix}.{name}" if prefix else name
    yield hook


def _last_of_list(model: nn.Module, hook: str) -> str | None:
    for prefix, holder, _ in _lists_with(model, hook):
        name = list(dict(holder.named_children()))[-1]
        return f"{prefix}.{name}" if prefix else name
    return None


def _is_alone(output: Any) -> bool:
    """Whether an output is a tensor and no more, so that it can be repeated."""
    if isinstance(output, tuple | list):
        return len(output) == 1 and isinstance(output[0], Tensor)
    return isinstance(output, Tensor)


def _repeated(output: Any, times: int) -> Any:
    tensor, put = first_tensor(output, "before the hook")
    return put(tensor.expand(times, *tensor.shape[1:]))


def _placed(rows: Tensor, position: int, hook: str) -> Callable[[Tensor | None, Tensor], Tensor]:
    """For :func:`rewritten`: `rows` at one position."""

    def rewrite(_: Tensor | None, output: Tensor) -> Tensor:
        if output.dim() != 3 or output.shape[0] != len(rows) or output.shape[2] != rows.shape[1]:
            raise ValueError(f"hook {hook!r} must give [contexts, positions, d], got {tuple(output.shape)}")
        output = output.clone()
        output[:, position] = rows.to(output)
        return output

    return rewrite


@contextmanager
def _giving(module: nn.Module, output: Any) -> Iterator[None]:
    """Inside the block the module computes nothing and gives `output`; its hooks run."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _logits(model: nn.Module, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise ValueError(
            f"{type(model).__name__} gives no logits [contexts, positions, vocabulary]: it has no language-model head. "
            "Measure the distance in its last layer, with measure='distance'"
        )
    return logits
