"""What a run depends on, looked at piece by piece: a finding each, with what to do. Here: this machine."""

import contextlib
import importlib.metadata
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.errors import ExitCode, SwaDistError
from swa_dist.service import doctor_services, doctor_storage, identity
from swa_dist.service.doctor_services import Finding
from swa_dist.service.doctor_storage import LEAST_FREE

_CHECK_SECONDS = 90.0
_DALI_SECONDS = 75  # less than a check has: its process is then ended, and not left behind
_LEAST_SHARED_MEMORY = 2**30
_LEAST_FILES = 4096
_RAY_DRAIN_SECONDS = 30  # Ray's own default, and Kubernetes' grace
_IN_ADDRESS = re.compile(r"(?<=://)\S*@")
_SECRET = re.compile(r"(PASSWORD|TOKEN|SECRET|SECRET_ACCESS_KEY|API_KEY)$")
_LEAST_SECRET = 4  # characters: masking shorter ones would garble every sentence

# In a process of its own: one in which a DALI pipeline ran can't be forked any more.
_DECODE = """
import sys
import numpy as np
from nvidia.dali import fn, pipeline_def

device = sys.argv[1]

@pipeline_def(batch_size=1, num_threads=1, device_id=0 if device == "mixed" else None)
def decode():
    jpeg = fn.external_source(lambda: [np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8)])
    return fn.decoders.image(jpeg, device=device)

pipeline = decode(prefetch_queue_depth=1)
pipeline.build()
print(pipeline.run()[0].as_cpu().as_array().shape)
"""


def examine(recipe: Recipe | None, address: str | None, ca_file: Path | None) -> list[Finding]:
    """Look at this machine, at the Ray cluster whose jobs server is at `address`, and at what the recipe names."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    # A name, the check, and what to do where it fails in a way of its own.
    checks: list[tuple[str, Callable[[], Finding], str]] = [
        ("Python", _python, "Install swa_dist again, with the versions in constraints.txt."),
        ("GPUs", lambda: _gpus(recipe), "See what nvidia-smi says."),
        ("DALI", _dali, "Install nvidia-dali-cuda130 as in constraints.txt."),
        ("shared memory", _shared_memory, "Mount a tmpfs at /dev/shm."),
        ("open files", _open_files, "See ulimit -n."),
        ("home folder", _home, "Set HOME to a folder that can be written."),
        ("scratch space", _scratch, "Set TMPDIR to a folder that can be written."),
        (
            "drain before grace",
            _drain,
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S and SWA_DIST_GRACE_SECONDS must be seconds.",
        ),
        (
            "Ray cluster",
            lambda: doctor_services.ray_cluster(address, ca_file),
            "Look at --address, --ca-file and RAY_JOB_HEADERS, which must be JSON.",
        ),
        (
            "MLflow",
            lambda: doctor_services.mlflow_server(recipe),
            "Look at `tracking.uri` and the MLFLOW_TRACKING_* variables.",
        ),
    ]
    if recipe is not None:
        checks += [
            (
                "images",
                lambda: doctor_services.images(_placed(recipe)),
                "Look at `data.train`, `data.val`, `data.index`.",
            ),
            ("starting weights", lambda: doctor_services.starting_weights(_placed(recipe)), "Look at `model.weights`."),
            (
                "output folder",
                lambda: doctor_storage.output_folder(_placed(recipe).output.dir),
                "Look at `output.dir`; on S3 at AWS_ENDPOINT_URL, the region and the credentials.",
            ),
        ]
    return [_tried(*check) for check in checks]


def _placed(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths. MLflow's address, which can be a mistake of its own, is left to its own check."""
    return identity.absolute_addresses(config.replace(recipe, **{"tracking.uri": "none"}))


def exit_code(findings: list[Finding]) -> ExitCode:
    return ExitCode.DEPENDENCY_DOWN if any(one.state == "broken" for one in findings) else ExitCode.OK


def show(findings: list[Finding], console: Console) -> None:
    """Print a line for each finding, and under it what to do."""
    colours = {"ok": "green", "warning": "yellow", "broken": "red", "skipped": "dim"}
    for one in findings:
        console.print(f"[{colours[one.state]}]{one.state:<8}[/] [bold]{one.check}:[/] ", end="")
        console.print(one.found, markup=False, highlight=False, soft_wrap=True)
        if one.remedy:
            console.print(f"         {one.remedy}", markup=False, highlight=False, soft_wrap=True)


def _tried(name: str, check: Callable[[], Finding], remedy: str) -> Finding:
    """What the check finds, in a thread that may hang without holding up the others. Tells no secret."""
    made: list[Finding] = []

    def attempt() -> None:
        try:
            made.append(check())
        except SwaDistError as error:
            made.append(Finding("", "broken", str(error), remedy))
        except Exception as error:  # whatever a driver, a library or a server comes up with: the other checks go on
            made.append(Finding("", "broken", f"{type(error).__name__}: {error}", remedy))

    thread = threading.Thread(target=attempt, name=f"doctor {name}", daemon=True)
    thread.start()
    thread.join(_CHECK_SECONDS)
    found = made[0] if made else Finding("", "broken", f"no answer in {_CHECK_SECONDS:g} s", remedy)
    return Finding(name, found.state, _told(found.found), _told(found.remedy))


def _told(text: str) -> str:
    """The text on one line, and without the secrets that this process was given."""
    text = _IN_ADDRESS.sub("***@", text)
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, "***")
    return " ".join(text.split())


def _secrets() -> Iterator[str]:
    given = [value for name, value in os.environ.items() if _SECRET.search(name)]
    headers = os.environ.get("RAY_JOB_HEADERS", "")
    try:
        given += map(str, json.loads(headers).values())
    except (ValueError, AttributeError):
        given.append(headers)
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), Path.home() / ".ray" / "auth_token"):
        if path:
            with contextlib.suppress(OSError):  # what can't be read isn't told either
                given.append(Path(path).read_text(encoding="utf-8", errors="replace"))
    # By words: libraries quote a value with its blanks and line ends written otherwise.
    return (word for value in given for word in value.split() if len(word) >= _LEAST_SECRET)


def _python() -> Finding:
    import torch

    names = ("torch", "torchvision", "ray", "mlflow", "nvidia-dali-cuda130", "swa_dist")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    found = f"{sys.version.split()[0]}, {versions}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("", "broken", found, "swa_dist runs on Python 3.11 to 3.13.")
    try:
        import torchvision  # noqa: F401 - one for another torch fails here already

        torch.ops.torchvision.nms  # noqa: B018
    except (ImportError, RuntimeError, AttributeError) as error:
        remedy = "torch and torchvision don't fit together: install both from one place, as in constraints.txt."
        return Finding("", "broken", f"{found}: {error}", remedy)
    return Finding("", "ok", found)


def _gpus(recipe: Recipe | None) -> Finding:
    import torch

    driver, seen = _driver()
    if not torch.cuda.is_available():
        needed = recipe is not None and recipe.cluster.gpus_per_worker == 1
        if seen:
            remedy = f"Update the driver to one of CUDA {torch.version.cuda}, or look at CUDA_VISIBLE_DEVICES."
            found = f"driver {driver} has {seen}, and torch can use none"
            return Finding("", "broken" if needed else "warning", found, remedy)
        if needed:
            remedy = "Set it to auto, or run where there are GPUs."
            return Finding("", "broken", "none, and `cluster.gpus_per_worker` is 1", remedy)
        return Finding("", "skipped", "none: runs on the CPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Finding("", "ok", f"{len(cards)}: {named}; driver {driver}, CUDA {torch.version.cuda}, NCCL {nccl}")


def _driver() -> tuple[str, int]:
    """The version of NVIDIA's driver, and how many GPUs it has."""
    import pynvml  # type: ignore[import-untyped]

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return "unknown", 0
    try:
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlDeviceGetCount())
    finally:
        pynvml.nvmlShutdown()


def _dali() -> Finding:
    import torch
    from PIL import Image

    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    device = "mixed" if torch.cuda.is_available() else "cpu"
    where = "GPU" if device == "mixed" else "CPU"
    try:
        made = subprocess.run(
            [sys.executable, "-c", _DECODE, device],
            input=jpeg.getvalue(),
            capture_output=True,
            timeout=_DALI_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        remedy = "Run it again; if it stays, look at the driver and at the disk that Python is on."
        return Finding("", "broken", f"decoded no image on the {where} in {_DALI_SECONDS} s", remedy)
    if made.returncode:
        last = (made.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
        remedy = "Install nvidia-dali-cuda130 as in constraints.txt; its GPU part needs the driver of CUDA 13."
        return Finding("", "broken", f"can't decode an image on the {where}: {last}", remedy)
    return Finding("", "ok", f"decodes on the {where}")


def _shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    found = f"/dev/shm has {size / 2**30:.1f} GiB"
    if size < _LEAST_SHARED_MEMORY:
        remedy = "Ray and NCCL want 1 GiB: docker run --shm-size=8g; under KubeRay raise the container's memory limit."
        return Finding("", "warning", found, remedy)
    return Finding("", "ok", found)


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:  # -1
        return Finding("", "ok", "no limit")
    if soft < _LEAST_FILES:
        remedy = f"Ray wants {_LEAST_FILES} or more: ulimit -n 65536, or docker run --ulimit nofile=65536."
        return Finding("", "warning", f"at most {soft:,}", remedy)
    return Finding("", "ok", f"at most {soft:,}")


def _home() -> Finding:
    home = Path.home()
    try:
        with tempfile.TemporaryFile(dir=home):
            return Finding("", "ok", f"{home} can be written")
    except OSError:
        pass
    settings = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    if any(os.environ.get(name) for name in settings) or os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return Finding("", "ok", f"{home} can't be written, and need not: RAY_AUTH_* tells of the token")
    remedy = "Ray keeps its token there: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or HOME to a folder of your own."
    return Finding("", "warning", f"{home} can't be written", remedy)


def _scratch() -> Finding:
    with tempfile.NamedTemporaryFile():
        place = tempfile.gettempdir()
    free = shutil.disk_usage(place).free
    found = f"{place} has {free / 2**30:.0f} GiB free"
    if free < LEAST_FREE:
        return Finding("", "warning", found, "Runs on S3 keep a checkpoint there for a while: set TMPDIR to more room.")
    return Finding("", "ok", found)


def _drain() -> Finding:
    grace = os.environ.get("SWA_DIST_GRACE_SECONDS")
    drain = float(os.environ.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", _RAY_DRAIN_SECONDS))
    if grace is None:
        if "KUBERNETES_SERVICE_HOST" not in os.environ:
            return Finding("", "skipped", "not in Kubernetes")
        remedy = "Set SWA_DIST_GRACE_SECONDS to the pod's terminationGracePeriodSeconds, as k8s/ does."
        return Finding("", "warning", f"Ray drains for {drain:g} s; the pod's grace is not known", remedy)
    found = f"Ray drains for {drain:g} s, the pod's grace is {grace} s"
    if drain <= 0:
        remedy = f"Set RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S to less than {grace}."
        return Finding("", "warning", f"{found}: workers that are taken away get no notice", remedy)
    if drain >= float(grace):
        remedy = "Make RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S shorter than terminationGracePeriodSeconds."
        return Finding("", "broken", f"{found}: workers are killed while they save their state", remedy)
    return Finding("", "ok", found)
