"""Which version of a model is @champion, and how it came to be. Imports mlflow.

MLflow moves an alias for whoever asks, whatever it was, and keeps no history. So each change is first written into a
journal, tags of the registered model that nobody overwrites; then it is carried out; then it is noted as done. One
process at a time does so, by a lease. Whoever holds it next carries out what a crash left half-done, and puts right
what a process wrote that was paused while its lease went to another.
"""

import contextlib
import getpass
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import mlflow
from mlflow.exceptions import MlflowException

from swa_dist.errors import BusyError, CheckpointError, ConfigError
from swa_dist.storage import lease
from swa_dist.storage.folder import is_s3

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
LOCK = "swa.lock_url"
"""Tag of a registered model: where the lease on its aliases is."""

_JOURNAL = "swa.journal."
_WAIT_SECONDS = 300.0
_POLL_SECONDS = 0.5
_TRIES = 10
_WHY_CHARACTERS = 2000  # MLflow's databases hold 5,000 in a tag
_LATE = timedelta(hours=1)  # after which a paused process is taken for gone

T = TypeVar("T")

Kind = Literal["promoted", "rolled back", "moved by hand", "rejected", "held"]


@dataclass(frozen=True)
class Entry:
    """One line of the journal."""

    number: int
    generation: int
    """Of the lease under which it was written."""
    kind: Kind
    version: str | None
    """What it is about; of a change, what @champion is from then on, None: nothing."""
    before: str | None
    """What @champion was."""
    previous: str | None
    """What @previous is from then on."""
    who: str
    when: str
    """UTC, as ISO 8601 has it."""
    why: str
    state: Literal["begun", "done", "given up"] = "done"
    ended_by: int = 0
    """The generation of the lease under which it was carried out."""
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:6])

    @property
    def is_change(self) -> bool:
        return self.kind not in ("rejected", "held")

    def facts(self) -> dict[str, Any]:
        """As `swa-dist history --json` has it."""
        names = ("when", "kind", "version", "before", "who", "why", "state")
        return {name: getattr(self, name) for name in names}

    @property
    def tag(self) -> str:
        # With the id, nobody overwrites what another wrote, not even where the lease's file was lost or isn't shared.
        return f"{_JOURNAL}{self.number:06d}-{self.generation:06d}-{self.id}"


@dataclass(frozen=True)
class Aliases:
    champion: str | None
    previous: str | None
    challenger: str | None
    journal: tuple[Entry, ...]
    """In the order in which it was written."""

    @property
    def last_change(self) -> Entry | None:
        """The last change that was not given up: what the aliases must be."""
        changes = [entry for entry in self.journal if entry.is_change and entry.state != "given up"]
        return changes[-1] if changes else None

    @property
    def next_number(self) -> int:
        return self.journal[-1].number + 1 if self.journal else 1


def look(client: mlflow.MlflowClient, name: str) -> Aliases:
    """The aliases and the journal as they are now, half-done changes and all. Raises CheckpointError where a line of
    the journal can't be read."""
    model = client.get_registered_model(name)
    found = {alias: str(version) for alias, version in model.aliases.items()}
    journal = [_read(name, tag, text) for tag, text in model.tags.items() if tag.startswith(_JOURNAL)]
    return Aliases(
        champion=found.get(CHAMPION),
        previous=found.get(PREVIOUS),
        challenger=found.get(CHALLENGER),
        journal=tuple(sorted(journal, key=lambda entry: (entry.number, entry.generation))),
    )


def _read(name: str, tag: str, text: str) -> Entry:
    known = {one.name for one in fields(Entry)}
    try:
        return Entry(**{word: value for word, value in json.loads(text).items() if word in known})
    except (ValueError, TypeError, AttributeError):
        raise CheckpointError(
            f"the tag {tag} of {name} must be a line of its journal, but can't be read: it was changed from outside,"
            " or by another version of swa_dist. Use that version, or remove the tag."
        ) from None


class Holder:
    """The one process that may change a model's aliases now. All raise BusyError once another has taken the lease."""

    def __init__(
        self,
        client: mlflow.MlflowClient,
        name: str,
        generation: int,
        check: Callable[[], None],
        say: Callable[[str], None],
    ) -> None:
        self._client = client
        self._name = name
        self._generation = generation
        self._check = check
        self._say = say

    def settle(self) -> Aliases:
        """Finish what others left half-done, and note what was moved by hand. The aliases as they then are."""
        found = look(self._client, self._name)
        last = found.last_change
        if last is None:
            return found
        if last.state == "begun":
            self._say(f"{self._name}: finishing what {last.who} began: {_what(last)}")
            if last.version is None or self._exists(last.version):
                self._carry_out(last)
            else:  # it was deleted since
                self._note(replace(last, state="given up", ended_by=self._generation))
                if found.champion is None and last.before is not None and self._exists(last.before):
                    self._set(CHAMPION, last.before)
            return self.settle()
        if found.champion != last.version:
            there = last.version is not None and self._exists(last.version)
            if there and found.champion in self._late(found):
                self._say(
                    f"{self._name}: @champion was version {found.champion} by a process that had lost its lease; it is"
                    f" version {last.version} again. If it was you, use `swa-dist rollback --to`."
                )
                self._carry_out(last)
            else:
                self._say(f"{self._name}: @champion was moved by hand from version {last.version} to {found.champion}")
                previous = last.version if there else found.previous
                self._note(self._entry(found, "moved by hand", found.champion, previous, "unknown", "outside swa_dist"))
            return self.settle()
        if found.previous != last.previous and (last.previous is None or self._exists(last.previous)):
            self._carry_out(last)
        return look(self._client, self._name)

    def change(self, kind: Kind, version: str, previous: str | None, who: str, why: str) -> Entry:
        """Make `version` @champion and `previous` @previous. After `settle`. Raises ConfigError where there is no such
        version, and BusyError where @champion was moved meanwhile."""
        if not self._exists(version):
            raise ConfigError(f"version {version} of {self._name} must exist, but was deleted meanwhile.")
        entry = self._entry(look(self._client, self._name), kind, version, previous, who, why)
        self._carry_out(replace(entry, state="begun", ended_by=0))
        found = look(self._client, self._name)
        if found.champion != version:
            raise BusyError(
                f"@champion of {self._name} must be version {version} now, but is {found.champion}: it was moved from"
                " outside at the same time. Look at `swa-dist history`, and try again."
            )
        return found.journal[-1]

    def record(self, kind: Kind, version: str, who: str, why: str) -> None:
        """Write down that a version did not become @champion."""
        found = look(self._client, self._name)
        self._note(self._entry(found, kind, version, found.previous, who, why))

    def challenge(self, version: str) -> None:
        """Make a version @challenger, unless a newer one is, or it is @champion."""
        found = look(self._client, self._name)
        if found.champion != version and int(found.challenger or 0) < int(version):
            self._set(CHALLENGER, version)

    def tag(self, version: str, tags: dict[str, str]) -> None:
        there = self._client.get_model_version(self._name, version).tags
        for tag, value in tags.items():
            if there.get(tag) != value:
                self._check()
                self._client.set_model_version_tag(self._name, version, tag, value)

    def _entry(
        self, found: Aliases, kind: Kind, version: str | None, previous: str | None, who: str, why: str
    ) -> Entry:
        last = found.last_change
        return Entry(
            number=found.next_number,
            generation=self._generation,
            kind=kind,
            version=version,
            before=last.version if kind == "moved by hand" and last else found.champion,
            previous=previous,
            who=who,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            why=why[:_WHY_CHARACTERS],
            ended_by=self._generation,
        )

    def _carry_out(self, entry: Entry) -> None:
        """What the entry says, which may be so already in part. What is so is not written again: where a server's
        answers are lost, each try gets further than the one before."""
        if entry.state == "begun" and entry.generation == self._generation:
            self._note(entry)
        self._set(PREVIOUS, entry.previous)
        self._set(CHAMPION, entry.version)
        if entry.version is not None:
            how = {"at": entry.when, "by": entry.who, "instead_of": entry.before or "", "why": entry.why}
            self.tag(entry.version, {f"swa.champion_{word}": value for word, value in how.items()})
            if look(self._client, self._name).challenger == entry.version:
                self._set(CHALLENGER, None)
        if entry.state == "begun":
            self._note(replace(entry, state="done", ended_by=self._generation))
        self._check()

    def _late(self, found: Aliases) -> set[str | None]:
        """Versions that a process may have made @champion after it had lost its lease: of changes that it did not end
        itself, and that were begun not long ago. Whoever moves @champion to another, or later, means it."""
        since = (datetime.now(UTC) - _LATE).isoformat(timespec="seconds")
        return {
            entry.version
            for entry in found.journal
            if entry.is_change
            and entry.version
            and entry.when > since
            and (entry.state != "done" or entry.ended_by != entry.generation)
        }

    def _note(self, entry: Entry) -> None:
        if entry not in look(self._client, self._name).journal:
            self._check()
            self._client.set_registered_model_tag(self._name, entry.tag, _text(entry))

    def _set(self, alias: str, version: str | None) -> None:
        wanted = version if version is not None and self._exists(version) else None
        if alias == CHAMPION and wanted != version:
            raise ConfigError(f"version {version} of {self._name} must exist, but was deleted meanwhile.")
        there = self._client.get_registered_model(self._name).aliases.get(alias)
        if wanted == (None if there is None else str(there)):
            return
        self._check()
        if wanted is not None:
            self._client.set_registered_model_alias(self._name, alias, wanted)
        else:
            self._client.delete_registered_model_alias(self._name, alias)

    def _exists(self, version: str) -> bool:
        try:
            self._client.get_model_version(self._name, version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True


@contextlib.contextmanager
def holding(client: mlflow.MlflowClient, name: str, say: Callable[[str], None]) -> Iterator[Holder]:
    """Within the block no other process changes the model's aliases. Waits for one that does; raises BusyError where
    that takes minutes, and ConfigError where the place of the lease can't be seen from here."""
    url = client.get_registered_model(name).tags.get(LOCK, "")
    if not url or not (is_s3(url) or Path(url).parent.is_dir()):
        raise ConfigError(
            f"the lease of {name}, in its tag {LOCK}, must be where this machine can write, but is"
            f" {url or 'not there'}. Run this where its folder is, or, while nothing runs, set the tag to a file that"
            " all who promote can reach, on a shared disk or on S3."
        )
    register, what = lease.register(url), f"promotion of {name}"
    with contextlib.ExitStack() as stack:
        held = _patiently(lambda: stack.enter_context(lease.hold(register, what, say)), what, say)
        check = lease.guard(register, what, held.generation)
        latest = max((entry.generation for entry in look(client, name).journal), default=0)
        if latest >= held.generation:
            with contextlib.suppress(BusyError):  # another has taken it over already
                check()
                say(
                    f"warning: {url} must be the lease of all who promote {name}, but others had another, or it was"
                    f" removed. If it is on a disk of this machine alone, set the model's tag {LOCK} to a file that all"
                    " can reach."
                )
        yield Holder(client, name, held.generation, check, say)


def alone(client: mlflow.MlflowClient, name: str, say: Callable[[str], None], work: Callable[[Holder], T]) -> T:
    """What `work` returns, done by the one process that may; done again where this one was paused for so long that
    another took the lease, or where somebody moved @champion from outside in that moment."""
    for remaining in reversed(range(_TRIES)):
        with holding(client, name, say) as held:
            try:
                return work(held)
            except BusyError as error:
                if not remaining:
                    raise
                say(f"{error} Trying again.")
    raise AssertionError("the last try returns or raises")


def claim_lock(client: mlflow.MlflowClient, name: str, wanted: str) -> str:
    """Where the model's lease is: at `wanted`, unless it has been elsewhere before."""
    kept: str | None = client.get_registered_model(name).tags.get(LOCK)
    if kept is None:
        client.set_registered_model_tag(name, LOCK, wanted)
    return kept or wanted


def this_person() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def _patiently(take: Callable[[], lease.Lease], what: str, say: Callable[[str], None]) -> lease.Lease:
    deadline = time.monotonic() + _WAIT_SECONDS
    said = False
    while True:
        try:
            return take()
        except BusyError:
            if time.monotonic() > deadline:
                raise
            if not said:
                say(f"waiting for another {what} to end")
                said = True
            time.sleep(_POLL_SECONDS)


def _what(entry: Entry) -> str:
    return f"version {entry.version} as @champion instead of {entry.before or 'none'}"


def _text(entry: Entry) -> str:
    return json.dumps(asdict(entry), ensure_ascii=False)
