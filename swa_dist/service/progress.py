"""What a person sees of long work: a bar on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_LINE_EVERY_SECONDS = 10.0


class Display(Protocol):
    def say(self, line: str) -> None: ...

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None: ...

    def close(self) -> None: ...


class Lines:
    """For a log: a line each ten seconds of a phase, and one at its end."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._phase = ""
        self._next = 0.0

    def say(self, line: str) -> None:
        print(line, file=self._file, flush=True)

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._next = phase, now + _LINE_EVERY_SECONDS
        if done < total and now < self._next:
            return
        self._next = now + _LINE_EVERY_SECONDS
        self.say(f"  {phase}: {done:,} of {total:,}{', ' + note if note else ''}")

    def close(self) -> None:
        pass


class Silent:
    """For nobody."""

    def say(self, line: str) -> None:
        pass

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        pass

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


def display(*, error: bool = False) -> Display:
    """For standard output, or standard error where the output is for machines."""
    console = Console(stderr=error)
    return Bars(console) if console.is_terminal else Lines(sys.stderr if error else sys.stdout)
