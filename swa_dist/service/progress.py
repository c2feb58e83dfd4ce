"""What a person sees of long work: a bar on a terminal, a plain line now and then in a log."""

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


class Display(Protocol):
    def say(self, line: str) -> None: ...

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None: ...

    def close(self) -> None: ...


class Lines:
    """For a log: a line each ten seconds of a phase, and one at its end."""

    def __init__(self) -> None:
        self._phase = ""
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line, flush=True)

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._next = phase, now + _LINE_EVERY_SECONDS
        if done < total and now < self._next:
            return
        self._next = now + _LINE_EVERY_SECONDS
        print(f"  {phase}: {done:,} of {total:,}{', ' + note if note else ''}", flush=True)

    def close(self) -> None:
        pass


class Bars:
    """For a terminal: a bar for each phase."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._bars.start()

    def say(self, line: str) -> None:
        self._bars.console.print(line, highlight=False, markup=False)

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(phase, total=total, note=note)
        self._bars.update(self._tasks[phase], completed=done, total=total, note=note)

    def close(self) -> None:
        self._bars.stop()


def display() -> Display:
    console = Console()
    return Bars(console) if console.is_terminal else Lines()
