"""Progress with time left: a bar on a terminal, a line per artifact elsewhere. On stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from artifacts.store import Ref


class Progressing:
    """A reporter that knows the whole work, counted in judged trials, and says how long is left."""

    def __init__(self, console: Console, total_work: int) -> None:
        self._console = console
        self._total = max(total_work, 1)
        self._done = 0.0  # work of finished stages
        self._current = 0.0  # work of the running stage
        self._share = 0.0  # fraction of it that is done
        self._label = ""  # of the running stage
        self._since: float | None = None  # when the first piece of work began
        self._bar = Progress(
            TextColumn("{task.description:<34.34}"),
            BarColumn(bar_width=20),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]:>11}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._bar.add_task("starting", total=self._total, left="-:-- left")

    def __enter__(self) -> Progressing:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def started(self, label: str, work: int) -> None:
        self._current, self._share, self._label = float(work), 0.0, label
        if work and self._since is None:
            self._since = time.monotonic()
        self._show(label)

    def advanced(self, done: int, total: int) -> None:
        self._share = done / max(total, 1)
        self._show()

    def stepped(self, label: str, step: int, steps: int, loss: float) -> None:
        """One training step of a phase that is all the work of its label."""
        if step == 1:
            self._done += self._current
            self.started(label, steps)
        self.advanced(step, steps)
        if step % 40 == 0 and not self._console.is_terminal:
            self._line(f"       {label} {step}/{steps}, loss {loss:.3f}  {self._left()}")

    def finished(self, label: str, ref: Ref, seconds: float, cached: bool) -> None:
        if label == self._label:  # else a part of it, which `advanced` counts
            self._done += self._current
            self._current = self._share = 0.0
        self._show()
        if not cached and not self._console.is_terminal:
            share = 100 * (self._done + self._current * self._share) / self._total
            self._line(f"{share:3.0f} %  {label}: made in {seconds:.1f} s  {self._left()}")

    def said(self, line: str) -> None:
        self._line(f"       {line}")

    def _line(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show(self, label: str | None = None) -> None:
        done = self._done + self._current * self._share
        self._bar.update(self._task, completed=done, left=self._left(), description=label)

    def _left(self) -> str:
        done = self._done + self._current * self._share
        if self._since is None or done <= 0:
            return "-:-- left"
        seconds = (time.monotonic() - self._since) * (self._total - done) / done
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Minutes and seconds, hours if there are any."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
