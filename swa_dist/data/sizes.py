"""How much of a machine a worker's loader takes: threads, what is read ahead, what stays in memory and on disk."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import platformdirs
import psutil

from swa_dist.config import Data
from swa_dist.storage.folder import is_s3

_S3_THREADS = 32  # an answer takes some 30 ms, whatever its size
_IMAGES_AHEAD = 256
_GROUPS_AHEAD = 4
_SHARE_OF_MEMORY = 0.25
_SHARE_OF_DISK = 0.5
_GB = 10**9


@dataclass(frozen=True)
class Sizes:
    decode_threads: int
    read_threads: int
    groups_ahead: int
    """Groups whose encoded images are read ahead."""
    kept_bytes: int
    """Of decoded images of the evaluation and the recalibration that stay in memory."""
    cache_dir: str
    """Of images from S3."""
    cache_bytes: int
    """Of all workers of a machine together; 0: no cache."""

    def __str__(self) -> str:
        cache = f"{self.cache_bytes / _GB:.1f} GB of images from S3 kept in {self.cache_dir}, "
        return (
            f"{self.decode_threads} decoding and {self.read_threads} reading threads, {self.groups_ahead} groups ahead,"
            f" {cache if self.cache_bytes else ''}up to {self.kept_bytes / _GB:.1f} GB of decoded images kept in memory"
        )


def sizes(data: Data, cores: int, workers_here: int) -> Sizes:
    """What the recipe says, or what fits this machine: `cores` of this worker, one of `workers_here`."""
    on_s3 = is_s3(data.train) or is_s3(data.val)
    readers = max(read_threads(data.train, cores), read_threads(data.val, cores))
    cache_dir = data.cache_dir if data.cache_dir != "auto" else str(platformdirs.user_cache_path("swa_dist") / "images")
    kept, cache = data.keep_decoded_gb, data.cache_gb
    available = psutil.virtual_memory().available
    if not on_s3 or (cache == "auto" and data.cache_dir == "auto" and "KUBERNETES_SERVICE_HOST" in os.environ):
        cache = 0  # a pod that writes more than its volume's limit is evicted, and the limit can't be seen from within
    elif cache == "auto":
        cache = _SHARE_OF_DISK * _free(Path(cache_dir)) / _GB
    return Sizes(
        decode_threads=cores if data.num_threads == "auto" else data.num_threads,
        read_threads=readers if data.read_threads == "auto" else data.read_threads,
        groups_ahead=max(_GROUPS_AHEAD, _IMAGES_AHEAD // data.group_images if on_s3 else 0)
        if data.groups_ahead == "auto"
        else data.groups_ahead,
        kept_bytes=int(_SHARE_OF_MEMORY * available / workers_here if kept == "auto" else kept * _GB),
        cache_dir=cache_dir,
        cache_bytes=int(cache * _GB),
    )


def read_threads(root: str, cores: int) -> int:
    return _S3_THREADS if is_s3(root) else max(2, cores)


def cores_here() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def _free(folder: Path) -> int:
    """Bytes free on the disk where the folder is, or will be."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0
