"""Real worker processes for tests, and the runs that several tests are about."""

import contextlib
import datetime
import http.client
import http.server
import ipaddress
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.storage.folder import Folder
from swa_dist.training.evaluate import Outcomes
from swa_dist.training.ports import Tracker
from swa_dist.training.state import Row, save_entry
from swa_dist.training.world import SoloWorld, TorchWorld, World

JOBS = Path(__file__).parent.parent / "jobs"
TIMEOUT_SECONDS = 60
SECRET_KEY = "secret-key-of-tests"

# Workers are forked from a server that has imported torch and run nothing: they start in a moment, and none is the
# child of a process in which a DALI pipeline ran, which would hang.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.preloaded"])


class WorkerError(Exception):
    """A worker raised; its traceback is the message."""


def start_workers(work: Callable[..., Any], size: int, *args: Any) -> "Workers":
    """Start `work(world, *args)` in `size` processes that form a gloo group. `work` must be importable by name."""
    rendezvous = Path(tempfile.mkdtemp(prefix="swa-test-")) / "rendezvous"
    pipes = [_context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        _context.Process(target=_worker, args=(work, rank, size, str(rendezvous), pipes[rank][1], args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    return Workers(processes, [receiver for receiver, _ in pipes])


def run_workers(work: Callable[..., Any], size: int, *args: Any) -> list[Any]:
    """What `work(world, *args)` returned in each of `size` processes, by rank. Raises WorkerError."""
    return start_workers(work, size, *args).results()


class Workers:
    """Running workers."""

    def __init__(self, processes: Sequence[Any], receivers: Sequence[Connection]) -> None:
        self.processes = processes
        self._receivers = receivers

    def results(self, timeout_seconds: float = 180) -> list[Any]:
        found = []
        try:
            for rank, receiver in enumerate(self._receivers):
                if not receiver.poll(timeout_seconds):
                    raise WorkerError(f"rank {rank} did not answer in {timeout_seconds} s")
                try:
                    ok, value = receiver.recv()
                except EOFError:
                    raise WorkerError(f"rank {rank} died") from None
                if not ok:
                    raise WorkerError(f"rank {rank}: {value}")
                found.append(value)
        finally:
            self.kill()
        return found

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _worker(
    work: Callable[..., Any], rank: int, size: int, rendezvous: str, sender: Connection, args: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    try:
        world: World = SoloWorld()
        if size > 1:
            world = joined(rendezvous, rank, size, TIMEOUT_SECONDS)
        sender.send((True, work(world, *args)))
    except BaseException:
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
        os._exit(0)  # not through atexit: what gloo or DALI do there can hang when a peer was killed


def joined(rendezvous: str, rank: int, size: int, timeout_seconds: float) -> TorchWorld:
    """Collective: the processes that meet at this file, as a gloo group."""
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size, timeout=timeout)
    return TorchWorld(torch.device("cpu"), timeout_seconds)


def digits_recipe(digits: str | Path, weights: str | Path, **fields: Any) -> Recipe:
    """The digits recipe on these images and weights, for one process."""
    located = {
        "data.train": str(Path(digits) / "train"),
        "data.val": str(Path(digits) / "val"),
        "model.weights": str(weights),
        "cluster.launcher": "process",
        "cluster.num_workers": 1,
    }
    return config.replace(config.load(JOBS / "digits.yaml"), **(located | fields))


def fit_start(world: World, digits: str, path: str) -> None:
    from swa_dist.service import quickstart
    from swa_dist.service.progress import Lines

    recipe = digits_recipe(digits, path)
    quickstart.train_start(recipe, quickstart.digits_loaders(recipe), Path(path), Lines(sys.stdout), epochs=6)


class Recorder(Tracker):
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.warnings: list[str] = []

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        pass

    def publish(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def command(*arguments: str) -> list[str]:
    """`swa-dist` of this environment."""
    return [sys.executable, "-m", "swa_dist", *arguments]


def swa_dist(*arguments: str, cwd: Path, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run `swa-dist` to its end."""
    return subprocess.run(
        command(*arguments), cwd=cwd, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )


def marked(variable: str, value: str) -> dict[int, str]:
    """The processes that have `variable=value` in their environment: their command lines by id. Not this one."""
    mark = f"{variable}={value}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ended = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if (
                not ended
                and mark in (process / "environ").read_bytes().split(b"\0")
                and int(process.name) != os.getpid()
            ):
                found[int(process.name)] = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def left_behind(variable: str, value: str) -> list[str]:
    """The command lines of the processes that have `variable=value` in their environment, after a moment to end."""
    time.sleep(2)
    return list(marked(variable, value).values())


def end_marked(variable: str, value: str) -> None:
    """End the processes that have `variable=value` in their environment, with all that they started, and wait until
    they have ended. Ray's agents write their title over their environment: they are found as children alone."""
    ending: set[psutil.Process] = set()
    deadline = time.monotonic() + 30
    while True:
        for pid in marked(variable, value):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                ending |= {process, *process.children(recursive=True)}
        ending = {process for process in ending if _lives(process)}
        if not ending:
            return
        assert time.monotonic() < deadline, ending
        for process in ending:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.2)


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        number: int = held.getsockname()[1]
        return number


class Said:
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass

    def count(self, text: str) -> int:
        """The lines that hold a text."""
        return sum(text in line for line in self.lines)

    def warnings(self) -> list[str]:
        return [line for line in self.lines if line.startswith("warning: ")]


class MlflowServer:
    """A real MLflow server on loopback, which can be ended and started again. `arguments` are more of its own."""

    def __init__(self, folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._arguments = arguments
        self._environment = environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "MlflowServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        if self._process is not None:
            return
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)),
                    *("--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"),
                    *(self._arguments or ("--artifacts-destination", str(self.folder / "artifacts"))),
                ],
                cwd=self.folder,
                # Without what runs jobs, eight processes that nothing here needs.
                env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for_port(self.port, self._process)

    def signal(self, number: int) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
        self._process = None


def certificate(folder: Path) -> tuple[Path, Path]:
    """Files of a certificate of 127.0.0.1, signed by itself, and of its key."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "server.crt", folder / "server.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


def wait_for_port(port: int, server: "subprocess.Popen[Any]") -> None:
    """Until the server listens on loopback."""
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert server.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        else:
            return


# moto's server, which looks at the condition of a write and then writes: two at once can both be let through.
S3_SERVER = """
import io, sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

moto, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

def serve(environ, start_response):
    if environ["REQUEST_METHOD"] != "PUT" or not {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & set(environ):
        return moto(environ, start_response)
    environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
    with one_at_a_time:
        return moto(environ, start_response)

run_simple("127.0.0.1", int(sys.argv[1]), serve, threaded=True, request_handler=MotoRequestHandler)
"""


class Proxy(http.server.ThreadingHTTPServer):
    """In front of an S3 server, on loopback. `rule(number, method, path)` says what becomes of each request:

    "" it is answered; "cut" it is not even heard; "deaf" it is done, and its answer is lost; otherwise the answer
    itself, from the status line on. A client whose AWS_SDK_UA_APP_ID is PID-N is killed before its request N is heard.
    """

    daemon_threads = True

    def __init__(self, server: str, rule: Callable[[int, str, str], str] = lambda number, method, path: "") -> None:
        super().__init__(("127.0.0.1", 0), _Forward)
        self.upstream = server.removeprefix("http://")
        self.rule = rule
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.seen: list[str] = []
        """What was asked for."""
        self._by_client: dict[str, int] = {}
        self._counting = threading.Lock()

    def __enter__(self) -> "Proxy":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.server_close()

    def fate(self, method: str, path: str, client: str) -> str:
        with self._counting:
            number = len(self.seen)
            self.seen.append(f"{method} {path}")
            if victim := re.search(r"app/(\d+)-(\d+)", client):
                own = self._by_client[victim[0]] = self._by_client.get(victim[0], -1) + 1
                if own >= int(victim[2]):
                    os.kill(int(victim[1]), signal.SIGKILL)
                    return "cut"
        return self.rule(number, method, path)

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that were killed


class _Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fate = self.server.fate(self.command, self.path, self.headers.get("User-Agent", ""))
        self.close_connection = True
        if fate not in ("", "cut", "deaf"):
            self.wfile.write(f"HTTP/1.1 {fate}".encode())
        if fate not in ("", "deaf"):
            return
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)
        unforwarded = ("connection", "expect")
        kept = {name: value for name, value in self.headers.items() if name.lower() not in unforwarded}
        upstream.request(self.command, self.path, body, kept)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if fate == "deaf":
            return
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = do_DELETE = _forward  # noqa: N815 - http.server's names


def answer_of(status: str, code: str) -> str:
    """An error of S3, for `Proxy`."""
    body = f"<Error><Code>{code}</Code><Message>no</Message></Error>"
    return f"{status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n{body}"


def new_bucket(server: str, patch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket of an S3 server that the environment then leads to."""
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        patch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        patch.delenv(name, raising=False)
    bucket = f"swa-{uuid.uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{server}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}"


def swa_dist_forked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`swa-dist` in a process that need not import torch first: ten times faster than `swa_dist`."""
    scratch = Path(tempfile.mkdtemp(prefix="swa-test-"))
    (code,) = run_workers(_main, 1, list(arguments), str(cwd), str(scratch))
    printed = [(scratch / name).read_text(encoding="utf-8") for name in ("out", "err")]
    return subprocess.CompletedProcess(list(arguments), code, *printed)


def _main(world: World, arguments: list[str], cwd: str, scratch: str) -> int:
    from swa_dist import cli

    os.chdir(cwd)
    sys.argv = ["swa-dist", *arguments]
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(f"{scratch}/{name}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(d, "w", closefd=False) for d in (1, 2))
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def write_finished(folder: Folder, recipe: Recipe, share_right: float = 1.0) -> None:
    """What a run of this recipe leaves for its registration: its candidate with outcomes, a share of them right, its
    images, its summary."""
    from swa_dist.data import index
    from swa_dist.data.scan import scan

    val = scan(recipe.data.val, "data.val")
    right = torch.arange(len(val)) < share_right * len(val)
    outcomes = Outcomes.of(
        {
            "outcomes/ids": torch.arange(len(val)),
            "outcomes/top1": right,
            "outcomes/top5": torch.ones(len(val), dtype=torch.bool),
            "outcomes/nll": torch.zeros(len(val), dtype=torch.float64),
            "outcomes/confidence": torch.ones(len(val), dtype=torch.float64),
        }
    )
    weights = models.build(recipe.model, 0).state_dict()
    save_entry(folder.store, "candidates/swa", {"model": weights, "outcomes": outcomes.tensors()}, {})
    index.save(val, f"{folder.url}/val.parquet")
    verdict = {"better_than_start": True, "better_than_last": True, "sentence": "better than both"}
    summary = {
        "name": recipe.name,
        "run_key": "0" * 64,
        "attempt": 1,
        "arch": recipe.model.arch,
        "epochs": recipe.optim.epochs,
        "weights": {"source": recipe.model.weights, "sha256": "0" * 64},
        "data": {"name": recipe.data.name, "digest": "0" * 64, "val_images": len(val)},
        "phases": {"train": {"images": 2000}},
        "candidates": {"swa": outcomes.metrics()},
        "control": "last",
        "candidate": "swa",
        "average": {"iterates": [400], "regime": "replicated"},
        "recalibration": {"num_layers": 20, "num_images": 400},
        "paired": [],
        "verdict": verdict,
    }
    folder.write("summary.json", json.dumps(summary))
