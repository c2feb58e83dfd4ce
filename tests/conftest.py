"""What all tests share: an environment that leaves the machine alone, real images, weights fitted to them."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pytest

from tests import support


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A home of our own, no telemetry, no service that this machine happens to name, and Ctrl-C that is heard: a shell
    has what it starts in the background ignore it, and so all that this starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("HYPOTHESIS_STORAGE_DIRECTORY", str(tmp_path_factory.mktemp("hypothesis")))
        for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "XDG_CACHE_HOME", "TORCHELASTIC_RUN_ID"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real digits: train (400 images) and val (1,397)."""
    from swa_dist.data import digits as source

    root = tmp_path_factory.mktemp("digits") / "data"
    source.write(root)
    return root


@pytest.fixture(scope="session")
def few_digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All training images, and 97 of the validation images: no number of workers divides that either."""
    root = tmp_path_factory.mktemp("few") / "data"
    root.mkdir()
    (root / "train").symlink_to(digits / "train")
    for label in range(10):
        folder = root / "val" / str(label)
        folder.mkdir(parents=True)
        for image in islice(sorted((digits / "val" / str(label)).iterdir()), 10 if label < 7 else 9):
            (folder / image.name).symlink_to(image)
    return root


@pytest.fixture(scope="session")
def start_weights(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 fitted to the digits."""
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    support.run_workers(support.fit_start, 1, str(digits), str(path))
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real S3 server, moto's, in a process of its own."""
    port = support.free_port()
    arguments = [sys.executable, "-c", support.S3_SERVER, str(port)]
    few_at_a_time = os.environ | {"MOTO_S3_DEFAULT_MAX_KEYS": "20"}  # so that lists have pages
    with (tmp_path_factory.mktemp("s3") / "log").open("w") as log:
        server = subprocess.Popen(arguments, stdout=log, stderr=log, env=few_at_a_time)
    support.wait_for_port(port, server)
    yield f"http://127.0.0.1:{port}"
    server.kill()
    server.wait()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket; the environment leads to it, with keys that are the test's own."""
    return support.new_bucket(s3_server, monkeypatch)


@pytest.fixture
def swa_dist_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """A command of swa-dist about a registry, without the seconds in which a process imports everything."""
    from swa_dist import cli

    def run(*arguments: str, uri: str) -> "subprocess.CompletedProcess[str]":
        monkeypatch.setattr("sys.argv", ["swa-dist", *arguments, "--tracking-uri", uri])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow's, to copy: it takes seconds to make one."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "new.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first."""
    order = ["laws", "golden", "unit", "k8s", "distributed", "service", "faults"]
    items.sort(key=lambda item: order.index(item.path.parent.name))
