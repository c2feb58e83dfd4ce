"""What is left of an attempt that did not end well: `post-mortem-aN.md` in the run's folder.

It is for whoever finds it: the reason, what to do, where the run got to, and what its workers said last. It is sent
around, so nothing secret is in it. Starts without torch, which may be what is broken.
"""

import errno
import json
import os
import re
import shlex
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from swa_dist.errors import ExitCode, SwaDistError
from swa_dist.service import environment, worker_log
from swa_dist.service.environment import redact
from swa_dist.service.layout import RECIPE, SUMMARY
from swa_dist.service.worker_log import Ending
from swa_dist.storage import folder as folders
from swa_dist.storage.folder import Folder, join
from swa_dist.storage.store import MANIFEST

_CHECKPOINTS, _CANDIDATES, _FACTS = "checkpoints", "candidates", "facts.json"  # as training/ has them, without torch
_SUBMITTED = "SWA_DIST_RECIPE"  # as submit.py has it
_MOST_FACTS_BYTES = 32 * 2**20
_LAST_ROWS = 5
_LOG_LINES = 600  # of all ranks together
_STACK_LINES = 120
_TRACEBACK_LINES = 200
_REASON_CHARACTERS = 1000

_KILLED = (
    "Nothing in this program ended it. See whether its machine was reclaimed or restarted, or whether the kernel killed"
    " it for memory (`dmesg`, `kubectl describe pod`); the workers' last lines are below. Then resume."
)
_BUG = "This is a bug: report it, with this file. What was committed is kept, and resuming may get past it."
# By name, for torch, Ray and Python have errors of full memory too; the first name of an error's classes counts.
_NEXT = {
    "ConfigError": "Change the recipe as the reason says, and start it again. Where the change decides the result it is"
    " another run, with a folder of its own; any other goes on here.",
    "DataError": "Mend the images, or the index of them (`swa-dist data index`), as the reason says; then resume."
    " Other images are another run, with a folder of its own.",
    "CheckpointError": "Put back or remove the file that the reason names; then resume. A damaged checkpoint is set"
    " aside and the one before it used. With `--again` the run starts over, and this folder gets another name.",
    "NumericsError": "Resume once: a fault of a machine does not come twice at the same image. If it does come again,"
    " set `schedule.max_lr` lower or `precision: float32`: another run. If workers differ, leave out the machine of the"
    " one that the reason names.",
    "OutOfMemoryError": "See what else uses that memory, and resume; or set `data.group_images` smaller, which is"
    " another run. On a CPU fewer workers on a machine, or a smaller `data.num_threads`, help too, and change nothing"
    " in the result.",
    "ServiceError": "See that what the reason names is up again (`swa-dist doctor RECIPE` looks at all of it), or why"
    " a worker was lost: its last lines are below. Then resume.",
    "OutputError": "Free space in the run's folder, or see that it may be written; then resume. `retention` and"
    " `checkpoint.keep_epochs` say how much is kept.",
    "BusyError": "Another process has this run. Let that one go on: there is nothing to resume until it has ended.",
    "Stopped": "Nothing went wrong: its state was saved when it was asked to stop. Resume when you like.",
    "KeyboardInterrupt": "Nothing went wrong: it was interrupted. What was committed is kept. Resume when you like.",
    "SwaDistError": "Do as the reason says; then resume.",
}
_NEXT["MemoryError"] = _NEXT["OutOfMemoryError"]


@dataclass
class _Found:
    """What the run's folder holds of an attempt."""

    position: str = "not known"
    rows: list[str] = field(default_factory=list)
    logs: dict[int, Ending] = field(default_factory=dict)
    """By rank."""
    problem: str = ""
    """Why this is not all of it."""


def name_of(attempt: int) -> str:
    return f"post-mortem-a{attempt}.md"


def missing(folder: Folder, attempt: int) -> bool:
    """Whether an attempt, which isn't under way, left no word of how it ended. Raises ServiceError."""
    return attempt > 0 and not folder.has(SUMMARY) and not folder.has(name_of(attempt))


def write(folder: Folder, attempt: int, error: BaseException | None, recipe_yaml: str) -> str | None:
    """Write the post-mortem of an attempt; its path or address, or None where it could not be written.

    `error`: what ended it, or None where a later start finds that it ended without a word. Where the run's folder can't
    be written, it goes into this machine's folder for temporary files. Never raises, so as not to hide `error`.
    """
    try:
        found = _Found()
        try:
            _look_into(folder, attempt, found)
        except Exception as problem:
            found.problem = redact(_one_line(problem))
        content = redact(_compose(folder, attempt, error, recipe_yaml, found)).encode(errors="backslashreplace")
        return _put(folder, name_of(attempt), content)
    except BaseException:  # a second Ctrl-C, too: it must not take the place of `error`
        return None


def _one_line(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # of an error that is broken itself
        text = ""
    return text or f"a {type(error).__name__} that says nothing"


def _put(folder: Folder, name: str, content: bytes) -> str:
    address = join(folder.url, name)
    try:
        folders.write(address, content)
    except (SwaDistError, OSError):
        handle, path = tempfile.mkstemp(prefix=f"{Path(folder.url).name}-", suffix=f"-{name}")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        return path
    return address


def _look_into(folder: Folder, attempt: int, found: _Found) -> None:
    names = folder.store.names(_CHECKPOINTS)
    newest = next((name for name in reversed(names) if folder.store.has(name)), None)
    if newest is None:
        found.position = "no checkpoint was committed"
    else:
        try:
            found.position, found.rows = _position(folder, newest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            found.position = f"`{newest}`, whose {_FACTS} can't be read: it may be damaged"
    scored = [Path(name).name for name in folder.store.names(_CANDIDATES)]
    found.position += f"; scored already: {', '.join(scored) or 'nothing'}."
    found.logs = worker_log.endings(folder, attempt)


def _position(folder: Folder, entry: str) -> tuple[str, list[str]]:
    """What a checkpoint says of itself, and its last metrics. Its weights, which are large, are not read."""
    if folder.remote is None:
        facts = json.loads((folder.local / entry / _FACTS).read_bytes())
        age = time.time() - (folder.local / entry / MANIFEST).stat().st_mtime
    else:
        seen = folder.remote.look(f"{entry}/{MANIFEST}")
        manifest = json.loads(seen.content if seen else b"")
        age = seen.age_seconds if seen else 0.0
        if manifest["files"][_FACTS]["bytes"] > _MOST_FACTS_BYTES:
            return f"`{entry}`, committed {_ago(age)} ago", []
        facts = json.loads(folder.remote.read(f"{entry}/{manifest['at']}/{_FACTS}") or b"")
    rows = facts["rows"]
    epoch = ""
    if rows and rows[-1]["position"]:
        epoch = f" (epoch {rows[-1]['epoch'] * facts['position'] / rows[-1]['position']:.2f})"
    text = f"`{entry}`, at image {facts['position']:,}{epoch}, committed {_ago(age)} ago"
    return text, [_row(row) for row in rows[-_LAST_ROWS:]]


def _row(row: dict[str, Any]) -> str:
    at = datetime.fromtimestamp(row["time_ms"] / 1000, UTC)
    metrics = ", ".join(f"{name} {value:.6g}" for name, value in row["metrics"].items())
    return f"{at:%Y-%m-%dT%H:%M:%SZ} image {row['position']:,}, epoch {row['epoch']:.3f}: {metrics}"


def _ago(seconds: float) -> str:
    return str(timedelta(seconds=max(0, round(seconds))))


def _compose(folder: Folder, attempt: int, error: BaseException | None, recipe_yaml: str, found: _Found) -> str:
    at = folder.local if folder.remote is None else Path(tempfile.gettempdir())
    parts = [
        f"# {Path(folder.url).name}, attempt {attempt}: why it ended",
        f"**{_reason(error)}**",
        f"Written {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}. {_exit(error)} The run's folder: {folder.url}",
        "## What to do next",
        _next_step(error),
        *_resume(folder),
        "## Where it got to",
        f"The newest checkpoint: {found.position}",
        _block(found.rows) if found.rows else "No metrics were committed.",
        *([f"Not all of the run's folder could be read: {found.problem}"] if found.problem else []),
        *_stacks(found.logs),
        "## What the workers said last",
        *_said(found.logs),
    ]
    if error is not None:
        lines = redact("".join(traceback.format_exception(error))).splitlines()
        parts += ["## Traceback", _block(lines[-_TRACEBACK_LINES:])]
    parts += ["## Environment", "Of the process that wrote this.", _block(environment.describe(at))]
    parts += ["## Configuration", _block(recipe_yaml.rstrip().splitlines(), "yaml")]
    return "\n\n".join(parts) + "\n"


def _reason(error: BaseException | None) -> str:
    if error is None:
        return "It left no word here: its process was killed, its machine is gone, or this folder could not be written."
    text = redact(_one_line(error))
    text = text if len(text) <= _REASON_CHARACTERS else f"{text[:_REASON_CHARACTERS]} ..."
    return text if isinstance(error, SwaDistError) else f"{type(error).__qualname__}: {text}"


def _exit(error: BaseException | None) -> str:
    if error is None:
        return "A later start of the run found it so."
    code = ExitCode.STOPPED if isinstance(error, KeyboardInterrupt) else ExitCode.UNFORESEEN
    return f"It ended by {type(error).__name__}, with exit code {int(getattr(error, 'exit_code', code))}."


def _next_step(error: BaseException | None) -> str:
    if error is None:
        return _KILLED
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _NEXT["OutputError"]
    return next((_NEXT[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _NEXT), _BUG)


def _resume(folder: Folder) -> list[str]:
    """The command that resumes the run, by way of where this process is."""
    recipe = shlex.quote(RECIPE if folder.remote is not None else join(folder.url, RECIPE))
    first = "Save the configuration below as recipe.yaml. " if folder.remote is not None else ""
    if _SUBMITTED in os.environ:
        lines = [f"swa-dist submit {recipe} --address http://HEAD:8265", f"swa-dist submit {recipe} --to kube"]
        return [first + "Submit it where it was submitted, to Ray or to Kubernetes:", _block(lines)]
    command = f"swa-dist finetune {recipe}"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        nodes, each = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
        command = f"torchrun --nnodes {nodes} --nproc-per-node {each} -m swa_dist finetune {recipe}"
    return [first + "The command that resumes it:", _block([command])]


def _stacks(endings: dict[int, Ending]) -> list[str]:
    """Dumps of hangs and crashes, each with the ranks that have the same: the odd one out is often the cause."""
    ranks: dict[str, list[str]] = {}
    dumps: dict[str, list[str]] = {}
    for rank, end in endings.items():
        if end.stacks:
            same = re.sub(r"0x[0-9a-f]+", "", "\n".join(end.stacks))
            ranks.setdefault(same, []).append(f"{rank}{' (which said more afterwards)' if end.said_more else ''}")
            dumps.setdefault(same, end.stacks)
    parts = ["## Stacks of hangs and crashes"] if dumps else []
    for same, who in ranks.items():
        parts += [f"### rank {', '.join(who)}", _block(dumps[same][:_STACK_LINES])]
    return parts


def _said(endings: dict[int, Ending]) -> list[str]:
    if not endings:
        return ["There are no logs of this attempt: it ended before its workers began, or their machines are gone."]
    each = min(40, max(5, _LOG_LINES // len(endings)))
    return [part for rank, end in endings.items() for part in (f"### rank {rank}", _block(end.said[-each:]))]


def _block(lines: list[str], language: str = "text") -> str:
    text = "\n".join(lines)
    longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
