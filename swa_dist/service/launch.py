"""Start a recipe where it is: under torchrun, in this process, or on Ray Train workers."""

import contextlib
import functools
import json
import os
import secrets
from collections.abc import Iterator

import torch

from swa_dist.config import Recipe
from swa_dist.errors import ConfigError
from swa_dist.service import result, retention, run
from swa_dist.service.progress import Display
from swa_dist.service.run import Finished, Job
from swa_dist.service.stopping import Termination
from swa_dist.training.world import SoloWorld, World, join_from_environment, on_rank_zero


def finetune(recipe: Recipe, display: Display, *, again: bool = False) -> Finished:
    """Run the recipe to its end, or find the finished run with the same key. SIGTERM ends it with Stopped."""
    termination = Termination()
    with termination.installed():
        if "TORCHELASTIC_RUN_ID" in os.environ:
            device = _device(int(os.environ["LOCAL_RANK"]))
            world = join_from_environment(device, recipe.cluster.collective_timeout_seconds)
            return _in_this_process(recipe, display, world, termination, again)
        if recipe.cluster.launcher == "ray":
            return _on_ray(recipe, display, termination, again)
        if recipe.cluster.num_workers != 1:
            raise ConfigError(
                f"`cluster.num_workers` must be 1 where `cluster.launcher` is process, but is"
                f" {recipe.cluster.num_workers}. Use torchrun or `cluster.launcher=ray` for more."
            )
        return _in_this_process(recipe, display, SoloWorld(_device(0)), termination, again)


def _on_ray(recipe: Recipe, display: Display, termination: Termination, again: bool) -> Finished:
    _check_cores(recipe)
    with contextlib.ExitStack() as held:
        job = run.prepare(
            recipe,
            display,
            held,
            num_workers=recipe.cluster.num_workers,
            again=again,
            submission=_submission() if recipe.cluster.address == "auto" else "",
        )
        if not isinstance(job, Job):
            return result.catch_up(job, display)
        with _failure_noted(job, termination):
            with _environment(_private_ray() if recipe.cluster.address == "local" else {}):
                from swa_dist.service import ray_train  # reads the environment; and a finished run need not wait for it

                ray_train.fit(job, display, termination)
            finished = result.conclude(job, display)
        retention.apply(recipe, job.open(), display)
        return finished


def _check_cores(recipe: Recipe) -> None:
    """A Ray of our own has this machine's cores, and can't get more."""
    cluster, cores = recipe.cluster, len(os.sched_getaffinity(0))
    if cluster.address == "local" and cluster.num_workers * cluster.cpus_per_worker > cores:
        raise ConfigError(
            f"`cluster.num_workers` must be at most {int(cores / cluster.cpus_per_worker)} on this machine of {cores}"
            f" cores at {cluster.cpus_per_worker:g} per worker, but is {cluster.num_workers}. Lower it, or"
            " `cluster.cpus_per_worker`; the result is the same."
        )


def _submission() -> str:
    """The submission id of the Ray job that this process is the driver of, or ""."""
    settings = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
    return str(settings.get("metadata", {}).get("job_submission_id", ""))


def _private_ray() -> dict[str, str]:
    """Settings of a Ray of our own: a token keeps others of this machine out, and ~/.ray is left alone."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_METRICS_ENABLED": "0",
    }


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Within the block the environment has these settings too."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _in_this_process(recipe: Recipe, display: Display, world: World, termination: Termination, again: bool) -> Finished:
    """Collective under torchrun, where this process is one worker of several."""
    with contextlib.ExitStack() as held:
        prepare = functools.partial(run.prepare, recipe, display, held, num_workers=world.size, again=again)
        job = on_rank_zero(world, prepare)
        if not isinstance(job, Job):
            found = job
            return on_rank_zero(world, lambda: result.catch_up(found, display))
        with _failure_noted(job, termination) if world.rank == 0 else contextlib.nullcontext():
            with termination.awaited() as told:
                run.work(job, world, display, told)
            finished = on_rank_zero(world, lambda: result.conclude(job, display))
        if world.rank == 0:
            retention.apply(recipe, job.open(), display)
        return finished


def _device(index: int) -> torch.device:
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


@contextlib.contextmanager
def _failure_noted(job: Job, termination: Termination) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with termination.awaited():  # torchrun tells those that are left to end as soon as one has
            run.note_failure(job, error)
        raise
