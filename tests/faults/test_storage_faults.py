"""Storage that is full, refuses, is damaged, is away, or is another's by now, while a run writes its checkpoints there.

Every worker ends with the same error, or goes on with the same bits. `pytest -m faults -rP` prints the figures.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import boto3
import pytest

from swa_dist.config import Recipe
from swa_dist.data.order import Batch, Loaders
from swa_dist.errors import SwaDistError
from swa_dist.storage import lease
from swa_dist.storage.folder import open_folder
from swa_dist.storage.s3 import Prefix, S3Store
from swa_dist.storage.store import MANIFEST, DiskStore, Store
from swa_dist.training import failures
from swa_dist.training.finetune import finetune
from swa_dist.training.world import World
from tests import small_run, support
from tests.small_run import NOWHERE, NUM_TRAIN, Trap, TrappedLoaders
from tests.support import Proxy

pytestmark = pytest.mark.timeout(600)
faults = pytest.mark.faults

CHECKPOINTS = "checkpoints"
LAST = 3 * NUM_TRAIN
SOON_SECONDS = 15.0
"""For what takes a second or two on a quiet machine."""


@dataclass(frozen=True)
class Ended:
    """How a worker's run ended."""

    error: str
    """Its class; "" if it ended well."""
    said: str
    warnings: list[str]
    rows: list[tuple[int, dict[str, float]]]
    digests: dict[str, str]
    """Of the candidates. On rank 0."""
    iterates: list[int]
    groups: list[tuple[int, tuple[int, ...]]]
    at: float
    """By the machine's clock."""


def ended(
    recipe: Recipe,
    world: World,
    loaders: Loaders,
    store: Store,
    should_stop: Callable[[], bool] = lambda: False,
    tracker: support.Recorder | None = None,
) -> Ended:
    tracker, found, error = tracker or support.Recorder(), {}, None
    try:
        with failures.named(recipe, world):
            found = finetune(recipe, world, loaders, store, tracker, should_stop)
    except SwaDistError as caught:
        error = caught
    at = time.time()
    return Ended(
        error=type(error).__name__ if error else "",
        said=str(error or ""),
        warnings=tracker.warnings,
        rows=[(row["position"], row["metrics"]) for row in tracker.rows],
        digests={} if world.rank else {name: small_run.digest_of(store, f"candidates/{name}") for name in found},
        iterates=found["swa"].facts["average"]["iterates"] if found else [],
        groups=getattr(loaders, "seen", []),
        at=at,
    )


def with_loaders(kind: type[TrappedLoaders], recipe: Recipe, world: World, trap: Trap = NOWHERE, **more: Any) -> Any:
    plain = small_run.loaders_of(recipe, world, trap)
    return kind(**{name: getattr(plain, name) for name in plain.__dataclass_fields__} | more)


def on_disk(world: World, root: str, fields: dict[str, Any]) -> Ended:
    recipe = small_run.recipe_of(**fields)
    return ended(recipe, world, small_run.loaders_of(recipe, world), DiskStore(Path(root)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The digests of two workers' candidates."""
    return small_run.completed(2, tmp_path_factory.mktemp("undisturbed"))[0].digests


def newest(store: DiskStore) -> str:
    return store.names(CHECKPOINTS)[-1]


class SmallDisk:
    """A file system of its own, in a mount namespace that a process holds open: it goes with that process."""

    def __init__(self, process: "subprocess.Popen[str]", mounted: Path) -> None:
        self._process = process
        self._mounted = mounted
        self.root = Path(f"/proc/{process.pid}/root{mounted}")

    def remount(self, options: str) -> None:
        assert self.do(f"mount -o remount,{options} t {self._mounted} 2>&1 && echo yes") == "yes"

    def do(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    mounted = tmp_path / "disk"
    mounted.mkdir()
    shell = ["sh", "-c", 'mount -t tmpfs -o size=48m t "$0" && echo mounted; while read -r line; do eval "$line"; done']
    pipes: dict[str, IO[str] | int] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    for namespaces in ("-Urm", "-m"):
        try:
            process = subprocess.Popen(["unshare", namespaces, *shell, str(mounted)], text=True, **pipes)
        except FileNotFoundError:
            pytest.skip("unshare, which makes mount namespaces, is not installed")
        said = process.stdout.readline().strip()
        if said == "mounted":
            yield SmallDisk(process, mounted)
        process.kill()
        errors = process.communicate()[1]
        if said == "mounted":
            return
    pytest.skip(f"no file system can be mounted here: {errors.strip()}")


@dataclass(frozen=True)
class Filling(TrappedLoaders):
    """On rank 0 the disk is full from the fifth batch on."""

    ballast: str = ""

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            if self.ballast and self.rank == 0 and (epoch, len(self.seen) > 2 * 2) >= (1, True):
                _fill(Path(self.ballast))
            yield batch


def _fill(path: Path) -> None:
    free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
    for size in (max(2**16, free // 2), 4096):
        with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(size))


def on_filling_disk(world: World, root: str, ballast: str) -> Ended:
    recipe = small_run.recipe_of()
    return ended(recipe, world, with_loaders(Filling, recipe, world, ballast=ballast), DiskStore(Path(root)))


def test_a_disk_that_is_full_ends_the_run_on_all_workers_and_keeps_the_older_checkpoint(
    small_disk: SmallDisk, undisturbed: dict[str, str]
) -> None:
    root, ballast = small_disk.root / "run", small_disk.root / "ballast"
    found = support.run_workers(on_filling_disk, 2, str(root), str(ballast))
    for one in found:
        assert (one.error, one.said) == ("OutputError", found[0].said)
    assert str(root / CHECKPOINTS) in found[0].said
    assert "Free some space and run again" in found[0].said
    store = DiskStore(root)
    store.open(newest(store))
    seconds = max(one.at for one in found) - ballast.stat().st_mtime
    print(f"from a full disk to the error on both workers: {seconds:.1f} s; resumes from {newest(store)}")
    assert seconds < SOON_SECONDS
    ballast.unlink()
    assert small_run.completed(2, root)[0].digests == undisturbed


@pytest.mark.parametrize("fault", ["a file is where the folder should be", "the disk is read-only"])
def test_what_rank_zero_cannot_write_ends_the_run_on_all_workers(fault: str, small_disk: SmallDisk) -> None:
    root = small_disk.root / "run"
    root.mkdir()
    if fault == "the disk is read-only":
        small_disk.remount("ro")
    else:
        (root / CHECKPOINTS).touch()
    began = time.time()
    found = support.run_workers(on_disk, 2, str(root), {})
    for one in found:
        assert (one.error, one.said) == ("OutputError", found[0].said)
    assert f"{root}/c" in found[0].said
    assert "must be writable, but is not" in found[0].said
    print(f"{fault}: {max(one.at for one in found) - began:.1f} s to {found[0].said}")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two workers that was killed in its third epoch."""
    root = tmp_path_factory.mktemp("interrupted") / "run"
    small_run.killed(2, root, Trap("batch", 7))
    return root


def flip(entry: Path) -> None:
    path = entry / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def cut(entry: Path) -> None:
    os.truncate(entry / "momentum.safetensors", 1000)


def lose_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()


def cut_manifest(entry: Path) -> None:
    os.truncate(entry / MANIFEST, 100)


def lose_file(entry: Path) -> None:
    (entry / "facts.json").unlink()


@faults
@pytest.mark.parametrize("damage", [flip, cut, lose_manifest, cut_manifest, lose_file])
def test_a_damaged_checkpoint_is_named_and_set_aside_and_the_one_before_it_is_used(
    damage: Callable[[Path], None], interrupted: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(interrupted, root)
    names = DiskStore(root).names(CHECKPOINTS)
    damage(root / names[-1])
    first, second = support.run_workers(on_disk, 2, str(root), {})
    assert (first.error, second.error) == ("", "")
    (warning,) = [line for line in first.warnings if "Set aside" in line]
    assert str(root / names[-1]) in warning
    assert len(list((root / CHECKPOINTS).glob(f".corrupt-{Path(names[-1]).name}-*"))) == 1
    begun = 2 * NUM_TRAIN if int(Path(names[-2]).name) == 2 * NUM_TRAIN else int(Path(names[-2]).name)
    assert {epoch for one in (first, second) for epoch, _ in one.groups} == set(range(begun // NUM_TRAIN, 3))
    assert first.digests == undisturbed


@faults
def test_where_all_checkpoints_are_damaged_the_run_says_so_and_begins_anew(
    interrupted: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(interrupted, root)
    names = DiskStore(root).names(CHECKPOINTS)
    for name in names:
        flip(root / name)
    first, second = support.run_workers(on_disk, 2, str(root), {})
    assert {epoch for one in (first, second) for epoch, _ in one.groups} == {0, 1, 2}
    assert len([line for line in first.warnings if "Set aside" in line]) == len(names)
    assert first.digests == undisturbed


@faults
def test_a_checkpoint_of_another_version_is_the_same_error_on_all_workers(interrupted: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(interrupted, root)
    store = DiskStore(root)
    name, old = newest(store), interrupted / newest(store)

    def fill(folder: Path) -> None:
        for path in old.glob("*.safetensors"):
            shutil.copyfile(path, folder / path.name)
        facts = json.loads((old / "facts.json").read_text()) | {"schema": 1}
        (folder / "facts.json").write_text(json.dumps(facts))

    store.commit(name, fill)
    began = time.time()
    found = support.run_workers(on_disk, 2, str(root), {})
    for one in found:
        assert (one.error, one.said) == ("CheckpointError", found[0].said)
        assert "must be of schema" in one.said
    assert max(one.at for one in found) - began < 2 * SOON_SECONDS
    assert newest(store) == name


# S3

MANY_STEPS: dict[str, Any] = {"data__global_batch": 32, "data__group_images": 16}
"""Four steps an epoch."""
DOWN_SECONDS = 3.0
UNAVAILABLE = support.answer_of("503 Service Unavailable", "ServiceUnavailable")


@dataclass(frozen=True)
class Slow(TrappedLoaders):
    """Loaders that note when each batch of the training begins."""

    seconds: float = 0.0
    begun: list[float] = field(default_factory=list)

    def train(self, epoch: int, start: int, left_out: Mapping[int, str]) -> Iterator[Batch]:
        for batch in super().train(epoch, start, left_out):
            time.sleep(self.seconds)
            self.begun.append(time.time())
            yield batch


def on_s3(world: World, url: str, environment: dict[str, str], seconds: float) -> tuple[Ended, list[float]]:
    os.environ.update(environment)  # this process is a child of the fork server, not of the test
    recipe = small_run.recipe_of(**MANY_STEPS)
    loaders = with_loaders(Slow, recipe, world, seconds=seconds)
    folder = open_folder(url)
    return ended(recipe, world, loaders, folder.store), loaders.begun


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | more


@pytest.fixture
def undisturbed_on_s3(s3: str) -> dict[str, str]:
    return support.run_workers(on_s3, 2, f"{s3}/undisturbed", environment(), 0.0)[0][0].digests


class Outage:
    """S3 is down from the first request about a checkpoint after the first epoch's until `ends`."""

    def __init__(self, answer: str, ends: Callable[[float], bool]) -> None:
        self._answer, self._ends = answer, ends
        self.began = self.ended = 0.0

    def __call__(self, number: int, method: str, path: str) -> str:
        about = re.search(rf"/{CHECKPOINTS}/(\d+)", path)
        if not self.began and about and int(about[1]) > NUM_TRAIN:
            self.began = time.time()
        if self.began and not self.ended and self._ends(time.time() - self.began):
            self.ended = time.time()
        return self._answer if self.began and not self.ended else ""


@faults
@pytest.mark.parametrize("answer", [UNAVAILABLE, "cut"], ids=["503", "cut"])
def test_the_training_goes_on_while_s3_is_down_for_three_seconds(
    answer: str, s3: str, s3_server: str, undisturbed_on_s3: dict[str, str]
) -> None:
    outage = Outage(answer, lambda seconds: seconds >= DOWN_SECONDS)
    with Proxy(s3_server, outage) as proxy:
        (first, begun), _ = support.run_workers(on_s3, 2, f"{s3}/run", environment(AWS_ENDPOINT_URL=proxy.url), 0.5)
    meanwhile = sum(outage.began < at < outage.ended for at in begun)
    print(f"S3 ({answer[:3]}) down for {outage.ended - outage.began:.1f} s: {meanwhile} steps began meanwhile")
    assert (first.error, first.digests) == ("", undisturbed_on_s3)
    assert meanwhile >= 1


@faults
def test_an_outage_of_s3_that_outlasts_a_checkpoint_is_named_and_the_next_one_is_committed(
    s3: str, s3_server: str, undisturbed_on_s3: dict[str, str]
) -> None:
    requests: list[float] = []

    def ends(seconds: float) -> bool:
        requests.append(seconds)
        return len(requests) > 5 and seconds > DOWN_SECONDS  # boto3's attempts at one request, all of them

    outage = Outage(UNAVAILABLE, ends)
    with Proxy(s3_server, outage) as proxy:
        (first, begun), _ = support.run_workers(on_s3, 2, f"{s3}/run", environment(AWS_ENDPOINT_URL=proxy.url), 1.0)
    warnings = [line for line in first.warnings if "S3 must" in line]
    assert warnings
    assert all("The training goes on" in warning for warning in warnings)
    meanwhile = sum(outage.began < at < outage.ended for at in begun)
    print(f"S3 down for {outage.ended - outage.began:.1f} s: {meanwhile} steps began meanwhile; {warnings[0]}")
    assert (first.error, first.digests) == ("", undisturbed_on_s3)
    assert meanwhile >= 1
    commits = [path for path in proxy.seen if path.startswith("PUT") and path.endswith(MANIFEST)]
    assert any(f"{NUM_TRAIN * 2:012d}" in path for path in commits)


@faults
def test_s3_that_stays_away_ends_the_run_on_all_workers_and_it_resumes(
    s3: str, s3_server: str, undisturbed_on_s3: dict[str, str]
) -> None:
    outage = Outage("cut", lambda seconds: False)
    with Proxy(s3_server, outage) as proxy:
        found = support.run_workers(on_s3, 2, f"{s3}/run", environment(AWS_ENDPOINT_URL=proxy.url), 0.3)
    for one, _ in found:
        assert (one.error, one.said) == ("ServiceError", found[0][0].said)
    print(f"S3 away for good: {found[0][0].at - outage.began:.1f} s to {found[0][0].said}")
    assert found[0][0].at - outage.began < 120
    (resumed, _), _ = support.run_workers(on_s3, 2, f"{s3}/run", environment(), 0.0)
    assert NUM_TRAIN in {min(position for position, _ in resumed.rows if position >= NUM_TRAIN)}
    assert 0 not in {epoch for epoch, _ in resumed.groups}
    assert resumed.digests == undisturbed_on_s3


def half_an_upload(world: World, url: str, environment: dict[str, str]) -> None:
    """Killed by the proxy in the middle of an upload in parts."""
    os.environ.update(environment, AWS_SDK_UA_APP_ID=f"{os.getpid()}-4")
    store = open_folder(url).store
    store.commit(f"{CHECKPOINTS}/{NUM_TRAIN:012d}", lambda folder: _fill_some(folder / "model.safetensors"))


def _fill_some(path: Path) -> None:
    path.write_bytes(bytes(40 * 2**20))


@faults
def test_half_an_upload_is_no_checkpoint_and_the_next_start_sweeps_it(
    s3: str, s3_server: str, undisturbed_on_s3: dict[str, str], tmp_path: Path
) -> None:
    url, bucket = f"{s3}/run", s3.removeprefix("s3://")
    with Proxy(s3_server) as proxy:
        workers = support.start_workers(half_an_upload, 1, url, environment(AWS_ENDPOINT_URL=proxy.url))
        workers.processes[0].join(120)
        assert workers.processes[0].exitcode == -signal.SIGKILL
    uploads = boto3.client("s3").list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert len(uploads) == 1
    assert S3Store(Prefix(url), DiskStore(tmp_path)).names(CHECKPOINTS) == []
    (first, _), _ = support.run_workers(on_s3, 2, url, environment(), 0.0)
    assert "Uploads" not in boto3.client("s3").list_multipart_uploads(Bucket=bucket)
    assert first.warnings == []
    assert first.digests == undisturbed_on_s3


# Fencing

TTL = 2.0
WHAT = "the run"


def leased(world: World, url: str, environment: dict[str, str], host: str, seconds: float) -> Ended:
    """A holder of the run's lease, as from a machine of that name, which others can't look into."""
    os.environ.update(environment)
    lease.socket.gethostname = lambda: host
    register = lease.register(f"{url}/.lease")
    recipe = small_run.recipe_of()
    with lease.hold(register, WHAT, lambda line: None, ttl_seconds=TTL) as held:
        guard = lease.guard(register, WHAT, held.generation)
        return ended(recipe, world, with_loaders(Slow, recipe, world, seconds=seconds), open_folder(url, guard).store)


def pause(pid: int, lock: Path) -> None:
    """At a moment at which it doesn't have the lock on disk, which nobody could then take."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.01)
            else:
                return


@faults
@pytest.mark.parametrize("place", ["disk", "s3"])
def test_a_paused_holder_that_was_taken_over_is_refused_at_its_next_checkpoint(
    place: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    alone = small_run.completed(1, tmp_path / "alone")[0].digests
    url = str(tmp_path / "run") if place == "disk" else f"{request.getfixturevalue('s3')}/run"
    store = open_folder(url).store
    paused = support.start_workers(leased, 1, url, environment(), "elsewhere", 0.5)
    deadline = time.monotonic() + 120
    while not store.names(CHECKPOINTS):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pause(paused.processes[0].pid, tmp_path / "run" / ".lease.lock" if place == "disk" else tmp_path / "lock")
    (new,) = support.run_workers(leased, 1, url, environment(), "here", 0.0)
    assert (new.error, new.digests) == ("", alone)
    left = {
        name: small_run.digest_of(store, name) for kind in (CHECKPOINTS, "candidates") for name in store.names(kind)
    }
    assert f"{CHECKPOINTS}/{LAST:012d}" in left
    resumed = time.time()
    os.kill(paused.processes[0].pid, signal.SIGCONT)
    (old,) = paused.results(60)
    print(f"on {place} the paused holder ended {old.at - resumed:.1f} s after it went on: {old.said}")
    assert old.error == "BusyError"
    assert "has taken it over (generation 2 after 1)" in old.said
    assert old.at - resumed < SOON_SECONDS
    again = open_folder(url).store
    assert {name: small_run.digest_of(again, name) for name in left} == left
    assert [name for kind in (CHECKPOINTS, "candidates") for name in again.names(kind)] == list(left)
