"""What a folder of images is: which are in, what is refused and how, and what the digest names."""

import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from swa_dist.data import index
from swa_dist.data.reading import Reader
from swa_dist.data.scan import scan
from swa_dist.errors import DataError, ExitCode


def picture(width=40, height=30, seed=0):
    """Noise, so that a JPEG of it is longer than what the index reads at either end."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def add(path, width=40, height=30, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, seed).save(path, **options)
    return path


@pytest.fixture
def train(tmp_path):
    """Two classes of two images."""
    root = tmp_path / "train"
    for number, name in enumerate(("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg")):
        add(root / name, seed=number)
    return root


def refusal(root, split="train"):
    """The message of the DataError that scanning ends with."""
    with pytest.raises(DataError) as caught:
        scan(str(root), f"data.{split}")
    return str(caught.value)


# What is in


def test_classes_are_the_sorted_folders_and_images_are_sorted_by_path(train):
    found = scan(str(train), "data.train")
    assert found.root == str(train)
    assert found.classes == ("cat", "dog")
    assert found.paths == ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg", "dog/b.jpg")
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert len(found) == 4


def test_labels_and_order_are_those_of_torchvisions_image_folder(tmp_path):
    for name in ("n02/b.jpg", "n02/a.JPEG", "n01/deep/er/c.png", "n01/a.jpg", "N03/x.jpg", "n1/x.jpg", "n01/a/z.jpg"):
        add(tmp_path / name)
    found, theirs = scan(str(tmp_path), "data.train"), ImageFolder(tmp_path)
    assert list(found.classes) == theirs.classes
    ours = {str(tmp_path / path): label for path, label in zip(found.paths, found.labels.tolist(), strict=True)}
    assert ours == dict(theirs.samples)


def test_sizes_are_height_and_width_in_pixels(train):
    add(train / "cat" / "c.jpg", width=70, height=50)
    found = scan(str(train), "data.train")
    sizes = dict(zip(found.paths, zip(found.heights.tolist(), found.widths.tolist(), strict=True), strict=True))
    assert sizes["cat/c.jpg"] == (50, 70)
    assert sizes["cat/a.jpg"] == (30, 40)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(train, orientation, suffix):
    """DALI turns JPEG and PNG images upright alike, so the crops that are drawn from these sizes must be of that."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = add(train / "cat" / f"0.{suffix}", width=70, height=50, exif=exif)
    found = scan(str(train), "data.train")
    width, height = ImageOps.exif_transpose(Image.open(path)).size
    assert (found.heights[0], found.widths[0]) == (height, width)
    assert ((height, width) == (70, 50)) == (orientation >= 5)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_a_png_of_any_mode_is_an_image(train, mode):
    path = train / "cat" / "c.png"
    picture(width=70, height=50).convert(mode).save(path)
    found = scan(str(train), "data.train")
    assert (found.paths[2], found.heights[2], found.widths[2]) == ("cat/c.png", 50, 70)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_a_grey_or_cmyk_jpeg_is_an_image(train, mode):
    picture().convert(mode).save(train / "cat" / "c.jpg")
    assert "cat/c.jpg" in scan(str(train), "data.train").paths


def test_a_png_named_jpg_is_an_image_by_its_content(train):
    """ImageNet's training set has one: n02105855_2933.JPEG."""
    add(train / "cat" / "c.JPEG", width=70, height=50, format="PNG")
    assert "cat/c.JPEG" in scan(str(train), "data.train").paths


def test_a_progressive_jpeg_and_one_with_bytes_after_its_end_are_images(train):
    add(train / "cat" / "c.jpg", progressive=True)
    path = add(train / "cat" / "d.jpg")
    path.write_bytes(path.read_bytes() + bytes(100))
    assert len(scan(str(train), "data.train")) == 6


@pytest.mark.parametrize(
    "name", ["a b.jpg", "käse 😀.jpg", "line\nfeed.jpg", "quo'te\".jpg", "per%20cent.jpg", "a.b.c.jpg"]
)
def test_a_name_may_be_anything_and_survives_saving(train, tmp_path, name):
    path = add(train / "cat" / name)
    found = scan(str(train), "data.train")
    assert f"cat/{name}" in found.paths
    index.save(found, str(tmp_path / "index.parquet"))
    assert index.load(str(tmp_path / "index.parquet"), str(train)).paths == found.paths
    place = found.paths.index(f"cat/{name}")
    assert bytes(Reader(found, None).read(place)) == path.read_bytes()


def test_a_name_that_is_not_utf8_is_indexed_and_saved_or_refused_by_name(train, tmp_path):
    """Old archives have names in Latin-1."""
    name = os.fsdecode(b"caf\xe9.jpg")
    add(train / "cat" / name)
    try:
        found = scan(str(train), "data.train")
    except DataError as error:
        message = str(error)
    else:
        index.save(found, str(tmp_path / "index.parquet"))
        message = str(index.load(str(tmp_path / "index.parquet"), str(train)).paths)
    assert "caf" in message


@pytest.mark.parametrize("name", ["c.JPG", "c.JPEG", "c.Jpg", "c.jpeg", "c.PNG"])
def test_an_extension_may_be_in_upper_case(train, name):
    add(train / "cat" / name)
    assert f"cat/{name}" in scan(str(train), "data.train").paths


def test_hidden_files_folders_and_files_that_are_no_images_are_ignored(train):
    before = scan(str(train), "data.train")
    add(train / "cat" / "._a.jpg").write_bytes(b"what macOS leaves")
    add(train / "cat" / ".thumbnails" / "a.jpg")
    add(train / ".hidden" / "a.jpg")
    add(train / "loose.jpg")
    (train / "cat" / "Thumbs.db").write_bytes(b"x")
    (train / "README.md").write_text("x")
    after = scan(str(train), "data.train")
    assert (after.paths, after.digest) == (before.paths, before.digest)


def test_images_in_folders_within_a_class_are_of_that_class(train):
    add(train / "dog" / "2024" / "may" / "a.jpg")
    found = scan(str(train), "data.train")
    assert found.paths[2] == "dog/2024/may/a.jpg"
    assert found.labels.tolist() == [0, 0, 1, 1, 1]


def test_a_class_folder_may_be_a_link(train, tmp_path):
    shutil.move(train / "dog", tmp_path / "elsewhere")
    (train / "dog").symlink_to(tmp_path / "elsewhere")
    assert scan(str(train), "data.train").paths[2:] == ("dog/a.jpg", "dog/b.jpg")


def test_progress_ends_at_all_of_them(train):
    said = []
    scan(str(train), "data.train", lambda done, total: said.append((done, total)))
    assert said == [(1, 4), (2, 4), (3, 4), (4, 4)]


# What is refused


def test_a_data_error_has_exit_code_65():
    assert DataError.exit_code == ExitCode.BAD_DATA == 65


def test_a_missing_folder_is_named(tmp_path):
    message = refusal(tmp_path / "absent", "val")
    assert "`data.val`" in message
    assert str(tmp_path / "absent") in message


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "train").write_text("x")
    assert str(tmp_path / "train") in refusal(tmp_path / "train")


def test_a_folder_without_class_folders_is_refused(tmp_path):
    add(tmp_path / "train" / "a.jpg")
    (tmp_path / "train" / ".hidden").mkdir()
    assert "must hold one folder per class" in refusal(tmp_path / "train")


def test_a_class_without_images_is_named(train):
    (train / "empty").mkdir()
    (train / "empty" / "notes.txt").write_text("x")
    assert str(train / "empty") in refusal(train)


def test_an_empty_file_is_named(train):
    (train / "cat" / "c.jpg").touch()
    assert f"{train / 'cat' / 'c.jpg'}: empty" in refusal(train)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1])
@pytest.mark.parametrize("name", ["c.jpg", "c.png"])
def test_a_truncated_image_is_named(train, name, kept):
    path = add(train / "cat" / name, width=200, height=150)
    os.truncate(path, int(path.stat().st_size * kept))
    message = refusal(train)
    assert "1 of 5 are not" in message
    assert f"{path}: cut short" in message


def test_a_truncated_jpeg_with_a_thumbnail_in_it_is_named(train):
    """The thumbnail in the head ends with the same marker as the image."""
    thumbnail = train / "cat" / "thumbnail.jpg"
    add(thumbnail, width=16, height=16)
    end = thumbnail.read_bytes()
    path = add(train / "cat" / "c.jpg", width=60, height=60, comment=end)
    os.truncate(path, len(end) + 700)
    assert path.read_bytes().find(b"\xff\xd9") > 0
    assert f"{path}: cut short" in refusal(train)


@pytest.mark.parametrize(
    "content", [b"this is no image\n" * 10, bytes(5000), b"\xff\xd8\xff\xd9", b"GIF89a" + bytes(100), b"x"]
)
def test_a_file_that_is_no_image_is_named(train, content):
    path = train / "dog" / "c.jpg"
    path.write_bytes(content)
    assert f"{path}: " in refusal(train)


def test_an_image_too_large_to_be_true_is_named(train):
    Image.new("1", (10_000, 6_000)).save(train / "cat" / "c.png")
    assert "60,000,000" in refusal(train) or "10000 x 6000 pixels" in refusal(train)


def test_a_dangling_link_is_named(train):
    (train / "cat" / "c.jpg").symlink_to(train / "nowhere.jpg")
    assert str(train / "cat" / "c.jpg") in refusal(train)


def test_all_bad_files_are_counted_and_ten_are_named(train):
    for number in range(15):
        (train / "cat" / f"x{number:02d}.jpg").touch()
    message = refusal(train)
    assert "15 of 19 are not" in message
    assert message.count(": empty") == 10
    assert "and 5 more" in message


# Two splits


def test_splits_with_different_classes_are_refused_with_the_difference(train, tmp_path):
    val = tmp_path / "val"
    add(val / "cat" / "a.jpg")
    add(val / "cow" / "a.jpg")
    with pytest.raises(DataError, match="lacks dog and adds cow"):
        index.check_pair(scan(str(train), "data.train"), scan(str(val), "data.val"), 2)


def test_another_number_of_classes_names_the_two_settings_that_mend_it(train, tmp_path):
    val = tmp_path / "val"
    shutil.copytree(train, val)
    pair = scan(str(train), "data.train"), scan(str(val), "data.val")
    index.check_pair(*pair, 2)
    with pytest.raises(DataError) as caught:
        index.check_pair(*pair, 1000)
    for part in ("`model.num_classes`", "(2)", "1000", "`model.head=replace`"):
        assert part in str(caught.value)


# The digest


def test_the_digest_is_the_same_for_a_copy_elsewhere_with_other_times(train, tmp_path):
    before = scan(str(train), "data.train")
    elsewhere = tmp_path / "else where" / "images"
    shutil.copytree(train, elsewhere)
    for path in elsewhere.rglob("*"):
        os.utime(path, (1, 1))
    after = scan(str(elsewhere), "data.train")
    assert after.root != before.root
    assert after.digest == before.digest


@pytest.mark.parametrize(
    "change",
    [
        lambda root: add(root / "cat" / "a.jpg", seed=99),
        lambda root: add(root / "cat" / "c.jpg"),
        lambda root: (root / "cat" / "b.jpg").unlink(),
        lambda root: (root / "cat" / "b.jpg").rename(root / "cat" / "z.jpg"),
        lambda root: (root / "cat" / "b.jpg").rename(root / "dog" / "z.jpg"),
        lambda root: (root / "cat").rename(root / "kitten"),
        lambda root: add(root / "fox" / "a.jpg"),
    ],
    ids=["replaced", "added", "removed", "renamed", "moved", "class-renamed", "class-added"],
)
def test_the_digest_changes_with_the_images(train, change):
    before = scan(str(train), "data.train")
    change(train)
    assert scan(str(train), "data.train").digest != before.digest


def test_two_images_that_change_places_change_the_digest(train):
    before = scan(str(train), "data.train").digest
    a, b = train / "cat" / "a.jpg", train / "dog" / "a.jpg"
    one, other = a.read_bytes(), b.read_bytes()
    a.write_bytes(other)
    b.write_bytes(one)
    assert scan(str(train), "data.train").digest != before


def test_the_data_digest_tells_the_splits_apart(train, tmp_path):
    add(tmp_path / "val" / "cat" / "a.jpg")
    add(tmp_path / "val" / "dog" / "a.jpg")
    one, other = scan(str(train), "data.train"), scan(str(tmp_path / "val"), "data.val")
    assert index.data_digest(one, other) != index.data_digest(other, one)
    assert index.data_digest(one, other) == index.data_digest(one, other)


# Saved


def test_a_saved_index_is_loaded_as_it_was(train, tmp_path):
    add(train / "dog" / "c.jpg", width=70, height=50)
    found = scan(str(train), "data.train")
    path = tmp_path / "deep" / "index.parquet"
    index.save(found, str(path))
    loaded = index.load(str(path), str(tmp_path / "elsewhere"))
    assert loaded.root == str(tmp_path / "elsewhere")
    assert (loaded.classes, loaded.paths, loaded.digest) == (found.classes, found.paths, found.digest)
    for field in ("labels", "heights", "widths"):
        assert getattr(loaded, field).dtype == np.int64
        assert getattr(loaded, field).tolist() == getattr(found, field).tolist()
    assert list(path.parent.iterdir()) == [path]


def cut(content):
    return content[: len(content) // 2]


def flip_footer(content):
    return content[:-20] + bytes(b ^ 0xFF for b in content[-20:-8]) + content[-8:]


@pytest.mark.parametrize("damage", [cut, flip_footer, lambda content: b"", lambda content: b"no parquet" * 100])
def test_a_damaged_index_file_is_a_data_error_that_names_it(train, tmp_path, damage):
    path = tmp_path / "index.parquet"
    index.save(scan(str(train), "data.train"), str(path))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"index\.parquet"):
        index.load(str(path), str(train))


def test_a_missing_index_file_is_a_data_error_that_names_it(train, tmp_path):
    with pytest.raises(DataError, match=r"absent\.parquet"):
        index.load(str(tmp_path / "absent.parquet"), str(train))


@pytest.mark.parametrize("metadata", [None, {"swa_dist": "{}"}, {"swa_dist": "[1]"}, {"swa_dist": "{"}])
def test_a_parquet_file_that_is_no_index_is_a_data_error_that_names_it(train, tmp_path, metadata):
    path = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(DataError, match=r"foreign\.parquet"):
        index.load(str(path), str(train))


def test_a_photograph_with_a_film_behind_it_is_whole(train):
    """Phones append a video or a depth map to the JPEG, or a second picture (which Pillow calls MPO)."""
    with (train / "cat" / "a.jpg").open("ab") as file:
        file.write(os.urandom(20_000).replace(b"\xff\xd9", b"\xff\x00"))
    pictures = [picture(64, 48, seed=n) for n in (1, 2)]
    pictures[0].save(train / "dog" / "a.jpg", format="MPO", save_all=True, append_images=pictures[1:])
    found = scan(str(train), "data.train")
    assert len(found) == 4
    assert (found.widths[2], found.heights[2]) == (64, 48)
