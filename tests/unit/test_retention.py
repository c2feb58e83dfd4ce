"""Only what need not be kept of finished runs is removed, on disk and on S3, whatever is held, killed or down."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import boto3
import mlflow
import pytest

from swa_dist import config
from swa_dist.service import registry, result, retention, tracking
from swa_dist.service.layout import ATTEMPT, RECIPE, SUMMARY, lease_url
from swa_dist.service.progress import Silent
from swa_dist.service.spool import SPOOL_FILES, Target
from swa_dist.storage.folder import is_s3, join, open_folder, set_aside
from swa_dist.storage.s3 import Prefix
from tests.support import Proxy, Said, answer_of, digits_recipe, free_port
from tests.unit.test_lease import Process

DAYS = 30
CONTENT = b"x" * 100_000


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture(scope="module")
def client(uri):
    with pytest.MonkeyPatch.context() as patch:
        for name in tracking._CLIENT_SETTINGS:
            patch.delenv(name, raising=False)
        tracking.configure_client()
        yield mlflow.MlflowClient(uri, registry_uri=uri)


@pytest.fixture(scope="module")
def experiment(client, uri):
    return client.create_experiment("swa_dist", (Path(uri.removeprefix("sqlite:///")).parent / "files").as_uri())


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tracking, "_PAUSES_SECONDS", ())


class Place:
    """Where runs are kept: it makes them, makes them old, and tells what is in them."""

    def __init__(self, url, uri, experiment, client):
        self.url, self._uri, self._experiment, self.client = url, uri, experiment, client
        self.model = f"digits-{uuid.uuid4().hex[:8]}"
        self.old = {}
        self._bucket = Prefix(url) if is_s3(url) else None  # one client, which takes a moment to make

    def recipe(self, **fields):
        fields = {"output.dir": self.url, "tracking.uri": self._uri, "registry.model": self.model} | fields
        return digits_recipe("/none", "/none", **fields)

    def run(self, *, days=0, finished=True, waiting=0, registered=True, uri=None, tags=True, **fields):
        """The name of a new run, whose summary is `days` old, with a checkpoint and a candidate."""
        key = uuid.uuid4().hex * 2
        name = f"swa-{key[:12]}"
        folder = open_folder(join(self.url, name))
        folder.write(RECIPE, config.to_yaml(self.recipe(**fields)))
        folder.write(ATTEMPT, json.dumps({"attempt": 1, "first_attempt": 1}))
        folder.write("start.safetensors", "start")
        for entry in ("checkpoints/000000000400", "candidates/swa"):
            folder.store.commit(entry, lambda folder: (folder / "model.safetensors").write_bytes(CONTENT) and None)
        run = self.client.create_run(self._experiment)
        version = None
        if registered:
            with contextlib.suppress(mlflow.exceptions.MlflowException):
                self.client.create_registered_model(self.model)
            version = self.client.create_model_version(
                self.model,
                source=run.info.artifact_uri,
                run_id=run.info.run_id,
                tags={"run_key": key} if tags else {},
            )
        spool = registry.spool_of(folder)
        target = Target(uri or self._uri, "swa_dist", name, key, 1)
        spool.open(target)
        spool.append({"kind": "status", "status": "RUNNING"})
        spool.mark_sent(1)
        if finished:
            summary = {
                "run_key": key,
                "waiting": waiting,
                "mlflow": {"uri": target.uri, "run_id": run.info.run_id},
                "registered": version and {"name": self.model, "version": version.version},
            }
            folder.write(SUMMARY, json.dumps(summary))
        self.age(name, days)
        return name

    def version(self, name):
        return str(json.loads(self.read(name, SUMMARY))["registered"]["version"])

    def read(self, name, file):
        return open_folder(join(self.url, name)).read_json(file) and self.content(name)[file]

    def age(self, name, days):
        self.old[name] = days
        summary = Path(self.url, name, SUMMARY)
        if not is_s3(self.url) and summary.is_file():
            os.utime(summary, (time.time() - days * 86_400,) * 2)

    def content(self, name):
        if self._bucket is not None:
            return {one.removeprefix(f"{name}/"): self._bucket.read(one) for one in self._bucket.names(f"{name}/")}
        root = Path(self.url, name)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def put(self, name, content):
        """What `content` told of a run, again."""
        for file, bytes_ in content.items():
            if self._bucket is not None:
                self._bucket.write(f"{name}/{file}", bytes_)
            else:
                Path(self.url, name, file).parent.mkdir(parents=True, exist_ok=True)
                Path(self.url, name, file).write_bytes(bytes_)
        self.age(name, self.old[name])

    def names(self):
        """All there is, but leases."""
        if self._bucket is not None:
            found = {name.partition("/")[0] for name in self._bucket.names()}
        else:
            found = set(os.listdir(self.url))
        return {name for name in found if ".lease" not in name}

    def apply(self, own, **fields):
        said = Said()
        nothing = {"retention.checkpoints": "all", "retention.run_days": DAYS}
        retention.apply(self.recipe(**nothing | fields), open_folder(join(self.url, own)), said)
        return said


@pytest.fixture
def disk(tmp_path, uri, experiment, client):
    (tmp_path / "runs").mkdir()
    return Place(str(tmp_path / "runs"), uri, experiment, client)


@pytest.fixture
def bucket(s3, s3_server, uri, experiment, client, monkeypatch):
    """S3 whose clock says of summaries that they are old."""
    place = Place(f"{s3}/runs", uri, experiment, client)

    behind = boto3.client("s3", endpoint_url=s3_server)

    def rule(number, method, path):
        *_, run, file = ["", *path.partition("?")[0].split("/")]
        if method != "GET" or file != SUMMARY or not place.old.get(run):
            return ""
        try:
            found = behind.get_object(Bucket=s3.removeprefix("s3://"), Key=f"runs/{run}/{file}")
        except behind.exceptions.NoSuchKey:
            return ""
        content = found["Body"].read().decode()
        now = datetime.now(UTC)
        written = format_datetime(now - timedelta(days=place.old[run]), usegmt=True)
        return (
            f"200 OK\r\nDate: {format_datetime(now, usegmt=True)}\r\nLast-Modified: {written}\r\n"
            f"ETag: {found['ETag']}\r\nContent-Length: {len(content)}\r\n\r\n{content}"
        )

    with Proxy(s3_server, rule) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place.proxy = proxy
        yield place


@pytest.fixture(params=["disk", "bucket"])
def place(request):
    return request.getfixturevalue(request.param)


# Old runs


def test_finished_runs_that_are_older_go_and_all_else_stays(place):
    own, younger, unfinished = place.run(days=99), place.run(days=DAYS - 0.1), place.run(days=99, finished=False)
    old = [place.run(days=DAYS + 0.1), place.run(days=400), place.run(days=400, registered=False)]
    kept = {name: place.content(name) for name in (own, younger, unfinished)}
    said = place.apply(own)
    assert place.names() == set(kept), said.lines
    assert {name: place.content(name) for name in kept} == kept
    (line,) = said.lines
    assert line.startswith(f"removed 3 runs older than 30 days from {place.url}: ")
    assert line.endswith(" kB")
    assert float(line.split()[-2]) == pytest.approx(600, rel=0.05)  # six entries
    assert all(place.content(name) == {} for name in old)
    assert place.apply(own).lines == []


def test_forever_is_for_ever(place):
    own, old = place.run(), place.run(days=30_000)
    before = place.content(old)
    assert place.apply(own, **{"retention.run_days": "forever"}).lines == []
    assert place.content(old) == before


def test_what_only_looks_like_a_run_is_not_touched(disk, tmp_path):
    own, run = disk.run(), disk.run(days=99)
    runs = Path(disk.url)
    key = "0123456789ab"
    for name in (f"swa-{key}", f"swa-{key}x", f"my-{run}", f"{run}.copy", f".removing-swa-{key}"):
        (runs / name).mkdir()
        (runs / name / "notes.txt").write_text("mine")
        if key not in name:
            (runs / name / ATTEMPT).write_text("{}")
            (runs / name / SUMMARY).write_bytes((runs / run / SUMMARY).read_bytes())
    (runs / "swa-111111111111").mkdir()  # another run's summary
    for file in (ATTEMPT, SUMMARY):
        (runs / "swa-111111111111" / file).write_bytes((runs / run / file).read_bytes())
    (runs / run / ATTEMPT).unlink()
    elsewhere = Place(str(tmp_path / "elsewhere"), disk._uri, disk._experiment, disk.client)
    linked = elsewhere.run(days=99)
    (runs / linked).symlink_to(Path(elsewhere.url, linked))
    for summary in runs.glob("*/summary.json"):
        os.utime(summary, (0, 0))
    before = {name: disk.content(name) for name in disk.names()}
    assert disk.apply(own).lines == []
    assert {name: disk.content(name) for name in disk.names()} == before
    assert (runs / linked).is_symlink()


def test_what_a_link_in_a_run_leads_to_stays(disk, tmp_path):
    own, old = disk.run(), disk.run(days=99)
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "model.bin").write_text("kept")
    (Path(disk.url) / old / "big").symlink_to(tmp_path / "big")
    (Path(disk.url) / old / "candidates" / "big").symlink_to(tmp_path / "big")
    assert len(disk.apply(own).lines) == 1
    assert (tmp_path / "big" / "model.bin").read_text() == "kept"
    assert disk.names() == {own}


def test_runs_that_were_set_aside_go_too_even_those_that_this_run_was_begun_anew_from(place):
    own, other = place.run(), place.run()
    for name in (own, other):
        set_aside(join(place.url, name), ".attempt-1")
        set_aside(join(place.url, f"{name}.attempt-1"), "-1")
        place.age(f"{name}.attempt-1-1", 99)
    again = open_folder(join(place.url, own))
    again.write(SUMMARY, "{}")
    with retention.lease.hold(retention.lease.register(lease_url(again.url)), "this run", lambda line: None):
        (line,) = place.apply(own).lines
    assert line.startswith("removed 2 runs")
    assert place.names() == {own}


# Aliases


def test_the_champion_stays_bit_for_bit_and_goes_once_it_is_none(place):
    own, champion, beaten = place.run(), place.run(days=400), place.run(days=400)
    place.client.set_registered_model_alias(place.model, "champion", place.version(champion))
    before = place.content(champion)
    times = {path: path.stat().st_mtime_ns for path in Path(place.url).glob(f"{champion}/**/*")}
    assert len(place.apply(own).lines) == 1
    assert place.content(beaten) == {}
    assert place.content(champion) == before
    assert {path: path.stat().st_mtime_ns for path in Path(place.url).glob(f"{champion}/**/*")} == times
    place.client.delete_registered_model_alias(place.model, "champion")
    place.apply(own)
    assert place.names() == {own}


def test_any_alias_under_any_name_keeps_a_run_told_by_its_tags_or_its_mlflow_run(disk):
    own, other_alias, no_tags, copied = disk.run(), disk.run(days=99), disk.run(days=99, tags=False), disk.run(days=99)
    disk.client.set_registered_model_alias(disk.model, "to-be-tried", disk.version(other_alias))
    disk.client.set_registered_model_alias(disk.model, "2", disk.version(no_tags))
    copy = disk.client.copy_model_version(f"models:/{disk.model}/{disk.version(copied)}", f"{disk.model}-prod")
    disk.client.set_registered_model_alias(copy.name, "live", copy.version)
    assert disk.apply(own).lines == []
    assert disk.names() == {own, other_alias, no_tags, copied}


def test_another_attempt_of_the_same_key_is_kept_by_its_alias(disk):
    own, champion = disk.run(), disk.run()
    disk.client.set_registered_model_alias(disk.model, "champion", disk.version(champion))
    set_aside(join(disk.url, champion), ".attempt-1")
    disk.age(f"{champion}.attempt-1", 99)
    assert disk.apply(own).lines == []
    assert disk.names() == {own, f"{champion}.attempt-1"}


def test_a_registry_that_cannot_be_asked_keeps_its_runs_and_is_asked_once(disk, tmp_path):
    closed = f"http://127.0.0.1:{free_port()}"
    own, asked = disk.run(), disk.run(days=99)
    away = {disk.run(days=99, uri=closed) for _ in range(3)}
    said = disk.apply(own)
    (warning,) = said.warnings()
    assert closed in warning
    assert disk.names() == {own, *away}
    assert asked not in disk.names()


def test_a_database_that_is_not_there_is_not_made_and_keeps_its_runs(disk, tmp_path):
    own, old = disk.run(), disk.run(days=99, uri=f"sqlite:///{tmp_path / 'gone' / 'mlflow.db'}")
    (warning,) = disk.apply(own).warnings()
    assert "gone/mlflow.db" in warning
    assert disk.names() == {own, old}
    assert not (tmp_path / "gone").exists()


def test_a_registry_that_does_not_know_the_model_keeps_its_run_and_a_deleted_version_does_not(disk):
    own, unknown = disk.run(), disk.run(days=99)
    disk.client.delete_registered_model(disk.model)
    (warning,) = disk.apply(own).warnings()
    assert f"must know the model {disk.model}" in warning
    disk.model, own_model = "known", disk.model
    deleted, other = disk.run(days=99), disk.run()
    disk.client.set_registered_model_alias(disk.model, "champion", disk.version(other))
    disk.client.delete_model_version(disk.model, disk.version(deleted))
    disk.model = own_model
    assert len(disk.apply(own).lines) == 2
    assert disk.names() == {own, unknown, other}


# Others at work


@pytest.mark.parametrize("host", ["", "elsewhere"])
def test_a_run_whose_lease_is_held_stays_without_waiting(place, host):
    own, held = place.run(), place.run(days=99)
    before = place.content(held)
    holder = Process(lease_url(join(place.url, held)), host, 60.0, 0.0)
    try:
        assert holder.says() == "ready"
        assert holder.do("hold").startswith("held")
        began = time.monotonic()
        assert place.apply(own).lines == []
        assert time.monotonic() - began < 15
        assert place.content(held) == before
        assert holder.do("state") == "kept"
        assert holder.do("release") == "released"
        assert len(place.apply(own).lines) == 1
        assert place.names() == {own}
    finally:
        holder.end()


def test_a_run_that_is_not_all_told_to_mlflow_stays(place):
    own, said_so, spooled = place.run(), place.run(days=99, waiting=2), place.run(days=99)
    registry.spool_of(open_folder(join(place.url, spooled))).append({"kind": "artifact", "name": SUMMARY})
    assert place.apply(own).lines == []
    assert place.names() == {own, said_so, spooled}


def test_a_run_that_an_unfinished_one_is_to_go_on_from_stays(place):
    own, shorter, done = place.run(), place.run(days=99), place.run(days=99)
    extends = {"checkpoint.extend_from": join(place.url, shorter)}
    longer = place.run(finished=False, **extends)
    finished = place.run(**{"checkpoint.extend_from": join(place.url, done)})
    place.apply(own)
    assert place.names() == {own, shorter, longer, finished}
    open_folder(join(place.url, longer)).write(SUMMARY, "{}")
    place.apply(own)
    assert place.names() == {own, longer, finished}


def test_a_run_is_extended_by_way_of_a_link_too_and_a_recipe_that_cannot_be_read_keeps_all(disk, tmp_path):
    own, shorter = disk.run(), disk.run(days=99)
    (tmp_path / "latest").symlink_to(Path(disk.url, shorter))
    longer = disk.run(finished=False, **{"checkpoint.extend_from": str(tmp_path / "latest")})
    assert disk.apply(own).lines == []
    Path(disk.url, longer, RECIPE).write_text("]")
    (warning,) = disk.apply(own).warnings()
    assert f"{longer}/{RECIPE}" in warning
    assert disk.names() == {own, shorter, longer}


def test_what_goes_wrong_is_a_warning(disk):
    own, odd, old = disk.run(), "swa-000000000000", disk.run(days=99)
    Path(disk.url, odd, SUMMARY).mkdir(parents=True)
    (warning,) = disk.apply(own).lines
    assert warning.startswith("warning: IsADirectoryError")
    assert disk.names() == {own, odd, old}


def test_storage_that_refuses_to_delete_is_a_warning(bucket):
    own, old = bucket.run(), bucket.run(days=99)
    aged = bucket.proxy.rule
    bucket.proxy.rule = lambda n, method, path: (
        answer_of("403 Forbidden", "AccessDenied") if "delete" in path else aged(n, method, path)
    )
    (warning,) = bucket.apply(own).lines
    assert old in warning
    assert "refuses to remove" in warning
    assert json.loads(bucket.content(old)[SUMMARY])["waiting"] == 0
    bucket.proxy.rule = aged
    assert bucket.apply(own).warnings() == []
    assert bucket.names() == {own}


# Kills

KILLED = """
import os, signal, sys
from swa_dist import config
from swa_dist.service import retention
from swa_dist.storage.folder import open_folder

class Silent:
    def say(self, line):
        pass

retention.versions.is_aliased = lambda *which: False  # which writes nothing, and is asked in the tests above
print("ready", flush=True)
for line in sys.stdin:
    recipe, url, moment = line.split()
    if (child := os.fork()) == 0:
        left = int(moment)
        os.environ["AWS_SDK_UA_APP_ID"] = f"{os.getpid()}-{left}"

        def count(event, arguments):
            global left
            if event in ("os.rename", "os.remove", "os.rmdir"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if not url.startswith("s3://"):
            sys.addaudithook(count)
        retention.apply(config.load(recipe), open_folder(url), Silent())
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def check_no_half_run(place, name, before):
    """What a kill left is the whole run, or nothing that looks like one."""
    found = place.content(name)
    if SUMMARY in found:
        assert {f: c for f, c in found.items() if f != ATTEMPT} == {f: c for f, c in before.items() if f != ATTEMPT}
        assert json.loads(found[ATTEMPT])["attempt"] == 1
    elif not is_s3(place.url):
        assert found == {}
        assert name not in place.names()
    else:
        assert not [file for file in found if file.endswith("manifest.json") or file in SPOOL_FILES]
        assert not found or json.loads(found[ATTEMPT])["removing"]


@pytest.mark.faults
def test_a_kill_at_any_moment_leaves_no_half_run_and_the_next_one_removes_the_rest(place, tmp_path):
    own, old, halves = place.run(), place.run(days=99), 0
    before, first = place.content(old), 0
    if is_s3(place.url):  # all requests before that change nothing of the run
        asked = len(place.proxy.seen)
        place.apply(own)
        requests = place.proxy.seen[asked:]
        first = next(
            n for n, request in enumerate(requests) if request.endswith(f"{old}/{ATTEMPT}") and "PUT" in request
        )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml(place.recipe(**{"retention.checkpoints": "all", "retention.run_days": DAYS})))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", KILLED], **pipes) as victims:
        assert victims.stdout.readline() == "ready\n"
        for moment in itertools.count(first):
            place.put(old, before)
            victims.stdin.write(f"{recipe} {join(place.url, own)} {moment}\n")
            victims.stdin.flush()
            code = int(victims.stdout.readline())
            check_no_half_run(place, old, before)
            halves += place.content(old) != before and place.names() != {own}
            said = place.apply(own)
            assert said.warnings() == []
            assert place.names() == {own}, f"killed at moment {moment}"
            if code == 0:
                assert said.lines == []
                break
        victims.stdin.close()
    assert halves >= 3


def test_a_run_that_is_begun_in_what_a_kill_left_is_nobodys_to_remove(bucket):
    own, old = bucket.run(), bucket.run(days=99)
    retention.open_runs(bucket.url).begin(old)
    folder = open_folder(join(bucket.url, old))
    state = folder.read_json(ATTEMPT)
    assert (state["attempt"], state["first_attempt"]) == (1, 2)  # another MLflow run
    assert not folder.store.names("checkpoints")
    folder.write(ATTEMPT, json.dumps({"attempt": 2, "first_attempt": 2}))
    before = bucket.content(old)
    assert bucket.apply(own).lines == []
    assert bucket.content(old) == before


# This run's own


def commit(folder, position, content=b"1"):
    name = f"checkpoints/{position:012d}"
    folder.store.commit(name, lambda at: (at / "model.safetensors").write_bytes(content) and None)
    return name


def spoil(place, own, entry):
    (file,) = [name for name in place.content(own) if name.startswith(entry) and name.endswith(".safetensors")]
    if is_s3(place.url):
        Prefix(join(place.url, own)).write(file, b"0")
    else:
        Path(place.url, own, file).write_bytes(b"0")


LAST = {"retention.checkpoints": "last", "retention.run_days": "forever"}


def test_the_last_checkpoint_stays_alone_and_the_candidates_all(place):
    own = place.run()
    folder = open_folder(join(place.url, own))
    last = [commit(folder, position, b"1" * 250_000) for position in (800, 1200)][-1]
    candidates = {name: c for name, c in place.content(own).items() if "candidates" in name}
    (line,) = place.apply(own, **LAST).lines
    assert line == f"removed 2 checkpoints of {folder.url}, all but the last: 350.0 kB"
    assert open_folder(folder.url).store.names("checkpoints") == [last]
    assert (open_folder(folder.url).store.open(last) / "model.safetensors").stat().st_size == 250_000
    assert len([n for n in place.content(own) if "checkpoints" in n]) == 2  # with its manifest
    assert {name: c for name, c in place.content(own).items() if "candidates" in name} == candidates
    assert place.apply(own, **LAST).lines == []


def test_a_damaged_last_checkpoint_is_named_and_the_valid_one_before_it_stays(place):
    own = place.run()
    folder = open_folder(join(place.url, own))
    valid, damaged = commit(folder, 800), commit(folder, 1200)
    spoil(place, own, damaged)
    said = place.apply(own, **LAST)
    assert damaged in said.warnings()[0]
    assert len(said.lines) == 2
    assert open_folder(folder.url).store.names("checkpoints") == [valid]


def test_where_no_checkpoint_is_valid_none_is_removed(place):
    own = place.run()
    folder = open_folder(join(place.url, own))
    for entry in (commit(folder, 400), commit(folder, 800)):
        spoil(place, own, entry)
    before = sorted(content for name, content in place.content(own).items() if "checkpoints" in name)
    assert len(place.apply(own, **LAST).warnings()) == 2
    assert sorted(content for name, content in place.content(own).items() if "checkpoints" in name) == before


def test_all_checkpoints_stay_if_they_are_to(place):
    own = place.run()
    commit(open_folder(join(place.url, own)), 800)
    before = place.content(own)
    assert place.apply(own, **LAST | {"retention.checkpoints": "all"}).lines == []
    assert place.content(own) == before


UNSENT = {"retention.checkpoints": "all", "retention.spools": "unsent", "retention.run_days": "forever"}


def told(place):
    """A run all of which MLflow was told, and its MLflow run."""
    own = place.run()
    folder = open_folder(join(place.url, own))
    row = {"kind": "row", "position": 64, "epoch": 0.1, "time_ms": 1_764_000_000_000, "metrics": {"loss": 1.0}}
    spool = registry.spool_of(folder)
    summary = folder.read_json(SUMMARY) | {"verdict": {"sentence": "It is better."}, "run_dir": folder.url}
    spool.append(row, {"kind": "status", "status": "FINISHED", "time_ms": 1_764_000_000_001})
    folder.write("registered.json", json.dumps(summary["registered"]))
    summary["mlflow"]["run_id"] = registry.send(folder, Silent())
    folder.write(SUMMARY, json.dumps(summary))
    spool.append({"kind": "artifact", "name": SUMMARY})
    registry.send(folder, Silent())
    return own, summary["mlflow"]["run_id"]


def record(place, run_id):
    """All that MLflow has of a run."""
    run = place.client.get_run(run_id)
    key = run.data.tags["swa.run_key"]
    runs = place.client.search_runs([run.info.experiment_id], f"tags.`swa.run_key` = '{key}'")
    history = [(m.step, m.value, m.timestamp) for m in place.client.get_metric_history(run_id, "loss")]
    artifacts = [file.path for file in place.client.list_artifacts(run_id)]
    return len(runs), history, artifacts, run.info.status, run.info.end_time, run.data.tags


@pytest.mark.parametrize("killed", [False, True])
def test_a_spool_that_is_sent_goes_and_a_replay_then_says_that_nothing_waits_and_doubles_nothing(place, killed):
    own, run_id = told(place)
    versions = len(place.client.search_model_versions(f"name = '{place.model}'"))
    before, spool = record(place, run_id), place.content(own)
    (line,) = place.apply(own, **UNSENT).lines
    size = sum(len(spool[file]) for file in SPOOL_FILES[:2])
    assert line == f"removed the spool of {join(place.url, own)}, all of which MLflow has: {size} bytes"
    assert {file for file in place.content(own) if file in SPOOL_FILES} == {SPOOL_FILES[2]}
    if killed:  # after the first of the two
        open_folder(join(place.url, own)).write(SPOOL_FILES[1], spool[SPOOL_FILES[1]].decode())
    said = Said()
    result.replay(join(place.url, own), said)
    assert said.lines == []
    assert open_folder(join(place.url, own)).read_json(SUMMARY)["waiting"] == 0
    assert record(place, run_id) == before
    assert len(place.client.search_model_versions(f"name = '{place.model}'")) == versions


@pytest.mark.parametrize("why", ["waiting", "unsent", "not told"])
def test_a_spool_that_is_not_all_sent_stays(place, why):
    own, _ = told(place)
    folder = open_folder(join(place.url, own))
    if why == "waiting":
        folder.write(SUMMARY, json.dumps(folder.read_json(SUMMARY) | {"waiting": 1}))
    elif why == "unsent":
        registry.spool_of(folder).append({"kind": "artifact", "name": SUMMARY})
    else:
        lines = [line for line in place.content(own)[SPOOL_FILES[0]].decode().splitlines() if SUMMARY not in line]
        folder.write(SPOOL_FILES[0], "\n".join(lines) + "\n")
    before = place.content(own)
    assert place.apply(own, **UNSENT).lines == []
    assert {f: c for f, c in place.content(own).items() if f != "spool.lock"} == {
        f: c for f, c in before.items() if f != "spool.lock"
    }
