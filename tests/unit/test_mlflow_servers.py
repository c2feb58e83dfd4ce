"""The registry on real MLflow servers: with users, behind a guard of host names, with artifacts proxied and on S3."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from tests.support import MlflowServer, digits_recipe, write_finished

pytestmark = pytest.mark.timeout(300)

Command = Callable[..., subprocess.CompletedProcess[str]]

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
    runs: str
    """Where the folders of runs are."""

    def run(self, name: str, share_right: float) -> Folder:
        """The folder of a finished run, which waits to be registered."""
        folder = open_folder(f"{self.runs}/{name}")
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


def log_in(monkeypatch: pytest.MonkeyPatch, user: str, password: str = PASSWORD) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)


def place_at(server: MlflowServer, few_digits: Path, runs: str) -> Place:
    fields = {
        "registry.model": NAME,
        "output.dir": runs,
        "model.arch": "shufflenet_v2_x0_5",
        "data.image_size": 32,
    }
    tracking.configure_client()
    return Place(server.uri, server.folder, digits_recipe(few_digits, models.RANDOM, **fields), runs)


@pytest.fixture
def guarded(few_digits: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """It has users, of whom a writer and a reader, knows its own host name only, and alone has access to S3."""
    own = Path(mlflow.server.auth.__file__).with_name("basic_auth.ini").read_text()
    # Without this each request would hash the password anew, which is half a second.
    (tmp_path / "auth.ini").write_text(f"{own}\nauth_cache_ttl_seconds = 60\n")
    secrets = {
        "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
        "MLFLOW_AUTH_CONFIG_PATH": str(tmp_path / "auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "a secret of a test",
    }
    arguments = ("--app-name", "basic-auth", "--allowed-hosts", "127.0.0.1:*", "--artifacts-destination", f"{s3}/kept")
    with MlflowServer(tmp_path, *arguments, environment=secrets) as server:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
            monkeypatch.delenv(name, raising=False)
        log_in(monkeypatch, "admin")
        for user in ("writer", "reader"):
            AuthServiceClient(server.uri).create_user(user, PASSWORD)
        log_in(monkeypatch, "writer")
        yield place_at(server, few_digits, str(tmp_path))


@pytest.fixture
def direct(few_digits: Path, s3: str, tmp_path: Path) -> Iterator[Place]:
    """Clients write artifacts to S3 themselves, and have their runs, and so the lease of promotions, there too."""
    arguments = ("--no-serve-artifacts", "--default-artifact-root", f"{s3}/kept")
    with MlflowServer(tmp_path, *arguments) as server:
        yield place_at(server, few_digits, f"{s3}/runs")


@pytest.mark.parametrize("which", ["guarded", "direct"])
def test_a_model_is_registered_promoted_rolled_back_and_used(
    which: str, request: pytest.FixtureRequest, few_digits: Path, swa_dist_here: Command
) -> None:
    place: Place = request.getfixturevalue(which)
    swa_dist = functools.partial(swa_dist_here, uri=place.uri)
    client = mlflow.MlflowClient(place.uri, place.uri)
    for name, share_right in (("first", 0.5), ("second", 1.0)):
        registry.send(place.run(name, share_right), Silent())
    assert client.get_registered_model(NAME).aliases == {"champion": "2", "previous": "1"}
    again = swa_dist("promote", NAME, "--version", "1")
    assert again.returncode == 10, again.stderr
    assert "does not become @champion" in again.stdout
    back = swa_dist("rollback", NAME, "--reason", "it was slow")
    assert back.returncode == 0, back.stderr
    assert client.get_registered_model(NAME).aliases["champion"] == "1"
    history = json.loads(swa_dist("history", NAME, "--json").stdout)
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


def test_mlflow_that_goes_away_just_after_a_registration_is_told_the_rest_and_the_ruling_is_kept(
    direct: Place, monkeypatch: pytest.MonkeyPatch, swa_dist_here: Command
) -> None:
    folder = direct.run("first", 1.0)

    def away(*arguments: object) -> None:
        raise ServiceError("MLflow must answer, but does not.")

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_PAUSES_SECONDS", ())
        patch.setitem(tracking._HANDLERS, "status", away)
        with pytest.raises(ServiceError, match="must answer"):
            registry.send(folder, Silent())
    elsewhere = open_folder(folder.url)  # another machine, which has nothing of the first one's disk
    assert [event["kind"] for event in registry.spool_of(elsewhere).waiting()] == ["status"]
    registry.send(elsewhere, Silent())
    assert (elsewhere.read_json(registry.REGISTERED) or {})["champion"]
    assert json.loads(swa_dist_here("history", NAME, "--json", uri=direct.uri).stdout)[0]["who"].endswith("in first")
    assert mlflow.MlflowClient(direct.uri, direct.uri).get_model_version(NAME, "1").aliases == ["champion"]


def test_a_user_who_may_only_read_is_told_so_and_what_waits_is_sent_by_one_who_may_write(
    guarded: Place, monkeypatch: pytest.MonkeyPatch, swa_dist_here: Command
) -> None:
    held = replace(guarded, recipe=config.replace(guarded.recipe, **{"registry.promote": "hold"}))
    registry.send(held.run("first", 0.5), Silent())
    folder = held.run("second", 1.0)
    log_in(monkeypatch, "reader")
    with pytest.raises(ServiceError, match=r"Permission denied.*Grant this user the right to write"):
        registry.send(folder, Silent())
    refused = swa_dist_here("promote", NAME, "--set", "registry.first=promote", uri=guarded.uri)
    assert refused.returncode == 69, refused.stderr
    assert "Grant this user the right to write this experiment and this registered model." in refused.stderr
    assert "Traceback" not in refused.stderr
    assert swa_dist_here("history", NAME, uri=guarded.uri).returncode == 0
    log_in(monkeypatch, "writer", "a wrong password")
    with pytest.raises(ServiceError, match=r"not authenticated.*MLFLOW_TRACKING_PASSWORD"):
        registry.send(folder, Silent())
    log_in(monkeypatch, "writer")
    told = swa_dist_here("history", NAME, uri=guarded.uri.replace("127.0.0.1", "localhost"))
    assert (told.returncode, "--allowed-hosts localhost:" in told.stderr) == (69, True), told.stderr
    registry.send(folder, Silent())
    found = mlflow.MlflowClient(guarded.uri, guarded.uri).get_registered_model(NAME)
    assert found.aliases == {"challenger": "2"}
    assert registry.spool_of(folder).waiting() == []
