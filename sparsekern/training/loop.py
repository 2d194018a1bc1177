"""``train``: the loop around :class:`~sparsekern.training.trainer.Trainer`, with evaluation, logs and checkpoints."""

from __future__ import annotations

import platform
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

import sparsekern
from sparsekern.data import ActivationLoader, ActivationStore, ActivationView, JoinedStore
from sparsekern.files import write_atomically, write_json
from sparsekern.modules import SAE
from sparsekern.progress import Progress
from sparsekern.training.checkpoint import load_checkpoint, save_checkpoint
from sparsekern.training.config import TrainConfig
from sparsekern.training.evaluate import Evaluation, evaluate, pca_fvu
from sparsekern.training.loggers import METRICS, Logger, build_loggers
from sparsekern.training.trainer import StepStats, Trainer

Activations = ActivationStore | Tensor | str | Path

# Options that may change between a run and its continuation: they do not touch the weights.
_FREE_OPTIONS = {"log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "logger"}
DENSITY = "density.safetensors"
_RUN_FILES = ("run.json", METRICS, "summary.json", DENSITY, "sae", "checkpoints", "tensorboard")
_BASELINE_TOKENS = 100_000  # enough for the covariance of a few thousand dimensions


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` returns.

    Attributes
    ----------
    sae : SAE
        The trained module.
    evaluation : Evaluation
        Its measures on the held-out tokens.
    summary : dict
        What ``summary.json`` holds.
    output : Path or None
        Folder of the run.
    """

    sae: SAE
    evaluation: Evaluation
    summary: dict[str, Any]
    output: Path | None


def train(
    sae: SAE,
    activations: Activations | Sequence[Activations],
    *,
    target: Activations | Sequence[Activations] | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> TrainResult:
    """Train `sae` on stored activations.

    Ctrl-C finishes the step in hand, writes a checkpoint, and raises ``KeyboardInterrupt``; with ``resume`` the run
    then goes on, on a CPU to the same bits as if it had not been interrupted.

    Parameters
    ----------
    sae : SAE
        Trained in place.
    activations : ActivationStore, path of one, or Tensor [n, d_in]
        A share ``held_out`` of it (whole contexts of a store; the last rows of a tensor) is kept for evaluation.
        Several, of the same tokens, for a :class:`~sparsekern.Crosscoder`.
    target : the same, or None
        What is to be reconstructed, of the same tokens: for a :class:`~sparsekern.Transcoder`.
    output : path or None
        Folder for ``metrics.jsonl``, ``summary.json``, ``density.safetensors`` (share of held-out tokens on which each
        latent fires), ``sae/`` and ``checkpoints/``; nothing is written without it.
    resume : bool
        Continue the run in `output` from its newest checkpoint.
    overwrite : bool
        Replace the run in `output`.
    progress : bool
        Show progress on the standard error stream.
    **options
        Any field of :class:`~sparsekern.training.config.TrainConfig`: ``steps``, ``batch_size``, ``lr``, ``seed`` …

    Raises
    ------
    ValueError
        On bad options or data, and where `output` holds a run and neither `resume` nor `overwrite` was given.
    """
    config = TrainConfig.of(options)
    x_stores = _listed(activations)
    training, held_out = _split(x_stores if target is None else [*x_stores, *_listed(target)], config)
    loader = ActivationLoader(training, config.batch_size, seed=config.seed)
    wanted = sae.d_in + (0 if target is None else sae.d_out)
    if loader.d != wanted:
        of = "d_in of the SAE" if target is None else "d_in and d_out of the SAE"
        raise ValueError(f"activations must have {wanted} columns ({of}), got {loader.d}")

    def x_and_target(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return (rows, None) if target is None else (rows[:, : sae.d_in], rows[:, sae.d_in :])

    def held_out_batches() -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        for rows in held_out.split(config.batch_size):
            x, wanted = x_and_target(rows)
            yield x if wanted is None else (x, wanted)

    trainer = Trainer(sae, config)
    folder = None if output is None else Path(output)
    run = _describe(sae, config, loader)
    seconds = 0.0
    if folder is not None:
        if resume:
            state = load_checkpoint(folder / "checkpoints", run)
            seconds = float(state.pop("loop.seconds"))
            trainer.load_state_dict(state)
        else:
            _prepare(folder, overwrite)
        write_json(folder / "run.json", run)
    elif resume:
        raise ValueError("resume needs the output folder of the run to continue")

    loader.position = trainer.steps_done
    loggers: list[Logger] = [] if folder is None else build_loggers(config.logger, folder, trainer.steps_done)
    started = time.monotonic() - seconds

    def checkpoint() -> None:
        if folder is not None:
            state = trainer.state_dict() | {"loop.seconds": torch.tensor(time.monotonic() - started)}
            save_checkpoint(folder / "checkpoints", trainer.steps_done, state, run, config.keep_checkpoints)

    try:
        with (
            _Interrupt() as interrupt,
            Progress("train", config.steps * config.batch_size, done=trainer.tokens_seen, shown=progress) as bar,
        ):
            timer, batches, evaluation = _Timer(), iter(loader), None
            bar.update(trainer.tokens_seen)
            while trainer.steps_done < config.steps:
                stats = trainer.step(*x_and_target(next(batches)))
                timer.add(config.batch_size)
                step, last = stats.step, stats.step == config.steps
                row: dict[str, float] = {}
                if step % config.log_every == 0 or last:
                    row = _row(stats, timer.rate())
                    bar.update(stats.tokens, note=f"fvu {row['fvu']:.3f}")
                if step % config.eval_every == 0 or last:
                    row = row or _row(stats, timer.rate())
                    evaluation = evaluate(sae, held_out_batches())
                    row |= _held_out_row(evaluation)
                    timer.restart()
                for logger in loggers if row else []:
                    logger.log(row)
                if interrupt.requested or step % config.checkpoint_every == 0 or last:
                    checkpoint()
                    timer.restart()
                if interrupt.requested:
                    kept = "" if folder is None else f"; {folder} can be resumed from there"
                    raise KeyboardInterrupt(f"stopped after step {step} of {config.steps}{kept}")
        if evaluation is None:  # a finished run was resumed
            evaluation = evaluate(sae, held_out_batches())
        seconds = time.monotonic() - started
        summary = _summary(sae, trainer, evaluation, training, held_out, seconds, config)
    finally:
        for logger in loggers:
            logger.close()
    sae.eval()
    if folder is not None:
        sae.save_pretrained(folder / "sae")
        write_atomically(folder / DENSITY, save({"density": evaluation.density}))
        write_json(folder / "summary.json", summary)
    return TrainResult(sae, evaluation, summary, folder)


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    found = {
        "sparsekern": sparsekern.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def _listed(data: Activations | Sequence[Activations]) -> list[Activations]:
    return [data] if isinstance(data, str | Path | ActivationStore | Tensor) else list(data)


def _split(data: list[Activations], config: TrainConfig) -> tuple[ActivationView | Tensor, Tensor]:
    """Training data, and the held-out tokens to measure on; columns side by side."""
    tensors = [rows for rows in data if isinstance(rows, Tensor)]
    if not tensors:
        stores = [ActivationStore(store) if isinstance(store, str | Path) else store for store in data]
        store = stores[0] if len(stores) == 1 else JoinedStore([s for s in stores if isinstance(s, ActivationStore)])
        assert isinstance(store, ActivationStore)
        training, held_out = store.split(config.held_out, config.seed)
        return training, held_out.load(config.eval_tokens)
    if len(tensors) < len(data) or any(rows.dim() != 2 or len(rows) != len(tensors[0]) for rows in tensors):
        shapes = [tuple(rows.shape) for rows in tensors]
        raise ValueError(f"activations must be stores, or tensors [n, d] of as many rows, got shapes {shapes}")
    rows = tensors[0] if len(tensors) == 1 else torch.cat(tensors, 1)
    cut = len(rows) - max(2, int(config.held_out * len(rows)))
    return rows[:cut], rows[cut : cut + config.eval_tokens]


def _describe(sae: SAE, config: TrainConfig, loader: ActivationLoader) -> dict[str, Any]:
    """What makes this run the run that it is: a checkpoint of another description is refused."""
    kept = {f"train.{name}": value for name, value in config.to_dict().items() if name not in _FREE_OPTIONS}
    return {
        **{f"sae.{name}": value for name, value in sae.config().items()},
        **kept,
        **{f"data.{name}": value for name, value in loader.state_dict()["fingerprint"].items()},
    }


def _prepare(folder: Path, overwrite: bool) -> None:
    """Make `folder` ready for a new run; only files of a run are ever removed."""
    folder.mkdir(parents=True, exist_ok=True)
    present = [folder / name for name in _RUN_FILES if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(f"{folder} holds a run already; resume it, overwrite it, or choose another folder")
    for path in present:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _row(stats: StepStats, rate: float) -> dict[str, float]:
    return {**stats.to_floats(), "tokens_per_second": rate}


def _held_out_row(evaluation: Evaluation) -> dict[str, float]:
    return {
        "heldout_fvu": evaluation.fvu,
        "heldout_explained_variance": evaluation.explained_variance,
        "heldout_cosine": evaluation.cosine,
        "heldout_l0": evaluation.l0,
    }


def _summary(
    sae: SAE,
    trainer: Trainer,
    evaluation: Evaluation,
    training: ActivationView | Tensor,
    held_out: Tensor,
    seconds: float,
    config: TrainConfig,
) -> dict[str, Any]:
    measures = {f"heldout_{name}": value for name, value in evaluation.to_dict().items()}
    components = min(sae.d_in, max(1, round(evaluation.l0)))
    sample = training[:_BASELINE_TOKENS] if isinstance(training, Tensor) else training.load(_BASELINE_TOKENS)
    return {
        **measures,
        "dead_fraction": sae.dead_mask().float().mean().item(),
        "pca_components": components,
        # What codes of a crosscoder or a transcoder could do linearly is another question.
        "pca_fvu": pca_fvu(sample, held_out, components) if held_out.shape[1] == sae.d_in // sae.n_sources else None,
        "steps": trainer.steps_done,
        "tokens": trainer.tokens_seen,
        "seconds": seconds,
        "tokens_per_second": trainer.tokens_seen / seconds,
        "threads": torch.get_num_threads(),
        "sae": sae.config(),
        "train": config.to_dict(),
        "versions": versions(),
    }


class _Timer:
    """Tokens per second of training alone, since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._started, self._tokens = time.monotonic(), 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens

    def rate(self) -> float:
        return self._tokens / max(time.monotonic() - self._started, 1e-9)


class _Interrupt:
    """Turns the first Ctrl-C into a request that the loop reads between steps; a second one interrupts at once.

    Raised in the middle of a step, ``KeyboardInterrupt`` could leave half of the parameters updated.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> _Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
