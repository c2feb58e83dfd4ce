"""Every image decoded once: what can't be is named and left out, what is merely unusual is counted; and what is known
of files that have not changed is not read again."""

import io
import json
import os
import struct
import zlib

import pytest
from PIL import Image

from swa_dist.data import index
from swa_dist.data import scan as scanning
from swa_dist.data.files import DiskFiles
from swa_dist.data.scan import scan
from swa_dist.data.verify import verify
from swa_dist.errors import DataError
from tests.unit.test_cli import here, run  # noqa: F401 - fixtures
from tests.unit.test_index import add, picture
from tests.unit.test_shards import samples, tar


@pytest.fixture
def train(tmp_path):
    """Two classes of three images, each of some 13 KB."""
    for number, name in enumerate(("cat/a.jpg", "cat/b.jpg", "cat/c.png", "dog/a.jpg", "dog/b.jpg", "dog/c.png")):
        add(tmp_path / "train" / name, width=120, height=90, seed=number)
    return tmp_path / "train"


def hole(path, length=4096):
    """What a lost block of a disk leaves, in the middle of the compressed pixels."""
    content = bytearray(path.read_bytes())
    at = (len(content) - length) // 2
    content[at : at + length] = bytes(length)
    path.write_bytes(content)


def flip(path, at=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x10
    path.write_bytes(content)


def cut_and_ended(path):
    """As a program saves what it has not wholly received."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff\xd9")


def verified(root):
    return verify(scan(str(root), "data.train"), cores=2)


# What is found


def test_whole_images_are_all_good_and_hashed(train):
    before = scan(str(train), "data.train")
    said = []
    found = verify(before, 2, lambda done, total: said.append((done, total)))
    assert (found.bad, found.unusual) == ({}, {})
    assert found.index.digest == before.digest
    assert None not in found.index.rows["sha256"].to_pylist()
    assert said == [(6, 6)]


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("cat/b.jpg", hole, "4,096 zero bytes in a row"),
        ("cat/c.png", hole, ""),
        ("cat/c.png", flip, ""),
        ("dog/c.png", lambda path: flip(path, 0.9), ""),
    ],
    ids=["hole in a JPEG", "hole in a PNG", "flipped in a PNG's pixels", "flipped in the last of a PNG's pixels"],
)
def test_damage_within_the_pixels_is_named_which_the_headers_do_not_tell(train, name, damage, why):
    damage(train / name)
    before = scan(str(train), "data.train")
    assert len(before) == 6
    found = verify(before, cores=2)
    assert list(found.bad) == [name]
    assert why in found.bad[name]
    assert name not in found.index.paths
    assert (len(found.index), found.index.num_left_out) == (5, 1)
    assert found.index.digest != before.digest


def test_zeros_in_a_jpegs_metadata_are_no_damage(train):
    """A preview that was never made, or the padding that cameras leave."""
    content = (train / "cat" / "a.jpg").read_bytes()
    padding = b"\xff\xe1" + struct.pack(">H", 2 + 8000) + bytes(8000)
    (train / "cat" / "a.jpg").write_bytes(content[:2] + padding + content[2:])
    assert verified(train).bad == {}


def test_grey_and_cmyk_images_and_those_with_alpha_are_counted_and_not_bad(train):
    for mode, name in (("L", "cat/1.jpg"), ("L", "dog/1.jpg"), ("CMYK", "dog/2.jpg"), ("RGBA", "cat/3.png")):
        picture().convert(mode).save(train / name)
    for mode in ("P", "1", "LA"):
        picture().convert("L").convert(mode).save(train / "cat" / f"{mode}.png")
    found = verified(train)
    assert found.bad == {}
    assert found.unusual == {
        "grey": 2,
        "CMYK": 1,
        "RGB with alpha": 1,
        "palette": 1,
        "black and white": 1,
        "grey with alpha": 1,
    }
    assert len(found.index) == 13


def test_many_bad_images_are_each_named_among_many(tmp_path):
    """More than are decoded at once."""
    bad = set()
    for number in range(150):
        path = add(tmp_path / "train" / "cat" / f"{number:03d}.png", width=20, height=20, seed=number)
        if number % 7 == 0:
            flip(path)
            bad.add(f"cat/{number:03d}.png")
    assert set(verified(tmp_path / "train").bad) == bad


def test_an_image_that_is_gone_since_the_scan_is_named(train):
    before = scan(str(train), "data.train")
    (train / "dog" / "a.jpg").unlink()
    found = verify(before, cores=2)
    assert list(found.bad) == ["dog/a.jpg"]
    assert "can't be read" in found.bad["dog/a.jpg"]


def test_a_silently_flipped_byte_is_noticed_at_the_second_time(train):
    """A JPEG decodes whatever its bits are; its size and its ends are as they were."""
    add(train / "dog" / "a.jpg", width=300, height=200)
    first = verified(train)
    assert first.bad == {}
    flip(train / "dog" / "a.jpg")
    again = index.carried(scan(str(train), "data.train"), first.index)
    assert len(again) == 6
    second = verify(again, cores=2)
    assert list(second.bad) == ["dog/a.jpg"]
    assert "changed since" in second.bad["dog/a.jpg"]
    assert second.index.paths == tuple(path for path in first.index.paths if path != "dog/a.jpg")


def test_damage_in_shards_is_named_with_the_shard(tmp_path):
    members = samples(0, 1)
    noise = io.BytesIO()
    picture(120, 90).save(noise, format="PNG")
    content = bytearray(noise.getvalue())
    content[len(content) // 2] ^= 1
    tar(tmp_path / "a.tar", members)
    tar(tmp_path / "b.tar", members | {"900.png": bytes(content), "900.cls": b"1"})
    found = verified(tmp_path)
    assert list(found.bad) == ["b.tar: 900.png"]
    assert len(found.index) == 4


def test_an_index_of_which_all_is_left_out_is_verified(train):
    for path in train.rglob("*.*"):
        picture(120, 90).save(path, format="PNG")
        flip(path)
    first = verified(train)
    assert (len(first.index), len(first.bad)) == (0, 6)
    assert verify(first.index, cores=2).bad == {}


# The command


def damaged(train):
    """One of each kind: names, and what is said of them."""
    (train / "cat" / "empty.jpg").touch()
    (train / "cat" / "zeros.jpg").write_bytes(bytes(5000))
    (train / "dog" / "text.jpg").write_text("this is no image\n" * 10)
    os.truncate(add(train / "dog" / "cut.jpg", width=200, height=150), 9000)
    Image.new("1", (10_000, 6_000)).save(train / "dog" / "huge.png")
    hole(train / "dog" / "b.jpg")
    flip(train / "cat" / "c.png")
    picture().convert("L").save(train / "cat" / "grey.jpg")
    return {
        "cat/empty.jpg": "empty",
        "cat/zeros.jpg": "not a JPEG or PNG image",
        "dog/text.jpg": "not a JPEG or PNG image",
        "dog/cut.jpg": "cut short",
        "dog/huge.png": "60,000,000",
        "dog/b.jpg": "zero bytes",
        "cat/c.png": "",
    }


def test_the_command_names_all_that_is_bad_and_ends_with_65_without_an_index(run, train):  # noqa: F811
    kinds = damaged(train)
    code, out, _ = run("data", "verify", train)
    assert code == 65
    assert f"{train}: 12 images, 7 bad, 1 grey" in out
    assert "--out INDEX leaves them out" in out
    for name in kinds:
        assert f"\n  {name}: " in out


def test_the_command_ends_well_where_all_is_good(run, train):  # noqa: F811
    code, out, _ = run("data", "verify", train)
    assert code == 0
    assert out.splitlines()[-1] == f"{train}: 6 images, 0 bad"


def test_the_command_gives_json_and_nothing_else_on_its_output(run, train):  # noqa: F811
    kinds = damaged(train)
    code, out, _ = run("data", "verify", train, "--json")
    assert code == 65
    (facts,) = json.loads(out)
    assert (facts["images"], facts["num_images"], facts["unusual"]) == (str(train), 12, {"grey": 1})
    assert facts["left_out_of"] is None
    assert set(facts["bad"]) == set(kinds)
    for name, why in kinds.items():
        assert why in facts["bad"][name] or (name == "dog/huge.png" and "10000 x 6000" in facts["bad"][name])


def test_what_was_found_is_left_out_of_the_index_and_stays_so_when_it_is_written_again(run, train, tmp_path):  # noqa: F811
    out_file = tmp_path / "index.parquet"
    assert run("data", "index", train, "--out", out_file)[0] == 0
    before = index.load(str(out_file), str(train))
    kinds = damaged(train)
    code, out, _ = run("data", "verify", train, "--out", out_file)
    assert code == 0
    assert f"left out of {out_file}" in out
    noted = index.load(str(out_file), str(train))
    assert set(noted.paths) == {"cat/a.jpg", "cat/b.jpg", "cat/grey.jpg", "dog/a.jpg", "dog/c.png"}
    assert dict(index.left_out(noted)).keys() == kinds.keys()
    assert noted.digest != before.digest
    code, out, _ = run("data", "index", train, "--out", out_file, "--quarantine")
    assert code == 0
    assert "5 images, 2 classes, 7 left out" in out
    assert noted.digest in out
    again = index.load(str(out_file), str(train))
    assert (again.digest, again.paths) == (noted.digest, noted.paths)
    code, out, _ = run("data", "verify", train, "--out", out_file, "--json")
    assert code == 0
    assert set(json.loads(out)[0]["bad"]) == set(kinds)


def test_an_image_that_was_replaced_by_a_good_one_is_in_again(run, train, tmp_path):  # noqa: F811
    out_file = tmp_path / "index.parquet"
    flip(train / "cat" / "c.png")
    assert run("data", "verify", train, "--out", out_file)[0] == 0
    assert len(index.load(str(out_file), str(train))) == 5
    add(train / "cat" / "c.png", width=121, height=90, seed=77)
    code, out, _ = run("data", "index", train, "--out", out_file)
    assert code == 0
    assert "6 images, 2 classes, digest" in out


def test_an_image_that_was_mended_in_its_middle_is_in_again_once_it_is_verified(run, train, tmp_path):  # noqa: F811
    """Its size and its ends, which the index knows it by, are the same."""
    out = str(tmp_path / "index.parquet")
    whole = add(train / "cat" / "b.jpg", width=200, height=150).read_bytes()
    hole(train / "cat" / "b.jpg")
    run("data", "verify", str(train), "--out", out)
    (train / "cat" / "b.jpg").write_bytes(whole)
    assert "1 left out" in run("data", "index", str(train), "--out", out)[1]
    assert " 0 bad" in run("data", "verify", str(train), "--out", out)[1]
    assert index.load(out, str(train)).digest == scan(str(train), "data.train").digest


def test_indexing_refuses_files_that_are_no_whole_images_unless_they_may_be_left_out(run, train, tmp_path):  # noqa: F811
    out_file = tmp_path / "index.parquet"
    (train / "cat" / "empty.jpg").touch()
    code, out, err = run("data", "index", train, "--out", out_file)
    assert code == 65
    assert "digest" not in out
    assert f"{train}/cat/empty.jpg: empty" in err
    assert "--quarantine" in err
    assert not out_file.exists()
    code, out, _ = run("data", "index", train, "--out", out_file, "--quarantine")
    assert code == 0
    assert "6 images, 2 classes, 1 left out" in out
    assert dict(index.left_out(index.load(str(out_file), str(train)))) == {"cat/empty.jpg": "empty"}


def test_bad_members_of_two_shards_with_one_name_are_both_named(run, tmp_path):  # noqa: F811
    for name in ("a.tar", "b.tar"):
        tar(tmp_path / "shards" / name, samples(0, 1) | {"900.jpg": b"", "900.cls": b"0"})
    code, out, _ = run("data", "verify", tmp_path / "shards", "--json")
    assert code == 65
    assert set(json.loads(out)[0]["bad"]) == {"a.tar: 900.jpg", "b.tar: 900.jpg"}


# The memory of headers


@pytest.fixture
def opened(monkeypatch):
    """The images that are opened to be read from here on."""
    seen, real = [], DiskFiles.open

    def noting(self, file):
        seen.append(file.name)
        return real(self, file)

    monkeypatch.setattr(DiskFiles, "open", noting)
    return seen


def test_unchanged_files_are_not_read_again_and_changed_ones_are(train, opened):
    first = scan(str(train), "data.train")
    assert sorted(opened) == sorted(first.paths)
    opened.clear()
    assert scan(str(train), "data.train").digest == first.digest
    assert opened == []
    add(train / "cat" / "a.jpg", width=121, height=90)
    add(train / "dog" / "new.jpg")
    second = scan(str(train), "data.train")
    assert sorted(opened) == ["cat/a.jpg", "dog/new.jpg"]
    assert second.widths[0] == 121


def test_a_file_of_the_same_size_and_time_but_another_content_is_read_again(train, opened):
    """As what sets times back does: rsync, tar, git-annex."""
    path = train / "cat" / "a.jpg"
    scan(str(train), "data.train")
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before[:-10] + bytes([before[-10] ^ 1]) + before[-9:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    opened.clear()
    scan(str(train), "data.train")
    assert opened == ["cat/a.jpg"]


def interrupted_scan(root, monkeypatch, *, at, at_once):
    """A scan that ends with Ctrl-C at so many images, of which `at_once` are read and remembered together."""
    monkeypatch.setattr(scanning, "_IMAGES_AT_ONCE", at_once)

    def interrupt(done, total):
        if done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(root, "data.train", interrupt)


def test_a_scan_that_was_interrupted_goes_on_where_it_was(train, opened, monkeypatch):
    interrupted_scan(str(train), monkeypatch, at=5, at_once=2)
    opened.clear()
    assert len(scan(str(train), "data.train")) == 6
    assert sorted(opened) == ["dog/b.jpg", "dog/c.png"]


def test_bad_files_are_remembered_but_not_those_that_could_not_be_read(train, opened, monkeypatch):
    """An answer of a file system that is away for a moment says nothing of the image."""
    (train / "cat" / "empty.jpg").touch()
    real = DiskFiles.open

    def away(self, file):
        if file.name == "dog/a.jpg":
            raise OSError(5, "Input/output error")
        return real(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(DiskFiles, "open", away)
        with pytest.raises(DataError, match=r"dog/a\.jpg: Input/output error"):
            scan(str(train), "data.train")
    opened.clear()
    found = scan(str(train), "data.train", quarantine=True)
    assert opened == ["dog/a.jpg"]
    assert dict(index.left_out(found)) == {"cat/empty.jpg": "empty"}


@pytest.mark.parametrize("content", [b"", b"no database" * 1000])
def test_a_memory_that_is_damaged_or_cannot_be_kept_costs_nothing_but_time(train, monkeypatch, tmp_path, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = scan(str(train), "data.train")
    (path,) = (tmp_path / "cache").rglob("*.sqlite")
    path.write_bytes(content)
    assert scan(str(train), "data.train").digest == first.digest
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert scan(str(train), "data.train").digest == first.digest


def test_links_in_a_loop_end_and_each_image_is_in_once(train):
    before = scan(str(train), "data.train")
    (train / "cat" / "self").symlink_to(".")
    (train / "cat" / "deep").mkdir()
    (train / "cat" / "deep" / "up").symlink_to("..")
    after = scan(str(train), "data.train")
    assert (after.paths, after.digest) == (before.paths, before.digest)
    (train / "dog" / "x.jpg").symlink_to("x.jpg")
    with pytest.raises(DataError, match=r"dog/x\.jpg: Too many levels"):
        scan(str(train), "data.train")


def test_a_link_to_a_folder_elsewhere_within_a_class_is_followed(train, tmp_path):
    add(tmp_path / "elsewhere" / "in" / "z.jpg")
    (train / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    found = scan(str(train), "data.train")
    assert found.paths[-1] == "dog/more/in/z.jpg"
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]


def test_a_pipe_is_no_image_and_nobody_waits_for_it(train):
    before = scan(str(train), "data.train")
    os.mkfifo(train / "cat" / "x.jpg")
    assert scan(str(train), "data.train").digest == before.digest


def test_crcs_of_pngs_are_what_tells(train):
    """A decoder that does not look at them gives noise for a flipped bit."""
    content = (train / "cat" / "c.png").read_bytes()
    at = content.index(b"IDAT")
    length = struct.unpack(">I", content[at - 4 : at])[0]
    wrong = struct.pack(">I", zlib.crc32(content[at : at + 4 + length]) ^ 1)
    (train / "cat" / "c.png").write_bytes(content[: at + 4 + length] + wrong + content[at + 8 + length :])
    assert list(verified(train).bad) == ["cat/c.png"]
