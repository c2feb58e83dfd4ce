"""What loading costs: images per CPU-second of ours, of torch's DataLoader and of DALI's own file reader.

    .venv/bin/python -m benchmarks.loader              # about 10 minutes on 2 cores
    .venv/bin/python -m benchmarks.loader --memory     # does a loader's memory grow over 20 epochs?
    .venv/bin/python -m benchmarks.loader --window     # how random shards are that are shuffled a window at a time

JPEGs of 500 x 375, quality 90, cut from scikit-learn's two photographs. The peers take turns, each in a process of its
own: a DataLoader can't fork after DALI ran, and other work on the machine should meet all alike. CPU-seconds of the
process and its children, since seconds on a shared machine say little; in each round the ratio to (b) is of that round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil

BATCH = 32
THREADS = 2
SIZE = 224
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
PEERS = {
    "ours": "(a) ours, float32",
    "ours-uint8": "(a') ours, uint8",
    "ours-uint8-no-antialias": "(a') ours, uint8, no antialias",
    "ours-shards": "(a) ours from tar shards, float32",
    "ours-shards-uint8": "(a') ours from tar shards, uint8",
    "pil": "(b) DataLoader, PIL, torchvision v1",
    "decode-jpeg": "(c) DataLoader, decode_jpeg, v2",
    "dali": "(d) DALI's file reader, float32",
    "dali-uint8": "(d') DALI's file reader, uint8",
}
REFERENCE = "pil"
AGAINST = [  # what is compared with what, and the goal
    ("ours", "pil", 1.7),
    ("ours-uint8-no-antialias", "pil", 2.3),
    ("ours", "decode-jpeg", 1.1),
    ("ours", "dali", 0.95),
    ("ours-shards", "dali", 0.95),
    ("ours-uint8", "dali-uint8", 0.95),
    ("ours-shards-uint8", "dali-uint8", 0.95),
]
SHARDS, IMAGES_PER_SHARD, CLASSES = 1252, 1024, 1000
WINDOWS = (4, 16, 64)
GLOBAL_BATCH = 256


def write_images(root: Path, num_images: int, num_classes: int = 16) -> None:
    """Class folders of crops, mirrored or not and in many brightnesses, with a little noise as a sensor has it."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    random = np.random.default_rng(0)
    for number in range(num_images):
        photograph = photographs[number % 2]
        scale = random.uniform(0.6, 1)
        width, height = int(569 * scale), int(427 * scale)
        left, top = random.integers(photograph.width - width + 1), random.integers(photograph.height - height + 1)
        image = photograph.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image) * random.uniform(0.7, 1.3) + random.normal(0, 7, (375, 500, 3))
        path = root / f"class{number % num_classes:02d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(root: Path) -> Any:
    import torch

    from swa_dist.config import Data
    from swa_dist.data.dali import DaliLoaders
    from swa_dist.data.scan import scan
    from swa_dist.data.sizes import Sizes

    found = scan(str(root), "data.train")
    return DaliLoaders(
        found,
        found,
        Data(name="photographs", train=str(root), val=str(root), global_batch=GLOBAL_BATCH, group_images=BATCH),
        seed=1,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        sizes=Sizes(THREADS, THREADS, 4, 0, "", 0),
    )


def of_ours(root: Path, *, as_bytes: bool = False, antialias: bool = True) -> Iterator[Iterator[int]]:
    from swa_dist.data import dali, resizing

    interpolate = resizing.interpolate

    def interpolate_so(*inputs: Any, **options: Any) -> Any:
        return interpolate(*inputs, **options | {"antialias": antialias})

    def epoch(number: int) -> Iterator[int]:
        for batch in loaders.train(number, 0, {}):
            yield from (len(group.images) for group in batch.groups)

    loaders = ours(root)
    with mock.patch.object(resizing, "interpolate", interpolate_so):
        if not as_bytes:
            yield from map(epoch, range(1000))
        with mock.patch.object(dali, "normalised", lambda images: images):
            yield from map(epoch, range(1000))


def of_torch(root: Path, load: Callable[[str], Any], steps: list[Any]) -> Iterator[Iterator[int]]:
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    images = ImageFolder(root, transform=v2.Compose(steps), loader=load)
    loader = DataLoader(images, BATCH, shuffle=True, num_workers=THREADS, persistent_workers=True)
    while True:
        yield (len(batch) for batch, _ in loader)


def of_pil(root: Path) -> Iterator[Iterator[int]]:
    """As in PyTorch's ImageNet example."""
    from torchvision import transforms
    from torchvision.datasets.folder import pil_loader

    from swa_dist.data.pixels import MEAN, STD

    steps = [
        transforms.RandomResizedCrop(SIZE, AREA, RATIO),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    return of_torch(root, pil_loader, steps)


def of_decode_jpeg(root: Path) -> Iterator[Iterator[int]]:
    """As in torchvision's reference scripts with the tensor backend."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms import v2

    from swa_dist.data.pixels import MEAN, STD

    steps = [
        v2.RandomResizedCrop(SIZE, AREA, RATIO, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return of_torch(root, lambda path: decode_jpeg(read_file(path), ImageReadMode.RGB), steps)


def of_dali(root: Path, *, as_bytes: bool = False) -> Iterator[Iterator[int]]:
    """As in DALI's own examples, with the same decoding, resizing and output as ours."""
    import torch
    from nvidia.dali import fn, pipeline_def, types

    from swa_dist.data.pixels import MEAN, STD

    @pipeline_def(batch_size=BATCH, num_threads=THREADS, device_id=None, prefetch_queue_depth=2, seed=1)
    def pipeline() -> Any:
        encoded, labels = fn.readers.file(file_root=str(root), random_shuffle=True, name="reader")
        window = fn.decoders.image_random_crop(encoded, random_area=AREA, random_aspect_ratio=RATIO)
        resized = fn.resize(window, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        mirror = fn.random.coin_flip()
        if as_bytes:
            return fn.flip(resized, horizontal=mirror), labels
        mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
        return fn.crop_mirror_normalize(resized, dtype=types.FLOAT, mean=mean, std=std, mirror=mirror), labels

    made = pipeline()
    made.build()
    num_batches = made.epoch_size("reader") // BATCH

    def epoch() -> Iterator[int]:
        for _ in range(num_batches):
            images, _ = (torch.utils.dlpack.from_dlpack(output.as_tensor()).clone() for output in made.run())
            yield len(images)

    while True:
        yield epoch()


def epochs_of(peer: str, folder: Path) -> Iterator[Iterator[int]]:
    """Endlessly: an epoch, which gives the number of images of each of its batches."""
    if peer.startswith("ours"):
        root = folder / ("shards" if "shards" in peer else "images")
        return of_ours(root, as_bytes="uint8" in peer, antialias="no-antialias" not in peer)
    if peer.startswith("dali"):
        return of_dali(folder / "images", as_bytes="uint8" in peer)
    return of_pil(folder / "images") if peer == "pil" else of_decode_jpeg(folder / "images")


def cpu_seconds() -> float:
    """Of this process, and of its children while they live."""
    here = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in [here, *here.children(recursive=True)])


def measure(peer: str, folder: Path, num_epochs: int) -> dict[str, float]:
    """In a process of its own: what epochs cost after a first one."""
    epochs = epochs_of(peer, folder)
    for _ in next(epochs):
        pass
    cpu, wall, images = cpu_seconds(), time.perf_counter(), 0
    for _ in range(num_epochs):
        images += sum(next(epochs))
    return {"per_cpu": images / (cpu_seconds() - cpu), "per_second": images / (time.perf_counter() - wall)}


def in_a_process(*arguments: str) -> Any:
    """What this script prints last when it is run with these."""
    command = [sys.executable, "-m", "benchmarks.loader", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def prepare(folder: Path, num_images: int) -> None:
    from swa_dist.data import sharding
    from swa_dist.data.scan import scan

    write_images(folder / "images", num_images)
    sharding.write(scan(str(folder / "images"), "data.train"), str(folder / "shards"), num_images // 8)


def compare(folder: Path, peers: list[str], rounds: int, num_epochs: int) -> None:
    sizes = [path.stat().st_size for path in (folder / "images").rglob("*.jpg")]
    print(f"{len(sizes)} JPEGs of 500 x 375, quality 90, {statistics.mean(sizes) / 1024:.0f} KiB each;", end=" ")
    print(f"batches of {BATCH}, {THREADS} threads or workers, {num_epochs} epochs a point, {rounds} rounds")
    found: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    for number in range(rounds):
        for peer in peers[number % len(peers) :] + peers[: number % len(peers)]:
            point = in_a_process("--point", peer, "--data", str(folder), "--epochs", str(num_epochs))
            print(f"round {number + 1} {peer}: {point['per_cpu']:.0f} images / CPU-second", file=sys.stderr)
            found[peer].append(point)
    rates = {peer: np.array([one["per_cpu"] for one in points]) for peer, points in found.items()}
    print("\nmedian (and quartiles) over rounds; images a second are of a machine that others use too")
    print(f"{'':<36}{'ratio to (b)':>20}{'images / CPU-second':>26}{'images / s':>12}")
    for peer in peers:
        ratio = spread(rates[peer] / rates[REFERENCE], 2) if REFERENCE in rates else ""
        seconds = statistics.median(one["per_second"] for one in found[peer])
        print(f"{PEERS[peer]:<36}{ratio:>20}{spread(rates[peer], 0):>26}{seconds:12.0f}")
    for one, other, goal in AGAINST:
        if one in rates and other in rates:
            ratios = rates[one] / rates[other]
            reached = "" if np.median(ratios) >= goal else ", not reached"
            print(f"{one} / {other}: {spread(ratios, 2)} (goal {goal}{reached})")


def spread(values: "np.ndarray[Any, Any]", digits: int) -> str:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def memory(folder: Path, num_epochs: int) -> list[float]:
    """MiB of this process after each epoch of training and validation."""
    loaders, sizes = ours(folder / "images"), []
    for epoch in range(num_epochs):
        for _ in loaders.train(epoch, 0, {}):
            pass
        for _ in loaders.validation():
            pass
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    return sizes


def window(seed: int = 0) -> None:
    """How far the order of shards that are shuffled a window at a time is from a shuffle of all images."""
    from swa_dist.data import order

    shard_numbers = np.repeat(np.arange(SHARDS), IMAGES_PER_SHARD)
    num_images = len(shard_numbers)
    num_batches = num_images // GLOBAL_BATCH
    shuffled = order.order(seed, order.Stream.TRAIN, 0, num_images)
    # As `data shard` writes them, images of all classes in each; and as a tool that doesn't shuffle would.
    labels = {"shuffled": np.empty(num_images, int), "by class": np.arange(num_images) * CLASSES // num_images}
    labels["shuffled"][order.order(seed + 1, order.Stream.TRAIN, 0, num_images)] = labels["by class"]
    print(f"{SHARDS:,} shards of {IMAGES_PER_SHARD:,} images, {CLASSES:,} classes, batches of {GLOBAL_BATCH}")
    print(f"{'':<14}{'a pair of one shard':>21}{'shards in':>11}{'  classes in a batch when shards hold':>38}")
    print(f"{'window':<14}{'is in one batch, x':>21}{'a batch':>11}{'images of all':>22}{'of one or two':>16}")
    orders = {f"{size} shards": _by_shards(seed, shard_numbers, size) for size in WINDOWS}
    for name, images in (orders | {"all images": shuffled}).items():
        batches = images[: num_batches * GLOBAL_BATCH].reshape(num_batches, GLOBAL_BATCH)
        counts = np.array([np.unique(shard_numbers[batch], return_counts=True)[1] for batch in batches], dtype=object)
        pairs = np.mean([(count * (count - 1)).sum() for count in counts]) / (GLOBAL_BATCH * (GLOBAL_BATCH - 1))
        by_chance = (IMAGES_PER_SHARD - 1) / (num_images - 1)
        shards = np.mean([len(count) for count in counts])
        classes = {what: np.mean([len(np.unique(of[batch])) for batch in batches]) for what, of in labels.items()}
        print(f"{name:<14}{pairs / by_chance:21.1f}{shards:11.1f}", end="")
        print(f"{classes['shuffled']:22.1f}{classes['by class']:16.1f}")


def _by_shards(seed: int, shard_numbers: "np.ndarray[Any, Any]", size: int) -> "np.ndarray[Any, Any]":
    from swa_dist.data import order

    return order.order_by_shards(seed, order.Stream.TRAIN, 0, shard_numbers, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=2, help="Of a point; 20 with --memory.")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--memory", action="store_true", help="The loader's memory after each epoch instead.")
    parser.add_argument("--window", action="store_true", help="What the shards' window costs in randomness instead.")
    parser.add_argument("--data", type=Path, help="Folder of images and shards that an earlier run kept, or to keep.")
    parser.add_argument("--point", choices=[*PEERS, "memory"], help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.window:
        return window()
    if chosen.point == "memory":
        return print(json.dumps(memory(chosen.data, chosen.epochs)))
    if chosen.point:
        return print(json.dumps(measure(chosen.point, chosen.data, chosen.epochs)))
    # Threads of torch that wait for work would spin, and their CPU-seconds be counted.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    with tempfile.TemporaryDirectory() as scratch:
        folder = chosen.data or Path(scratch)
        if not (folder / "shards" / "index.parquet").exists():
            prepare(folder, chosen.images)
        if chosen.memory:
            sizes = in_a_process("--point", "memory", "--data", str(folder), "--epochs", "20")
            print("MiB of memory after each epoch:", " ".join(f"{size:.0f}" for size in sizes))
            print(f"from epoch 5 to 20: {sizes[-1] - sizes[4]:+.1f} MiB")
            return None
        return compare(folder, chosen.peers, chosen.rounds, chosen.epochs)


if __name__ == "__main__":
    main()
