"""What a run depends on, looked at piece by piece: a finding each, with what to do. Here: this machine."""

import importlib.metadata
import io
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from swa_dist.config import Recipe
from swa_dist.errors import ExitCode, SwaDistError
from swa_dist.service import doctor_services, identity
from swa_dist.service.doctor_services import LEAST_FREE, Finding

_DALI_SECONDS = 120
_LEAST_SHARED_MEMORY = 2**30
_LEAST_FILES = 4096
_RAY_DRAIN_SECONDS = 30  # Ray's own default, and Kubernetes' grace

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
    checks: list[tuple[str, Callable[[], Finding]]] = [
        ("Python", _python),
        ("GPUs", lambda: _gpus(recipe)),
        ("DALI", _dali),
        ("shared memory", _shared_memory),
        ("open files", _open_files),
        ("home folder", _home),
        ("scratch space", _scratch),
        ("drain before grace", _drain),
        ("Ray cluster", lambda: doctor_services.ray_cluster(address, ca_file)),
        ("MLflow", lambda: doctor_services.mlflow_server(recipe)),
    ]
    if recipe is not None:
        there = identity.absolute_addresses(recipe)
        checks += [
            ("images", lambda: doctor_services.images(there)),
            ("starting weights", lambda: doctor_services.starting_weights(there)),
            ("output folder", lambda: doctor_services.output_folder(there.output.dir)),
        ]
    return [_tried(name, check) for name, check in checks]


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


def _tried(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        found = check()
    except SwaDistError as error:
        return Finding(name, "broken", str(error))
    except Exception as error:  # whatever a driver, a library or a server comes up with: the other checks go on
        return Finding(name, "broken", f"{type(error).__name__}: {error}")
    return Finding(name, found.state, found.found, found.remedy)


def _python() -> Finding:
    import torch
    import torchvision

    names = ("torch", "torchvision", "ray", "mlflow", "nvidia-dali-cuda130", "swa_dist")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    found = f"{sys.version.split()[0]}, {versions}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("", "broken", found, "swa_dist runs on Python 3.11 to 3.13.")
    if not hasattr(torch.ops.torchvision, "nms"):
        remedy = f"torch and torchvision {torchvision.__version__} don't fit together: install both from one place."
        return Finding("", "broken", found, remedy)
    return Finding("", "ok", found)


def _gpus(recipe: Recipe | None) -> Finding:
    import torch

    if not torch.cuda.is_available():
        if recipe is not None and recipe.cluster.gpus_per_worker == 1:
            return Finding(
                "", "broken", "none, and `cluster.gpus_per_worker` is 1", "Set it to auto, or run where there are GPUs."
            )
        return Finding("", "skipped", "none: runs on the CPU")
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = ", ".join(f"{card.name} with {card.total_memory / 2**30:.0f} GiB" for card in cards)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return Finding("", "ok", f"{len(cards)}: {named}; CUDA {torch.version.cuda}, NCCL {nccl}")


def _dali() -> Finding:
    import torch
    from PIL import Image

    jpeg = io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    device = "mixed" if torch.cuda.is_available() else "cpu"
    made = subprocess.run(
        [sys.executable, "-c", _DECODE, device],
        input=jpeg.getvalue(),
        capture_output=True,
        timeout=_DALI_SECONDS,
        check=False,
    )
    where = "GPU" if device == "mixed" else "CPU"
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
    if soft < _LEAST_FILES:
        remedy = f"Ray wants {_LEAST_FILES} or more: ulimit -n 65536, or docker run --ulimit nofile=65536."
        return Finding("", "warning", f"at most {soft}", remedy)
    return Finding("", "ok", f"at most {soft:,}")


def _home() -> Finding:
    home = Path.home()
    if os.access(home, os.W_OK):
        return Finding("", "ok", f"{home} can be written")
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return Finding("", "ok", f"{home} can't be written, and need not: RAY_AUTH_TOKEN or RAY_AUTH_MODE is set")
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
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        return Finding("", "skipped", "not in Kubernetes")
    drain = int(os.environ.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", _RAY_DRAIN_SECONDS))
    grace = os.environ.get("SWA_DIST_GRACE_SECONDS")
    if grace is None:
        remedy = "Set SWA_DIST_GRACE_SECONDS to the pod's terminationGracePeriodSeconds, as k8s/ does."
        return Finding("", "warning", f"Ray drains for {drain} s; the pod's grace is not known", remedy)
    found = f"Ray drains for {drain} s, the pod's grace is {grace} s"
    if drain >= int(grace):
        remedy = "Make RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S shorter than terminationGracePeriodSeconds."
        return Finding("", "broken", f"{found}: workers are killed while they save their state", remedy)
    return Finding("", "ok", found)
