"""A run up to its scored candidates: the checks before it, and what each worker does.

The same on every path: `prepare` checks everything that can be checked without workers and makes a `Job`, a plain
value; `work` is what each worker does with it. What they found is weighed in result.py.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data import index
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.index import Index
from swa_dist.errors import ConfigError, ServiceError
from swa_dist.service import registry, tracking
from swa_dist.service.progress import Display
from swa_dist.service.tracking import Spool, SpoolTracker, Target
from swa_dist.service.weights import fetch
from swa_dist.storage import Store, read_json, write_atomic, writing
from swa_dist.training.finetune import finetune
from swa_dist.training.world import World

SUMMARY = "summary.json"
STOP_REQUEST = "stop"

_ATTEMPT = "attempt.json"


@dataclass(frozen=True)
class Job:
    """A run that was checked: what each worker is told. Plain values only."""

    recipe: dict[str, Any]
    """Resolved: absolute paths, the weights a local file."""
    fingerprint: str
    run_key: str
    run_dir: str
    attempt: int
    first_attempt: int
    """The attempt that began the state in `run_dir`."""
    weights: str
    """Where the starting weights came from, as the recipe has it."""
    weights_sha256: str
    data_digest: str

    @property
    def name(self) -> str:
        """Of this attempt's Ray run; single-use."""
        return f"swa-{self.run_key[:12]}-a{self.attempt}"

    @property
    def folder(self) -> Path:
        return Path(self.run_dir)


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    summary: dict[str, Any]
    already: bool
    """Whether it had before this command."""


def prepare(recipe: Recipe, display: Display, *, again: bool = False) -> Job | Finished:
    """Check everything that needs no workers and take the next attempt; or find the finished run of this key.

    `again`: set a finished or broken state aside and begin anew. Writes the run's folder. Raises the error that is the
    person's to mend, before anything is written.
    """
    resolved = _resolve(recipe)
    _check_writable(Path(resolved.output.dir))
    train, val = _scan(resolved, display)
    weights = fetch(resolved.model)
    local = config.replace(resolved, **{"model.weights": str(weights.path)})
    network = models.build(local.model, local.seed)
    models.load(network, local.model)
    data_digest = index.data_digest(train, val)
    key = config.run_key(resolved, weights.sha256, data_digest)
    folder = Path(resolved.output.dir) / f"swa-{key[:12]}"
    state = read_json(folder / _ATTEMPT) or {"attempt": 0, "first_attempt": 1}
    if again and folder.exists():
        state = {"attempt": state["attempt"], "first_attempt": state["attempt"] + 1}
        with writing(folder):
            folder.rename(_free(folder.with_name(f"{folder.name}.attempt-{state['attempt']}")))
    summary = read_json(folder / SUMMARY)
    if summary is not None:
        return Finished(summary, already=True)
    job = Job(
        recipe=config.to_tree(local),
        fingerprint=config.fingerprint(resolved),
        run_key=key,
        run_dir=str(folder),
        attempt=state["attempt"] + 1,
        first_attempt=state["first_attempt"],
        weights=recipe.model.weights,
        weights_sha256=weights.sha256,
        data_digest=data_digest,
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / STOP_REQUEST).unlink(missing_ok=True)
        index.save(train, folder / "train.parquet")
        index.save(val, folder / "val.parquet")
    write_atomic(folder / "recipe.yaml", config.to_yaml(resolved))
    write_atomic(folder / _ATTEMPT, json.dumps({"attempt": job.attempt, "first_attempt": job.first_attempt}))
    _open_spool(job, resolved, train, val, display)
    return job


def work(job: Job, world: World, display: Display, should_stop: Callable[[], bool]) -> None:
    """Collective: one worker's part of the run. What it finds is committed in the run's folder."""
    recipe = config.from_tree(job.recipe)
    loaders = DaliLoaders(
        train_index=index.load(job.folder / "train.parquet", Path(recipe.data.train)),
        val_index=index.load(job.folder / "val.parquet", Path(recipe.data.val)),
        data=recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        num_threads=_decoding_threads(recipe),
    )
    tracking.configure_client()
    tracker = SpoolTracker(Spool(job.folder), display) if world.rank == 0 else _Nobody()
    try:
        finetune(
            recipe,
            world,
            loaders,
            Store(job.folder),
            tracker,
            lambda: should_stop() or (job.folder / STOP_REQUEST).exists(),
        )
    finally:
        tracker.close()


def note_failure(job: Job) -> None:
    """Say in the spool that this attempt ended without a result."""
    Spool(job.folder).append({"kind": "status", "status": "FAILED", "time_ms": _now_ms()})


def _resolve(recipe: Recipe) -> Recipe:
    """Absolute paths, since workers run elsewhere, and the addresses that `auto` stands for."""
    uri = recipe.tracking.uri
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    fields = {
        "tracking.uri": uri,
        "data.train": str(Path(recipe.data.train).expanduser().resolve()),
        "data.val": str(Path(recipe.data.val).expanduser().resolve()),
        "output.dir": str(Path(recipe.output.dir).expanduser().resolve()),
    }
    return config.replace(recipe, **fields)


def _check_writable(folder: Path) -> None:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()


def _scan(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    found = []
    for split, root in (("train", recipe.data.train), ("val", recipe.data.val)):
        found.append(index.scan(Path(root), split, functools.partial(display.progress, f"index {split}")))
    train, val = found
    index.check_pair(train, val, recipe.model.num_classes)
    size = recipe.data.group_images
    for what, count in (
        ("of an epoch", len(train) % recipe.data.global_batch),
        ("of the recalibration", _recalibration_images(recipe, train)),
    ):
        if count % size == 1:
            raise ConfigError(
                f"`data.group_images` must not leave a group of one image at the end {what}, where BatchNorm has no"
                f" variance, but does: {size} with {len(train):,} training images. Try {size - 1}."
            )
    return train, val


def _recalibration_images(recipe: Recipe, train: Index) -> int:
    wanted = recipe.recalibrate.images
    return len(train) if wanted == "all" else min(wanted, len(train))


def _open_spool(job: Job, recipe: Recipe, train: Index, val: Index, display: Display) -> None:
    """Begin the run's record, and its MLflow run if MLflow answers."""
    spool = Spool(job.folder)
    spool.open(
        Target(
            uri=recipe.tracking.uri,
            experiment=recipe.tracking.experiment,
            run_name=f"{recipe.name}-{job.run_key[:12]}",
            run_key=job.run_key,
            first_attempt=job.first_attempt,
        )
    )
    # Params are write-once in MLflow: only what the key or the attempt's beginning fixes; the rest are tags.
    in_key = {n: v for n, v in config.flatten(config.to_tree(recipe)).items() if config.in_key(n)}
    tags = {
        "swa.attempt": job.attempt,
        "swa.fingerprint": job.fingerprint,
        "swa.recipe": recipe.name,
        "swa.num_workers": recipe.cluster.num_workers,
        "swa.weights": job.weights,
        "swa.weights_sha256": job.weights_sha256,
        "swa.data_digest": job.data_digest,
        "swa.version": version("swa_dist"),
    }
    datasets = {
        split: {"source": found.root.as_uri(), "name": f"{recipe.data.name}-{split}", "digest": found.digest}
        for split, found in (("train", train), ("val", val))
    }
    spool.append(
        {"kind": "start", "params": in_key, "datasets": datasets},
        {"kind": "tags", "tags": tags},
        {"kind": "status", "status": "RUNNING"},
        {"kind": "artifact", "path": str(job.folder / "recipe.yaml")},
    )
    tracking.configure_client()
    try:
        tracking.send(spool, {"model": registry.register})
    except ServiceError as error:
        display.say(f"warning: {error} The run goes on; what it has to say waits in {spool.events}.")


def _decoding_threads(recipe: Recipe) -> int:
    threads = recipe.data.num_threads
    if threads == "auto":
        return max(1, int(recipe.cluster.cpus_per_worker))
    return threads


def _free(path: Path) -> Path:
    """`path`, or with a number where that is taken."""
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name}-{number}")
    return path


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Nobody:
    """The tracker of the workers that don't report."""

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        pass

    def publish(self, rows: object) -> None:
        pass

    def warn(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass
