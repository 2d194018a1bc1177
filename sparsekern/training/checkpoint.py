"""Checkpoints of a training run: ``checkpoints/step-00000500/{state.safetensors, run.json}``, never a pickle.

A checkpoint is written under another name and then renamed, so that one that exists is whole. ``run.json`` says what
the run was: a checkpoint continues only the run that it was taken from.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsekern.files import safetensors_bytes, write_atomically, write_json

STATE, RUN = "state.safetensors", "run.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another run."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Tensor], run: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of `step` into `folder` and remove all but the newest `keep`."""
    final = folder / f"step-{step:08d}"
    draft = folder / f"{final.name}.tmp"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        write_atomically(draft / STATE, safetensors_bytes(state))
        write_json(draft / RUN, run)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(draft, final)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, run: dict[str, Any]) -> dict[str, Tensor]:
    """State of the newest checkpoint in `folder`, which must be of the run `run`.

    Raises
    ------
    CheckpointError
        With the settings that differ, if the checkpoint is of another configuration.
    """
    found = _checkpoints(folder)
    if not found:
        raise CheckpointError(f"{folder} holds no checkpoint to resume from; start the run without --resume")
    newest = found[-1]
    try:
        saved = json.loads((newest / RUN).read_text())
        state = load_file(newest / STATE)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{newest} is damaged ({error}); remove it to resume from the one before") from error
    differing = sorted(key for key in saved.keys() | run.keys() if saved.get(key) != run.get(key))
    if differing:
        details = "; ".join(f"{key}: {saved.get(key)!r} there, {run.get(key)!r} now" for key in differing)
        raise CheckpointError(f"{newest} is of another configuration ({details}); use that one, or another folder")
    return state


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != ".tmp")
