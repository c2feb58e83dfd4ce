"""What a run depends on is looked at for real, each fault is named with what to do, and no secret is told."""

import base64
import contextlib
import fcntl
import http.server
import json
import os
import resource
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from swa_dist import cli, config
from swa_dist.data import index
from swa_dist.data.scan import scan
from swa_dist.service import doctor, doctor_storage
from swa_dist.storage.s3 import Prefix
from tests.support import JOBS, MlflowServer, free_port

CANARIES = {
    "AWS_SECRET_ACCESS_KEY": "canary-of-s3",
    "MLFLOW_TRACKING_PASSWORD": "canary-of-mlflow",
    "RAY_AUTH_TOKEN": "canaryofray" * 4,
}


def recipe_of(tmp_path, **fields):
    located = {
        "data.train": str(tmp_path),
        "data.val": str(tmp_path),
        "output.dir": str(tmp_path / "runs"),
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    return config.replace(config.load(JOBS / "digits.yaml"), **(located | fields))


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    """No setting of whoever runs the tests decides a finding."""
    for name in os.environ:
        if name.startswith(("RAY_AUTH", "RAY_API", "RAY_JOB", "MLFLOW_TRACKING", "KUBERNETES_", "SWA_DIST_")):
            monkeypatch.delenv(name)


@pytest.fixture
def find(monkeypatch):
    """The finding of one check. DALI, which takes seconds, is only looked at where it is asked for."""

    def one(check, recipe=None, address=None):
        if check != "DALI":
            monkeypatch.setattr(doctor, "_dali", lambda: doctor.Finding("", "skipped", "not asked for"))
        found = doctor.examine(recipe, address, None)
        assert all(f.remedy for f in found if f.state in ("warning", "broken")), found
        (finding,) = (f for f in found if f.check == check)
        return finding

    return one


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `swa-dist` in this process: its exit code, what it printed, and its errors."""

    def run_command(*arguments):
        capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["swa-dist", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), *capsys.readouterr()

    return run_command


@pytest.fixture
def answering():
    """Start a server that answers each request by a function of its headers: (status, headers, JSON or text)."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = answer(dict(self.headers) | {"path": self.path})
                text = isinstance(body, str)
                content = (body if text else json.dumps(body)).encode()
                headers = {
                    "Content-Length": str(len(content)),
                    "Content-Type": "text/html" if text else "application/json",
                    "Date": self.date_time_string(),
                } | headers
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # of one who didn't wait for a slow answer
                    self.end_headers()
                    self.wfile.write(content)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *ignored):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_this_machine_is_fine(find, tmp_path):
    assert find("Python").state == "ok"
    assert "torch 2." in find("Python").found
    assert find("GPUs").state in ("ok", "skipped")
    assert find("home folder").state == "ok"
    assert find("Ray cluster").state == "skipped"
    for check in ("images", "output folder", "MLflow"):
        assert find(check, recipe_of(tmp_path)).state == "ok"
    assert list(tmp_path.iterdir()) == []


def test_dali_decodes_here_in_a_process_of_its_own(find):
    finding = find("DALI")
    assert (finding.state, finding.found.split(" on ")[0]) == ("ok", "decodes")


def test_a_gpu_that_is_asked_for_and_not_there_is_broken(find, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finding = find("GPUs", recipe_of(tmp_path, **{"cluster.gpus_per_worker": 1}))
    assert finding.state == "broken"
    assert "auto" in finding.remedy


@pytest.fixture
def two_cards(monkeypatch):
    """NVIDIA's driver with two GPUs; torch uses them if it is told to."""
    driver = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlSystemGetDriverVersion=lambda: "575.51",
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)

    def use(usable):
        card = types.SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))

    return use


def test_gpus_are_named_with_memory_driver_and_nccl(find, two_cards):
    two_cards(True)
    finding = find("GPUs")
    assert finding.state == "ok"
    assert finding.found.startswith("2: NVIDIA H100 with 80 GiB, NVIDIA H100 with 80 GiB; driver 575.51, CUDA ")
    assert finding.found.endswith("NCCL 2.27.3")


@pytest.mark.parametrize(("gpus", "state"), [("auto", "warning"), (1, "broken")])
def test_a_driver_whose_gpus_torch_cannot_use_is_told(find, two_cards, tmp_path, gpus, state):
    two_cards(False)
    finding = find("GPUs", recipe_of(tmp_path, **{"cluster.gpus_per_worker": gpus}))
    assert finding.state == state
    assert "575.51 has 2" in finding.found
    assert "driver" in finding.remedy


def test_a_torchvision_of_another_torch_is_broken(find, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    finding = find("Python")
    assert finding.state == "broken"
    assert "fit together" in finding.remedy


def test_a_dali_that_decodes_nothing_or_hangs_is_broken(find, monkeypatch):
    monkeypatch.setattr(doctor, "_DECODE", "raise SystemExit('no libnvjpeg')")
    finding = find("DALI")
    assert (finding.state, "no libnvjpeg" in finding.found) == ("broken", True)
    monkeypatch.setattr(doctor, "_DALI_SECONDS", 0.2)
    monkeypatch.setattr(doctor, "_DECODE", "import time; time.sleep(60)")
    finding = find("DALI")
    assert (finding.state, "0.2 s" in finding.found, finding.remedy != "") == ("broken", True, True)
    assert "sleep" not in finding.found


def test_little_shared_memory_is_a_warning(find, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=2**26) if path == "/dev/shm" else usage)
    finding = find("shared memory")
    assert (finding.state, finding.found) == ("warning", "/dev/shm has 0.1 GiB")
    assert "--shm-size" in finding.remedy


def test_few_open_files_are_a_warning(find, monkeypatch):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        finding = find("open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (finding.state, finding.found) == ("warning", "at most 1,024")
    assert "ulimit -n 65536" in finding.remedy
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert find("open files").state == "ok"


def test_a_home_that_cannot_be_written_is_a_warning_unless_the_token_is_elsewhere(find, monkeypatch):
    monkeypatch.setenv("HOME", "/proc")  # where root can't write either
    finding = find("home folder")
    assert finding.state == "warning"
    assert "RAY_AUTH_TOKEN" in finding.remedy
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/run/secrets/ray")
    assert find("home folder").state == "ok"


def test_scratch_space_that_is_not_there_or_small_is_told(find, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    finding = find("scratch space")
    assert (finding.state, "TMPDIR" in finding.remedy) == ("broken", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**30))
    assert find("scratch space").state == "warning"


VERSION = __import__("ray").__version__


@pytest.mark.parametrize(
    ("accepts", "version", "state", "says"),
    [
        (("Bearer canaryofray" + "canaryofray" * 3,), VERSION, "ok", "takes this token"),
        ((None, "Bearer " + "canaryofray" * 4), VERSION, "warning", "asks for no token"),
        (("Bearer other",), VERSION, "broken", "refuses this token"),
        ((None, "Bearer " + "canaryofray" * 4), "2.9.0", "broken", "has Ray 2.9.0"),
    ],
)
def test_a_ray_cluster_is_told_apart(find, answering, monkeypatch, accepts, version, state, says):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARIES["RAY_AUTH_TOKEN"])
    address = answering(
        lambda headers: (200 if headers.get("Authorization") in accepts else 401, {}, {"ray_version": version})
    )
    finding = find("Ray cluster", address=address)
    assert (finding.state, says in finding.found) == (state, True), finding
    assert (state == "ok") == (finding.remedy == "")


def cluster_that_wants(token):
    return lambda headers: (200 if headers.get("Authorization") == token else 401, {}, {"ray_version": VERSION})


def test_a_token_counts_as_rays_client_sends_it(find, answering, monkeypatch, tmp_path):
    address = answering(cluster_that_wants("Bearer canary"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary\n")
    finding = find("Ray cluster", address=address)
    assert (finding.state, "RAY_AUTH_MODE=token" in finding.remedy) == ("broken", True), finding
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert find("Ray cluster", address=address).state == "ok"
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer other"}')
    assert find("Ray cluster", address=address).state == "broken"
    monkeypatch.delenv("RAY_JOB_HEADERS")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("canary\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find("Ray cluster", address=address).state == "ok"


def test_headers_that_open_a_proxy_are_not_an_open_dashboard(find, answering, monkeypatch):
    address = answering(cluster_that_wants("Bearer of-the-proxy"))
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Authorization": "Bearer of-the-proxy"}')
    assert find("Ray cluster", address=address).state == "ok"


@pytest.mark.parametrize(("status", "body"), [(500, {}), (200, "<html>"), (200, {"version": "1"}), (200, [1])])
def test_what_is_no_jobs_server_is_broken(find, answering, status, body):
    finding = find("Ray cluster", address=answering(lambda headers: (status, {}, body)))
    assert (finding.state, f"answers {status}" in finding.found) == ("broken", True), finding
    assert "8265" in finding.remedy


def test_an_open_cluster_whose_clock_is_off_is_told_both(find, answering):
    date = {"Date": "Tue, 24 Nov 2020 08:00:00 GMT"}
    finding = find("Ray cluster", address=answering(lambda headers: (200, date, {"ray_version": VERSION})))
    assert finding.state == "warning"
    assert "asks for no token; this machine's clock is +" in finding.found
    assert "NTP" in finding.remedy


def test_a_cluster_that_is_not_there_is_broken_in_seconds(find):
    began = time.monotonic()
    finding = find("Ray cluster", address=f"http://127.0.0.1:{free_port()}")
    assert finding.state == "broken"
    assert "ray[default]" in finding.remedy
    assert time.monotonic() - began < 30


GUARD = "Invalid Host header - possible DNS rebinding attack detected"


@pytest.mark.parametrize(
    ("status", "body", "health", "remedy"),
    [
        (401, {}, 200, "MLFLOW_TRACKING_USERNAME"),
        (403, GUARD, 200, "--allowed-hosts 127.0.0.1:"),
        (403, "Permission denied", 200, "Grant"),
        (404, "Not found", 200, "address"),
        (500, {}, 200, "database"),
        (502, {}, 502, "server's log"),
        (200, "<html>Who are you?", 200, "login page"),
    ],
)
def test_an_mlflow_server_that_does_not_serve_is_told_apart(find, answering, tmp_path, status, body, health, remedy):
    uri = answering(lambda headers: (health, {}, "OK") if headers["path"] == "/health" else (status, {}, body))
    finding = find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri}))
    assert finding.state == "broken"
    assert str(status) in finding.found
    assert remedy in finding.remedy


def test_mlflow_is_told_who_asks_as_its_client_tells_it(find, answering, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = answering(lambda headers: (seen.append(headers.get("Authorization")), (200, {}, {}))[1])
    recipe = recipe_of(tmp_path, **{"tracking.uri": uri})
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "of-mlflow")
    find("MLflow", recipe)
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("[mlflow]\nmlflow_tracking_username = me\n")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "word")
    find("MLflow", recipe)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "you")
    find("MLflow", recipe)
    basic = [f"Basic {base64.b64encode(pair).decode()}" for pair in (b"me:word", b"you:word")]
    assert seen == ["Bearer of-mlflow", *basic]


def test_an_mlflow_that_is_down_or_slow_is_broken_in_time(find, answering, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.doctor_services, "_TIMEOUT_SECONDS", 0.5)
    done = threading.Event()
    slow = answering(lambda headers: (done.wait(30), (200, {}, {}))[1])
    began = time.monotonic()
    for uri in (f"http://127.0.0.1:{free_port()}", slow):
        finding = find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri}))
        assert (finding.state, "doesn't answer" in finding.found) == ("broken", True), finding
        assert "replay" in finding.remedy
    done.set()
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("uri", "state"), [("sqlite:////proc/mlflow.db", "broken"), ("postgresql://db/mlflow", "skipped")]
)
def test_an_mlflow_without_a_server_is_tried_as_far_as_it_can_be(find, tmp_path, uri, state):
    assert find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri})).state == state


def test_a_clock_that_is_off_is_a_warning(find, answering, tmp_path):
    uri = answering(lambda headers: (200, {"Date": "Tue, 24 Nov 2020 08:00:00 GMT"}, {}))
    finding = find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri}))
    assert finding.state == "warning"
    assert "NTP" in finding.remedy


def test_a_real_mlflow_server_answers_its_own_host_and_refuses_others(find, tmp_path):
    with MlflowServer(tmp_path, "--allowed-hosts", "localhost:*") as server:
        known, foreign = (
            find("MLflow", recipe_of(tmp_path, **{"tracking.uri": f"http://{host}:{server.port}"}))
            for host in ("localhost", "127.0.0.1")
        )
    assert known.state == "ok", known
    assert (foreign.state, "403" in foreign.found) == ("broken", True), foreign
    assert f"--allowed-hosts 127.0.0.1:{server.port}" in foreign.remedy


def bucket_finding(find, tmp_path, url):
    return find("output folder", recipe_of(tmp_path, **{"output.dir": url}))


def test_storage_on_s3_is_tried_step_by_step_and_left_as_it_was(find, s3, tmp_path):
    finding = bucket_finding(find, tmp_path, f"{s3}/runs")
    assert finding.state == "ok", finding
    assert "put, get, list, put if there is none, put on another version, put on this version, delete" in finding.found
    assert Prefix(s3).names() == []


@pytest.mark.parametrize(
    ("method", "does", "says", "remedy"),
    [
        ("swap", lambda self, name, content, version: '"1"', "put if there is none fails", "Two runs"),
        ("names", lambda self, under="": [], "list fails", "credentials"),
        ("read", lambda self, name: b"0", "get fails", "CHECKSUM"),
        ("remove", lambda self, *names: None, "delete fails", "policy"),
    ],
)
def test_a_step_on_s3_that_goes_wrong_is_named(find, s3, tmp_path, monkeypatch, method, does, says, remedy):
    monkeypatch.setattr(Prefix, method, does)  # as S3-compatible servers do, and none that can be had here
    finding = bucket_finding(find, tmp_path, f"{s3}/runs")
    assert (finding.state, says in finding.found, remedy in finding.remedy) == ("broken", True, True), finding
    assert "done: put" in finding.found
    monkeypatch.undo()


def test_a_probe_on_s3_goes_also_when_a_step_fails(find, s3, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "read", lambda self, name: b"0")
        assert bucket_finding(find, tmp_path, f"{s3}/runs").state == "broken"
    assert Prefix(s3).names() == []


def test_a_clock_that_is_off_s3s_is_a_warning(find, s3, answering, tmp_path, monkeypatch):
    late = answering(lambda headers: (403, {"Date": "Tue, 24 Nov 2020 08:00:00 GMT"}, {}))
    head = doctor_storage.requests.head
    monkeypatch.setattr(doctor_storage.requests, "head", lambda url, **settings: head(late, **settings))
    finding = bucket_finding(find, tmp_path, f"{s3}/runs")
    assert (finding.state, "NTP" in finding.remedy, "delete; this" in finding.found) == ("warning", True, True), finding


def test_a_disk_without_locks_is_broken(find, tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)  # as NFS with `nolock`
    finding = bucket_finding(find, tmp_path, str(tmp_path / "deep" / "runs"))
    assert (finding.state, "lock fails" in finding.found, "NFS" in finding.remedy) == ("broken", True, True), finding
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_not_there_and_a_disk_that_cannot_be_written_are_broken(find, s3, tmp_path):
    (tmp_path / "file").touch()
    for url in (f"{s3}-absent/runs", str(tmp_path / "file" / "runs")):
        finding = find("output folder", recipe_of(tmp_path, **{"output.dir": url}))
        assert finding.state == "broken"
        assert url in finding.found


def test_images_and_weights_that_are_not_there_are_broken(find, tmp_path):
    gone = recipe_of(tmp_path, **{"data.train": str(tmp_path / "gone"), "model.weights": str(tmp_path / "no.pth")})
    assert str(tmp_path / "gone") in find("images", gone).found
    assert find("starting weights", gone).state == "broken"
    unread = recipe_of(tmp_path, **{"data.index": str(tmp_path / "index")})
    assert find("images", unread).state == "broken"
    assert "swa-dist data index" in find("images", unread).found


def test_an_index_is_told_with_its_digest(find, tmp_path):
    roots = {split: tmp_path / split for split in ("train", "val")}
    for number, root in enumerate(roots.values()):
        for label in range(10):
            (root / str(label)).mkdir(parents=True)
            Image.new("RGB", (8, 8), (label, number, 0)).save(root / str(label) / "0.jpg")
    found = {split: scan(str(root), f"data.{split}") for split, root in roots.items()}
    for split, one in found.items():
        index.save(one, str(tmp_path / f"{split}.parquet"))
    fields = {f"data.{split}": str(root) for split, root in roots.items()} | {"data.index": str(tmp_path)}
    finding = find("images", recipe_of(tmp_path, **fields))
    assert (finding.state, "10 and 10" in finding.found) == ("ok", True), finding
    assert index.data_digest(found["train"], found["val"])[:12] in finding.found
    other = find("images", recipe_of(tmp_path, **fields | {"model.num_classes": 11}))
    assert (other.state, "`model.num_classes`" in other.found) == ("broken", True)


@pytest.mark.parametrize(("name", "state"), [("IMAGENET1K_V1", "ok"), ("IMAGENET1K_V9", "broken")])
def test_the_name_of_weights_must_be_known(find, tmp_path, name, state):
    finding = find("starting weights", recipe_of(tmp_path, **{"model.weights": name}))
    assert finding.state == state
    assert ("IMAGENET1K_V1" in finding.remedy) == (state == "broken")


@pytest.mark.parametrize(("grace", "state"), [(None, "warning"), ("110", "broken"), ("109", "broken"), ("120", "ok")])
def test_in_kubernetes_the_drain_must_be_shorter_than_the_grace(find, monkeypatch, grace, state):
    assert find("drain before grace").state == "skipped"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "110")
    if grace is not None:
        monkeypatch.setenv("SWA_DIST_GRACE_SECONDS", grace)
    assert find("drain before grace").state == state
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST")
    assert find("drain before grace").state == (state if grace is not None else "skipped")


@pytest.mark.parametrize(("drain", "state", "says"), [("0", "warning", "no notice"), ("soon", "broken", "'soon'")])
def test_a_drain_that_is_off_or_no_number_is_told(find, monkeypatch, drain, state, says):
    monkeypatch.setenv("SWA_DIST_GRACE_SECONDS", "120")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", drain)
    finding = find("drain before grace")
    assert (finding.state, says in finding.found) == (state, True), finding
    assert "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in finding.remedy


def test_a_check_that_fails_by_itself_does_not_end_the_others(monkeypatch):
    def failing():
        raise KeyError("x")

    monkeypatch.setattr(doctor, "_dali", failing)
    found = doctor.examine(None, None, None)
    assert {f.check: f.state for f in found}["DALI"] == "broken"
    assert len(found) > 5
    assert doctor.exit_code(found) == 69
    assert doctor.exit_code([f for f in found if f.state != "broken"]) == 0


def test_a_check_that_hangs_does_not_hold_up_the_others(find, monkeypatch):
    hanging = threading.Event()
    monkeypatch.setattr(doctor, "_home", hanging.wait)
    monkeypatch.setattr(doctor, "_CHECK_SECONDS", 1)
    began = time.monotonic()
    finding = find("home folder")
    hanging.set()
    assert (finding.state, finding.found) == ("broken", "no answer in 1 s")
    assert time.monotonic() - began < 30


def test_a_password_in_mlflows_address_ends_no_check_and_is_not_told(find, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:canary@secret@127.0.0.1:{free_port()}")
    recipe = recipe_of(tmp_path, **{"tracking.uri": "auto"})
    assert find("images", recipe).state == "ok"
    finding = find("MLflow", recipe)
    assert (finding.state, "holds a password" in finding.found) == ("broken", True), finding
    assert "canary" not in finding.found + finding.remedy
    assert "secret" not in finding.found + finding.remedy


@pytest.mark.parametrize(
    ("check", "variable", "value"),
    [
        ("Ray cluster", "RAY_AUTH_TOKEN", "canary-token\n"),
        ("Ray cluster", "RAY_JOB_HEADERS", '{"Authorization": "Bearer canary-token\\n"}'),
        ("Ray cluster", "RAY_API_SERVER_ADDRESS", "http://me:canary-token@127.0.0.1:9"),
        ("MLflow", "MLFLOW_TRACKING_TOKEN", "canary-token\n"),
        ("MLflow", "MLFLOW_TRACKING_URI", "postgresql://me:canary/token@db/mlflow"),
    ],
)
def test_a_setting_that_a_library_would_quote_is_not_told(find, answering, monkeypatch, check, variable, value):
    address = answering(lambda headers: (500, {}, {}))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address)
    monkeypatch.setenv(variable, value)
    assert "canary" not in json.dumps(find(check).facts())


def test_what_a_check_raises_is_told_without_the_secrets_on_one_line(monkeypatch, tmp_path):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "token").write_text("canary-in-a-file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_JOB_HEADERS", "canary-no-json")
    monkeypatch.setenv("SHORT_TOKEN", "s")  # masks no sentence

    def failing():
        raise OSError(
            f"it said:\n  {' '.join(CANARIES.values())} canary-in-a-file canary-no-json for s3://user:canary@host"
        )

    monkeypatch.setattr(doctor, "_dali", failing)
    (finding,) = (f for f in doctor.examine(None, None, None) if f.check == "DALI")
    assert finding.found == "OSError: it said: *** *** *** *** *** for s3://***@host"


def test_the_verb_prints_a_line_each_or_json_and_no_secret(run, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    uri = f"http://127.0.0.1:{free_port()}"
    code, text, errors = run("doctor", "digits", "--set", f"tracking.uri={uri}", "--address", uri)
    assert code == 69
    assert "broken   MLflow: " in text
    code, facts, more_errors = run("doctor", "digits", "--set", f"tracking.uri={uri}", "--address", uri, "--json")
    assert code == 69
    for value in CANARIES.values():
        assert value not in text + errors + facts + more_errors
    found = json.loads(facts)
    assert all(set(one) == {"check", "state", "found", "remedy"} for one in found)
    states = {one["check"]: one["state"] for one in found}
    assert (states["MLflow"], states["Ray cluster"], states["Python"]) == ("broken", "broken", "ok")
    assert states.keys() == {line[9:].split(":")[0] for line in text.splitlines() if line[:8].strip()}


def test_the_verb_without_a_recipe_ends_well_where_all_is_well(run):
    code, text, _ = run("doctor")
    assert code == 0
    assert "ok       DALI: decodes" in text
    assert "broken" not in text
    assert not list(Path.cwd().iterdir())


def test_what_is_broken_is_shown_with_its_remedy(capsys):
    doctor.show([doctor.Finding("MLflow", "broken", "down [/x]", "start it")], Console(width=80))
    assert capsys.readouterr().out == "broken   MLflow: down [/x]\n         start it\n"
