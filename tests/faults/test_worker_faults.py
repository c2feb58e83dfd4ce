"""Workers that are stopped, killed, starved of memory or told to end, and numbers that are not, in the middle of a run.

All workers end alike, soon, with what went wrong; or they go on alike. `pytest -m faults -rP` prints the figures.
"""

import contextlib
import dataclasses
import gc
import os
import resource
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swa_dist.data.order import Batch, Group, Span, Transforms
from swa_dist.service.stopping import Termination
from swa_dist.service.worker_log import WorkerLog, endings
from swa_dist.storage.folder import open_folder
from swa_dist.storage.store import DiskStore
from swa_dist.training.state import TrainState
from swa_dist.training.world import TorchWorld, World, join_from_environment
from tests import small_run, support
from tests.faults.test_storage_faults import Ended, ended, with_loaders
from tests.small_run import STEPS_PER_EPOCH, Result, Trap, TrappedLoaders

pytestmark = pytest.mark.timeout(600)
faults = pytest.mark.faults

CHECKPOINTS = "checkpoints"
ITERATES = [96, 120, 216, 240, 336, 360]
SHORT_SECONDS = 5
"""How long workers wait for each other where one does not come."""
SLACK_SECONDS = 10.0
"""Of a busy machine."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Result]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {size: small_run.completed(size, root / str(size))[0] for size in (1, 2)}


def found(kind: type[Any]) -> Any:
    """The one object of its class in this process."""
    (one,) = [thing for thing in gc.get_objects() if type(thing) is kind]
    return one


def newest(root: Path) -> str:
    return DiskStore(root).names(CHECKPOINTS)[-1]


def seconds_between(path: Path, last: float) -> float:
    """From when the file was written."""
    return last - path.stat().st_mtime


# Workers that stop or die


@dataclass(unsafe_hash=True)
class Signal(Trap):
    """Sends its process this signal, once, and notes when."""

    number_of_signal: int = signal.SIGKILL
    note: str = ""

    def at(self, point: str, rank: int) -> None:
        if (point, rank) == (self.point, self.rank):
            self._seen += 1
            if self._seen == self.number + 1:
                Path(self.note).touch()
                os.kill(os.getpid(), self.number_of_signal)


def impatient(rendezvous: str) -> TorchWorld:
    """The same workers, in a group that waits for seconds."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    return support.joined(rendezvous, rank, size, SHORT_SECONDS)


class StoppingWorld:
    """A world on whose rank 1 the process is stopped as it comes to a checkpoint: where it gathers right after a sum,
    once one is committed."""

    def __init__(self, world: World, root: str, note: str) -> None:
        self._world, self._root, self._note = world, Path(root), Path(note)
        self._summed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world, name)

    def sum_(self, tensor: Tensor) -> Tensor:
        self._summed = True
        return self._world.sum_(tensor)

    def max_(self, tensor: Tensor) -> Tensor:
        self._summed = False
        return self._world.max_(tensor)

    def gather(self, value: Any) -> list[Any]:
        if self._summed and self._world.rank == 1 and DiskStore(self._root).names(CHECKPOINTS):
            self._note.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        self._summed = False
        return self._world.gather(value)


class Logged(support.Recorder):
    def __init__(self, log: WorkerLog) -> None:
        super().__init__()
        self._log = log

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        self._log.progress(phase, done, total, note)


def with_a_stopped_worker(world: World, root: str, trap: Signal, at_a_checkpoint: bool) -> Ended:
    recipe = small_run.recipe_of(cluster__collective_timeout_seconds=SHORT_SECONDS)
    world = impatient(f"{root}-rendezvous")
    if at_a_checkpoint:
        world = StoppingWorld(world, root, trap.note)
    with WorkerLog(open_folder(root), 1, world.rank, world.size, world.device) as log:
        log.alive(0.4 * SHORT_SECONDS)
        loaders, store = small_run.loaders_of(recipe, world, trap), DiskStore(Path(root))
        return ended(recipe, world, loaders, store, tracker=Logged(log))


def until_stopped(tmp_path: Path, trap: Signal, at_a_checkpoint: bool) -> tuple[Ended, float]:
    """Rank 0's end, and how long after the other stopped it came."""
    workers = support.start_workers(with_a_stopped_worker, 2, str(tmp_path / "run"), trap, at_a_checkpoint)
    try:
        deadline = time.monotonic() + 120
        while not Path(trap.note).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        workers.processes[0].join(SHORT_SECONDS + 2 * SLACK_SECONDS)
        assert workers.processes[0].exitcode is not None, "rank 0 still waits for a worker that is stopped"
        (first,) = support.Workers(workers.processes[:1], workers._receivers[:1]).results()
    finally:
        workers.kill()
    return first, seconds_between(Path(trap.note), first.at)


@faults
def test_a_worker_that_is_stopped_is_a_service_error_within_the_timeout_and_the_log_has_the_stacks(
    tmp_path: Path, undisturbed: dict[int, Result]
) -> None:
    trap = Signal("batch", 4, 1, number_of_signal=signal.SIGSTOP, note=str(tmp_path / "note"))
    first, seconds = until_stopped(tmp_path, trap, at_a_checkpoint=False)
    print(f"rank 1 stopped, collective timeout {SHORT_SECONDS} s: rank 0 ended after {seconds:.1f} s: {first.said}")
    assert first.error == "ServiceError"
    assert "`cluster.collective_timeout_seconds`" in first.said
    assert seconds < SHORT_SECONDS + SLACK_SECONDS
    stacks = "\n".join(endings(open_folder(str(tmp_path / "run")), 1)[0].stacks)
    assert "loop.py" in stacks, stacks  # in the backward pass
    assert small_run.completed(2, tmp_path / "run")[0].digests == undisturbed[2].digests


@faults
def test_a_worker_that_is_stopped_as_a_checkpoint_begins_is_noticed_too(tmp_path: Path) -> None:
    trap = Signal("nowhere", 0, 1, note=str(tmp_path / "note"))
    first, seconds = until_stopped(tmp_path, trap, at_a_checkpoint=True)
    print(f"rank 1 stopped at a checkpoint: rank 0 ended after {seconds:.1f} s: {first.said}")
    assert first.error == "ServiceError"


def meet(world: World, rank: int, port: int, die: str, note: str) -> tuple[str, float]:
    """The error of a rendezvous of two, at which this process is killed where it says so; and when."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")

    def end(*args: object, **more: object) -> Any:
        Path(note).touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if die == "before it":
        end()
    if die == "within it":
        dist.distributed_c10d._new_process_group_helper = end
    if die == "after it":
        dist.new_group = end
    try:
        join_from_environment(torch.device("cpu"), SHORT_SECONDS)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", time.time()
    return "", time.time()


@faults
@pytest.mark.parametrize("moment", ["before it", "within it", "after it"])
def test_a_worker_that_is_killed_at_the_rendezvous_ends_the_other_within_the_timeout(
    moment: str, tmp_path: Path
) -> None:
    port, note = support.free_port(), tmp_path / "note"
    first = support.start_workers(meet, 1, 0, port, "", "")
    second = support.start_workers(meet, 1, 1, port, moment, str(note))
    second.processes[0].join(60)
    assert second.processes[0].exitcode == -signal.SIGKILL
    ((said, at),) = first.results(SHORT_SECONDS + 60)
    seconds = seconds_between(note, at)
    print(f"a worker killed {moment}, the rendezvous: the other ended after {seconds:.1f} s: {said}")
    assert said.startswith("ServiceError: all workers must meet within")
    assert seconds < SHORT_SECONDS + SLACK_SECONDS


# Numbers


@dataclass(frozen=True)
class Poisoned(TrappedLoaders):
    """Loaders that spoil steps on one rank, and say whether the state after a step is that of before it."""

    steps: tuple[int, ...] = ()
    on: int = 1
    value: float = float("nan")
    """Of a pixel; a finite one is instead a factor on the network's output."""
    unchanged: list[bool] = field(default_factory=list)
    """Of each spoiled step."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        first = epoch * STEPS_PER_EPOCH + -(-start // self.data.global_batch)
        for step, batch in enumerate(super().train(epoch, start, left_out), start=first):
            if step not in self.steps:
                yield batch
                continue
            before = _everything()
            with self._spoiled(batch) as spoiled:
                yield spoiled
            after = _everything()
            self.unchanged.append(all(torch.equal(before[name], after[name]) for name in before | after))

    @contextlib.contextmanager
    def _spoiled(self, batch: Batch) -> Iterator[Batch]:
        if self.rank != self.on:
            yield batch
        elif abs(self.value) < float("inf"):
            handle = found(TrainState).model.fc.register_forward_hook(lambda module, given, out: out * self.value)
            yield batch
            handle.remove()
        else:
            images = batch.groups[0].images.clone()
            images[0, 0, 0, 0] = self.value
            group = dataclasses.replace(batch.groups[0], images=images)
            yield dataclasses.replace(batch, groups=[group, *batch.groups[1:]])


def _everything() -> dict[str, Tensor]:
    """Weights, BatchNorm's statistics and momentum, as they are now."""
    state = found(TrainState)
    tensors = state.model.state_dict() | {f"momentum of {n}": t for n, t in state._momentum().items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def with_poison(
    world: World, root: str, poison: dict[str, Any], fields: dict[str, Any], trap: Trap = small_run.NOWHERE
) -> tuple[Ended, list[bool]]:
    recipe = small_run.recipe_of(**fields)
    loaders = with_loaders(Poisoned, recipe, world, trap, **poison)
    return ended(recipe, world, loaders, DiskStore(Path(root))), loaders.unchanged


def assert_finite(root: Path) -> None:
    for path in [*(root / "candidates").glob("*/model.safetensors"), *(root / CHECKPOINTS).glob("*/*.safetensors")]:
        for name, tensor in safetensors.torch.load_file(path).items():
            assert torch.isfinite(tensor).all(), (path, name)


@faults
@pytest.mark.parametrize(
    ("value", "step", "why"),
    [
        (float("nan"), 4, "not finite"),
        (float("inf"), 5, "not finite"),  # the last of an epoch, at which weights are averaged
        (1e6, 8, "times as long as usual"),
    ],
    ids=["nan", "inf", "spike"],
)
def test_a_step_that_one_worker_spoils_is_skipped_by_all_and_leaves_no_trace(
    value: float, step: int, why: str, tmp_path: Path
) -> None:
    results = support.run_workers(with_poison, 2, str(tmp_path), {"steps": (step,), "value": value}, {})
    first = results[0][0]
    for one, unchanged in results:
        assert (one.error, unchanged) == ("", [True])
    (warning,) = [line for line in first.warnings if "no step was taken" in line]
    assert why in warning
    assert ("not finite on rank 1." in warning) == (why == "not finite")
    print(warning)
    skipped = [metrics["train/skipped"] for _, metrics in first.rows if "train/skipped" in metrics]
    assert skipped[-1] == 1
    assert sorted(skipped) == skipped
    assert first.iterates == ITERATES
    assert_finite(tmp_path)


def test_many_spoiled_steps_in_a_row_end_the_run_on_all_workers_at_a_good_checkpoint(tmp_path: Path) -> None:
    poison = {"steps": (4, 5, 6, 7)}
    results = support.run_workers(with_poison, 2, str(tmp_path), poison, {"guard__max_skips_in_a_row": 3})
    for one, _ in results:
        assert (one.error, one.said) == ("NumericsError", results[0][0].said)
    assert "3 in a row" in results[0][0].said
    assert "on rank 1" in results[0][0].said
    print(results[0][0].said)
    DiskStore(tmp_path).open(newest(tmp_path))
    assert_finite(tmp_path)


@faults
def test_a_resumed_run_skips_what_an_undisturbed_one_does(tmp_path: Path) -> None:
    """It takes eight steps to know a spike: the guard remembers those from before the kill."""
    poison = {"steps": (4, 8), "value": 1e6}  # the first one is taken: nothing is known yet
    undisturbed = support.run_workers(with_poison, 2, str(tmp_path / "undisturbed"), poison, {})[0][0]
    assert len([line for line in undisturbed.warnings if "no step was taken" in line]) == 1
    root = tmp_path / "run"
    workers = support.start_workers(with_poison, 2, str(root), poison, {}, Trap("batch", 7))
    workers.processes[0].join(120)
    assert workers.processes[0].exitcode == -signal.SIGKILL
    workers.kill()
    resumed = support.run_workers(with_poison, 2, str(root), poison, {})[0][0]
    assert int(Path(newest(root)).name) == 360
    assert len([line for line in resumed.warnings if "no step was taken" in line]) == 1
    assert 0 not in {epoch for epoch, _ in resumed.groups}
    assert resumed.digests == undisturbed.digests


# Memory


@dataclass(frozen=True)
class Starving(TrappedLoaders):
    """From the fifth batch on images are large, and the process gets no more memory than it has."""

    headroom_mib: int = 0

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for step, batch in enumerate(super().train(epoch, start, left_out), start=epoch * STEPS_PER_EPOCH):
            if step != 4:
                yield batch
                continue
            group = batch.groups[0]
            large = nn.functional.interpolate(group.images, size=(512, 512))
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + self.headroom_mib * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
            yield dataclasses.replace(batch, groups=[dataclasses.replace(group, images=large), *batch.groups[1:]])


def starved(world: World, root: str, headroom_mib: int) -> Ended:
    recipe = small_run.recipe_of()
    loaders = with_loaders(Starving, recipe, world, headroom_mib=headroom_mib)
    return ended(recipe, world, loaders, DiskStore(Path(root)))


@faults
@pytest.mark.parametrize("headroom_mib", [4, 64, 150])
def test_full_memory_is_named_with_a_remedy_and_the_run_resumes(
    headroom_mib: int, tmp_path: Path, undisturbed: dict[int, Result]
) -> None:
    (one,) = support.run_workers(starved, 1, str(tmp_path), headroom_mib)
    print(f"{headroom_mib} MiB left: {one.said}")
    assert one.error == "OutOfMemoryError"
    assert "set groups of 8 images" in one.said
    assert "The last checkpoint is kept" in one.said
    DiskStore(tmp_path).open(newest(tmp_path))
    assert small_run.completed(1, tmp_path)[0].digests == undisturbed[1].digests


# Replicas


@dataclass(frozen=True)
class Flipping(TrappedLoaders):
    """On rank 1 one bit of one weight flips before the second batch, after which weights are averaged."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for step, batch in enumerate(super().train(epoch, start, left_out)):
            if (epoch, step, self.rank) == (0, 1, 1):
                with torch.no_grad():
                    bits = found(DistributedDataParallel).module.fc.bias.view(torch.int32)
                    bits[3] ^= 1 << 8
            yield batch


def with_a_flipped_bit(world: World, root: str) -> Ended:
    recipe = small_run.recipe_of()
    return ended(recipe, world, with_loaders(Flipping, recipe, world), DiskStore(Path(root)))


def test_of_three_workers_the_one_whose_bit_flipped_is_named(tmp_path: Path) -> None:
    results = support.run_workers(with_a_flipped_bit, 3, str(tmp_path))
    for one in results:
        assert (one.error, one.said) == ("NumericsError", results[0].said)
    assert "the weights at image 96 must be the same on all workers" in results[0].said
    assert results[0].said.endswith("Rank 1 is alone with its own.")
    print(results[0].said)


# SIGTERM


@dataclass(frozen=True)
class Slow(TrappedLoaders):
    """Each batch and group takes a moment."""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            time.sleep(0.1)
            yield batch

    def recalibration(self, span: Span, transforms: Transforms, left_out: Mapping[int, str]) -> Iterator[Group]:
        for group in super().recalibration(span, transforms, left_out):
            time.sleep(0.1)
            yield group


def terminable(world: World, root: str, trap: Signal) -> Ended:
    recipe = small_run.recipe_of()
    termination = Termination()
    with termination.installed(), termination.awaited() as asked:
        return ended(recipe, world, with_loaders(Slow, recipe, world, trap), DiskStore(Path(root)), asked)


@faults
@pytest.mark.parametrize(("point", "number"), [("batch", 4), ("recalibrate", 4), ("evaluate", 4)])
def test_sigterm_to_one_worker_stops_all_at_a_committed_checkpoint(
    point: str, number: int, tmp_path: Path, undisturbed: dict[int, Result]
) -> None:
    root, note = tmp_path / "run", tmp_path / "note"
    trap = Signal(point, number, 1, number_of_signal=signal.SIGTERM, note=str(note))
    results = support.run_workers(terminable, 2, str(root), trap)
    for one in results:
        assert (one.error, one.said) == ("Stopped", results[0].said)
    seconds = seconds_between(note, max(one.at for one in results))
    print(f"SIGTERM to rank 1 in {point} {number}: both stopped after {seconds:.1f} s: {results[0].said}")
    position = int(Path(newest(root)).name)
    if point == "batch":
        assert f"at image {position} " in results[0].said
        assert 120 < position < 240
    else:
        assert position == 360
    assert seconds < 5.0
    resumed = small_run.completed(2, root)[0]
    assert resumed.digests == undisturbed[2].digests
    assert resumed.iterates == ITERATES
