"""What the loaders give: every image once, the same for any number of workers, with the pixels that torchvision has."""

import contextlib
import hashlib
import io
import itertools
import os
import random
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import boto3
import numpy as np
import psutil
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torchvision.transforms.v2 import functional

from swa_dist.config import Data
from swa_dist.data import dali, index, order, sharding
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.memory import MemoryLoaders
from swa_dist.data.order import Span, Stream
from swa_dist.data.pixels import MEAN, STD, normalised
from swa_dist.data.reading import Ahead, Reader
from swa_dist.data.resizing import Resizer, placements
from swa_dist.data.scan import scan
from swa_dist.data.sizes import Sizes
from swa_dist.errors import DataError, ExitCode
from tests import support

# Batches of 12, 12, 12 and 2 images, in groups of 5, 5 and 2: of four workers one never has a group, and of the last
# batch three have none.
NUM_TRAIN, NUM_VAL = 38, 13
BATCH, GROUP, SIZE = 12, 5, 32
STARTS = range(0, NUM_TRAIN, BATCH)
WORKERS = (1, 2, 3, 4)
ORIENTATION = 0x0112
SIZES = Sizes(decode_threads=1, read_threads=2, groups_ahead=2, kept_bytes=0, cache_dir="unused", cache_bytes=0)
SEED = 3
PHOTOGRAPHS = load_sample_images().images


def picture(generator, width, height):
    """Smooth, as photographs are: what JPEG does to it is little."""
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write_images(root, num_images, seed):
    """JPEG and PNG images of 20 to 120 pixels a side with every orientation, in two classes."""
    generator = np.random.default_rng(seed)
    for i in range(num_images):
        exif = Image.Exif()
        exif[ORIENTATION] = 1 + i % 8
        path = root / ("cat", "dog")[i % 2] / f"{i:03d}.{('jpg', 'png')[i // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        width, height = generator.integers(20, 121, 2).tolist()
        picture(generator, width, height).save(path, exif=exif)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_images(root / "train", NUM_TRAIN, seed=0)
    write_images(root / "val", NUM_VAL, seed=1)
    return root


@pytest.fixture(scope="module")
def places(images):
    """The same images in folders and in shards: of each layout where the splits are."""
    sharded = images.with_name("shards")
    for split in ("train", "val"):
        sharding.write(scan(str(images / split), split), str(sharded / split), images_per_shard=7)
    return {"folder": images, "shards": sharded}


@pytest.fixture(params=["folder", "shards"])
def place(request, places):
    return places[request.param]


@pytest.fixture
def own(place, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(place, tmp_path / "own"))


def data_of(place, **fields):
    usual = {"global_batch": BATCH, "group_images": GROUP, "image_size": SIZE, "resize_size": 40, "shard_window": 2}
    return Data(name="test", train=f"{place}/train", val=f"{place}/val", **(usual | fields))


def indices_of(data):
    return scan(data.train, "data.train"), scan(data.val, "data.val")


def loaders_at(place, rank=0, workers=1, sizes=SIZES, **fields):
    data = data_of(place, **fields)
    return made(data, indices_of(data), rank, workers, sizes)


def made(data, indices, rank=0, workers=1, sizes=SIZES):
    device = torch.device("cpu")
    return DaliLoaders(*indices, data, seed=SEED, rank=rank, world_size=workers, device=device, sizes=sizes)


def known(group):
    """A group by its ids, its labels and its pixels."""
    return tuple(group.ids.tolist()), tuple(group.labels.tolist()), sha256(group.images)


def sha256(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def batches(place, workers=1, epoch=0, start=0, num_batches=None, **fields):
    """The groups of each global batch, put together from those of all workers. Fails unless each worker has its own."""
    shares = [
        list(itertools.islice(loaders_at(place, rank, workers, **fields).train(epoch, start, {}), num_batches))
        for rank in range(workers)
    ]
    found = []
    for parts in zip(*shares, strict=True):
        assert len({(part.num_images, part.num_groups) for part in parts}) == 1
        groups = [None] * parts[0].num_groups
        for rank, part in enumerate(parts):
            groups[rank::workers] = [known(group) for group in part.groups]
        assert sum(len(ids) for ids, _, _ in groups) == parts[0].num_images
        found.append(groups)
    return found


def ids_of(batches):
    return [i for groups in batches for ids, _, _ in groups for i in ids]


@pytest.fixture(scope="module")
def alone(places):
    """An epoch on one worker, by layout."""
    return {place: batches(place) for place in places.values()}


def dealt(parts):
    """The groups of all workers in their order."""
    rows = itertools.zip_longest(*parts)
    return [known(group) for row in rows for group in row if group is not None]


# Which images, and which pixels


@pytest.mark.parametrize("workers", WORKERS)
def test_an_epoch_is_every_image_once_and_its_batches_are_those_of_one_worker_pixel_for_pixel(place, alone, workers):
    found = batches(place, workers)
    assert sorted(ids_of(found)) == list(range(NUM_TRAIN))
    assert [sum(len(ids) for ids, _, _ in groups) for groups in found] == [12, 12, 12, 2]
    assert found == alone[place]


@pytest.mark.parametrize(("batch", "group"), [(38, 38), (38, 7), (13, 4), (2, 2), (64, 16)])
def test_an_epoch_is_every_image_once_whatever_divides_it(place, batch, group):
    expected = batches(place, 1, global_batch=batch, group_images=group)
    assert sorted(ids_of(expected)) == list(range(NUM_TRAIN))
    assert batches(place, 3, global_batch=batch, group_images=group) == expected


def test_epochs_differ_in_order_and_pixels_and_labels_are_the_indexs(place, alone):
    second = batches(place, epoch=1)
    assert sorted(ids_of(second)) == list(range(NUM_TRAIN))
    assert ids_of(second) != ids_of(alone[place])
    labels = scan(f"{place}/train", "data.train").labels
    assert all(tuple(labels[list(ids)]) == given for groups in second for ids, given, _ in groups)
    assert not {d for groups in second for _, _, d in groups} & {d for groups in alone[place] for _, _, d in groups}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("start", STARTS)
def test_a_restart_gives_exactly_the_next_batches(place, alone, start, workers):
    assert batches(place, workers, start=start) == alone[place][start // BATCH :]


def test_another_number_of_workers_in_mid_epoch_neither_repeats_nor_drops(place, alone):
    found = [
        groups
        for start, workers in zip(STARTS, (3, 2, 4, 1), strict=True)
        for groups in batches(place, workers, start=start, num_batches=1)
    ]
    assert found == alone[place]


@pytest.mark.parametrize(
    "sizes",
    [
        replace(SIZES, decode_threads=3),
        replace(SIZES, read_threads=1),
        replace(SIZES, read_threads=16),
        replace(SIZES, groups_ahead=1),
        replace(SIZES, groups_ahead=50),
        replace(SIZES, kept_bytes=10**9),
    ],
    ids=["decode", "read-1", "read-16", "ahead-1", "ahead-50", "kept"],
)
def test_how_much_of_a_machine_is_used_changes_no_bit(place, alone, sizes):
    assert batches(place, 2, sizes=sizes) == alone[place]


def test_images_on_s3_are_those_on_disk_with_and_without_a_cache(places, alone, s3, tmp_path):
    bucket = boto3.client("s3")
    for path in (places["shards"] / "train").iterdir():
        bucket.upload_file(str(path), s3.removeprefix("s3://"), f"train/{path.name}")
    data = replace(data_of(places["shards"]), train=f"{s3}/train")
    indices = indices_of(data)
    for cache_bytes in (0, 50_000, 10**9):
        folder = tmp_path / str(cache_bytes)
        sizes = replace(SIZES, cache_dir=str(folder), cache_bytes=cache_bytes, read_threads=8)
        for _ in ("cold", "warm"):
            found = made(data, indices, sizes=sizes).train(0, 0, {})
            assert [[known(group) for group in batch.groups] for batch in found] == alone[places["shards"]]
        kept = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != ".used"]
        assert sum(kept) <= cache_bytes
        assert (0 < len(kept) < NUM_TRAIN) if cache_bytes == 50_000 else len(kept) == (NUM_TRAIN if cache_bytes else 0)


@pytest.mark.parametrize("workers", WORKERS)
def test_validation_is_every_image_once_in_the_groups_of_one_worker(place, workers):
    (expected,) = [[known(group) for group in loaders_at(place).validation()]]
    assert [len(ids) for ids, _, _ in expected] == [5, 5, 3]
    assert [i for ids, _, _ in expected for i in ids] == list(range(NUM_VAL))
    assert dealt([loaders_at(place, rank, workers).validation() for rank in range(workers)]) == expected


@pytest.mark.parametrize("transforms", ["train", "eval"])
def test_recalibration_is_a_fixed_order_of_its_own_for_any_number_of_workers(place, transforms):
    span = Span(0, 23)
    expected = dealt([loaders_at(place).recalibration(span, transforms, {})])
    assert [i for ids, _, _ in expected for i in ids] == order.order(SEED, Stream.RECALIBRATE, 0, NUM_TRAIN)[
        :23
    ].tolist()
    for workers in (2, 4):
        parts = [loaders_at(place, rank, workers).recalibration(span, transforms, {}) for rank in range(workers)]
        assert dealt(parts) == expected
    in_parts = [loaders_at(place).recalibration(part, transforms, {}) for part in (Span(0, 10), Span(10, 23))]
    assert [known(group) for part in in_parts for group in part] == expected


def test_loaders_in_memory_give_the_same_ids(place):
    data = data_of(place)
    labels = torch.zeros(NUM_TRAIN, dtype=torch.int64)
    pixels = torch.zeros(NUM_TRAIN, 3, 8, 8, dtype=torch.uint8)
    for rank, workers in ((0, 1), (0, 2), (2, 3)):
        memory = MemoryLoaders(pixels, labels, pixels[:NUM_VAL], labels[:NUM_VAL], data, SEED, rank, workers)
        ours = loaders_at(place, rank, workers)
        span = Span(0, 20)
        assert [g.ids.tolist() for g in ours.validation()] == [g.ids.tolist() for g in memory.validation()]
        assert [g.ids.tolist() for g in ours.recalibration(span, "train", {})] == [
            g.ids.tolist() for g in memory.recalibration(span, "train", {})
        ]
        if place.name != "shards":  # whose order is another
            assert [
                (b.num_images, b.num_groups, [g.ids.tolist() for g in b.groups]) for b in ours.train(1, 12, {})
            ] == [(b.num_images, b.num_groups, [g.ids.tolist() for g in b.groups]) for b in memory.train(1, 12, {})]


# What stays in memory


def passes(loaders):
    """What is kept: the validation images, and the recalibration's in both transforms."""
    yield lambda: loaders.validation()
    yield lambda: loaders.recalibration(Span(0, 30), "train", {})
    yield lambda: loaders.recalibration(Span(0, 30), "eval", {})


def test_what_is_kept_is_what_was_decoded_and_files_are_not_read_again(own):
    loaders = loaders_at(own, sizes=replace(SIZES, kept_bytes=10**9))
    first = [[known(group) for group in give()] for give in passes(loaders)]
    assert first == [[known(group) for group in give()] for give in passes(loaders_at(own))]
    shutil.rmtree(own)
    assert [[known(group) for group in give()] for give in passes(loaders)] == first


def test_where_room_is_short_some_is_kept_and_the_rest_is_decoded_again(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "own"))
    room = 2 * GROUP * SIZE * SIZE * 3 + 100
    loaders = loaders_at(root, sizes=replace(SIZES, kept_bytes=room))
    first = [known(group) for group in loaders.validation()]
    for i in range(2 * GROUP):
        (root / "val" / loaders.name_of("val", i)).unlink()
    assert [known(group) for group in loaders.validation()] == first
    (root / "val" / loaders.name_of("val", 2 * GROUP)).unlink()
    with pytest.raises(DataError):
        list(loaders.validation())


def test_a_pass_that_was_broken_off_does_no_harm(place, alone):
    loaders = loaders_at(place, sizes=replace(SIZES, kept_bytes=10**9))
    next(loaders.train(0, 0, {}))
    next(loaders.validation())
    assert [[known(g) for g in batch.groups] for batch in loaders.train(0, 0, {})] == alone[place]
    assert [known(g) for g in loaders.validation()] == [known(g) for g in loaders_at(place).validation()]


def resident(world, root):
    """This process's memory after two passes over all images and after five more, bytes."""
    loaders = loaders_at(root)
    found = []
    for epoch in range(7):
        assert sum(batch.num_images for batch in loaders.train(epoch, 0, {})) == NUM_TRAIN
        assert sum(len(group.ids) for group in loaders.validation()) == NUM_VAL
        found.append(psutil.Process().memory_info().rss)
    return found[1], found[-1]


def test_memory_stays_flat_over_passes(images):
    """Each of the ten pipelines in between must give its memory back: some 5 MiB."""
    ((before, after),) = support.run_workers(resident, 1, str(images))
    print(f"resident memory grew by {(after - before) / 2**20:.1f} MiB")
    assert after - before < 24 * 2**20


def forget_what_is_read_ahead(world, root):
    """As the garbage collector does that runs in a thread which is just starting: it holds this lock of threading's."""
    train = scan(f"{root}/train", "data.train")
    read = Ahead(num_threads=2, num_groups=2).read(Reader(train, None), [np.arange(4)] * 8)
    next(read)
    with getattr(threading, "_shutdown_locks_lock", contextlib.nullcontext()):
        read.close()
    return True


def test_a_pipeline_that_is_collected_while_a_thread_starts_hangs_nothing(images):
    """DALI's pipelines are in cycles, and so what they read from ends wherever the collector happens to run."""
    workers = support.start_workers(forget_what_is_read_ahead, 1, str(images))
    assert workers.results(timeout_seconds=30) == [True]


# What images are


def pixels_of(images):
    """The bytes that were normalised, uint8 [images, height, width, 3]."""
    std, mean = (torch.tensor(of, dtype=torch.float64)[:, None, None] for of in (STD, MEAN))
    return ((images.double() * std + mean) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_normalisation_is_torchvisions():
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 1, 1, 3)
    theirs = functional.normalize(levels.permute(0, 3, 1, 2).float() / 255, list(MEAN), list(STD))
    assert (normalised(levels) - theirs).abs().max() <= 1e-6
    assert (pixels_of(normalised(levels)) == levels.numpy()).all()


def turned_beforehand(images, to, suffix):
    """The images of a split as PNG, once with an orientation and once upright: equal when both are upright."""
    generator = np.random.default_rng(5)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        raw = picture(generator, 90, 60)
        content = io.BytesIO()
        raw.save(content, {"jpg": "JPEG", "png": "PNG"}[suffix], exif=exif, quality=95, subsampling=0)
        for split, name in itertools.product(("train", "val"), ("cat", "dog")):
            for root in (images, to):
                (root / split / name).mkdir(parents=True, exist_ok=True)
            (images / split / name / f"{orientation}.{suffix}").write_bytes(content.getvalue())
            upright = ImageOps.exif_transpose(Image.open(content))
            upright.save(to / split / name / f"{orientation}.{suffix}", "PNG")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_images_with_an_orientation_are_those_turned_upright_beforehand(tmp_path, suffix):
    """The same windows of them, so that an orientation that is forgotten, or turned the other way, is another image.
    Decoded by DALI and by Pillow, which have one JPEG decoder."""
    turned_beforehand(tmp_path / "oriented", tmp_path / "upright", suffix)
    fields = {"group_images": 16, "global_batch": 16}
    ours, upright = (loaders_at(tmp_path / name, **fields) for name in ("oriented", "upright"))
    assert [ours.name_of("val", i) for i in range(16)] == [upright.name_of("val", i) for i in range(16)]
    pairs = [
        (next(ours.validation()), next(upright.validation())),
        *((a.groups[0], b.groups[0]) for a, b in zip(ours.train(0, 0, {}), upright.train(0, 0, {}), strict=True)),
        *zip(ours.recalibration(Span(0, 16), "eval", {}), upright.recalibration(Span(0, 16), "eval", {}), strict=True),
    ]
    for mine, theirs in pairs:
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert torch.equal(mine.images, theirs.images)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    for split, name in itertools.product(("train", "val"), ("cat", "dog")):
        (root / split / name).mkdir(parents=True)
        for number, pixels in enumerate(PHOTOGRAPHS):
            photograph = Image.fromarray(pixels).resize((500, 375), Image.Resampling.LANCZOS)
            photograph.save(root / split / name / f"{number}.jpg", quality=95)
            photograph.save(root / split / name / f"{number}.png")
    return root


def check(ours, theirs, what, mean=0.05, largest=1):
    """Levels of 255, by default those of torchvision on photographs: torch's kernel for bytes weighs pixels with fewer
    bits than Pillow."""
    found = np.abs(ours.astype(float) - theirs.astype(float))
    print(f"{what}: mean absolute difference {found.mean():.4f} levels, at most {found.max():.0f}")
    assert found.mean() <= mean
    assert found.max() <= largest


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_evaluation_sees_what_torchvision_makes_of_a_photograph(photographs, suffix):
    loaders = loaders_at(photographs, image_size=224, resize_size=256, group_images=8)
    (group,) = loaders.validation()
    chosen = [n for n, i in enumerate(group.ids.tolist()) if loaders.name_of("val", i).endswith(suffix)]
    paths = [photographs / "val" / loaders.name_of("val", int(group.ids[n])) for n in chosen]
    theirs = [
        np.asarray(functional.center_crop(functional.resize(Image.open(path), [256], antialias=True), [224, 224]))
        for path in paths
    ]
    check(pixels_of(group.images)[chosen], np.stack(theirs), f"evaluation, {suffix}")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_training_sees_what_torchvision_makes_of_the_same_window(photographs, suffix):
    """Of every window that order.py draws, small ones that are enlarged among them; mirrored where it says so."""
    loaders = loaders_at(photographs, image_size=224, group_images=8, global_batch=8)
    ours, theirs = [], []
    for epoch in range(4):
        ((batch),) = loaders.train(epoch, 0, {})
        (group,) = batch.groups
        windows = order.crops(
            SEED,
            Stream.TRAIN,
            epoch,
            Span(0, 8),
            np.full(8, 375),
            np.full(8, 500),
            area=(0.08, 1.0),
            ratio=(0.75, 4 / 3),
            flip=True,
        )
        assert 0 < windows.flip.sum() < 8
        for n, i in enumerate(group.ids.tolist()):
            name = loaders.name_of("train", i)
            if name.endswith(suffix):
                box = (int(of[n]) for of in (windows.top, windows.left, windows.height, windows.width))
                photograph = Image.open(photographs / "train" / name)
                cropped = functional.resized_crop(photograph, *box, [224, 224], antialias=True)
                theirs.append(np.asarray(functional.hflip(cropped) if windows.flip[n] else cropped))
                ours.append(pixels_of(group.images[n : n + 1])[0])
    check(np.stack(ours), np.stack(theirs), f"training, {suffix}")


@pipeline_def
def placed(images, places, side):
    image, place = fn.external_source(
        source=iter([(images, places)]),
        num_outputs=2,
        batch=True,
        dtype=[types.UINT8, types.INT32],
        layout=["HWC", None],
    )
    return dali._placed(image, place, side)


def test_what_dali_does_on_a_gpu_is_what_torch_does_on_a_cpu_nearly():
    """Its operators, here on the CPU: the same part of each image, at the same place, mirrored or not."""
    images = [np.ascontiguousarray(pixels[: 427 - 31 * n, 60 * n :]) for n in range(3) for pixels in PHOTOGRAPHS]
    flip = np.arange(6) % 3 == 0
    height, width = np.array([224, 230, 300, 256, 224, 400]), np.array([224, 300, 230, 256, 390, 240])
    places = placements(height, width, height - 224, (width - 224) // 2, flip)
    pipeline = placed(images, places, 224, batch_size=6, num_threads=1, device_id=None)
    pipeline.build()
    (found,) = pipeline.run()
    fitted = Resizer(1).fit(images, places, 224).numpy()
    check(fitted, found.as_array(), "DALI's resize", mean=0.25, largest=8)


# What is not as it was indexed


def file_of(root, loaders, split, i):
    """Where the image is, and its bytes there: its file, or the shard that it is in."""
    name = loaders.name_of(split, i)
    return root / split / name.partition(": ")[0]


def vanish(path):
    path.unlink()


def overwrite(path):
    """With as many other bytes."""
    path.write_bytes(random.Random(0).randbytes(path.stat().st_size))


def cut_short(path):
    os.truncate(path, 50)


READS = {
    "train": lambda loaders: loaders.train(0, 0, {}),
    "recalibration": lambda loaders: loaders.recalibration(Span(0, NUM_TRAIN), "train", {}),
    "validation": lambda loaders: loaders.validation(),
}


@pytest.mark.parametrize("reads", READS)
@pytest.mark.parametrize("damage", [vanish, overwrite, cut_short])
def test_an_image_that_is_not_what_was_indexed_ends_the_run_by_name(own, damage, reads):
    loaders = loaders_at(own)
    path = file_of(own, loaders, "val" if reads == "validation" else "train", 7)
    damage(path)
    with pytest.raises(DataError) as caught:
        list(READS[reads](loaders))
    message = str(caught.value)
    assert str(path) in message
    assert "swa-dist data index" in message
    assert caught.value.exit_code == ExitCode.BAD_DATA


def test_an_image_that_is_overwritten_in_its_place_by_another_whole_one_ends_the_run(images, tmp_path):
    root = Path(shutil.copytree(images, tmp_path / "own"))
    loaders = loaders_at(root)
    one, other = (root / "val" / loaders.name_of("val", i) for i in (3, 4))
    shutil.copy(other, one)
    with pytest.raises(DataError, match="must be as it was when it was indexed"):
        list(loaders.validation())


# Few images


def few(root, num_images):
    """Loaders of so many images."""
    data = data_of(root)
    return made(data, [index.make(i.root, i.classes, i.shards, i.rows[:num_images]) for i in indices_of(data)])


def test_one_image_is_an_epoch(place):
    loaders = few(place, 1)
    (batch,) = loaders.train(0, 0, {})
    assert (batch.num_images, batch.num_groups) == (1, 1)
    for group in (*batch.groups, *loaders.validation(), *loaders.recalibration(Span(0, 1), "train", {})):
        assert (group.ids.tolist(), group.images.shape) == ([0], (1, 3, SIZE, SIZE))


def test_no_image_is_no_batch(place):
    loaders = few(place, 0)
    assert (loaders.num_train, loaders.num_val) == (0, 0)
    assert [*loaders.train(0, 0, {}), *loaders.validation(), *loaders.recalibration(Span(0, 0), "train", {})] == []


def test_images_that_are_left_out_leave_the_others_as_they_are(places):
    """Each has its own part and its own mirroring, wherever in its group it then is."""
    loaders = loaders_at(places["folder"], flip=True)

    def pixels(left_out):
        groups = [group for batch in loaders.train(0, 0, left_out) for group in batch.groups]
        return {i: image for group in groups for i, image in zip(group.ids.tolist(), group.images, strict=True)}

    whole = pixels({})
    first = [batch.groups[0].ids.tolist() for batch in loaders.train(0, 0, {})]
    bad = {ids[0]: "no image" for ids in first if len(ids) > 2}
    rest = pixels(bad)
    assert whole.keys() - rest.keys() == bad.keys()
    assert all(torch.equal(whole[i], image) for i, image in rest.items())
