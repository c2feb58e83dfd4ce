"""Images on S3: what they are there is what they are on disk; what goes wrong is named, tried again, or kept out."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import boto3
import botocore.session
import numpy as np
import pytest
from botocore.config import Config
from botocore.retries.standard import ExponentialBackoff

from swa_dist.data import index, sharding
from swa_dist.data import scan as scanning
from swa_dist.data.cache import Cache
from swa_dist.data.reading import Ahead, Reader
from swa_dist.data.scan import scan
from swa_dist.errors import DataError, ServiceError
from swa_dist.storage import s3 as storage
from swa_dist.storage.s3 import Prefix
from tests.support import SECRET_KEY, Proxy, answer_of
from tests.unit.test_index import add
from tests.unit.test_shards import content_of, files_in, samples, tar
from tests.unit.test_storage import full_disk, unwritable  # noqa: F401 - fixtures
from tests.unit.test_verify import interrupted_scan

NAMES = ("cat/a.jpg", "cat/b 1+%.JPG", "cat/in/käse.png", "dog/a.jpg", "dog/b.jpeg")


@pytest.fixture(scope="module")
def descriptions():
    """What boto3 knows of S3's requests: a tenth of a second for each client to read."""
    return botocore.session.get_session().get_component("data_loader")


@pytest.fixture(autouse=True)
def _clients_at_once(descriptions, monkeypatch):
    real = boto3.session.Session

    def session():
        core = botocore.session.get_session()
        core.register_component("data_loader", descriptions)
        return real(botocore_session=core)

    monkeypatch.setattr(boto3.session, "Session", session)


@pytest.fixture
def on_disk(tmp_path):
    """Class folders of five images."""
    for number, name in enumerate(NAMES):
        add(tmp_path / "images" / name, width=40 + number, seed=number)
    return tmp_path / "images"


def put(folder, url):
    """Upload a folder."""
    prefix = Prefix(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            prefix.write(str(path.relative_to(folder)), path.read_bytes())
    return url


@pytest.fixture
def url(on_disk, s3):
    return put(on_disk, f"{s3}/images")


@pytest.fixture
def proxy(s3, s3_server, monkeypatch):
    """What the environment leads to from here on."""
    with Proxy(s3_server) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL", made.url)
        yield made


@pytest.fixture
def impatient(monkeypatch):
    """Fewer attempts and shorter waits, or the tests of outages would take minutes."""
    settings = Config(connect_timeout=1, read_timeout=1, retries={"mode": "standard", "total_max_attempts": 2})
    for name in ("READ_SETTINGS", "_SETTINGS"):
        monkeypatch.setattr(storage, name, settings)
    monkeypatch.setattr(Prefix.__init__, "__defaults__", (settings,))
    monkeypatch.setattr(storage, "_BODY_ATTEMPTS", 2)
    monkeypatch.setitem(ExponentialBackoff._DEFAULT_BACKOFF_CONFIG, "throttling_base_scale", 0.05)


def gets(proxy):
    """Requests for objects, not lists."""
    return [one for one in proxy.seen if one.startswith("GET") and "list-type" not in one]


def ranges(proxy):
    """The ranges that are asked for from here on, one for each request."""
    seen = []

    class Noting(proxy.RequestHandlerClass):
        def do_GET(self):  # noqa: N802 - http.server's name
            seen.append(self.headers.get("Range"))
            super().do_GET()

    proxy.RequestHandlerClass = Noting
    return seen


def contents(found, cache=None):
    reader = Reader(found, cache)
    return [reader.read(i).tobytes() for i in range(len(found))]


# The same as on disk


def test_class_folders_are_what_they_are_on_disk(on_disk, url):
    there, here = scan(url, "data.train"), scan(str(on_disk), "data.train")
    assert there.root == url
    assert (there.classes, there.paths) == (here.classes, here.paths)
    for what in ("labels", "heights", "widths"):
        assert getattr(there, what).tolist() == getattr(here, what).tolist()
    assert contents(there) == contents(here)


def test_the_digest_is_of_the_content_and_not_of_the_place(on_disk, url, s3):
    assert scan(put(on_disk, f"{s3}/else/where"), "data.train").digest == scan(url, "data.train").digest
    Prefix(url).write("cat/a.jpg", (on_disk / "dog" / "a.jpg").read_bytes())
    assert scan(url, "data.train").digest != scan(f"{s3}/else/where", "data.train").digest


def test_a_bucket_itself_may_hold_the_class_folders(on_disk, s3):
    put(on_disk, s3)
    assert len(scan(s3, "data.train")) == 5


@pytest.mark.parametrize("with_index", [True, False])
def test_shards_are_what_they_are_on_disk(on_disk, tmp_path, s3, with_index):
    target = tmp_path / "shards"
    here = sharding.write(scan(str(on_disk), "data.train"), str(target), 2)
    if not with_index:
        (target / "index.parquet").unlink()
    there = scan(put(target, f"{s3}/shards"), "data.train")
    assert (there.digest, there.classes, there.paths) == (here.digest, here.classes, here.paths)
    assert there.labels.tolist() == here.labels.tolist()
    assert contents(there) == contents(here)


def test_foreign_shards_are_what_they_are_on_disk(tmp_path, s3):
    tar(tmp_path / "a.tar", samples(0, 2, 1))
    tar(tmp_path / "b.tar", samples(1, 1, first=7))
    here = scan(str(tmp_path), "data.train")
    there = scan(put(tmp_path, f"{s3}/shards"), "data.train")
    assert (there.digest, there.labels.tolist()) == (here.digest, here.labels.tolist())
    assert contents(there) == contents(here)


def test_flat_images_with_a_file_of_labels_are_what_they_are_on_disk(tmp_path, s3):
    for number in range(3):
        add(tmp_path / "val" / f"{number}.jpg", seed=number)
    (tmp_path / "val" / "val_annotations.txt").write_text("0.jpg\tdog\n1.jpg\tcat\n2.jpg\tdog\n")
    here = scan(str(tmp_path / "val"), "data.val", labels="auto")
    there = scan(put(tmp_path / "val", f"{s3}/val"), "data.val", labels="auto")
    assert (there.classes, there.paths, there.labels.tolist()) == (here.classes, here.paths, here.labels.tolist())


def test_an_index_on_s3_reads_its_images(url, s3):
    index.save(scan(url, "data.train"), f"{s3}/index.parquet")
    assert contents(index.load(f"{s3}/index.parquet", url)) == contents(scan(url, "data.train"))


def test_hidden_objects_and_those_that_stand_for_folders_are_ignored(url):
    before, prefix = scan(url, "data.train"), Prefix(url)
    for name in ("cat/", ".git/a.jpg", "cat/.thumbnails/a.jpg", "cat/._a.jpg", "loose.jpg", "cat/notes.txt"):
        prefix.write(name, b"x" * (not name.endswith("/")))
    after = scan(url, "data.train")
    assert (after.paths, after.digest) == (before.paths, before.digest)


def test_bad_objects_are_named_or_left_out(url):
    Prefix(url).write("cat/x.jpg", b"")
    Prefix(url).write("dog/x.jpg", b"no image")
    with pytest.raises(DataError) as caught:
        scan(url, "data.train")
    assert f"{url}/cat/x.jpg: empty" in str(caught.value)
    assert f"{url}/dog/x.jpg: not a JPEG or PNG image" in str(caught.value)
    assert scan(url, "data.train", quarantine=True).paths == NAMES


def test_a_photograph_with_a_large_preview_before_it_is_read_wholly(url):
    """Its size comes after more than is read at first."""
    exif = b"\xff\xe1\xff\xfe" + b"Exif\0\0" + bytes(65_526)
    content = Prefix(url).read("cat/a.jpg")
    Prefix(url).write("cat/x.jpg", content[:2] + exif + content[2:])
    found = scan(url, "data.train")
    at = found.paths.index("cat/x.jpg")
    assert (found.widths[at], found.heights[at]) == (40, 30)


# Requests


def test_an_image_of_a_shard_is_one_request_for_its_bytes(on_disk, tmp_path, s3, proxy):
    target = tmp_path / "shards"
    sharding.write(scan(str(on_disk), "data.train"), str(target), 3)
    found = scan(put(target, f"{s3}/shards"), "data.train")
    reader, asked = Reader(found, None), ranges(proxy)
    for i in range(len(found)):
        reader.read(i)
    assert asked == [f"bytes={found.offset(i)}-{found.offset(i) + found.num_bytes(i) - 1}" for i in range(len(found))]


def test_an_image_of_its_own_is_one_request(url, proxy):
    found = scan(url, "data.train")
    proxy.seen.clear()
    contents(found)
    assert len(proxy.seen) == len(found)


def test_a_second_scan_asks_for_no_image_and_a_third_for_the_one_that_changed(on_disk, url, proxy):
    first = scan(url, "data.train")
    assert len(gets(proxy)) == 5
    proxy.seen.clear()
    assert scan(url, "data.train").digest == first.digest
    assert gets(proxy) == []
    assert len(proxy.seen) < 8
    Prefix(url).write("dog/a.jpg", (on_disk / "cat" / "a.jpg").read_bytes())
    proxy.seen.clear()
    assert scan(url, "data.train").digest != first.digest
    assert [one.rpartition("/images/")[2] for one in gets(proxy)] == ["dog/a.jpg"]


def test_a_second_scan_of_shards_reads_none(tmp_path, s3, proxy):
    tar(tmp_path / "a.tar", samples(0, 1))
    put(tmp_path, f"{s3}/shards")
    first = scan(f"{s3}/shards", "data.train")
    proxy.seen.clear()
    assert scan(f"{s3}/shards", "data.train").digest == first.digest
    assert gets(proxy) == []


def test_an_interrupted_scan_goes_on_where_it_was(url, proxy, monkeypatch):
    interrupted_scan(url, monkeypatch, at=4, at_once=1)
    proxy.seen.clear()
    assert len(scan(url, "data.train")) == 5
    assert [one.rpartition("/images/")[2] for one in gets(proxy)] == ["dog/a.jpg", "dog/b.jpeg"]


# What goes wrong


def test_an_object_that_is_replaced_or_gone_after_it_was_indexed_is_named_with_the_remedy(on_disk, url):
    found = scan(url, "data.train")
    Prefix(url).write("cat/a.jpg", (on_disk / "dog" / "a.jpg").read_bytes())
    Prefix(url).remove("dog/a.jpg")
    reader = Reader(found, None)
    for name in ("cat/a.jpg", "dog/a.jpg"):
        with pytest.raises(DataError) as caught:
            reader.read(found.paths.index(name))
        assert f"{url}/{name} must be as it was when it was indexed" in str(caught.value)
        assert "`swa-dist data index`" in str(caught.value)
        assert caught.value.exit_code == 65
    assert reader.read(1).tobytes() == (on_disk / found.path(1)).read_bytes()


def test_a_shard_that_is_replaced_after_it_was_indexed_is_named(tmp_path, s3):
    tar(tmp_path / "a.tar", samples(0, 1))
    put(tmp_path, f"{s3}/shards")
    found = scan(f"{s3}/shards", "data.train")
    tar(tmp_path / "a.tar", samples(0, 1) | samples(0, first=2))
    put(tmp_path, f"{s3}/shards")
    with pytest.raises(DataError, match=r"/shards/a\.tar must be as it was"):
        Reader(found, None).read(0)


def test_an_image_that_may_not_be_read_is_a_data_error_that_names_it_and_no_key(url, proxy):
    found = scan(url, "data.train")
    proxy.rule = lambda number, method, path: answer_of("403 Forbidden", "AccessDenied")
    proxy.seen.clear()
    with pytest.raises(DataError) as caught:
        Reader(found, None).read(0)
    assert f"{url}/cat/a.jpg" in str(caught.value)
    assert SECRET_KEY not in str(caught.value)
    assert len(proxy.seen) == 1


@pytest.mark.parametrize("refused", ["list-type", "delimiter", "/a.jpg", "classes.txt", "val_annotations.txt"])
def test_a_place_that_may_not_be_listed_or_read_is_a_data_error_that_names_it(url, proxy, refused, tmp_path, s3):
    if refused == "classes.txt":
        tar(tmp_path / "shards" / "a.tar", samples(0))
        (tmp_path / "shards" / "classes.txt").write_text("cat\n")
        put(tmp_path / "shards", f"{s3}/images")
    if refused == "val_annotations.txt":
        Prefix(f"{s3}/images").remove(*NAMES)
        put(add(tmp_path / "flat" / "a.jpg").parent, f"{s3}/images")
    proxy.rule = lambda number, method, path: answer_of("403 Forbidden", "AccessDenied") if refused in path else ""
    with pytest.raises(DataError) as caught:
        scan(url, "data.val", labels="auto")
    assert url in str(caught.value)
    assert caught.value.exit_code == 65


def test_a_bucket_or_a_prefix_that_is_not_there_is_a_data_error_that_names_it(s3):
    for absent in (f"{s3}-absent/images", f"{s3}/absent"):
        with pytest.raises(DataError) as caught:
            scan(absent, "data.train")
        assert absent in str(caught.value)


def half_of(content):
    """An answer that is cut off in the middle."""
    return f"206 Partial Content\r\nContent-Length: {len(content)}\r\n\r\n{'x' * (len(content) // 2)}"


@pytest.mark.parametrize("sharded", [True, False])
def test_a_body_that_is_cut_in_the_middle_is_asked_for_again(on_disk, tmp_path, url, s3, proxy, sharded):
    if sharded:
        sharding.write(scan(str(on_disk), "data.train"), str(tmp_path / "shards"), 3)
        (tmp_path / "shards" / "index.parquet").unlink()
        url = put(tmp_path / "shards", f"{s3}/shards")
    lost = {}

    def cut_once(number, method, path):
        first = lost.setdefault(path, number) == number
        return half_of(b"x" * 3000) if first and path.endswith((".tar", "g", "G")) else ""

    proxy.seen.clear()
    proxy.rule = cut_once
    found = scan(url, "data.train")
    lost.clear()
    assert content_of(found) == content_of(scan(str(on_disk), "data.train"))
    assert len(lost) == (2 if sharded else 5)


@pytest.mark.parametrize("fate", ["cut", "deaf", "slow", "503"])
def test_an_answer_that_does_not_come_is_asked_for_again(url, proxy, impatient, fate):
    found = scan(url, "data.train")
    proxy.seen.clear()

    def rule(number, method, path):
        if number:
            return ""
        if fate == "slow":
            time.sleep(1.5)
        return {"slow": "", "503": answer_of("503 Slow Down", "SlowDown")}.get(fate, fate)

    proxy.rule = rule
    content = Reader(found, None).read(0).tobytes()
    assert len(content) == found.num_bytes(0)
    assert len(proxy.seen) == 2


OUTAGES = {
    "500": answer_of("500 Internal Server Error", "InternalError"),
    "503": answer_of("503 Slow Down", "SlowDown"),
    "cut": "cut",
    "body": half_of(b"x" * 3000),
    "no server": None,
}


def test_s3_that_is_away_for_good_is_a_service_error_in_bounded_time(url, s3_server, impatient, monkeypatch):
    """While reading, and while the headers are read. All kinds at once."""
    found = scan(url, "data.train")

    def away(kind, deed):
        with Proxy(s3_server, lambda number, method, path: OUTAGES[kind]) as proxy:
            with one_environment, pytest.MonkeyPatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", proxy.url)
                reader, prefix = Reader(found, None), Prefix(url)
                _ = reader._files._prefix._client, prefix._client
            if kind == "no server":
                proxy.shutdown()
                proxy.socket.close()
            began = time.monotonic()
            with pytest.raises(ServiceError) as caught:
                reader.read(0) if deed == "read" else list(prefix.objects())
            return str(caught.value), time.monotonic() - began

    one_environment = threading.Lock()
    asked = [(kind, deed) for kind in OUTAGES for deed in ("read", "list") if (kind, deed) != ("body", "list")]
    with ThreadPoolExecutor(len(asked)) as threads:
        for (kind, deed), (said, seconds) in zip(asked, threads.map(lambda one: away(*one), asked), strict=True):
            assert url in said, (kind, deed)
            assert SECRET_KEY not in said
            assert seconds < 15, (kind, deed)
    assert ServiceError.exit_code == 69


def test_s3_that_goes_away_in_a_scan_is_a_service_error_and_the_next_goes_on(url, proxy, impatient, monkeypatch):
    monkeypatch.setattr(scanning, "_IMAGES_AT_ONCE", 1)
    proxy.rule = lambda number, method, path: "cut" if "/dog/" in path and "list-type" not in path else ""
    with pytest.raises(ServiceError):
        scan(url, "data.train")
    proxy.rule = lambda number, method, path: ""
    proxy.seen.clear()
    assert len(scan(url, "data.train")) == 5
    assert len(gets(proxy)) == 2


# Shards written to S3

VICTIM = """
import os, sys
from swa_dist.data import sharding
from swa_dist.data.scan import scan

source, url, number = sys.argv[1:]
index = scan(source, "data.train")
os.environ["AWS_SDK_UA_APP_ID"] = f"{os.getpid()}-{number}"
sharding.write(index, url, 3)
"""


@pytest.mark.faults
def test_after_a_kill_before_a_request_the_same_command_gives_the_same_objects(on_disk, tmp_path, s3, proxy):
    """The objects are the bytes that they are on disk, and nothing is left beside them."""
    source = scan(str(on_disk), "data.train")
    sharding.write(source, str(tmp_path / "whole"), 3)
    whole = files_in(tmp_path / "whole")

    def killed(number):
        url = f"{s3}/shards/{number}"
        arguments = [sys.executable, "-c", VICTIM, str(on_disk), url, str(number)]
        assert subprocess.run(arguments, timeout=100, check=False).returncode == -9
        there = Prefix(url)
        assert all(name.startswith(".") or there.read(name) == whole[name] for name in there.names()), number
        sharding.write(source, url, 3)
        assert {name: there.read(name) for name in there.names()} == whole, number

    killed(13)  # of 14: all is there, but what was needed only until then is still
    killed(8)  # some of the shards are there


# The cache


def cached(tmp_path, num_bytes=10**9):
    said = []
    return Cache(tmp_path / "cache", num_bytes, said.append), said


def held(tmp_path):
    return sum(
        path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".used"
    )


def files_of(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".used"]


def older(tmp_path, seconds=1000):
    """As if what is in the cache were of a run that began and ended before."""
    for number, path in enumerate(sorted(files_of(tmp_path))):
        then = time.time() - seconds + number
        os.utime(path, (then, then))


def test_what_was_read_is_read_without_a_request_by_the_next_run_too(url, proxy, tmp_path):
    found = scan(url, "data.train")
    first = contents(found, cached(tmp_path)[0])
    proxy.seen.clear()
    assert contents(found, cached(tmp_path)[0]) == first
    assert proxy.seen == []


def test_an_object_that_was_replaced_is_not_served_as_the_one_that_was(on_disk, url, tmp_path):
    before = contents(scan(url, "data.train"), cached(tmp_path)[0])
    Prefix(url).write("cat/a.jpg", (on_disk / "dog" / "a.jpg").read_bytes())
    after = contents(scan(url, "data.train"), cached(tmp_path)[0])
    assert after[0] == before[3]
    assert after[1:] == before[1:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:3],
        lambda content: content[:-1],
        lambda content: bytes(len(content)),
        lambda content: bytes(4),
        lambda content: content[:100] + bytes([content[100] ^ 1]) + content[101:],
    ],
    ids=["emptied", "checksum cut", "cut", "zeroed", "zeroed and cut", "flipped"],
)
def test_a_damaged_file_is_not_served_and_is_replaced(tmp_path, damage):
    """A machine that lost power leaves files empty that were renamed before their content was on the disk."""
    cache, said = cached(tmp_path)
    cache.put("image", b"content" * 100)
    (path,) = files_of(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get("image") is None
    assert files_of(tmp_path) == []
    cache.put("image", b"content" * 100)
    assert cache.get("image") == b"content" * 100
    assert said == []


def test_it_stays_within_its_bytes_and_takes_no_more_when_all_is_of_this_run(tmp_path):
    cache, said = cached(tmp_path, 10_000)
    for number in range(30):
        cache.put(f"image {number}", bytes(996))
        assert held(tmp_path) <= 10_000
    assert [number for number in range(30) if cache.get(f"image {number}")] == list(range(10))
    assert said == []


def test_it_evicts_what_this_run_did_not_use_the_longest_unused_first_and_keeps_what_it_did(tmp_path):
    before, _ = cached(tmp_path, 10_000)
    for number in range(10):
        before.put(f"old {number}", bytes(996))
    older(tmp_path)
    by_age = sorted(files_of(tmp_path), key=lambda path: path.stat().st_mtime)
    cache, _ = cached(tmp_path, 10_000)
    oldest = next(number for number in range(10) if before._path(f"old {number}") == by_age[0])
    assert cache.get(f"old {oldest}") is not None  # and so it is the newest
    for number in range(5):
        cache.put(f"new {number}", bytes(996))
        assert held(tmp_path) <= 10_000
    assert cache.get(f"old {oldest}") is not None
    assert all(cache.get(f"new {number}") is not None for number in range(5))
    kept = set(files_of(tmp_path))
    assert [path in kept for path in by_age] == [True] + [False] * (10 - len(kept) + 5) + [True] * (len(kept) - 6)
    for number in range(5, 40):
        cache.put(f"new {number}", bytes(996))
    assert cache.get(f"old {oldest}") is not None
    assert cache.get("new 39") is None


FILL = """
import sys
from pathlib import Path
from swa_dist.data.cache import Cache

folder, who = Path(sys.argv[1]), sys.argv[2]
said = []
cache = Cache(folder, 200_000, said.append)
print(flush=True)
sys.stdin.readline()
for number in range(150):
    cache.put(f"{who} {number}", who.encode() * 4000)
    cache.get(f"old {number}")
print(said, flush=True)
"""


def test_several_processes_at_once_stay_within_its_bytes_and_warn_of_nothing(tmp_path):
    """They evict what a run before left, while the others write and read."""
    before, _ = cached(tmp_path, 200_000)
    for number in range(49):
        before.put(f"old {number}", bytes(4000))
    older(tmp_path)
    arguments = [sys.executable, "-c", FILL, str(tmp_path / "cache")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*arguments, who], **pipes) for who in "abcd"]
    for worker in workers:
        worker.stdout.readline()
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    most = 0
    while any(worker.poll() is None for worker in workers):
        sizes = []
        for path in files_of(tmp_path):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:  # evicted meanwhile
                continue
        most = max(most, sum(sizes))
    assert [worker.communicate()[0] for worker in workers] == ["[]\n"] * 4
    assert most <= 200_000 + 4 * 4004  # what each writes while another counts
    cache, _ = cached(tmp_path, 200_000)
    taken = [f"{who} {number}" for who in "abcd" for number in range(150)]
    assert all(content in (None, name[0].encode() * 4000) for name in taken if (content := cache.get(name)) or True)
    assert sum(cache.get(name) is not None for name in taken) > 30
    assert not list((tmp_path / "cache").rglob(".staging*"))


WRITE_FOR_EVER = """
import sys
from pathlib import Path
from swa_dist.data.cache import Cache

cache = Cache(Path(sys.argv[1]), 10**9, print)
print(flush=True)
while True:
    for number in range(4):
        cache.put(f"image {number}", bytes([number]) * 3_000_000)
"""


def test_a_half_written_file_is_never_seen_and_what_a_kill_leaves_is_evicted(tmp_path):
    arguments = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path / "cache")]
    cache, _ = cached(tmp_path)
    for _ in range(3):
        with subprocess.Popen(arguments, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                for number in range(4):
                    assert cache.get(f"image {number}") in (None, bytes([number]) * 3_000_000)
            writer.kill()
    (tmp_path / "cache" / "00").mkdir(exist_ok=True)
    (tmp_path / "cache" / "00" / ".staging-x").write_bytes(bytes(10_000_000))
    older(tmp_path)
    small, said = cached(tmp_path, 4_000_000)
    (tmp_path / "cache" / ".used").unlink()
    small.put("new", bytes(500_000))
    assert small.get("new") is not None
    assert held(tmp_path) <= 4_000_000
    assert said == []


@pytest.mark.parametrize("content", [b"", b"x", b"-5", b"12345"])
def test_an_account_that_is_wrong_is_put_right(tmp_path, content):
    cache, _ = cached(tmp_path, 10_000)
    cache.put("first", bytes(996))
    (tmp_path / "cache" / ".used").write_bytes(content)
    for number in range(30):
        cache.put(f"image {number}", bytes(996))
    assert 9_000 <= held(tmp_path) <= 10_000 + (1_000 if content == b"-5" else 0)


def test_a_full_disk_warns_once_and_the_images_come_from_s3(url, proxy, full_disk, tmp_path):  # noqa: F811
    (full_disk / "other").write_bytes(bytes(1_040_000))
    said = []
    cache = Cache(full_disk / "cache", 10**9, said.append)
    found = scan(url, "data.train")
    fresh = contents(found)
    for _ in range(3):
        assert contents(found, cache) == fresh
    assert len(said) == 1
    assert str(full_disk / "cache") in said[0]
    assert "No space left" in said[0]
    assert not list((full_disk / "cache").rglob(".staging*"))


def test_a_folder_that_cannot_be_written_warns_once_though_many_threads_meet_it(url, unwritable):  # noqa: F811
    said = []
    cache = Cache(unwritable / "cache", 10**9, said.append)
    found = scan(url, "data.train")
    fresh = contents(found)
    assert contents(found, cache) == fresh
    assert len(said) == 1
    for _ in range(20):
        said.clear()
        cache, together = Cache(unwritable / "cache", 10**9, said.append), threading.Barrier(16)

        def store(number, cache=cache, together=together):
            together.wait()
            cache.put(f"image {number}", b"x")

        with ThreadPoolExecutor(16) as threads:
            list(threads.map(store, range(16)))
        assert len(said) == 1


def test_no_cache_is_no_folder(url, tmp_path):
    cache, said = cached(tmp_path, 0)
    contents(scan(url, "data.train"), cache)
    assert not (tmp_path / "cache").exists()
    assert said == []


def test_images_on_disk_are_not_copied_into_it(on_disk, tmp_path):
    contents(scan(str(on_disk), "data.train"), cached(tmp_path)[0])
    assert not (tmp_path / "cache").exists()


def test_groups_that_are_read_ahead_come_in_order_through_the_cache(url, proxy, tmp_path):
    found = scan(url, "data.train")
    groups = [[4, 0], [2], [], [1, 3]]
    fresh = contents(found)
    for _ in range(2):
        reader = Reader(found, cached(tmp_path)[0])
        arrays = [np.array(group, dtype=np.int64) for group in groups]
        read = list(Ahead(num_threads=8, num_groups=2).read(reader, arrays))
        assert [[one.tobytes() for one in group] for group in read] == [[fresh[i] for i in group] for group in groups]
