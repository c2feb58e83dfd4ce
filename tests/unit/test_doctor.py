"""What a run depends on is looked at for real, each fault is named with what to do, and no secret is told."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from swa_dist import config
from swa_dist.service import doctor
from tests.support import JOBS, command, free_port, wait_for_port

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


@pytest.fixture
def find(monkeypatch):
    """The finding of one check. DALI, which takes seconds, is only looked at where it is asked for."""

    def one(check, recipe=None, address=None):
        if check != "DALI":
            monkeypatch.setattr(doctor, "_dali", lambda: doctor.Finding("", "skipped", "not asked for"))
        (finding,) = (f for f in doctor.examine(recipe, address, None) if f.check == check)
        return finding

    return one


@pytest.fixture
def answering():
    """Start a server that answers each request by a function of its headers: (status, headers, JSON)."""
    servers = []

    def start(answer):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = answer(self.headers)
                content = json.dumps(body).encode()
                self.send_response_only(status)
                for name, value in {"Content-Length": str(len(content)), "Date": self.date_time_string()}.items():
                    self.send_header(name, headers.get(name, value))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *ignored):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
    assert [path.name for path in (tmp_path / "runs").iterdir()] == []


def test_dali_decodes_here_in_a_process_of_its_own(find):
    finding = find("DALI")
    assert (finding.state, finding.found.split(" on ")[0]) == ("ok", "decodes")


def test_a_gpu_that_is_asked_for_and_not_there_is_broken(find, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    finding = find("GPUs", recipe_of(tmp_path, **{"cluster.gpus_per_worker": 1}))
    assert finding.state == "broken"
    assert "auto" in finding.remedy


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
    monkeypatch.setenv("RAY_AUTH_TOKEN", CANARIES["RAY_AUTH_TOKEN"])
    address = answering(
        lambda headers: (200 if headers["Authorization"] in accepts else 401, {}, {"ray_version": version})
    )
    finding = find("Ray cluster", address=address)
    assert (finding.state, says in finding.found) == (state, True), finding
    assert (state == "ok") == (finding.remedy == "")


def test_a_cluster_that_is_not_there_is_broken_in_seconds(find):
    began = time.monotonic()
    finding = find("Ray cluster", address=f"http://127.0.0.1:{free_port()}")
    assert finding.state == "broken"
    assert "ray[default]" in finding.remedy
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "MLFLOW_TRACKING_USERNAME"), (403, "--allowed-hosts"), (500, "server's log")]
)
def test_an_mlflow_server_that_refuses_is_told_apart(find, answering, tmp_path, status, remedy):
    uri = answering(lambda headers: (status, {}, {}))
    finding = find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri}))
    assert finding.state == "broken"
    assert str(status) in finding.found
    assert remedy in finding.remedy


def test_a_clock_that_is_off_is_a_warning(find, answering, tmp_path):
    uri = answering(lambda headers: (200, {"Date": "Tue, 24 Nov 2020 08:00:00 GMT"}, {}))
    finding = find("MLflow", recipe_of(tmp_path, **{"tracking.uri": uri}))
    assert finding.state == "warning"
    assert "NTP" in finding.remedy


def test_a_real_mlflow_server_answers_its_own_host_and_refuses_others(find, tmp_path):
    port = free_port()
    arguments = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}", "--allowed-hosts", f"localhost:{port}"),
    ]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(arguments, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_port(port, server)
        known, foreign = (
            find("MLflow", recipe_of(tmp_path, **{"tracking.uri": f"http://{host}:{port}"}))
            for host in ("localhost", "127.0.0.1")
        )
        assert known.state == "ok", known
        assert (foreign.state, "403" in foreign.found) == ("broken", True), foreign
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def test_storage_on_s3_is_tried_on_condition_and_left_as_it_was(find, s3, tmp_path):
    from swa_dist.storage.s3 import Prefix

    finding = find("output folder", recipe_of(tmp_path, **{"output.dir": f"{s3}/runs"}))
    assert (finding.state, "on condition too" in finding.found) == ("ok", True), finding
    assert Prefix(s3).names() == []


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


@pytest.mark.parametrize(("grace", "state"), [(None, "warning"), ("110", "broken"), ("109", "broken"), ("120", "ok")])
def test_in_kubernetes_the_drain_must_be_shorter_than_the_grace(find, monkeypatch, grace, state):
    assert find("drain before grace").state == "skipped"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "110")
    if grace is not None:
        monkeypatch.setenv("SWA_DIST_GRACE_SECONDS", grace)
    assert find("drain before grace").state == state


def test_a_check_that_fails_by_itself_does_not_end_the_others(monkeypatch):
    def failing():
        raise KeyError("x")

    monkeypatch.setattr(doctor, "_dali", failing)
    found = doctor.examine(None, None, None)
    assert {f.check: f.state for f in found}["DALI"] == "broken"
    assert len(found) > 5
    assert doctor.exit_code(found) == 69
    assert doctor.exit_code([f for f in found if f.state != "broken"]) == 0


def test_the_verb_prints_a_line_each_or_json_and_no_secret(tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    uri = f"http://127.0.0.1:{free_port()}"
    arguments = ("doctor", "digits", "--set", f"tracking.uri={uri}", "--address", uri)
    for extra in ((), ("--json",)):
        result = subprocess.run(
            command(*arguments, *extra), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 69
        assert "Traceback" not in result.stderr
        for value in CANARIES.values():
            assert value not in result.stdout + result.stderr
    states = {one["check"]: one["state"] for one in json.loads(result.stdout)}
    assert (states["MLflow"], states["Ray cluster"], states["Python"]) == ("broken", "broken", "ok")


def test_what_is_broken_is_shown_with_its_remedy(capsys):
    doctor.show([doctor.Finding("MLflow", "broken", "down [/x]", "start it")], Console(width=80))
    assert capsys.readouterr().out == "broken   MLflow: down [/x]\n         start it\n"
