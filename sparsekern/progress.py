"""Progress of long work: a bar with rate and time left where ``rich`` is installed, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager; call :meth:`update` as work is done.

    Parameters
    ----------
    title : str
        What is being done.
    total : int or None
        Units of work in all, where known.
    unit : str
        What is counted, for the rate.
    done : int
        Units that an earlier run did already.
    shown : bool
        False makes every call do nothing.
    """

    def __init__(self, title: str, total: int | None, unit: str = "tokens", done: int = 0, shown: bool = True) -> None:
        self.title, self.total, self.unit, self.shown = title, total, unit, shown
        self._start_done = done
        self._started: float | None = None  # the clock of the rate starts with the first report, after all preparation
        self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self._start_done, rate="", eta="", note=""
            )
        return self

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Report that `done` units are done in all."""
        if not self.shown:
            return
        self.total = total or self.total
        now = time.monotonic()
        if self._started is None:
            self._started, self._start_done = now, done
        rate = (done - self._start_done) / max(now - self._started, 1e-9)
        left = (self.total - done) / rate if self.total and rate > 0 else None
        eta = "" if left is None else f"{_clock(left)} left"
        if self._bar is not None:
            self._bar.update(
                self._task, completed=done, total=self.total, rate=f"{rate:,.0f} {self.unit}/s", eta=eta, note=note
            )
        elif now - self._last_line >= SECONDS_BETWEEN_LINES or done == self.total:
            self._last_line = now
            of = f"/{self.total:,}" if self.total else ""
            parts = [f"{self.title}: {done:,}{of} {self.unit}", f"{rate:,.0f} {self.unit}/s", eta, note]
            print(" · ".join(part for part in parts if part), file=sys.stderr, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _rich_bar() -> Any:
    try:
        from rich import progress
        from rich.console import Console
    except ImportError:
        return None
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.TaskProgressColumn(),
        progress.TextColumn("[cyan]{task.fields[rate]}"),
        progress.TextColumn("{task.fields[eta]}"),
        progress.TextColumn("[dim]{task.fields[note]}"),
        console=Console(stderr=True),
    )
