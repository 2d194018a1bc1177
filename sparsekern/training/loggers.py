"""Where the metrics of a run go. ``metrics.jsonl`` is always written; TensorBoard and W&B on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from sparsekern.files import write_atomically

METRICS = "metrics.jsonl"


class Logger(Protocol):
    """Takes rows of metrics; every row has a ``step``."""

    def log(self, row: dict[str, float]) -> None:
        """Take one row."""

    def close(self) -> None:
        """Finish."""


class JsonlLogger:
    """Appends one JSON object a line to ``metrics.jsonl``.

    Parameters
    ----------
    folder
        Where the file is.
    from_step
        Rows of later steps are dropped first: an interrupted run may have logged beyond its last checkpoint.
    """

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        path = folder / METRICS
        kept = [row for row in read_metrics(folder) if row["step"] <= from_step] if path.exists() else []
        write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def log(self, row: dict[str, float]) -> None:
        """Append one row; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """The rows of a run's ``metrics.jsonl``; a last line cut short by a crash is left out."""
    rows = []
    for line in (Path(folder) / METRICS).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class TensorBoardLogger:
    """Event files in the folder ``tensorboard`` of the run."""

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("logger=tensorboard needs `pip install 'sparsekern[loggers]'`") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=from_step + 1)

    def log(self, row: dict[str, float]) -> None:
        """Add every metric as a scalar."""
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        """Write what is left and close."""
        self._writer.close()


class WandbLogger:
    """A Weights & Biases run, named after the folder; ``WANDB_*`` variables apply."""

    def __init__(self, folder: Path, from_step: int = 0) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("logger=wandb needs `pip install 'sparsekern[loggers]'`") from error
        self._run = wandb.init(project="sparsekern", name=folder.name, dir=str(folder))

    def log(self, row: dict[str, float]) -> None:
        """Send one row."""
        self._run.log({name: value for name, value in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def build_loggers(name: str, folder: Path, from_step: int) -> list[Logger]:
    """The JSONL logger and the one called `name` (``none``, ``tensorboard``, ``wandb``)."""
    classes: dict[str, list[Any]] = {"none": [], "tensorboard": [TensorBoardLogger], "wandb": [WandbLogger]}
    return [logger(folder, from_step) for logger in [JsonlLogger, *classes[name]]]
