"""What a process and its machine are like, in words that can be sent around: nothing secret is in them."""

import functools
import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote, quote_plus

import psutil

_GPU_SECONDS = 5.0
_DISTRIBUTIONS = ("torch", "torchvision", "ray", "mlflow", "nvidia-dali-cuda130", "numpy", "swa_dist")
# Variables that say how a worker was started and how workers talk. None of them is meant to hold a secret.
_VARIABLES = re.compile(
    r"(MASTER_ADDR|MASTER_PORT|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|TORCHELASTIC_(RUN_ID|RESTART_COUNT|MAX_RESTARTS)"
    r"|(NCCL|TORCH_NCCL|GLOO|CUDA|OMP|MKL)_[A-Z_0-9]+|TORCH_DISTRIBUTED_DEBUG|PYTORCH_(CUDA_)?ALLOC_CONF"
    r"|NVIDIA_VISIBLE_DEVICES|RAY_ADDRESS|MLFLOW_TRACKING_URI|AWS_(DEFAULT_)?REGION|AWS_ENDPOINT_URL(_S3)?|AWS_CA_BUNDLE"
    r"|TMPDIR|HOSTNAME|KUBERNETES_SERVICE_HOST|SLURM_JOB_ID)"
)
_SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
_LEAST_SECRET = 8  # characters: without shorter ones no sentence could be read
_REDACTED = "[redacted]"
_SECRET_TEXTS = (
    (re.compile(r"://(?:[^/\s:@]*:\S*|[^/\s]*)@"), rf"://{_REDACTED}@"),  # of an address: up to the last @
    (
        re.compile(r"(?i)([?&][^=&\s]*(?:token|secret|password|signature|credential|key)[^=&\s]*=)[^&\s]+"),
        rf"\1{_REDACTED}",
    ),
    (re.compile(r"(?i)\b(bearer\s+|authorization\W+basic\s+)[\w.~+/=-]{8,}"), rf"\1{_REDACTED}"),
)


def redact(text: str) -> str:
    """Without passwords in addresses, and without the values of this process's variables that are named as secrets."""
    given = [value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)]
    given += [line.strip() for value in given for line in value.splitlines()]
    secrets = {form for value in given if len(value) >= _LEAST_SECRET for form in _forms(value)}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, _REDACTED)
    for pattern, instead in _SECRET_TEXTS:
        text = pattern.sub(instead, text)
    return text


def code_tags() -> dict[str, str]:
    """Tags of an MLflow run that name the code: its version and, where it was installed from git, the commit."""
    code = importlib.metadata.distribution("swa_dist")
    origin = json.loads(code.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id")
    return {"swa.version": code.version} | ({"mlflow.source.git.commit": commit} if commit else {})


def _forms(secret: str) -> tuple[str, ...]:
    """A value as it is, and as libraries write it in an address, in Python and in JSON."""
    quoted = (quote(secret, safe="/", errors="replace"), quote(secret, safe="", errors="replace"))
    return secret, *quoted, quote_plus(secret, errors="replace"), repr(secret)[1:-1], json.dumps(secret)[1:-1]


def describe(folder: Path) -> list[str]:
    """Lines about this process and its machine; the free space is that of the disk `folder` is on. Never raises."""
    facts: dict[str, Callable[[], object]] = {
        "python": platform.python_version,
        **{name: functools.partial(importlib.metadata.version, name) for name in _DISTRIBUTIONS},
        "host": socket.gethostname,
        "system": platform.platform,
        "CPUs": lambda: f"{os.cpu_count()}, {len(os.sched_getaffinity(0))} of them for this process",
        "memory": lambda: f"{_gib(psutil.virtual_memory().total)}, {_gib(psutil.virtual_memory().available)} free",
        "GPUs": _gpus,
        "free disk": lambda: _free_disk(folder),
    }
    lines = []
    for name, look in facts.items():
        try:
            lines.append(f"{name}: {look()}")
        except Exception:  # of a machine in which something is broken
            lines.append(f"{name}: not known")
    return lines + [f"{name}={os.environ[name]}" for name in sorted(os.environ) if _VARIABLES.fullmatch(name)]


def _free_disk(folder: Path) -> str:
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return f"{_gib(shutil.disk_usage(there).free)} at {there}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"


def _gpus() -> str:
    """By NVIDIA's driver, which is asked in a thread: where a GPU has failed it may never answer."""
    names: list[str] = []

    def ask() -> None:
        import pynvml  # type: ignore[import-untyped]

        try:
            pynvml.nvmlInit()
            handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
            names.append(", ".join(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles) or "none")
        except pynvml.NVMLError as error:
            names.append(f"none ({error})")

    thread = threading.Thread(target=ask, name="gpus", daemon=True)
    thread.start()
    thread.join(_GPU_SECONDS)
    return names[0] if names else "the driver doesn't answer"
