"""What is kept of finished runs, as `retention` in the recipe says; the rest is removed when a run finishes."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from rich.filesize import decimal
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from swa_dist.config import Recipe
from swa_dist.errors import BusyError, CheckpointError, ServiceError, SwaDistError
from swa_dist.service import registry, tracking, versions
from swa_dist.service.layout import ATTEMPT, RECIPE, SUMMARY, lease_url
from swa_dist.service.progress import Display
from swa_dist.service.run_folders import Runs, listed_bytes, open_runs
from swa_dist.service.spool import SPOOL_FILES
from swa_dist.storage import lease
from swa_dist.storage.folder import Folder, is_s3, join, open_folder
from swa_dist.storage.lease import Seen
from swa_dist.storage.store import MANIFEST, newest
from swa_dist.training.checkpoints import CHECKPOINTS

_KEY = slice(len("swa-"), len("swa-") + 12)  # of a folder's name
_SECONDS_PER_DAY = 86_400


def apply(recipe: Recipe, folder: Folder, display: Display) -> None:
    """Remove what need not be kept, of the run in `folder` that has just finished and of older ones beside it.

    Only for the process that holds the run's lease. What goes wrong is a warning, never an error. Of unfinished runs,
    those beside it alone are known to need others.
    """
    steps: list[Callable[[], None]] = []
    if recipe.retention.checkpoints == "last":
        steps.append(functools.partial(_keep_last_checkpoint, folder, display))
    if recipe.retention.spools == "unsent":
        steps.append(functools.partial(_remove_sent_spool, folder, display))
    if recipe.retention.run_days != "forever":
        steps.append(functools.partial(_remove_old_runs, folder, recipe.retention.run_days, display))
    for step in steps:
        try:
            step()
        except Exception as error:  # whatever it is: the run is finished, and stays so
            said = str(error) if isinstance(error, SwaDistError) else f"{type(error).__name__}: {error}"
            display.say(f"warning: {said} Nothing more was removed; the next run that finishes tries again.")


def _keep_last_checkpoint(folder: Folder, display: Display) -> None:
    store = folder.store
    if len(store.names(CHECKPOINTS)) < 2:
        return  # without a look at its content, which may have to be fetched
    last = newest(store, CHECKPOINTS, lambda message: display.say(f"warning: {message}"))
    older = [name for name in store.names(CHECKPOINTS) if name != last]
    if last is None or not older:
        return
    freed = 0
    for name in older:
        with contextlib.suppress(CheckpointError):  # of a damaged manifest, which tells no sizes
            freed += listed_bytes(folder.read_json(f"{name}/{MANIFEST}"))
        store.remove(name)
    display.say(f"removed {_count(len(older), 'checkpoint')} of {folder.url}, all but the last: {decimal(freed)}")


def _remove_sent_spool(folder: Folder, display: Display) -> None:
    spool = registry.spool_of(folder)
    with spool.one_sender():
        told = any(event["kind"] == "artifact" and event["name"] == SUMMARY for event in spool.read())
        if (folder.read_json(SUMMARY) or {}).get("waiting") != 0 or not told or spool.waiting():
            return
        # The events go before the number sent: the other way round, a kill between would have all of them sent again.
        # The target stays, so that `swa-dist replay` can tell that nothing waits.
        events, sent, _ = SPOOL_FILES
        freed = sum((folder.local / name).stat().st_size for name in (events, sent))
        for name in (events, sent):
            folder.remove(name)
    display.say(f"removed the spool of {folder.url}, all of which MLflow has: {decimal(freed)}")


def _remove_old_runs(folder: Folder, days: int, display: Display) -> None:
    parent, _, own = folder.url.rpartition("/")
    runs = open_runs(parent)
    for name in runs.remains():
        with _one_of_many(join(parent, name), display), _alone(runs, name, own) as check:
            if runs.is_remains(name):
                check()
                runs.clear(name)
                display.say(f"removed what an interrupted removal had left of {join(parent, name)}")
    summaries = {name: runs.look(name, SUMMARY) for name in runs.names()}
    extended = _extended(runs, [name for name, seen in summaries.items() if seen is None])
    asked = _Asked(display)
    freed: list[int] = []
    try:
        for name, seen in summaries.items():
            if seen is None or seen.age_seconds <= days * _SECONDS_PER_DAY or name == own:
                continue
            if _address(join(parent, name)) not in extended:
                with _one_of_many(join(parent, name), display):
                    freed += _remove_old(runs, name, seen, own, asked)
    finally:
        if freed:
            older = f"{_count(len(freed), 'run')} older than {_count(days, 'day')}"
            display.say(f"removed {older} from {parent}: {decimal(sum(freed))}")


@contextlib.contextmanager
def _one_of_many(url: str, display: Display) -> Iterator[None]:
    """Within the block what goes wrong is this folder's affair, unless the storage doesn't answer."""
    try:
        yield
    except BusyError:
        pass  # it is being run, or removed, by another
    except ServiceError:
        raise
    except (SwaDistError, OSError, ValueError) as error:
        display.say(f"warning: {error} {url} stays.")


def _remove_old(runs: Runs, name: str, seen: Seen, own: str, asked: "_Asked") -> list[int]:
    """The bytes that were freed; nothing where it stays. `seen`: its summary."""
    facts = _Facts.of(seen.content, join(runs.url, name))
    if facts is None or facts.run_key[:12] != name[_KEY] or runs.look(name, ATTEMPT) is None:
        return []  # named like a run, and none of ours
    if facts.waiting != 0 or asked.may_be_aliased(facts):
        return []
    # A summary that could not be sent is not counted in the summary.
    if registry.spool_of(open_folder(facts.url)).waiting():
        return []
    with _alone(runs, name, own) as check:
        now = runs.look(name, SUMMARY)
        if now is None or now.version != seen.version:
            return []  # begun anew meanwhile, or told to MLflow
        size = runs.size(name)
        check()
        runs.begin(name)
        check()
        runs.clear(name)
        return [size]


@contextlib.contextmanager
def _alone(runs: Runs, name: str, own: str) -> Iterator[Callable[[], None]]:
    """Within the block no other process starts or removes a run of this name's key. Raises BusyError where one is at
    it, without waiting. Gives a check that it still is so.

    The lease outlives the folder: its generation is what refuses a holder that was paused all the while.
    """
    run = name.partition(".")[0]
    if run == own:  # one that this very run was begun anew from: this process has its lease
        yield lambda: None
        return
    register, what = lease.register(lease_url(join(runs.url, run))), f"the run with key {run[_KEY]}"
    with lease.hold(register, what, _not_waiting) as held:
        yield lease.guard(register, what, held.generation)


def _not_waiting(line: str) -> None:
    """What a lease says before it waits to see whether its holder is alive."""
    raise BusyError(line)


def _extended(runs: Runs, unfinished: list[str]) -> set[str]:
    """The folders that unfinished runs are to go on from. Raises CheckpointError where one doesn't tell."""
    found = set()
    for name in unfinished:
        seen = runs.look(name, RECIPE)
        if seen is None or "." in name:  # none yet, or set aside for good
            continue
        try:  # not by config.py: it may be of a version with other settings
            address = YAML(typ="safe", pure=True).load(seen.content)["checkpoint"]["extend_from"]
        except (YAMLError, ValueError, TypeError, KeyError):
            raise CheckpointError(
                f"{join(runs.url, name)}/{RECIPE} must tell what an unfinished run goes on from, but does not. Remove"
                " that folder, or complete it."
            ) from None
        found.add(_address(str(address)))
    return found


def _address(url: str) -> str:
    return url.rstrip("/") if is_s3(url) else os.path.realpath(url)


@dataclass(frozen=True)
class _Facts:
    """What a summary says of a run."""

    url: str
    run_key: str
    waiting: int
    uri: str
    run_id: str
    registered: tuple[str, str] | None
    """Name and version."""

    @classmethod
    def of(cls, content: bytes, url: str) -> "_Facts | None":
        """None where this is no run's summary."""
        try:
            summary = json.loads(content)
            version = summary["registered"]
            return cls(
                url=url,
                run_key=str(summary["run_key"]),
                waiting=int(summary["waiting"]),
                uri=str(summary["mlflow"]["uri"]),
                run_id=str(summary["mlflow"]["run_id"]),
                registered=None if version is None else (str(version["name"]), str(version["version"])),
            )
        except (ValueError, TypeError, KeyError):
            return None


class _Asked:
    """What the registries answer. One that doesn't is asked once, and its runs stay."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._silent: set[str] = set()
        tracking.configure_client()

    def may_be_aliased(self, facts: _Facts) -> bool:
        """Whether a version of the run, under any name, has an alias, as far as its registry tells."""
        if facts.uri in self._silent:
            return True
        try:
            return tracking.patiently(
                lambda: versions.is_aliased(facts.uri, facts.run_key, facts.run_id, facts.registered)
            )
        except ServiceError as error:
            self._display.say(f"warning: {error} None of its runs is removed.")
            self._silent.add(facts.uri)
        except CheckpointError as error:
            self._display.say(f"warning: {error}")
        return True


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
