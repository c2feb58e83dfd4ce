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
from typing import Any

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.data import index
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.index import Index
from swa_dist.data.sizes import cores_here
from swa_dist.data.sizes import sizes as loader_sizes
from swa_dist.errors import BusyError, ConfigError, Stopped, SwaDistError
from swa_dist.service import (
    checks,
    environment,
    identity,
    post_mortem,
    registry,
    stopping,
    system_metrics,
    tracking,
)
from swa_dist.service.layout import ATTEMPT, RECIPE, STOP_REQUEST, SUMMARY, lease_url, run_dir
from swa_dist.service.progress import Display
from swa_dist.service.spool import Target
from swa_dist.service.tracking import SpoolTracker
from swa_dist.service.weights import LocalWeights, fetch, published_top1
from swa_dist.service.worker_log import WorkerLog
from swa_dist.storage import lease
from swa_dist.storage.files import sha256_file, writing
from swa_dist.storage.folder import Folder, as_uri, exists, join, open_folder, set_aside
from swa_dist.training import failures
from swa_dist.training.finetune import finetune
from swa_dist.training.world import World, on_rank_zero, pin_arithmetic

# How long MLflow is waited for: by a run that has finished, and by one that has a grace period to end in.
_FINISHED_SECONDS = 60.0
_STOPPED_SECONDS = 3.0
_HANGING = 0.8
"""The share of the time after which a worker gives up, at which the stacks of one that waits are written down."""


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
    unregistered: SwaDistError | None = None
    """What keeps its model, which waits in the spool, from being registered."""


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
    began = time.monotonic()
    resolved = resolve(recipe)
    if num_workers > resolved.groups_per_batch:
        raise ConfigError(
            f"there must be at most as many workers as groups in a global batch ({resolved.groups_per_batch}), but are"
            f" {num_workers}. Start fewer, or set `data.group_images` smaller: another result and another key."
        )
    checks.check_writable(resolved.output.dir)
    train, val = identity.indices(resolved, display)
    checks.check_images(resolved, train, val)
    weights = fetch(resolved.model, resolved.tracking.uri)
    network = models.build(resolved.model, resolved.seed)
    models.load(network, config.replace(resolved, **{"model.weights": str(weights.path)}).model)
    data_digest = index.data_digest(train, val)
    key = config.run_key(resolved, weights.sha256, data_digest)
    least_attempt = checks.check_submission(submission, key)
    if resolved.checkpoint.extend_from != "nothing":
        checks.check_extension(resolved, weights.sha256, data_digest)
    url = run_dir(resolved.output.dir, key)
    kept = held.enter_context(lease.hold(lease.register(lease_url(url)), _what(key), display.say))
    folder = open_folder(url)
    state = folder.read_json(ATTEMPT) or {"attempt": 0, "first_attempt": 1}
    if post_mortem.missing(folder, state["attempt"]):
        folder.pull(RECIPE)
        text = (folder.local / RECIPE).read_text(encoding="utf-8") if folder.has(RECIPE) else ""
        written = post_mortem.write(folder, state["attempt"], None, text)
        display.say(f"attempt {state['attempt']} ended without a word; what is known of it: {written}")
    if again and exists(url):
        state = {"attempt": state["attempt"], "first_attempt": state["attempt"] + 1}
        set_aside(url, f".attempt-{state['attempt']}")
    summary = folder.read_json(SUMMARY)
    if summary is not None:
        return Finished(summary | {"run_dir": url}, already=True)
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
    if folder.age_seconds(STOP_REQUEST) > time.monotonic() - began:  # one that is younger is for this attempt
        folder.remove(STOP_REQUEST)
    for split, found in (("train", train), ("val", val)):
        index.save(found, join(url, f"{split}.parquet"))
    folder.write(RECIPE, config.to_yaml(resolved))
    _open_spool(job, folder, resolved, train, val, num_workers)
    folder.write(ATTEMPT, json.dumps({"attempt": job.attempt, "first_attempt": job.first_attempt}))
    return job


def work(job: Job, world: World, display: Display, should_stop: Callable[[], bool]) -> None:
    """Collective: one worker's part of the run. What it finds is committed in the run's folder."""
    folder = job.open()
    recipe = config.replace(config.from_tree(job.recipe), **{"model.weights": str(folder.local / job.start)})
    pin_arithmetic(world.device)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(WorkerLog(folder, job.attempt, world.rank, world.size, world.device))
        log.alive(_HANGING * recipe.cluster.collective_timeout_seconds)
        stack.enter_context(failures.named(recipe, world))
        on_rank_zero(world, job.check_lease)  # workers outlive a driver that was cut off
        requested = stack.enter_context(stopping.requested(folder)) if world.rank == 0 else stopping.never
        if world.rank == 0:  # who alone reads them
            folder.pull(job.start)
        shown: Display = _Both(log, display) if world.rank == 0 else log
        sizes = loader_sizes(recipe.data, _cores(recipe), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        shown.say(f"loader: {sizes}")
        loaders = DaliLoaders(
            index.load(join(job.run_dir, "train.parquet"), recipe.data.train),
            index.load(join(job.run_dir, "val.parquet"), recipe.data.val),
            recipe.data,
            seed=recipe.seed,
            rank=world.rank,
            world_size=world.size,
            device=world.device,
            sizes=sizes,
            warn=lambda message: shown.say(f"warning: {message}"),
        )
        tracking.configure_client()
        tracker = SpoolTracker(registry.spool_of(folder), shown) if world.rank == 0 else _Quiet(log)
        node = system_metrics.node_of(world.size)
        if recipe.tracking.system_metrics and node is not None:
            stack.enter_context(system_metrics.logged(job.run_dir, node))
        patience = _STOPPED_SECONDS
        try:
            finetune(recipe, world, loaders, folder.store, tracker, lambda: should_stop() or requested())
            patience = _FINISHED_SECONDS
        finally:
            tracker.close(patience)


def note_failure(job: Job, error: BaseException) -> None:
    """Leave a post-mortem, whose address is noted on `error`, and tell MLflow, if it answers soon, that this attempt
    ended without a result. Never gets in the way of `error`."""
    status = "KILLED" if isinstance(error, Stopped | KeyboardInterrupt) else "FAILED"
    try:
        job.check_lease()
    except BusyError:
        return  # the record of a run that another has taken over is the other's
    except (SwaDistError, OSError):
        pass  # storage that doesn't answer: the post-mortem then goes elsewhere
    with contextlib.suppress(SwaDistError, OSError):
        folder = job.open()
        events = [{"kind": "status", "status": status, "time_ms": time.time_ns() // 1_000_000}]
        recipe = config.to_yaml(config.from_tree(job.recipe))
        if (written := post_mortem.write(folder, job.attempt, error, recipe)) is not None:
            error.add_note(f"post-mortem: {written}")
            events.append({"kind": "artifact", "name": written.rpartition("/")[2]})
        registry.spool_of(folder).append(*events)
        registry.send_within(folder, _STOPPED_SECONDS)


def resolve(recipe: Recipe) -> Recipe:
    """Absolute paths, since workers run elsewhere, and the addresses that `auto` stands for."""
    resolved = identity.absolute_addresses(recipe)
    fields: dict[str, Any] = {"tracking.uri": identity.tracking_uri_here(recipe.tracking.uri)}
    published = published_top1(recipe)
    if published is not None:
        fields["evaluate.published_top1"] = published
    return config.replace(resolved, **fields)


def _what(run_key: str) -> str:
    return f"the run with key {run_key[:12]}"


def _keep_weights(folder: Folder, weights: LocalWeights, name: str) -> None:
    """The starting weights in the run's folder, which all workers see; where they came from may be on this machine."""
    folder.pull(name)
    kept = folder.local / name
    if not kept.is_file() or sha256_file(kept) != weights.sha256:
        staged = kept.with_name(f".staging-{kept.name}")
        shutil.copyfile(weights.path, staged)
        staged.replace(kept)
        folder.push(name)


def _open_spool(job: Job, folder: Folder, recipe: Recipe, train: Index, val: Index, num_workers: int) -> None:
    """Begin the run's record. The workers' rank 0 sends it: MLflow's being slow doesn't hold up the start."""
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
    # Params stay as the first attempt logged them; how things are in this one, tags and recipe.yaml say.
    params = config.flatten(config.to_tree(recipe))
    tags = {
        "swa.attempt": job.attempt,
        "swa.submission": job.submission or "none",
        "swa.fingerprint": job.fingerprint,
        "swa.recipe": recipe.name,
        "swa.num_workers": num_workers,
        "swa.weights": job.weights,
        "swa.weights_sha256": job.weights_sha256,
        "swa.data_digest": job.data_digest,
        "swa.run_dir": job.run_dir,
        **environment.code_tags(),
    }
    datasets = {
        split: {"source": as_uri(found.root), "name": f"{recipe.data.name}-{split}", "digest": found.digest}
        for split, found in (("train", train), ("val", val))
    }
    spool.append(
        {"kind": "start", "params": params, "datasets": datasets},
        {"kind": "tags", "tags": tags},
        {"kind": "status", "status": "RUNNING"},
        {"kind": "artifact", "name": RECIPE},
    )


def _cores(recipe: Recipe) -> int:
    """Of this worker."""
    if recipe.cluster.launcher == "ray" and "TORCHELASTIC_RUN_ID" not in os.environ:
        return max(1, int(recipe.cluster.cpus_per_worker))
    return max(1, cores_here() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@dataclass(frozen=True)
class _Both:
    """Rank 0's display: what people see is in its log too."""

    log: WorkerLog
    display: Display

    def say(self, line: str) -> None:
        self.log.say(line)
        self.display.say(line)

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        self.log.progress(phase, done, total, note)
        self.display.progress(phase, done, total, note)

    def close(self) -> None:
        self.display.close()


@dataclass(frozen=True)
class _Quiet:
    """The tracker of the workers that don't report: their logs alone."""

    log: WorkerLog

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        self.log.progress(phase, done, total, note)

    def publish(self, rows: object) -> None:
        pass

    def warn(self, message: str) -> None:
        self.log.say(f"warning: {message}")

    def close(self, patience_seconds: float) -> None:
        pass
