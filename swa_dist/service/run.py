"""A run up to its scored candidates: the checks before it, and what each worker does.

The same on every path: `prepare` checks everything that can be checked without workers and makes a `Job`, a plain
value; `work` is what each worker does with it. What they found is weighed in result.py.
"""

import contextlib
import functools
import json
import os
import shutil
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
from swa_dist.data.order import check_groups
from swa_dist.errors import ConfigError, DataError, OutputError, ServiceError, Stopped, SwaDistError
from swa_dist.service import registry, tracking
from swa_dist.service.progress import Display
from swa_dist.service.tracking import Spool, SpoolTracker, Target
from swa_dist.service.weights import LocalWeights, fetch, published_top1
from swa_dist.storage import Store, check_writable, only_one, read_json, sha256_file, write_atomic, writing
from swa_dist.training.finetune import finetune
from swa_dist.training.recalibrate import most_images
from swa_dist.training.world import World, pin_arithmetic

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


def prepare(
    recipe: Recipe, display: Display, held: contextlib.ExitStack, *, num_workers: int, again: bool = False
) -> Job | Finished:
    """Check everything that needs no workers and take the next attempt; or find the finished run of this key.

    `held` keeps other processes from this key until it is closed. `again`: set a finished or broken state aside and
    begin anew. Writes the run's folder. Raises the error that is the person's to mend, before anything is written.
    """
    resolved = _resolve(recipe)
    if num_workers > resolved.groups_per_batch:
        raise ConfigError(
            f"there must be at most as many workers as groups in a global batch ({resolved.groups_per_batch}), but are"
            f" {num_workers}. Start fewer, or set `data.group_images` smaller: another result and another key."
        )
    _check_writable(Path(resolved.output.dir))
    train, val = _scan(resolved, display)
    weights = fetch(resolved.model)
    local = config.replace(resolved, **{"model.weights": str(weights.path)})
    network = models.build(local.model, local.seed)
    models.load(network, local.model)
    data_digest = index.data_digest(train, val)
    key = config.run_key(resolved, weights.sha256, data_digest)
    if resolved.checkpoint.extend_from != "nothing":
        _check_extension(resolved, weights.sha256, data_digest)
    folder = Path(resolved.output.dir) / f"swa-{key[:12]}"
    held.enter_context(only_one(folder.with_name(f".{folder.name}.lock"), f"the run with key {key[:12]}"))
    state = read_json(folder / _ATTEMPT) or {"attempt": 0, "first_attempt": 1}
    if again and folder.exists():
        state = {"attempt": state["attempt"], "first_attempt": state["attempt"] + 1}
        with writing(folder):
            folder.rename(_free(folder.with_name(f"{folder.name}.attempt-{state['attempt']}")))
    summary = read_json(folder / SUMMARY)
    if summary is not None:
        return Finished(summary, already=True)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        start = _kept_weights(folder, weights)
    job = Job(
        recipe=config.to_tree(config.replace(local, **{"model.weights": str(start)})),
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
        (folder / STOP_REQUEST).unlink(missing_ok=True)
        index.save(train, folder / "train.parquet")
        index.save(val, folder / "val.parquet")
    write_atomic(folder / "recipe.yaml", config.to_yaml(resolved))
    write_atomic(folder / _ATTEMPT, json.dumps({"attempt": job.attempt, "first_attempt": job.first_attempt}))
    _open_spool(job, resolved, train, val, num_workers, display)
    return job


def work(job: Job, world: World, display: Display, should_stop: Callable[[], bool]) -> None:
    """Collective: one worker's part of the run. What it finds is committed in the run's folder."""
    recipe = config.from_tree(job.recipe)
    pin_arithmetic(world.device)
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


def note_failure(job: Job, error: BaseException) -> None:
    """Tell MLflow, if it answers, that this attempt ended without a result. Never gets in the way of `error`."""
    status = "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED"
    spool = Spool(job.folder)
    with contextlib.suppress(SwaDistError, OSError):
        spool.append({"kind": "status", "status": status, "time_ms": time.time_ns() // 1_000_000})
        tracking.send(spool, {"model": registry.register})


def _resolve(recipe: Recipe) -> Recipe:
    """Absolute paths, since workers run elsewhere, and the addresses that `auto` stands for."""
    uri = recipe.tracking.uri
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    fields: dict[str, Any] = {
        "tracking.uri": uri,
        "data.train": str(Path(recipe.data.train).expanduser().resolve()),
        "data.val": str(Path(recipe.data.val).expanduser().resolve()),
        "output.dir": str(Path(recipe.output.dir).expanduser().resolve()),
    }
    if recipe.checkpoint.extend_from != "nothing":
        fields["checkpoint.extend_from"] = str(Path(recipe.checkpoint.extend_from).expanduser().resolve())
    published = published_top1(recipe)
    if published is not None:
        fields["evaluate.published_top1"] = published
    return config.replace(recipe, **fields)


def _check_writable(folder: Path) -> None:
    try:
        check_writable(folder)
    except OutputError as error:
        raise OutputError(f"`output.dir` must be a folder that can be written: {error}") from None


def _scan(recipe: Recipe, display: Display) -> tuple[Index, Index]:
    found = []
    for split, root in (("train", recipe.data.train), ("val", recipe.data.val)):
        found.append(index.scan(Path(root), split, functools.partial(display.progress, f"index {split}")))
    train, val = found
    if recipe.data.kind == "imagenet":
        _check_imagenet(train, val)
    index.check_pair(train, val, recipe.model.num_classes)
    _check_cycles(recipe, train)
    check_groups(len(train) % recipe.data.global_batch, recipe.data.group_images)
    check_groups(most_images(recipe.recalibrate, len(train)), recipe.data.group_images)
    return train, val


def _check_imagenet(train: Index, val: Index) -> None:
    for split, found, images in (("train", train, 1_281_167), ("val", val, 50_000)):
        if (len(found), len(found.classes)) != (images, 1000):
            raise DataError(
                f"`data.{split}` must be ILSVRC 2012's {images:,} images of 1,000 classes, as `data.kind` says, but"
                f" has {len(found):,} of {len(found.classes):,}. Complete it, or set `data.kind=other`."
            )


def _check_cycles(recipe: Recipe, train: Index) -> None:
    images = min(recipe.averaging_epochs, recipe.cycle_epochs) * len(train)
    if images < recipe.data.global_batch:
        raise ConfigError(
            "a cycle, and the distance between averaging points, must be at least a global batch"
            f" ({recipe.data.global_batch} images), but is {float(images):.0f} of {len(train):,} training images."
            " Lengthen `schedule.cycle_epochs`, or lower `average.points`."
        )


def _check_extension(recipe: Recipe, weights_sha256: str, data_digest: str) -> None:
    """Raise ConfigError unless `extend_from` is a finished run of this recipe with fewer epochs."""
    folder = Path(recipe.checkpoint.extend_from)
    summary = read_json(folder / SUMMARY)
    if summary is None:
        raise ConfigError(
            f"`checkpoint.extend_from` must be the folder of a finished run, but {folder} has no summary."
        )
    theirs = config.load(folder / "recipe.yaml")
    after = tuple(n for n in recipe.average.also_after_epochs if n < theirs.optim.epochs)
    shorter = {"optim.epochs": theirs.optim.epochs, "average.also_after_epochs": after}
    if theirs.optim.epochs < recipe.optim.epochs:
        wanted = config.replace(recipe, **shorter)
        if config.run_key(wanted, weights_sha256, data_digest) == summary["run_key"]:
            return
    mine, other = (config.flatten(config.to_tree(r)) for r in (recipe, theirs))
    differing = [name for name in mine if config.in_key(name) and name not in shorter and mine[name] != other.get(name)]
    what = f"`{differing[0]}` differs" if differing else "its length, weights or data are others"
    raise ConfigError(
        f"`checkpoint.extend_from` must be a shorter run of the same recipe, weights and data, but for {folder} {what}."
    )


def _kept_weights(folder: Path, weights: LocalWeights) -> Path:
    """The starting weights in the run's folder, which all workers see; where they came from may be on this machine."""
    kept = folder / f"start{weights.path.suffix}"
    if not kept.is_file() or sha256_file(kept) != weights.sha256:
        staged = kept.with_name(f".staging-{kept.name}")
        shutil.copyfile(weights.path, staged)
        staged.replace(kept)
    return kept


def _open_spool(job: Job, recipe: Recipe, train: Index, val: Index, num_workers: int, display: Display) -> None:
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
        "swa.num_workers": num_workers,
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
        {"kind": "artifact", "name": "recipe.yaml"},
    )
    tracking.configure_client()
    try:
        tracking.send(spool, {"model": registry.register})
    except ServiceError as error:
        display.say(f"warning: {error} The run goes on; what it has to say waits in {spool.events}.")


def _decoding_threads(recipe: Recipe) -> int:
    threads = recipe.data.num_threads
    if threads != "auto":
        return threads
    if recipe.cluster.launcher == "ray" and "TORCHELASTIC_RUN_ID" not in os.environ:
        return max(1, int(recipe.cluster.cpus_per_worker))
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _free(path: Path) -> Path:
    """`path`, or with a number where that is taken."""
    number = 0
    while path.exists():
        number += 1
        path = path.with_name(f"{path.name}-{number}")
    return path


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
