"""One key, one run: a submission attaches to what runs, shows what is finished, and starts what failed once more.

The same decision for each place that runs are submitted to; ray_jobs.py and kube.py are the places. Starts without
torch: a submitter may be a small machine.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.errors import ExitCode, OutputError, ServiceError
from swa_dist.service import identity
from swa_dist.service.layout import ATTEMPT, SUMMARY, run_dir
from swa_dist.service.progress import Display
from swa_dist.storage.folder import open_folder

ENTRYPOINT = "python -m swa_dist finetune env:SWA_DIST_RECIPE"
"""What runs in the cluster. The recipe travels whole, in a variable: no shell reads it, and no file need be there."""
RECIPE_VARIABLE = "SWA_DIST_RECIPE"


@dataclass(frozen=True)
class Attempt:
    """A submission of a run that a place knows of."""

    name: str
    """swa-KEY-aN: the submission id of a Ray job, the name of a RayJob. Used once, for good."""
    number: int
    state: Literal["running", "succeeded", "failed"]
    """running: or waiting to. failed: or stopped on request; the next attempt goes on from its last checkpoint."""
    reason: str = ""
    """Why it failed, in the place's words."""


class Place(Protocol):
    """Where runs are submitted to. Every method raises ServiceError where the place doesn't answer or refuses."""

    def attempts(self, run_key: str) -> list[Attempt]:
        """The submissions of a key that are still known, by number, the first one first."""

    def start(self, name: str, run_key: str, recipe: Recipe) -> bool:
        """Submit; False where one of this name is there already, of another submitter: names are given out once."""

    def follow(self, name: str, display: Display) -> int:
        """Show what the submission does until it ends; its exit code."""

    def come_back(self, name: str) -> list[str]:
        """Command lines that follow, ask for and stop the submission from anywhere."""


def submit(recipe: Recipe, place: Place, display: Display, *, wait: bool) -> int:
    """Have the recipe run at a place, once. Returns the exit code: of the run if `wait`, else of the submission."""
    there = pinned(identity.absolute_addresses(recipe))
    who = identity.identify(there)
    key = who.run_key
    known, stored_attempt = _stored(run_dir(there.output.dir, key))
    if known is not None and known["registered"] is not None:
        display.say(f"finished already: {recipe.name} with key {key[:12]}. {_found(known)}")
        return ExitCode.OK
    attempts = place.attempts(key)
    last = attempts[-1] if attempts else None
    if last is not None and last.state == "succeeded" and stored_attempt is None:
        display.say(f"finished already: {last.name}. Its results are in {run_dir(there.output.dir, key)}")
        return ExitCode.OK
    if last is not None and last.state == "running":
        display.say(f"{last.name} runs already; attached to it")
        name = last.name
    else:
        if last is not None and last.state == "failed":
            reason = f" ({last.reason})" if last.reason else ""
            if known is None:
                display.say(f"{last.name} did not finish{reason}; its state is resumed")
            else:
                display.say(f"{last.name} finished, but its model waits to be registered{reason}")
        name = config.attempt_name(key, max(last.number if last else 0, stored_attempt or 0) + 1)
        if place.start(name, key, as_sent(there, who.weights_sha256)):
            display.say(f"submitted {recipe.name} as {name}")
        else:
            display.say(f"{name} was submitted by another a moment ago; attached to it")
    if not wait:
        _say_how_to_come_back(place, name, display)
        return ExitCode.OK
    try:
        return place.follow(name, display)
    except KeyboardInterrupt:
        display.say(f"detached; {name} goes on")
        _say_how_to_come_back(place, name, display)
        return ExitCode.OK


def as_sent(recipe: Recipe, weights_sha256: str) -> Recipe:
    """The recipe as the cluster gets it: to run on that cluster, from exactly these weights."""
    fields = {"cluster.address": "auto", "cluster.launcher": "ray", "model.weights_sha256": weights_sha256}
    return config.replace(recipe, **fields)


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with models:/NAME@champion as the version that it is now: it may be another in a moment."""
    if not identity.is_registered(recipe.model.weights):
        return recipe
    from swa_dist.service import versions

    return config.replace(recipe, **{"model.weights": versions.pinned(recipe.tracking.uri, recipe.model.weights)})


def _stored(url: str) -> tuple[dict[str, Any] | None, int | None]:
    """What the run's folder holds, where it can be seen from here: its summary, and its number of attempts."""
    try:
        folder = open_folder(url)
        attempt = folder.read_json(ATTEMPT)
        return folder.read_json(SUMMARY), None if attempt is None else int(attempt["attempt"])
    except (OutputError, ServiceError, OSError):  # the submitter need not see what the cluster does
        return None, None


def _found(summary: dict[str, Any]) -> str:
    return f"{summary['verdict']['sentence']} Its results are in {summary['run_dir']}"


def _say_how_to_come_back(place: Place, name: str, display: Display) -> None:
    for line in place.come_back(name):
        display.say(f"  {line}")
