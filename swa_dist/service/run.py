"""A run up to its scored candidates: the checks before it, and what each worker does.

The same on every path: `prepare` checks everything that can be checked without workers and makes a `Job`, a plain
value; `work` is what each worker does with it. What they found is weighed in result.py.
"""

import contextlib
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
from swa_dist.service import identity, registry, tracking
from swa_dist.service.layout import ATTEMPT, RECIPE, STOP_REQUEST, SUMMARY, lease_url, run_dir
from swa_dist.service.progress import Display
from swa_dist.service.tracking import SpoolTracker, Target
from swa_dist.service.weights import LocalWeights, fetch, published_top1
from swa_dist.storage import lease
from swa_dist.storage.files import sha256_file, writing
from swa_dist.storage.folder import Folder, check_writable, exists, join, open_folder, set_aside
from swa_dist.training.finetune import finetune
from swa_dist.training.recalibrate import most_images
from swa_dist.training.world import World, pin_arithmetic

_LOOK_EVERY_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """A run that was checked: what each worker is told. Plain values only."""

    recipe: dict[str, Any]
    """Resolved: absolute paths and addresses."""
    fingerprint: str
    run_key: str
    run_dir: str
    """The run's folder, on disk or on S3."""
    attempt: int
    first_attempt: int
    """The attempt that began the state in `run_dir`."""
    generation: int
    """Of the lease under which this attempt writes."""
    weights: str
    """Where the starting weights came from, as the recipe has it."""
    weights_sha256: str
    start: str
    """The starting weights' file in `run_dir`."""
    data_digest: str
    submission: str
    """The Ray job that this attempt is, or ""."""

    @property
    def name(self) -> str:
        """Of this attempt's Ray run; single-use."""
        return config.attempt_name(self.run_key, self.attempt)

    def open(self) -> Folder:
        """The run's folder. A commit there is refused once another process has taken the run over."""
        return open_folder(self.run_dir, self.check_lease)

    def check_lease(self) -> None:
        """Raises BusyError once another process has taken the run over."""
        lease.guard(lease.register(lease_url(self.run_dir)), _what(self.run_key), self.generation)()


@dataclass(frozen=True)
class Finished:
    """A run that came to its end."""

    summary: dict[str, Any]
    already: bool
    """Whether it had before this command."""


def prepare(
    recipe: Recipe,
    display: Display,
    held: contextlib.ExitStack,
    *,
    num_workers: int,
    again: bool = False,
    submission: str = "",
) -> Job | Finished:
    """Check everything that needs no workers and take the next attempt; or find the finished run of this key.

    `held` keeps other processes from this key until it is closed. `again`: set a finished or broken state aside and
    begin anew. `submission`: the name under which this was submitted, if it was. Writes the run's folder. Raises the
    error that is the person's to mend, before anything is written.
    """
    resolved = resolve(recipe)
    if num_workers > resolved.groups_per_batch:
        raise ConfigError(
            f"there must be at most as many workers as groups in a global batch ({resolved.groups_per_batch}), but are"
            f" {num_workers}. Start fewer, or set `data.group_images` smaller: another result and another key."
        )
    _check_writable(resolved.output.dir)
    train, val = identity.indices(resolved, display)
    _check_images(resolved, train, val)
    weights = fetch(resolved.model, resolved.tracking.uri)
    network = models.build(resolved.model, resolved.seed)
    models.load(network, config.replace(resolved, **{"model.weights": str(weights.path)}).model)
    data_digest = index.data_digest(train, val)
    key = config.run_key(resolved, weights.sha256, data_digest)
    least_attempt = _check_submission(submission, key)
    if resolved.checkpoint.extend_from != "nothing":
        _check_extension(resolved, weights.sha256, data_digest)
    url = run_dir(resolved.output.dir, key)
    kept = held.enter_context(lease.hold(lease.register(lease_url(url)), _what(key), display.say))
    folder = open_folder(url)
    state = folder.read_json(ATTEMPT) or {"attempt": 0, "first_attempt": 1}
    if again and exists(url):
        state = {"attempt": state["attempt"], "first_attempt": state["attempt"] + 1}
        set_aside(url, f".attempt-{state['attempt']}")
    summary = folder.read_json(SUMMARY)
    if summary is not None:
        return Finished(summary, already=True)
    start = f"start{weights.path.suffix}"
    job = Job(
        recipe=config.to_tree(resolved),
        fingerprint=config.fingerprint(resolved),
        run_key=key,
        run_dir=url,
        attempt=max(state["attempt"] + 1, least_attempt),
        first_attempt=max(state["first_attempt"], least_attempt if not state["attempt"] else 0),
        generation=kept.generation,
        weights=recipe.model.weights,
        weights_sha256=weights.sha256,
        start=start,
        data_digest=data_digest,
        submission=submission,
    )
    with writing(folder.local):
        folder.local.mkdir(parents=True, exist_ok=True)
        _keep_weights(folder, weights, start)
    folder.remove(STOP_REQUEST)
    for split, found in (("train", train), ("val", val)):
        index.save(found, join(url, f"{split}.parquet"))
    folder.write(RECIPE, config.to_yaml(resolved))
    folder.write(ATTEMPT, json.dumps({"attempt": job.attempt, "first_attempt": job.first_attempt}))
    _open_spool(job, folder, resolved, train, val, num_workers, display)
    return job


def work(job: Job, world: World, display: Display, should_stop: Callable[[], bool]) -> None:
    """Collective: one worker's part of the run. What it finds is committed in the run's folder."""
    folder = job.open()
    recipe = config.replace(config.from_tree(job.recipe), **{"model.weights": str(folder.local / job.start)})
    pin_arithmetic(world.device)
    if world.rank == 0:  # who alone reads them
        folder.pull(job.start)
    loaders = DaliLoaders(
        train_index=index.load(join(job.run_dir, "train.parquet"), Path(recipe.data.train)),
        val_index=index.load(join(job.run_dir, "val.parquet"), Path(recipe.data.val)),
        data=recipe.data,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
        num_threads=_decoding_threads(recipe),
    )
    tracking.configure_client()
    tracker = SpoolTracker(registry.spool_of(folder), display) if world.rank == 0 else _Nobody()
    requested = _Requested(folder) if world.rank == 0 else _never
    try:
        finetune(recipe, world, loaders, folder.store, tracker, lambda: should_stop() or requested())
    finally:
        tracker.close()


def note_failure(job: Job, error: BaseException) -> None:
    """Tell MLflow, if it answers, that this attempt ended without a result. Never gets in the way of `error`."""
    status = "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED"
    with contextlib.suppress(SwaDistError, OSError):
        job.check_lease()  # the record of a run that another has taken over is the other's
        folder = job.open()
        registry.spool_of(folder).append({"kind": "status", "status": status, "time_ms": time.time_ns() // 1_000_000})
        registry.send(folder)


def resolve(recipe: Recipe) -> Recipe:
    """Absolute paths, since workers run elsewhere, and the addresses that `auto` stands for."""
    resolved = identity.absolute_addresses(recipe)
    fields: dict[str, Any] = {}
    if resolved.tracking.uri == "auto":
        fields["tracking.uri"] = f"sqlite:///{Path('mlflow.db').resolve()}"
    published = published_top1(recipe)
    if published is not None:
        fields["evaluate.published_top1"] = published
    return config.replace(resolved, **fields)


def _what(run_key: str) -> str:
    return f"the run with key {run_key[:12]}"


def _check_writable(url: str) -> None:
    try:
        check_writable(url)
    except OutputError as error:
        raise OutputError(f"`output.dir` must be a folder that can be written: {error}") from None


def _check_submission(submission: str, key: str) -> int:
    """The least number that this attempt may have: that of the submission it is. Raises ConfigError where the run is
    another than the one that was submitted."""
    parsed = config.parse_attempt_name(submission)
    if parsed is None:
        return 1
    if parsed[0] != key[:12]:
        raise ConfigError(
            f"the submitted run must be the one with key {parsed[0]}, but is {key[:12]} here: its images' index or its"
            " weights have changed since it was submitted, or the submitter has another version of swa_dist. Submit it"
            " again, with the version that the cluster has."
        )
    return parsed[1]


def _check_images(recipe: Recipe, train: Index, val: Index) -> None:
    if recipe.data.kind == "imagenet":
        _check_imagenet(train, val)
    _check_cycles(recipe, train)
    check_groups(len(train) % recipe.data.global_batch, recipe.data.group_images)
    check_groups(most_images(recipe.recalibrate, len(train)), recipe.data.group_images)


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
    folder = open_folder(recipe.checkpoint.extend_from)
    summary = folder.read_json(SUMMARY)
    if summary is None:
        raise ConfigError(
            f"`checkpoint.extend_from` must be the folder of a finished run, but {folder.url} has no summary."
        )
    folder.pull(RECIPE)
    theirs = config.load(folder.local / RECIPE)
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
        f"`checkpoint.extend_from` must be a shorter run of the same recipe, weights and data, but for {folder.url}"
        f" {what}."
    )


def _keep_weights(folder: Folder, weights: LocalWeights, name: str) -> None:
    """The starting weights in the run's folder, which all workers see; where they came from may be on this machine."""
    folder.pull(name)
    kept = folder.local / name
    if not kept.is_file() or sha256_file(kept) != weights.sha256:
        staged = kept.with_name(f".staging-{kept.name}")
        shutil.copyfile(weights.path, staged)
        staged.replace(kept)
        folder.push(name)


def _open_spool(
    job: Job, folder: Folder, recipe: Recipe, train: Index, val: Index, num_workers: int, display: Display
) -> None:
    """Begin the run's record, and its MLflow run if MLflow answers."""
    spool = registry.spool_of(folder)
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
        "swa.submission": job.submission,
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
        {"kind": "artifact", "name": RECIPE},
    )
    tracking.configure_client()
    try:
        registry.send(folder)
    except ServiceError as error:
        display.say(f"warning: {error} The run goes on; what it has to say waits in {job.run_dir}.")


def _decoding_threads(recipe: Recipe) -> int:
    threads = recipe.data.num_threads
    if threads != "auto":
        return threads
    if recipe.cluster.launcher == "ray" and "TORCHELASTIC_RUN_ID" not in os.environ:
        return max(1, int(recipe.cluster.cpus_per_worker))
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


class _Requested:
    """Whether a stop request lies in the run's folder; looks every so many seconds, since a look may cost a request."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._next = 0.0
        self._found = False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._found and now >= self._next:
            self._next = now + _LOOK_EVERY_SECONDS
            with contextlib.suppress(SwaDistError, OSError):  # storage that is away for a moment is no reason to stop
                self._found = self._folder.has(STOP_REQUEST)
        return self._found


def _never() -> bool:
    return False


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
