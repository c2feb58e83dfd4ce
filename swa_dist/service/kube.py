"""Runs as RayJobs of a Kubernetes cluster, from the manifests in k8s/."""

import copy
import io
import re
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.errors import ConfigError, ExitCode, ServiceError
from swa_dist.service import identity, kube_rules
from swa_dist.service.kube_api import RayJobApi, RefusedError
from swa_dist.service.kube_rules import Tree
from swa_dist.service.layout import run_dir
from swa_dist.service.progress import Display
from swa_dist.service.submit import ENTRYPOINT, RECIPE_VARIABLE, Attempt, as_sent, pinned

RUN_KEY = "swa-dist/run-key"
RUN_DIR = "swa-dist/run-dir"
RECIPE = "swa-dist/recipe"

_TERMINAL = ("Complete", "Failed", "ValidationFailed")
_RENDER_SECONDS = 120


def render(overlay: str) -> list[Tree]:
    """What kustomize makes of an overlay of k8s/, by its name, or of a folder of one's own.

    Raises ConfigError for an overlay that is not there or not right, ServiceError where kubectl is missing.
    """
    package = Path(__file__).parents[1]
    known = {path.name: path for root in (package, package.parent) for path in root.glob("k8s/overlays/*/")}
    folder = known.get(overlay, Path(overlay))
    if not any((folder / name).is_file() for name in ("kustomization.yaml", "kustomization.yml", "Kustomization")):
        raise ConfigError(
            f"`OVERLAY` must be one of {', '.join(sorted(known))}, or a folder with a kustomization.yaml, but is"
            f" {overlay!r}."
        )
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise ServiceError("kubectl must be installed to render manifests, but is not on PATH. Install it.")
    try:
        made = subprocess.run(
            [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=_RENDER_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ServiceError(
            f"kubectl must render {folder} in {_RENDER_SECONDS} s, but did not. Try it by hand."
        ) from None
    if made.returncode:
        raise ConfigError(f"{folder} must be what kustomize takes, but is not: {made.stderr.strip()}")
    return [document for document in YAML(typ="safe", pure=True).load_all(made.stdout) if document]


def rendered(recipe: Recipe, overlay: str) -> str:
    """The documents of an overlay as YAML, with the RayJob of the first attempt at `recipe`, whose paths are the pods'.

    The key, and so the name, is told by the index that the recipe names: raises DataError where it can't be read.
    """
    documents = render(overlay)
    template = template_of(documents)
    there = pinned(identity.absolute_addresses(recipe))
    who = identity.identify(there)
    name, sent = config.attempt_name(who.run_key, 1), as_sent(there, who.weights_sha256)
    job = stamp(template, name=name, run_key=who.run_key, recipe=sent)
    out, writer = io.StringIO(), YAML()
    writer.width = 1000
    writer.dump_all([job if document is template else document for document in documents], out)
    return out.getvalue()


def template_of(documents: list[Tree]) -> Tree:
    """The one RayJob. Raises ConfigError where there is none, or more."""
    found = [document for document in documents if isinstance(document, dict) and document.get("kind") == "RayJob"]
    if len(found) != 1:
        raise ConfigError(f"the manifests must have one RayJob, but have {len(found)}. Take an overlay that has.")
    return found[0]


def load_template(path: Path) -> Tree:
    """The one RayJob in a YAML file. Raises ConfigError."""
    try:
        documents = list(YAML(typ="safe", pure=True).load_all(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"`--template` must be a YAML file with a RayJob, but {path} is not: {error}.") from None
    return template_of(documents)


def stamp(template: Tree, *, name: str, run_key: str, recipe: Recipe) -> Tree:
    """A copy of a RayJob that holds `recipe` whole and runs it. Raises ConfigError with all KubeRay would refuse."""
    job = copy.deepcopy(template)
    job.pop("status", None)
    metadata, spec = job.setdefault("metadata", {}), job.setdefault("spec", {})
    metadata["name"] = spec["jobId"] = name
    metadata["labels"] = (metadata.get("labels") or {}) | {
        RUN_KEY: run_key[:12],
        RECIPE: recipe.name.rstrip("-"),  # a label's value ends in a letter or digit
    }
    metadata["annotations"] = (metadata.get("annotations") or {}) | {
        RUN_KEY: run_key,
        RUN_DIR: run_dir(recipe.output.dir, run_key),
    }
    spec["entrypoint"] = ENTRYPOINT
    if found := kube_rules.problems(job):
        raise ConfigError("\n  ".join([f"RayJob {name}: {len(found)} problems", *found]))
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    # Kubernetes puts variables in for $(NAME), unless its dollar is doubled.
    value = config.to_yaml(recipe).replace("$", "$$")
    others = [item for item in head.get("env") or [] if item["name"] != RECIPE_VARIABLE]
    head["env"] = [*others, {"name": RECIPE_VARIABLE, "value": value}]
    return job


class Kube:
    """A namespace of a Kubernetes cluster as a place to submit to."""

    def __init__(
        self, *, template: Tree | None = None, namespace: str | None = None, context: str | None = None
    ) -> None:
        """By default the template's namespace, else the pod's own or the kubeconfig's. `start` needs a template."""
        self._api = RayJobApi(namespace or (template or {}).get("metadata", {}).get("namespace"), context)
        self._template = template or {}
        self._here = f"--namespace {self._api.namespace}" + (f" --context {context}" if context else "")

    def attempts(self, run_key: str) -> list[Attempt]:
        found = []
        for job in self._api.list(f"{RUN_KEY}={run_key[:12]}"):
            if parsed := config.parse_attempt_name(job["metadata"]["name"]):
                state, sentence = _state(job.get("status") or {}), _sentence(job.get("status") or {})
                reason = sentence.partition("\n")[0] if state == "failed" else ""
                found.append(Attempt(job["metadata"]["name"], parsed[1], state, reason))
        return sorted(found, key=lambda attempt: attempt.number)

    def start(self, name: str, run_key: str, recipe: Recipe) -> bool:
        """Raises ConfigError for a template that KubeRay would refuse."""
        return self._api.create(stamp(self._template, name=name, run_key=run_key, recipe=recipe))

    def follow(self, name: str, display: Display) -> int:
        """The exit code is the command's own where KubeRay tells it, else 1."""
        display.say(f"{name}: logs: kubectl {self._here} logs --follow job/{name}")
        said, dashboard = "", ""
        for job in self._api.states(name):
            status = job.get("status") or {}
            if (sentence := _sentence(status)) not in (said, ""):
                said = sentence
                display.say(f"{name}: {sentence}")
            if (url := status.get("dashboardURL", "")) not in (dashboard, ""):
                dashboard = url
                forward = f"kubectl {self._here} port-forward service/{name}-head-svc 8265"
                display.say(f"{name}: dashboard: http://{url}, or {forward}")
            if _state(status) != "running":
                return _exit_code(status)
        raise AssertionError("the states of a RayJob end with an error or a terminal one")

    def describe(self, name: str | None) -> list[dict[str, Any]]:
        """A run, or all that the namespace has, as a person or a program asks for them."""
        if name is None:
            return [_description(job) for job in self._api.list(RUN_KEY)]
        try:
            return [_description(self._api.get(name))]
        except RefusedError as refused:
            if refused.status == 404:
                raise ConfigError(
                    f"`RUN` must be a RayJob, but {name} is none in namespace {self._api.namespace}. See"
                    f" `swa-dist status --to kube {self._here}`."
                ) from None
            raise

    def come_back(self, name: str) -> list[str]:
        return [
            f"kubectl {self._here} logs --follow job/{name}",
            f"swa-dist status {name} --to kube {self._here}",
            f"kubectl {self._here} delete rayjob {name}",  # a run that stops by itself, KubeRay would start again
        ]


def _state(status: Tree) -> Literal["running", "succeeded", "failed"]:
    """running, also where it waits to; succeeded; failed, also where it was stopped."""
    if status.get("jobDeploymentStatus") not in _TERMINAL:
        return "running"
    return "succeeded" if status.get("jobStatus") == "SUCCEEDED" else "failed"


def _sentence(status: Tree) -> str:
    """What KubeRay says of a RayJob: "Running, job PENDING (reason): message"."""
    job = status.get("jobStatus") and f"job {status['jobStatus']}"
    text = ", ".join(part for part in (status.get("jobDeploymentStatus"), job) if part)
    if status.get("reason"):
        text += f" ({status['reason']})"
    return f"{text}: {status['message']}" if status.get("message") else text


def _exit_code(status: Tree) -> int:
    """Of a RayJob that has ended. Ray's message begins "Job entrypoint command failed with exit code N"."""
    if _state(status) == "succeeded":
        return ExitCode.OK
    found = re.search(r"exit code (\d+)", status.get("message") or "")
    return int(found[1]) if found and 0 < int(found[1]) < 256 else ExitCode.UNFORESEEN


def _description(job: Tree) -> dict[str, Any]:
    metadata, status = job["metadata"], job.get("status") or {}
    labels, notes = metadata.get("labels") or {}, metadata.get("annotations") or {}
    began, state = status.get("startTime"), str(_state(status))
    code = None if state == "running" else _exit_code(status)
    if state == "running" and status.get("jobStatus") != "RUNNING":
        state = "pending"
    elif code == ExitCode.STOPPED:
        state = "stopped"
    return {
        "name": metadata["name"],
        "recipe": labels.get(RECIPE, ""),
        "status": state,
        "exit_code": code,
        "started": began,
        "seconds": round((_time(status.get("endTime")) - _time(began)).total_seconds()) if began else None,
        "run_dir": notes.get(RUN_DIR, ""),
        "run_key": notes.get(RUN_KEY, ""),
    }


def _time(text: str | None) -> datetime:
    """Kubernetes' time, or now."""
    return datetime.fromisoformat(text) if text else datetime.now(UTC)
