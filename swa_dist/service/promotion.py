"""The gate between a registered version and @champion: both on the same images, the rules, and what comes of it.

Imports mlflow. What moves aliases is in champion.py; here is decided whether, and written down why.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import mlflow
import numpy as np
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data.order import Ints
from swa_dist.errors import BusyError, ConfigError, DataError, ServiceError
from swa_dist.evidence import gate
from swa_dist.evidence.gate import Decision
from swa_dist.service import champion, identity, logged_model, scored, standalone, tracking, versions
from swa_dist.service.champion import Entry, Holder
from swa_dist.service.progress import Display
from swa_dist.service.scored import Scored
from swa_dist.training.evaluate import Outcomes

T = TypeVar("T")

_TRIES = 10
_OVERRIDABLE = ("registry.gate.", "registry.first=", "data.val=", "data.val_labels=", "data.index=")

_SAID = {
    "promoted": "is @champion now",
    "rejected": "does not become @champion",
    "held": "waits for a person",
    "champion already": "stays @champion",
}

Status = Literal["promoted", "rejected", "held", "champion already"]


@dataclass(frozen=True)
class Ruling:
    """What became of a version."""

    name: str
    version: str
    status: Status
    why: str
    over: str | None
    """The version that was @champion, with which it was compared."""
    decision: Decision | None
    """The comparison, where there was one."""

    @property
    def is_champion(self) -> bool:
        return self.status in ("promoted", "champion already")

    def facts(self) -> dict[str, Any]:
        return asdict(self) | {"champion": self.is_champion}


@dataclass(frozen=True)
class Gatekeeper:
    """Decides about the versions of one model, for `who`."""

    uri: str
    name: str
    display: Display
    who: str

    @property
    def _client(self) -> mlflow.MlflowClient:
        return versions.client_of(self.uri)

    def promote(self, version: str, overrides: tuple[str, ...] = ()) -> Ruling:
        """Make the version @champion if the rules of its recipe, with `overrides` of them, hold.

        Raises CheckpointError where files are not those that were registered, ConfigError and DataError where there is
        nothing to compare it with, ServiceError where MLflow doesn't answer, and BusyError where another process is at
        it for minutes.
        """
        for _ in range(_TRIES):
            found = self._alone(lambda held: held.settle())
            if found.champion == version:
                return Ruling(self.name, version, "champion already", "it is @champion already", version, None)
            ruling = self._rule(version, found, overrides)  # may take long: others are not kept out meanwhile
            self._report(ruling)  # before what it leads to: a crash between leaves a report of what is looked at again
            if self._alone(functools.partial(self._carry_out, ruling, found)):
                return ruling
            self.display.say(f"@champion of {self.name} was moved meanwhile; looking again")
        raise BusyError(f"@champion of {self.name} must stay for a moment, but was moved {_TRIES} times. Try again.")

    def challenge(self, version: str) -> None:
        """Make the version @challenger, unless a newer one is."""
        self._alone(lambda held: held.challenge(version))

    def hold(self, version: str, why: str) -> Ruling:
        """Leave the version to a person, and write down why."""
        ruling = Ruling(self.name, version, "held", why, None, None)
        self._alone(lambda held: self._carry_out(ruling, held.settle(), held))
        return ruling

    def ruled(self, version: str) -> Ruling | None:
        """What was decided about the version before, if anything was, without its comparison."""
        for entry in reversed(self._alone(lambda held: held.settle()).journal):
            if entry.version == version and entry.state == "done" and entry.kind in ("promoted", "rejected", "held"):
                return Ruling(self.name, version, cast(Status, entry.kind), entry.why, entry.before, None)
        return None

    def rollback(self, to: str | None, reason: str) -> Entry:
        """Make another version @champion, whatever the evidence: @previous, or the version `to`."""
        seen = self._alone(lambda held: held.settle())
        target = seen.previous if to is None else which_version(self.uri, self.name, to, "--to")
        if target is None:
            raise ConfigError(
                f"`--to` must name a version, since {self.name} has no @previous. See `swa-dist history {self.name}`."
            )
        with tempfile.TemporaryDirectory() as scratch:
            versions.verified(self.uri, self.name, target, Path(scratch))
        begun = False

        def carry_out(held: Holder) -> Entry:
            nonlocal begun
            found = held.settle()
            if found.champion == target:
                if begun and found.last_change is not None:  # another finished it for this process
                    return found.last_change
                raise ConfigError(f"`--to` must be another version than @champion, but {target} is it.")
            # The reason is about the @champion that the person saw.
            if to is None and not begun and (found.champion, found.previous) != (seen.champion, seen.previous):
                raise ConfigError(
                    f"`--to` must be given, since @champion of {self.name} was moved from version {seen.champion} to"
                    f" {found.champion} meanwhile. See `swa-dist history {self.name}`."
                )
            begun = True
            return held.change("rolled back", target, _before(found, target), self.who, reason)

        return self._alone(carry_out)

    @property
    def challenger(self) -> str | None:
        """The version that is @challenger, if any is."""
        with tracking.answering(self.uri):
            return champion.look(self._client, self.name).challenger

    def history(self) -> tuple[Entry, ...]:
        with tracking.answering(self.uri):
            return champion.look(self._client, self.name).journal

    def _alone(self, work: Callable[[Holder], T]) -> T:
        with tracking.answering(self.uri):
            return champion.alone(self._client, self.name, self.display.say, work)

    def _rule(self, version: str, found: champion.Aliases, overrides: tuple[str, ...]) -> Ruling:
        with tempfile.TemporaryDirectory() as scratch:
            challenger, _ = self._read(version, Path(scratch) / "challenger")
            recipe = _overridden(challenger.recipe, overrides)
            self._check_run(version)
            if found.champion is None:
                return self._first(version, found, recipe)
            theirs, folder = self._read(found.champion, Path(scratch) / "champion", "@champion, ")
            decision = self._compare(dataclasses.replace(challenger, recipe=recipe), theirs, folder, found.champion)
        status: Status = "promoted" if decision.passed else "rejected"
        return Ruling(self.name, version, status, decision.sentence, found.champion, decision)

    def _read(self, version: str, into: Path, what: str = "") -> tuple[Scored, Path]:
        """A version's evidence and the folder of its files, which are those that were registered."""
        into.mkdir()
        folder = versions.verified(self.uri, self.name, version, into) / logged_model.FILES
        return scored.read(folder, f"{what}models:/{self.name}/{version}"), folder

    def _check_run(self, version: str) -> None:
        """Raise ConfigError where the run that a version comes from was deleted."""
        address = f"models:/{self.name}/{version}"
        run_id = versions.version_of(self.uri, address, "the version").run_id
        with tracking.answering(self.uri):
            try:
                stage = self._client.get_run(run_id).info.lifecycle_stage
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                stage = "gone"
        if stage != LifecycleStage.ACTIVE:
            raise ConfigError(
                f"the run of {address} must be in MLflow, where its evidence can be looked up, but was deleted."
                f" `mlflow runs restore --run-id {run_id}` brings it back, unless it was removed for good."
            )

    def _first(self, version: str, found: champion.Aliases, recipe: Recipe) -> Ruling:
        last = found.last_change
        if last is not None:
            raise ConfigError(
                f"{self.name} must have a @champion to compare version {version} with, but has none since version"
                f" {last.before} was taken away. Put one in its place: swa-dist rollback {self.name} --to VERSION"
                " --reason WHY."
            )
        if recipe.registry.first == "hold":
            why = (
                "there never was a @champion, and `registry.first` is hold: a person decides, with swa-dist promote"
                f" {self.name} --set registry.first=promote"
            )
            return Ruling(self.name, version, "held", why, None, None)
        why = "there was no @champion and `registry.first` is promote, whatever the verdict"
        return Ruling(self.name, version, "promoted", why, None, None)

    def _compare(self, mine: Scored, theirs: Scored, folder: Path, version: str) -> Decision:
        if mine.classes != theirs.classes:
            both = ", ".join(sorted(set(mine.classes) ^ set(theirs.classes))[:5]) or "they are in another order"
            raise DataError(
                f"@champion of {self.name} (version {version}) must know the same classes, but knows"
                f" {len(theirs.classes)}, and the challenger {len(mine.classes)}. Known to one alone: {both}."
                " Give models for other classes another `registry.model`."
            )
        champions = theirs.outcomes
        if mine.val_digest != theirs.val_digest:
            self.display.say(f"@champion (version {version}) was scored on other images; scoring it on these")
            champions = self._score(mine, theirs, folder)
        challengers, champions, labels = _on_the_same(mine, champions)
        return gate.decide(
            mine.recipe.registry.gate,
            mine.verdict,
            is_control=mine.is_control,
            challenger=challengers,
            champion=champions,
            labels=labels,
            classes=mine.classes,
        )

    def _score(self, mine: Scored, theirs: Scored, folder: Path) -> Outcomes:
        """The champion's outcomes on the challenger's validation images, prepared as the champion takes them."""
        val = identity.val_index(mine.recipe, self.display)
        if val.digest != mine.val_digest:
            raise DataError(
                f"`data.val` must hold the images that the challenger was scored on (digest {mine.val_digest[:12]}),"
                f" but {mine.recipe.data.val} does not ({val.digest[:12]}). Set it to where they are."
            )
        data = {"data.val": mine.recipe.data.val, "data.val_labels": mine.recipe.data.val_labels}
        recipe = config.replace(theirs.recipe, **data)
        model = standalone.loaded(folder / logged_model.WEIGHTS, recipe)
        return standalone.outcomes_of(model, val, recipe, self.display)

    def _carry_out(self, ruling: Ruling, found: champion.Aliases, held: Holder) -> bool:
        """Write the ruling down and do it; False where it is of a champion that is none any more."""
        now = held.settle()
        last = now.last_change
        if now.champion == ruling.version and last is not None and (last.who, last.why) == (self.who, ruling.why):
            return True  # another finished it for this process
        if now.champion != found.champion:
            return False
        if ruling.status == "promoted":
            held.change("promoted", ruling.version, now.champion or now.previous, self.who, ruling.why)
        elif ruling.status in ("rejected", "held"):
            held.record(ruling.status, ruling.version, self.who, ruling.why)
        tags = {"gate": ruling.status, "gate_why": ruling.why, "gate_champion": ruling.over or "none"}
        held.tag(ruling.version, tags)
        return True

    def _report(self, ruling: Ruling) -> None:
        """The ruling as files of the version's run. Who may promote need not be one who may write there."""
        name = f"promotion/version-{ruling.version}"
        run_id = versions.version_of(self.uri, f"models:/{self.name}/{ruling.version}", "the version").run_id
        try:
            with tracking.answering(self.uri):
                self._client.log_text(run_id, json.dumps(ruling.facts(), indent=1), f"{name}.json")
                self._client.log_text(run_id, markdown(ruling), f"{name}.md")
                self._client.set_tag(run_id, "swa.promotion", f"{ruling.status}: {ruling.why}")
        except ServiceError as error:
            self.display.say(f"warning: the comparison is not among the files of the version's run: {error}")


def gatekeeper(uri: str, name: str, display: Display) -> Gatekeeper:
    """For the person at this machine. Raises ConfigError where there is no such model, and ServiceError."""
    versions.check_database(uri)
    tracking.configure_client()
    with tracking.answering(uri):
        try:
            versions.client_of(uri).get_registered_model(name)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise ConfigError(f"`NAME` must be a registered model at {uri}, but {name} is none.") from None
    return Gatekeeper(uri, name, display, champion.this_person())


def which_version(uri: str, name: str, version: str, what: str = "--version") -> str:
    """The number, as MLflow has it, of the version that a person named. Raises ConfigError where there is none."""
    return str(versions.version_of(uri, f"models:/{name}/{version}", f"`{what}`").version)


def text(ruling: Ruling) -> str:
    """A ruling as a person reads it on a terminal."""
    lines = [f"{ruling.name} version {ruling.version} {_SAID[ruling.status]}: {ruling.why}"]
    if ruling.decision is not None:
        lines += [f"  {'ok' if rule.holds else 'NO':<4}{rule.name}: {rule.finding}" for rule in ruling.decision.rules]
    return "\n".join(lines)


def markdown(ruling: Ruling) -> str:
    """A ruling as a page to read."""
    lines = [f"# {ruling.name} version {ruling.version}: {ruling.status}", "", f"{ruling.why}.", ""]
    decision = ruling.decision
    if decision is None:
        return "\n".join(lines)
    lines += [f"Compared with @champion, version {ruling.over}, on the same images.", ""]
    lines += ["| rule | holds | finding |", "| --- | --- | --- |"]
    lines += [f"| {rule.name} | {'yes' if rule.holds else '**no**'} | {rule.finding} |" for rule in decision.rules]
    if decision.most_lost:
        lines += ["", "Classes that lost most (p: one-sided sign test, Holm's correction for all classes):", ""]
        lines += ["| class | images | change, points | p |", "| --- | ---: | ---: | ---: |"]
        lines += [f"| {c.name} | {c.images} | {c.change:+.1f} | {c.p_value:.2g} |" for c in decision.most_lost]
    return "\n".join([*lines, ""])


def _overridden(recipe: Recipe, overrides: tuple[str, ...]) -> Recipe:
    for override in overrides:
        if not override.startswith(_OVERRIDABLE):
            raise ConfigError(
                f"`--set` must be of the gate or of where the images are, but is {override}. It may begin with"
                f" {', '.join(_OVERRIDABLE)}; the rest of a version's recipe is as it was trained."
            )
    return identity.absolute_addresses(config.parse(config.to_yaml(recipe), "the version's recipe", overrides))


def _on_the_same(mine: Scored, champions: Outcomes) -> tuple[Outcomes, Outcomes, Ints]:
    """Both outcomes, and the labels, on the images that both could decode."""
    ids = np.intersect1d(mine.outcomes.ids, champions.ids)
    here = np.isin(mine.outcomes.ids, ids)
    return _picked(mine.outcomes, here), _picked(champions, np.isin(champions.ids, ids)), mine.labels[here]


def _picked(outcomes: Outcomes, which: Any) -> Outcomes:
    return Outcomes(**{field.name: getattr(outcomes, field.name)[which] for field in dataclasses.fields(outcomes)})


def _before(found: champion.Aliases, version: str) -> str | None:
    """What @previous was when the version became @champion, so that a second rollback goes further back."""
    for entry in reversed(found.journal):
        if entry.is_change and entry.version == version and entry.state == "done":
            return entry.previous
    return None
