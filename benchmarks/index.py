"""How long an index of many files on this disk takes, beside the floor: reading the two ends of each.

    .venv/bin/python -m benchmarks.index [--images 100000]

Small JPEGs (about 10 KB each) in 1,000 class folders, which the page cache holds, so that it is the work that is
measured and not the disk. Each scan is in a process of its own.
"""

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLASSES = 1000
CONTENTS = 200  # different images; each file is a copy of one, with some bytes of its own at its end
END_BYTES = 4096
IMAGENET = 1_281_167


def write(root: Path, num_images: int) -> None:
    import io

    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random, contents = np.random.default_rng(0), []
    for number in range(CONTENTS):
        left, top = random.integers(340), random.integers(200)
        written = io.BytesIO()
        photographs[number % 2].crop((left, top, left + 160, top + 128)).save(written, "JPEG", quality=90)
        contents.append(written.getvalue())
    for name in range(min(CLASSES, num_images)):
        (root / f"n{name:08d}").mkdir(parents=True)
    for number in range(num_images):
        path = root / f"n{number % CLASSES:08d}" / f"{number:08d}.JPEG"
        path.write_bytes(contents[number % CONTENTS] + b"%d" % number)


def floor(root: Path) -> dict[str, float]:
    """List the files and read their ends, with the threads of a scan."""

    def ends(path: str) -> int:
        file = os.open(path, os.O_RDONLY)
        try:
            size = os.fstat(file).st_size
            return len(os.pread(file, END_BYTES, 0)) + len(os.pread(file, END_BYTES, max(0, size - END_BYTES)))
        finally:
            os.close(file)

    began, cpu = time.perf_counter(), time.process_time()
    paths = [entry.path for folder in sorted(os.listdir(root)) for entry in os.scandir(root / folder)]
    with concurrent.futures.ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        num_bytes = sum(pool.map(ends, paths))
    return _point(began, cpu) | {"images": len(paths), "num_bytes": num_bytes}


def scanned(root: Path) -> dict[str, float]:
    from swa_dist.data.scan import scan

    scan(str(root.parent / "few"), "data.train")  # what any scan takes
    before = peak_kib()
    began, cpu = time.perf_counter(), time.process_time()
    found = scan(str(root), "data.train")
    point = _point(began, cpu)
    return point | {"images": len(found), "before_kib": before, "index_bytes": found.rows.nbytes}


def _point(began: float, cpu: float) -> dict[str, float]:
    return {
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - cpu,
        "peak_kib": peak_kib(),
    }


def peak_kib() -> int:
    """Resident. What getrusage says is at least what the parent had when it forked."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def in_a_process(what: str, root: Path, home: Path) -> dict[str, Any]:
    """`home`: where the memory of files that did not change is kept."""
    command = [sys.executable, "-m", "benchmarks.index", "--point", what, "--data", str(root)]
    environment = os.environ | {"XDG_CACHE_HOME": str(home)}
    place = Path(__file__).parent.parent
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=place, env=environment)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def report(num_images: int, points: dict[str, dict[str, Any]], kept: int) -> None:
    print(f"{num_images:,} JPEGs in class folders, in the page cache")
    print(f"{'':<32}{'s':>8}{'CPU-s':>8}{'us an image':>13}{'peak MiB':>10}")
    for name, one in points.items():
        each = 1e6 * one["seconds"] / one["images"]
        print(f"{name:<32}{one['seconds']:8.1f}{one['cpu']:8.1f}{each:13.0f}{one['peak_kib'] / 1024:10.0f}")
    first = points["first scan"]
    grown = 1024 * (first["peak_kib"] - first["before_kib"]) / first["images"]
    in_memory, on_disk = first["index_bytes"] / first["images"], kept / first["images"]
    print(
        f"bytes an image: the index {in_memory:.0f}, at the scan's peak {grown:.0f}, the memory on disk {on_disk:.0f}"
    )
    print(
        f"so {IMAGENET:,} images: the index {in_memory * IMAGENET / 2**20:.0f} MiB, at the scan's peak"
        f" {grown * IMAGENET / 2**20:.0f} MiB, the memory on disk {on_disk * IMAGENET / 2**20:.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--out", type=Path, help="Where to put them, about 1 GB. Default: a temporary folder.")
    parser.add_argument("--point", choices=["floor", "scan"], help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.point:
        return print(json.dumps((floor if chosen.point == "floor" else scanned)(chosen.data)))
    with tempfile.TemporaryDirectory(dir=chosen.out) as scratch:
        root, home = Path(scratch) / "images", Path(scratch) / "home"
        write(root, chosen.images)
        write(root.parent / "few", CLASSES)
        points = {
            "floor: list, read both ends": in_a_process("floor", root, home),
            "first scan": in_a_process("scan", root, home),
            "second scan, nothing changed": in_a_process("scan", root, home),
            "floor, again": in_a_process("floor", root, home),
        }
        kept = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
        report(chosen.images, points, kept)
    return None


if __name__ == "__main__":
    main()
