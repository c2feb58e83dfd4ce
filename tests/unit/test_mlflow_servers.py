"""The registry on real MLflow servers: with users, behind a guard of host names, with artifacts proxied and on S3."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pytest
from mlflow.server.auth.client import AuthServiceClient

from swa_dist import config, models
from swa_dist.errors import ServiceError
from swa_dist.service import registry, tracking
from swa_dist.service.progress import Silent
from swa_dist.service.spool import Target
from swa_dist.storage.folder import Folder, open_folder
from tests.support import MlflowServer, command, digits_recipe, write_finished

pytestmark = pytest.mark.timeout(300)

PASSWORD = "a long password of a test"
NAME = "digits"
END_MS = 1_764_000_999_000

ASKED = """
import sys
import mlflow
import pandas
model = mlflow.pyfunc.load_model("models:/digits@champion")
print(model.predict(pandas.DataFrame({"image": [open(sys.argv[1], "rb").read()]})))
"""


@dataclass
class Place:
    """A server, and the recipe of runs whose results are registered there."""

    uri: str
    folder: Path
    recipe: config.Recipe

    def run(self, name: str, share_right: float) -> Folder:
        """The folder of a finished run, which waits to be registered."""
        folder = open_folder(str(self.folder / name))
        write_finished(folder, self.recipe, share_right)
        run_key = name.ljust(64, "0")
        spool = registry.spool_of(folder)
        spool.open(Target(self.uri, experiment="made", run_name=name, run_key=run_key, first_attempt=1))
        spool.append(
            {
                "kind": "model",
                "recipe": config.to_tree(self.recipe),
                "uri": self.uri,
                "entry": "candidates/swa",
                "time_ms": END_MS,
                "tags": {"attempt": 1, "verdict": "better than both", "run_key": run_key},
            },
            {"kind": "status", "status": "FINISHED", "time_ms": END_MS},
        )
        return folder

    def swa_dist(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command(*arguments, "--tracking-uri", self.uri),
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str = PASSWORD) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def place_at(server: MlflowServer, few_digits: Path) -> Place:
    fields = {
        "registry.model": NAME,
        "output.dir": str(server.folder),
        "model.arch": "shufflenet_v2_x0_5",
        "data.image_size": 32,
    }
    tracking.configure_client()
    return Place(server.uri, server.folder, digits_recipe(few_digits, models.RANDOM, **fields))


@pytest.fixture
def guarded(few_digits: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """It has users, of whom a writer and a reader, knows its own host name only, and alone has access to S3."""
    secrets = {"MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD, "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of a test"}
    arguments = ("--app-name", "basic-auth", "--allowed-hosts", "127.0.0.1:*", "--artifacts-destination", f"{s3}/kept")
    with MlflowServer(tmp_path, *arguments, environment=secrets) as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        log_in(monkeypatch, "admin")
        for user in ("writer", "reader"):
            AuthServiceClient(server.uri).create_user(user, PASSWORD)
        log_in(monkeypatch, "writer")
        yield place_at(server, few_digits)


@pytest.fixture
def direct(few_digits: Path, s3: str, tmp_path: Path) -> Iterator[Place]:
    """Clients write artifacts to S3 themselves."""
    arguments = ("--no-serve-artifacts", "--default-artifact-root", f"{s3}/kept")
    with MlflowServer(tmp_path, *arguments) as server:
        yield place_at(server, few_digits)


@pytest.mark.parametrize("which", ["guarded", "direct"])
def test_a_model_is_registered_promoted_rolled_back_and_used(
    which: str, request: pytest.FixtureRequest, few_digits: Path
) -> None:
    place: Place = request.getfixturevalue(which)
    client = mlflow.MlflowClient(place.uri, place.uri)
    for name, share_right in (("first", 0.5), ("second", 1.0)):
        registry.send(place.run(name, share_right), Silent())
    assert client.get_registered_model(NAME).aliases == {"champion": "2", "previous": "1"}
    again = place.swa_dist("promote", NAME, "--version", "1")
    assert again.returncode == 10, again.stderr
    assert "does not become @champion" in again.stdout
    back = place.swa_dist("rollback", NAME, "--reason", "it was slow")
    assert back.returncode == 0, back.stderr
    assert client.get_registered_model(NAME).aliases["champion"] == "1"
    history = json.loads(place.swa_dist("history", NAME, "--json").stdout)
    assert [entry["kind"] for entry in history] == ["promoted", "promoted", "rejected", "rolled back"]
    image = next(path for path in (few_digits / "val").rglob("*") if path.is_file())
    asked = subprocess.run(
        [sys.executable, "-c", ASKED, str(image)],
        env=os.environ | {"MLFLOW_TRACKING_URI": place.uri},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert asked.returncode == 0, asked.stderr


def test_a_user_who_may_only_read_is_told_so_and_what_waits_is_sent_by_one_who_may_write(
    guarded: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.send(guarded.run("first", 0.5), Silent())
    folder = guarded.run("second", 1.0)
    log_in(monkeypatch, "reader")
    with pytest.raises(ServiceError, match=r"Permission denied.*Grant this user the right to write"):
        registry.send(folder, Silent())
    refused = guarded.swa_dist("rollback", NAME, "--reason", "-", "--to", "1")
    assert (refused.returncode, refused.stderr.count("Grant this user")) == (69, 1), refused.stderr
    assert "Traceback" not in refused.stderr
    assert guarded.swa_dist("history", NAME).returncode == 0
    log_in(monkeypatch, "writer", "a wrong password")
    with pytest.raises(ServiceError, match=r"not authenticated.*MLFLOW_TRACKING_PASSWORD"):
        registry.send(folder, Silent())
    log_in(monkeypatch, "writer")
    foreign = guarded.uri.replace("127.0.0.1", "localhost")
    told = subprocess.run(
        command("history", NAME, "--tracking-uri", foreign), capture_output=True, text=True, check=False, timeout=100
    )
    assert (told.returncode, "--allowed-hosts localhost:" in told.stderr) == (69, True), told.stderr
    registry.send(folder, Silent())
    assert mlflow.MlflowClient(guarded.uri, guarded.uri).get_registered_model(NAME).aliases["champion"] == "2"
    assert registry.spool_of(folder).waiting() == []
