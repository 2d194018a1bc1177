"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file such that whoever looks finds the old content or the new, never a part."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def safetensors_bytes(tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file, which holds no memory twice: tied weights are written as two."""
    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        plain[name] = copy.clone() if copy.data_ptr() in seen else copy
        seen.add(plain[name].data_ptr())
    return save(plain, metadata=metadata)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())
