"""What a run depends on elsewhere, looked at piece by piece: the Ray cluster, MLflow, the images, the weights."""

import configparser
import functools
import importlib.metadata
import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import requests

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.data import index
from swa_dist.data.files import files_at
from swa_dist.service import identity, mlflow_refusals

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
    headers = json.loads(os.environ.get("RAY_JOB_HEADERS", "{}"))
    token = _ray_token() if "authorization" not in map(str.lower, headers) else ""
    ask = functools.partial(
        requests.get,
        f"{address.rstrip('/')}/api/version",
        verify=True if ca_file is None else str(ca_file),
        timeout=_TIMEOUT_SECONDS,
    )
    try:
        stranger = ask(allow_redirects=False)
        answer = ask(headers=headers | ({"Authorization": f"Bearer {token}"} if token else {}))
    except requests.RequestException as error:
        remedy = "Look at the address, http://HEAD:8265, at --ca-file, and whether the head runs with ray[default]."
        return Finding("", "broken", f"{address} doesn't answer: {error}", remedy)
    if answer.status_code in (401, 403):
        remedy = "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's."
        return Finding("", "broken", f"{address} refuses {'this' if token else 'a missing'} token", remedy)
    theirs, mine = _ray_version(answer), importlib.metadata.version("ray")
    if theirs is None:
        remedy = "Give --address the jobs server's address, http://HEAD:8265; if it is, look at the head's log."
        return Finding("", "broken", f"{address} answers {answer.status_code}, and not as Ray's jobs server", remedy)
    if theirs != mine:
        remedy = "Drivers and clusters of different versions of Ray don't talk: install one on both."
        return Finding("", "broken", f"{address} has Ray {theirs}, this machine {mine}", remedy)
    if _ray_version(stranger) is not None:
        remedy = "Anyone who reaches it can run code: start the head with RAY_AUTH_MODE=token."
        return timed(answer, Finding("", "warning", f"{address} has Ray {theirs}, and asks for no token", remedy))
    return timed(answer, Finding("", "ok", f"{address} has Ray {theirs}, and takes this token"))


def _ray_version(answer: requests.Response) -> str | None:
    facts = _json(answer)
    return str(facts["ray_version"]) if answer.ok and "ray_version" in facts else None


def _ray_token() -> str:
    """The token that Ray's client sends, "" where it sends none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return ""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def mlflow_server(recipe: Recipe | None) -> Finding:
    uri = recipe.tracking.uri if recipe is not None else "auto"
    if uri == "auto":
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').resolve()}"
    if config.holds_credentials(uri):
        remedy = "Take it out: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and an address without it."
        return Finding("", "broken", f"{uri} holds a password, and a recipe's run refuses that", remedy)
    if uri.startswith("sqlite:///"):
        place = Path(uri.removeprefix("sqlite:///")).parent
        try:
            with tempfile.TemporaryFile(dir=place):
                return Finding("", "ok", f"{uri}, no server")
        except OSError:
            return Finding("", "broken", f"{uri} can't be written", f"Make {place} a folder that can be written.")
    if not uri.startswith(("http://", "https://")):
        return Finding("", "skipped", f"{uri}: only servers and SQLite files are tried")
    try:
        answer = _ask_mlflow(uri, "/api/2.0/mlflow/experiments/search", {"max_results": "1"})
        if answer.ok and answer.headers.get("Content-Type", "").startswith("application/json"):
            return timed(answer, Finding("", "ok", f"{uri} answers"))
        remedy = _mlflow_remedy(uri, answer)
    except requests.RequestException as error:
        remedy = "Start it, or look at the address; runs go on without it, and `swa-dist replay` sends what waited."
        return Finding("", "broken", f"{uri} doesn't answer: {error}", remedy)
    return Finding("", "broken", f"{uri} answers {answer.status_code} {answer.reason}, and not as it must", remedy)


def _mlflow_remedy(uri: str, answer: requests.Response) -> str:
    """What to do about an answer that is none of MLflow's."""
    if answer.ok:
        return "It may be a login page or another service: look at the address."
    refused = mlflow_refusals.remedy(uri, answer.status_code, answer.text)
    if refused is not None:
        return refused
    if answer.status_code >= 500 and _ask_mlflow(uri, "/health", {}).ok:
        return "Its /health is fine: look at its database, and at its log."
    return "Look at the address, and at the server's log."


def _ask_mlflow(uri: str, path: str, params: dict[str, str]) -> requests.Response:
    """As MLflow's client does: a user with a password comes before a token, a variable before ~/.mlflow/credentials."""
    kept = configparser.ConfigParser(interpolation=None)
    kept.read(Path.home() / ".mlflow" / "credentials")
    user, password = (
        str(os.environ.get(name) or kept.get("mlflow", name.lower(), fallback=""))
        for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    )
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    unchecked = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    return requests.get(
        uri.rstrip("/") + path,
        params=params,
        headers={"Authorization": f"Bearer {token}"} if token else {},
        auth=(user, password) if user and password else None,  # wins
        verify=not unchecked and (os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or True),
        timeout=_TIMEOUT_SECONDS,
    )


def _json(answer: requests.Response) -> dict[str, object]:
    try:
        found = answer.json()
    except requests.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def timed(answer: requests.Response, finding: Finding) -> Finding:
    """The finding, as a warning where this machine's clock is far from the answering server's."""
    try:
        seconds = time.time() - parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return finding
    if abs(seconds) < _MOST_SKEW_SECONDS:
        return finding
    found = f"{finding.found}; this machine's clock is {seconds:+.0f} s off its own"
    remedy = "Set the clock by NTP: S3 refuses requests that are 15 minutes off, and logs don't fit together."
    state: State = "broken" if finding.state == "broken" else "warning"
    return Finding("", state, found, f"{finding.remedy} {remedy}".strip())


def images(recipe: Recipe) -> Finding:
    if recipe.data.index != identity.SCAN:
        train, val = identity.named(recipe)
        index.check_pair(train, val, recipe.model.num_classes)
        found = f"{len(train):,} and {len(val):,} in the indices in {recipe.data.index}"
        return Finding("", "ok", f"{found}, digest {index.data_digest(train, val)[:12]}")
    missing = [root for root in (recipe.data.train, recipe.data.val) if not files_at(root).exists()]
    if missing:
        return Finding("", "broken", f"{' and '.join(missing)} not there", "Set `data.train` and `data.val`.")
    return Finding("", "ok", f"{recipe.data.train} and {recipe.data.val}, read at each start; no index to submit with")


def starting_weights(recipe: Recipe) -> Finding:
    weights = recipe.model.weights
    if not identity.elsewhere(weights) and not Path(weights).is_file():
        return Finding("", "broken", f"{weights} is not there", "Set `model.weights`.")
    if identity.is_torchvision_name(weights):
        from torchvision.models import get_model_weights  # seconds, which only such names cost

        known = get_model_weights(recipe.model.arch).__members__
        if weights not in known:
            remedy = f"Set `model.weights` to one of {', '.join(known)}."
            return Finding("", "broken", f"{weights} is no name of weights of {recipe.model.arch}", remedy)
    pinned = recipe.model.weights_sha256 != "auto"
    return Finding("", "ok", f"{weights}, {'pinned' if pinned else 'not pinned by `model.weights_sha256`'}")
