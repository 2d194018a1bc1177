"""Saving and loading modules: ``model.safetensors`` beside ``config.json``, never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparsekern.files import safetensors_bytes, write_atomically, write_json

if TYPE_CHECKING:
    from sparsekern.modules.sae import SAE

FORMAT = 1
"""Version of the folder's layout, raised when old files can no longer be read as they are."""

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save_pretrained(module: SAE, path: str | Path) -> None:
    """Write `module` into the folder `path`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / WEIGHTS, safetensors_bytes(module.state_dict(), {"format": "pt"}))
    config = {"format": FORMAT, "dtype": str(module.b_dec.dtype).removeprefix("torch."), **module.config()}
    write_json(folder / CONFIG, config)


def load_pretrained(cls: type[SAE], path_or_hub_id: str | Path, device: torch.device | str | None) -> SAE:
    """Load a module of class `cls` from a folder or from the Hub."""
    folder = Path(path_or_hub_id)
    if not folder.is_dir():
        folder = _download(str(path_or_hub_id))
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}: not a folder written by save_pretrained")
    config = json.loads((folder / CONFIG).read_text())
    if config.pop("format", None) != FORMAT:
        raise ValueError(
            f"{folder / CONFIG} is not of format {FORMAT}: written by another version, or by another library"
        )
    name = config.pop("dtype", None)
    if name not in DTYPES:
        raise ValueError(f"{folder / CONFIG}: dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    module = cls.from_config(config, DTYPES[name])
    try:
        module.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged or does not fit {CONFIG}: {error}") from error
    return module.to(device)


def _download(hub_id: str) -> Path:
    """Fetch a repository's two files from the Hugging Face Hub."""
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise ValueError(f"{hub_id!r} is neither a folder nor a Hub id of the form owner/name")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{hub_id!r} is no folder here, and loading from the Hub needs `pip install huggingface_hub`"
        ) from error
    return Path(snapshot_download(hub_id, allow_patterns=[CONFIG, WEIGHTS]))
