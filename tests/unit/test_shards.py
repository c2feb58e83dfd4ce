"""Tar shards: those of others are read as WebDataset lays them out; ours are the same bytes for the same images."""

import io
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from swa_dist.data import index, sharding
from swa_dist.data.reading import Reader
from swa_dist.data.scan import scan
from swa_dist.errors import DataError, OutputError
from tests.unit.test_index import add, picture
from tests.unit.test_storage import full_disk  # noqa: F401 - a fixture

COLUMNS = ["path", "shard", "offset", "num_bytes", "label", "height", "width", "version", "bad"]


def jpeg(seed=0, width=40, height=30):
    content = io.BytesIO()
    picture(width, height, seed).save(content, format="JPEG")
    return content.getvalue()


def tar(path, members, **options):
    """A tar file of these names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as file:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def samples(*labels, first=0):
    """Images with a number for a class: 000.jpg and 000.cls."""
    members = {}
    for number, label in enumerate(labels, first):
        members |= {f"{number:03d}.jpg": jpeg(number), f"{number:03d}.cls": str(label).encode()}
    return members


def refusal(root):
    with pytest.raises(DataError) as caught:
        scan(str(root), "data.train")
    assert caught.value.exit_code == 65
    return str(caught.value)


def labels_of(found):
    return {path: found.classes[label] for path, label in zip(found.paths, found.labels.tolist(), strict=True)}


def content_of(found):
    """What the images are, whatever their order and names: class and content of each."""
    reader = Reader(found, None)
    return sorted((found.classes[found.labels[i]], reader.read(i).tobytes()) for i in range(len(found)))


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path):
    """The index of 24 images of three classes, of several sizes and kinds."""
    root = tmp_path / "source"
    for number in range(23):
        add(root / f"class {number % 3}" / f"{number}.JPEG", width=30 + number, seed=number)
    add(root / "class 1" / "käse\n.Png", seed=99)
    return scan(str(root), "data.train")


# Those of others


def test_images_with_numbers_for_classes_have_their_names_from_classes_txt(tmp_path):
    tar(tmp_path / "a.tar", samples(2, 0))
    tar(tmp_path / "b.tar", samples(2, first=2))
    (tmp_path / "classes.txt").write_text("cat\ndog\nnewt of the north\n")
    found = scan(str(tmp_path), "data.train")
    assert found.classes == ("cat", "dog", "newt of the north")
    assert found.labels.tolist() == [2, 0, 2]
    assert [found.name(i) for i in range(3)] == ["a.tar: 000.jpg", "a.tar: 001.jpg", "b.tar: 002.jpg"]
    assert found.shard_numbers.tolist() == [0, 0, 1]
    assert (found.heights.tolist(), found.widths.tolist()) == ([30] * 3, [40] * 3)
    assert [Reader(found, None).read(i).tobytes() for i in range(3)] == [jpeg(seed) for seed in range(3)]


def test_without_classes_txt_the_numbers_are_the_names_with_those_that_no_image_has(tmp_path):
    """10 is not between 1 and 2, as it would be among names."""
    tar(tmp_path / "a.tar", samples(10, 2, 0))
    found = scan(str(tmp_path), "data.train")
    assert found.classes == tuple(map(str, range(11)))
    assert found.labels.tolist() == [10, 2, 0]


def test_classes_txt_with_too_few_names_is_refused_by_name(tmp_path):
    tar(tmp_path / "a.tar", samples(0, 2))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    message = refusal(tmp_path)
    assert f"{tmp_path}/classes.txt must name every class" in message
    assert "2 names" in message


def test_classes_txt_that_is_not_text_is_refused_by_name(tmp_path):
    tar(tmp_path / "a.tar", samples(0, 1))
    (tmp_path / "classes.txt").write_bytes("caf\xe9\nk\xe4se\n".encode("latin-1"))
    assert "classes.txt" in refusal(tmp_path)


@pytest.mark.parametrize("label", ["-1", "cat", "", "1.5"])
def test_a_class_that_is_no_number_from_0_on_is_refused_by_name(tmp_path, label):
    tar(tmp_path / "a.tar", samples(0) | samples(label, first=1))
    message = refusal(tmp_path)
    assert f"{tmp_path}/a.tar" in message
    assert "001.cls" in message


def test_images_in_folders_are_of_those_classes(tmp_path):
    """As `tar cf a.tar cat dog` makes it, and with a folder above."""
    tar(tmp_path / "a.tar", {"dog/1.jpg": jpeg(1), "cat/1.jpg": jpeg(2)})
    tar(tmp_path / "b.tar", {"train/cat/2.JPEG": jpeg(3), "./dog/5.png": jpeg(4), "dog/readme.txt": b"x"})
    found = scan(str(tmp_path), "data.train")
    assert found.classes == ("cat", "dog")
    names = {"dog/1.jpg": "dog", "cat/1.jpg": "cat", "train/cat/2.JPEG": "cat", "./dog/5.png": "dog"}
    assert labels_of(found) == names
    assert list(labels_of(found)) == list(names)  # in the order of the shards


def test_a_samples_key_ends_at_the_first_dot_of_its_files_name(tmp_path):
    """As WebDataset splits them; a folder's dots are not its file's."""
    members = {
        "v1.0/n01.photo.jpg": jpeg(1),
        "v1.0/n01.cls": b"1",
        "v1.0/n01.json": b"{}",
        "n02.cls": b" 0\n",
        "n02.JPG": jpeg(2),
    }
    tar(tmp_path / "a.tar", members)
    assert labels_of(scan(str(tmp_path), "data.train")) == {"v1.0/n01.photo.jpg": "1", "n02.JPG": "0"}


@pytest.mark.parametrize("name", ["7.jpg", "./7.jpg"])
def test_an_image_without_a_class_is_refused_by_name(tmp_path, name):
    tar(tmp_path / "a.tar", {name: jpeg()})
    message = refusal(tmp_path)
    assert f"{name} in {tmp_path}/a.tar has none" in message
    assert "7.cls" in message


def test_numbers_and_folders_for_classes_are_not_mixed(tmp_path):
    tar(tmp_path / "a.tar", samples(0, 1))
    tar(tmp_path / "b.tar", {"cat/7.jpg": jpeg()})
    message = refusal(tmp_path)
    assert "all lie in folders" in message
    assert "'cat'" in message


def test_hidden_members_are_not_images(tmp_path):
    """macOS's tar puts one beside each file."""
    tar(tmp_path / "a.tar", {"cat/._1.jpg": b"what macOS adds", "cat/1.jpg": jpeg(), "._cat": b"x"})
    assert scan(str(tmp_path), "data.train").paths == ("cat/1.jpg",)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_tar_files_of_any_format_with_long_names_and_names_in_unicode_are_read(tmp_path, format):
    long = "käse/" + ("x" * 40 + "/") * 3 + "cat/line\nfeed 😀.jpg"
    tar(tmp_path / "a.tar", {long: jpeg(1), "dog/2.jpg": jpeg(2)}, format=format)
    found = scan(str(tmp_path), "data.train")
    assert labels_of(found) == {long: "cat", "dog/2.jpg": "dog"}
    assert [Reader(found, None).read(i).tobytes() for i in range(2)] == [jpeg(1), jpeg(2)]


def test_a_bad_image_in_a_shard_is_named_with_it_or_left_out(tmp_path):
    tar(tmp_path / "a.tar", samples(0, 1) | {"900.jpg": jpeg()[:-50], "900.cls": b"0", "901.jpg": b"", "901.cls": b"1"})
    message = refusal(tmp_path)
    assert "2 of 4 are not" in message
    assert "900.jpg: cut short" in message
    assert "901.jpg: empty" in message
    found = scan(str(tmp_path), "data.train", quarantine=True)
    assert (found.paths, found.num_left_out) == (("000.jpg", "001.jpg"), 2)


# Damage


def long_shard(path):
    return tar(path, samples(*range(6)))


def cut_in_an_image(content):
    return content[: content.index(jpeg(3)) + 600]


def cut_in_a_header(content):
    return content[: content.index(jpeg(3)) - 300]


def cut_at_a_members_end(content):
    """Where the next begins: nothing in the file tells, but that it has no end."""
    return content[: content.index(jpeg(3)) - 512]


def hole_over_a_header(content):
    """What a lost block of a disk leaves."""
    at = content.index(jpeg(3)) - 512
    return content[:at] + bytes(512) + content[at + 512 :]


def flip_in_a_header(content):
    at = content.index(jpeg(3)) - 512
    return content[:at] + b"\xff" + content[at + 1 :]


DAMAGES = [cut_in_an_image, cut_in_a_header, cut_at_a_members_end, hole_over_a_header, flip_in_a_header]


@pytest.mark.parametrize("damage", [*DAMAGES, lambda content: b"", lambda content: b"no tar" * 1000])
def test_a_damaged_shard_is_refused_by_name(tmp_path, damage):
    """In the middle too: a reader that takes what it can't read for the end loses the images behind it unseen."""
    path = long_shard(tmp_path / "b.tar")
    tar(tmp_path / "a.tar", samples(0, first=100))
    assert len(scan(str(tmp_path), "data.train")) == 7
    path.write_bytes(damage(path.read_bytes()))
    assert f"{path} must be a whole tar file, but is damaged" in refusal(tmp_path)


def test_a_shard_with_one_empty_block_at_its_end_is_whole(tmp_path):
    """Not every program writes two, and fills up to 20."""
    path = long_shard(tmp_path / "a.tar")
    content = path.read_bytes()
    path.write_bytes(content[: -(-len(content.rstrip(b"\0")) // 512) * 512 + 512])
    assert len(scan(str(tmp_path), "data.train")) == 6


# Written


def test_the_same_images_give_the_same_bytes_wherever_they_are(source, tmp_path):
    copy = tmp_path / "else where"
    for i, path in enumerate(source.paths):
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(Reader(source, None).read(i).tobytes())
    sharding.write(source, str(tmp_path / "a"), 10)
    sharding.write(scan(str(copy), "data.train"), str(tmp_path / "b"), 10)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    names = {"000000.tar", "000001.tar", "000002.tar", "classes.txt", "index.parquet", ".plan.json"}
    assert set(files_in(tmp_path / "a")) == names


@pytest.mark.parametrize("images_per_shard", [1, 7, 24, 100])
def test_the_shards_hold_each_image_once_with_its_class_size_and_bytes(source, tmp_path, images_per_shard):
    written = sharding.write(source, str(tmp_path / "a"), images_per_shard)
    assert written.classes == source.classes
    assert content_of(written) == content_of(source)
    assert len(written.shards) == -(-24 // images_per_shard)
    assert np.bincount(written.shard_numbers).tolist()[:-1] == [images_per_shard] * (len(written.shards) - 1)
    sizes = [sorted(zip(i.heights.tolist(), i.widths.tolist(), strict=True)) for i in (source, written)]
    assert sizes[0] == sizes[1]
    assert list(written.paths) == [f"{i:09d}{os.path.splitext(path)[1]}" for i, path in enumerate(written.paths)]


def test_the_index_that_is_written_is_the_one_that_reading_the_shards_gives(source, tmp_path, monkeypatch):
    """With other memories, so that both scans read."""
    target = tmp_path / "a"
    written = sharding.write(source, str(target), 10)
    found = []
    for memory in ("with", "without"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / memory))
        found.append(scan(str(target), "data.train"))
        (target / "index.parquet").unlink(missing_ok=True)
    for one in found:
        assert (one.digest, one.classes, one.shards) == (written.digest, written.classes, written.shards)
        assert one.rows.select(COLUMNS).to_pylist() == written.rows.select(COLUMNS).to_pylist()


def test_classes_with_any_name_survive(tmp_path):
    for number, name in enumerate(("sep\u2028arator", " blanks ", "#7", "käse", "tab\t")):
        add(tmp_path / "source" / name / "a.jpg", seed=number)
    source = scan(str(tmp_path / "source"), "data.train")
    sharding.write(source, str(tmp_path / "a"), 2)
    found = scan(str(tmp_path / "a"), "data.train")
    assert found.classes == source.classes
    assert content_of(found) == content_of(source)


def test_a_class_whose_name_has_lines_is_refused_by_name(tmp_path):
    add(tmp_path / "source" / "line\nfeed" / "a.jpg")
    with pytest.raises(DataError, match=r"'line\\nfeed' is not"):
        sharding.write(scan(str(tmp_path / "source"), "data.train"), str(tmp_path / "a"), 2)
    assert not (tmp_path / "a").exists()


def test_the_shards_are_plain_tar_files_with_the_classes_numbers_in_them(source, tmp_path):
    sharding.write(source, str(tmp_path / "a"), 10)
    subprocess.run(["tar", "xf", tmp_path / "a" / "000001.tar", "-C", tmp_path], check=True)
    images = {os.path.splitext(path.name)[0]: path for path in tmp_path.glob("0*.[jp]*g")}
    assert sorted(images) == [f"{number:09d}" for number in range(10, 20)]
    contents = content_of(source)
    for key, path in images.items():
        label = int((tmp_path / f"{key}.cls").read_text())
        assert (source.classes[label], path.read_bytes()) in contents


def test_what_an_index_leaves_out_is_not_in_the_shards(tmp_path):
    for number in range(5):
        path = add(tmp_path / "source" / "cat" / f"{number}.jpg", seed=number)
    path.write_bytes(path.read_bytes()[:-100])
    source = scan(str(tmp_path / "source"), "data.train", quarantine=True)
    written = sharding.write(source, str(tmp_path / "a"), 3)
    assert (len(written), written.num_left_out) == (4, 0)
    assert content_of(written) == content_of(source)


def test_progress_ends_at_all_of_them_also_where_all_is_done(source, tmp_path):
    said = []
    for _ in range(2):
        sharding.write(source, str(tmp_path / "a"), 10, lambda *progress: said.append(progress))
    assert said == [(10, 24), (20, 24), (24, 24), (24, 24)]


# Killed, refused, full

VICTIM = """
import os, signal, sys
from swa_dist.data import sharding
from swa_dist.data.scan import scan

source, target, event, number = *sys.argv[1:4], 0
index = scan(source, "data.train")

def hook(name, arguments):
    global left
    if name == event and str(arguments[0]).startswith(target):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

while True:
    child = os.fork()
    if not child:
        left = number
        sys.addaudithook(hook)
        sharding.write(index, f"{target}/{number:03d}", 8)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    number += 1
"""


def whole_shards(source, tmp_path):
    sharding.write(source, str(tmp_path / "whole"), 8)
    return files_in(tmp_path / "whole")


@pytest.mark.parametrize(("event", "least"), [("open", 20), ("os.rename", 9), ("os.remove", 5)])
@pytest.mark.faults
def test_after_a_kill_at_any_file_the_same_command_gives_the_same_bytes_and_leaves_nothing(
    source, tmp_path, event, least
):
    """Before each opening, renaming and removal of a file in turn: the kill is real, of a process of its own."""
    target = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", VICTIM, source.root, str(target), event], check=True, timeout=100)
    whole = whole_shards(source, tmp_path)
    killed = sorted(target.iterdir())
    assert len(killed) > least
    for folder in killed:
        for name, content in files_in(folder).items():
            assert name.startswith(".") or content == whole[name]  # what is there under its name is whole
        sharding.write(source, str(folder), 8)
        assert files_in(folder) == whole, folder.name


def test_shards_that_are_there_are_not_written_again(source, tmp_path):
    target = tmp_path / "a"
    sharding.write(source, str(target), 5)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir() if path.name != ".plan.json"}
    sharding.write(source, str(target), 5)
    assert {name: (target / name).stat().st_mtime_ns for name in before} == before


def test_a_folder_with_other_shards_or_files_is_refused_and_left_as_it_is(source, tmp_path):
    sharding.write(source, str(tmp_path / "a"), 10)
    before = files_in(tmp_path / "a")
    add(tmp_path / "source" / "class 0" / "new.jpg")
    other = scan(str(tmp_path / "source"), "data.train")
    for images, size in ((other, 10), (source, 11)):
        with pytest.raises(OutputError, match="of other images or of another size") as caught:
            sharding.write(images, str(tmp_path / "a"), size)
        assert str(tmp_path / "a") in str(caught.value)
    assert files_in(tmp_path / "a") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="must be empty"):
        sharding.write(source, str(tmp_path / "mine"), 10)
    assert set(files_in(tmp_path / "mine")) == {"thesis.tex"}


def test_an_image_that_changed_since_it_was_indexed_ends_writing_and_is_named(source, tmp_path):
    add(tmp_path / "source" / "class 0" / "0.JPEG", seed=1234)
    with pytest.raises(DataError, match=r"class 0/0\.JPEG must be as it was when it was indexed"):
        sharding.write(source, str(tmp_path / "a"), 5)
    assert "index.parquet" not in files_in(tmp_path / "a")
    assert not [name for name in files_in(tmp_path / "a") if name.startswith(".staging")]


def test_a_full_disk_is_named_and_what_is_done_is_kept(tmp_path, full_disk):  # noqa: F811
    for number in range(40):
        add(tmp_path / "source" / "cat" / f"{number:02d}.jpg", width=160, height=120, seed=number, quality=98)
    source = scan(str(tmp_path / "source"), "data.train")
    with pytest.raises(OutputError, match="full") as caught:
        sharding.write(source, str(full_disk / "a"), 4)
    assert str(full_disk / "a") in str(caught.value)
    left = files_in(full_disk / "a")
    assert "index.parquet" not in left
    assert not [name for name in left if name.startswith(".staging")]
    assert [name for name in left if name.endswith(".tar")]


# An index that isn't its shards'


def test_a_shard_that_was_written_anew_is_a_data_error_that_names_it_and_the_remedy(tmp_path):
    """Tar files are filled up to 10 KiB, so that another is often as long."""
    tar(tmp_path / "a.tar", samples(0, 1, 0))
    found = scan(str(tmp_path), "data.train")
    size = (tmp_path / "a.tar").stat().st_size
    tar(tmp_path / "a.tar", samples(0, 1, 0, first=10))
    assert (tmp_path / "a.tar").stat().st_size == size
    with pytest.raises(DataError) as caught:
        Reader(found, None).read(1)
    message = str(caught.value)
    assert f"{tmp_path}/a.tar: 001.jpg" in message
    assert "`swa-dist data index`" in message
    again = scan(str(tmp_path), "data.train")  # which helps
    assert Reader(again, None).read(1).tobytes() == jpeg(11)
    assert again.digest != found.digest


def test_writing_the_index_again_helps_though_the_shards_came_with_one(source, tmp_path):
    """The index beside the shards is of those that were there before."""
    found = sharding.write(source, str(tmp_path / "a"), 30)
    shard = tmp_path / "a" / "000000.tar"
    content = shard.read_bytes()
    tar(shard, samples(0, 1))
    with shard.open("ab") as file:
        file.write(bytes(len(content) - shard.stat().st_size))
    with pytest.raises(DataError, match=r"000000\.tar: .*`swa-dist data index`"):
        Reader(found, None).read(1)
    again = scan(str(tmp_path / "a"), "data.train")
    assert Reader(again, None).read(1).tobytes() == jpeg(1)


def test_a_shard_that_is_shorter_or_gone_is_a_data_error_that_names_it(tmp_path):
    path = long_shard(tmp_path / "a.tar")
    found = scan(str(tmp_path), "data.train")
    os.truncate(path, int(found.offset(5)) + 100)
    with pytest.raises(DataError, match=r"a\.tar: 005\.jpg must be as it was"):
        Reader(found, None).read(5)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.tar must be as it was .*No such file"):
        Reader(found, None).read(0)


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: b"", lambda content: b"x" * 5000])
def test_a_damaged_index_beside_the_shards_is_refused_by_name(source, tmp_path, damage):
    sharding.write(source, str(tmp_path / "a"), 10)
    path = tmp_path / "a" / "index.parquet"
    path.write_bytes(damage(path.read_bytes()))
    assert str(path) in refusal(tmp_path / "a")


def test_an_index_of_shards_survives_saving(source, tmp_path):
    sharding.write(source, str(tmp_path / "a"), 10)
    found = scan(str(tmp_path / "a"), "data.train")
    index.save(found, str(tmp_path / "index.parquet"))
    loaded = index.load(str(tmp_path / "index.parquet"), str(tmp_path / "a"))
    assert (loaded.shards, loaded.digest) == (found.shards, found.digest)
    assert content_of(loaded) == content_of(source)
