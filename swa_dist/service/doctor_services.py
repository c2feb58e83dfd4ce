"""What a run depends on elsewhere, looked at piece by piece: the Ray cluster, MLflow, the images, the storage."""

import importlib.metadata
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import requests

from swa_dist.config import Recipe
from swa_dist.service import identity
from swa_dist.storage import folder
from swa_dist.storage.lease import register

LEAST_FREE = 10 * 2**30

_TIMEOUT_SECONDS = 10
_MOST_SKEW_SECONDS = 60.0

State = Literal["ok", "warning", "broken", "skipped"]


@dataclass(frozen=True)
class Finding:
    check: str
    state: State
    found: str
    remedy: str = ""

    def facts(self) -> dict[str, str]:
        return asdict(self)


def ray_cluster(address: str | None, ca_file: Path | None) -> Finding:
    if address is None:
        return Finding("", "skipped", "no --address: runs on a Ray of its own")
    url = f"{address.rstrip('/')}/api/version"
    verify: bool | str = True if ca_file is None else str(ca_file)
    headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "{}"))
    token = _token()
    try:
        bare = requests.get(url, headers=headers, verify=verify, timeout=_TIMEOUT_SECONDS)
        given = {"Authorization": f"Bearer {token}"} if token else {}
        answer = requests.get(url, headers=headers | given, verify=verify, timeout=_TIMEOUT_SECONDS)
    except requests.RequestException as error:
        remedy = "Look at the address, at --ca-file, and whether the head runs with ray[default]."
        return Finding("", "broken", f"{address} doesn't answer: {error}", remedy)
    if answer.status_code in (401, 403):
        remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        return Finding("", "broken", f"{address} refuses {'this' if token else 'a missing'} token", remedy)
    theirs, mine = str(answer.json()["ray_version"]), importlib.metadata.version("ray")
    if theirs != mine:
        remedy = "Drivers and clusters of different versions of Ray don't talk: install one on both."
        return Finding("", "broken", f"{address} has Ray {theirs}, this machine {mine}", remedy)
    if late := _skew(answer):
        return late
    if bare.ok:
        remedy = "Anyone who reaches it can run code: start the head with RAY_AUTH_MODE=token."
        return Finding("", "warning", f"{address} has Ray {theirs}, and asks for no token", remedy)
    return Finding("", "ok", f"{address} has Ray {theirs}, and takes this token")


def _token() -> str:
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"]
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="ascii").strip() if path.is_file() else ""


def mlflow_server(recipe: Recipe | None) -> Finding:
    uri = recipe.tracking.uri if recipe is not None else "auto"
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    if not uri.startswith("http"):
        place = Path(uri.removeprefix("sqlite:///")).parent
        if uri.startswith("sqlite:///") and not os.access(place, os.W_OK):
            return Finding("", "broken", f"{uri} can't be written", f"Make {place} a folder that can be written.")
        return Finding("", "ok", f"{uri}, no server")
    headers, login = {}, None
    if os.environ.get("MLFLOW_TRACKING_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['MLFLOW_TRACKING_TOKEN']}"
    elif os.environ.get("MLFLOW_TRACKING_USERNAME"):
        login = (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
    try:
        answer = requests.get(
            f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/search",
            params={"max_results": 1},
            headers=headers,
            auth=login,
            verify=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True,
            timeout=_TIMEOUT_SECONDS,
        )
    except requests.RequestException as error:
        remedy = "Runs go on without it; `swa-dist replay` sends what waited."
        return Finding("", "broken", f"{uri} doesn't answer: {error}", remedy)
    remedies = {
        401: "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.",
        403: "The server takes only hosts that it knows, or this user may not: start it with --allowed-hosts"
        " HOST:PORT, or grant the rights.",
    }
    if not answer.ok:
        remedy = remedies.get(answer.status_code, "Look at the server's log.")
        return Finding("", "broken", f"{uri} answers {answer.status_code} {answer.reason}", remedy)
    return _skew(answer) or Finding("", "ok", f"{uri} answers")


def _skew(answer: requests.Response) -> Finding | None:
    """A warning where this machine's clock is far from the server's."""
    if "Date" not in answer.headers:
        return None
    seconds = time.time() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
    if abs(seconds) < _MOST_SKEW_SECONDS:
        return None
    remedy = "Set the clock by NTP: S3 refuses requests that are 15 minutes off, and logs don't fit together."
    return Finding("", "warning", f"this machine's clock is {seconds:+.0f} s off that of {answer.url}", remedy)


def images(recipe: Recipe) -> Finding:
    if recipe.data.index != identity.SCAN:
        train, val = identity.named(recipe)
        return Finding("", "ok", f"{len(train):,} and {len(val):,} in the indices in {recipe.data.index}")
    missing = [root for root in (recipe.data.train, recipe.data.val) if not Path(root).is_dir()]
    if missing:
        return Finding("", "broken", f"{' and '.join(missing)} not there", "Set `data.train` and `data.val`.")
    remedy = "To submit from elsewhere: swa-dist data index --recipe RECIPE --set data.index=FOLDER."
    return Finding("", "ok", f"{recipe.data.train} and {recipe.data.val}, read at each start", remedy)


def starting_weights(recipe: Recipe) -> Finding:
    weights = recipe.model.weights
    if not identity.elsewhere(weights) and not Path(weights).is_file():
        return Finding("", "broken", f"{weights} is not there", "Set `model.weights`.")
    if recipe.model.weights_sha256 == "auto":
        remedy = "`model.weights_sha256` would pin them, and spare a submitter the download."
        return Finding("", "ok", weights, remedy)
    return Finding("", "ok", f"{weights}, pinned")


def output_folder(url: str) -> Finding:
    folder.check_writable(url)
    held = folder.join(url, f".doctor-{uuid.uuid4().hex}")
    for problem in _conditional_writes(held):
        remedy = "Old S3-compatible servers: set AWS_REQUEST_CHECKSUM_CALCULATION=when_required, or update the server."
        return Finding("", "broken", f"{url}: {problem}", remedy)
    found = f"{url} can be written, on condition too"
    if not folder.is_s3(url):
        free = shutil.disk_usage(url).free
        found += f"; {free / 2**30:.0f} GiB free"
        if free < LEAST_FREE:
            return Finding("", "warning", found, "A ResNet-152 run keeps some 3 GB: make room.")
    return Finding("", "ok", found)


def _conditional_writes(url: str) -> Iterator[str]:
    """What is wrong with the storage's writes on condition, which keep two runs from one folder."""
    lock = register(url)
    try:
        first = lock.swap(b"1", None)
        if first is None:
            yield "a first write on condition is refused"
        elif lock.swap(b"2", None) is not None:
            yield "a write that must only create does overwrite"
        elif lock.swap(b"2", "another") is not None:
            yield "a write on condition of another version is done"
        elif (seen := lock.look()) is None or seen.content != b"1":
            yield "what was written is not what is read"
    finally:
        folder.remove(url)
        if not folder.is_s3(url):
            folder.remove(f"{url}.lock")
