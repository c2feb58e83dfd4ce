"""The folder that runs are kept in, tried out step by step, on disk or on S3, and left as it was."""

import contextlib
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import requests

from swa_dist.errors import SwaDistError
from swa_dist.service.doctor_services import Finding, timed
from swa_dist.storage import folder
from swa_dist.storage.lease import register

LEAST_FREE = 10 * 2**30

_TIMEOUT_SECONDS = 10
_RIGHTS = (
    "Look at AWS_ENDPOINT_URL, the region, the credentials and the bucket's policy; an old S3-compatible server may"
    " need AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
)
_CONDITIONS = "Two runs could write one folder: use a server that holds to conditions, as S3 does."
_FILES = "Look at who may write to the folder."
_LOCKS = "Two runs could write one folder: mount it with locks (NFS 4, or lockd; Lustre with -o flock)."

Step = tuple[str, Callable[[], bool], str]
"""What is tried, whether it went as it must, and what to do where it didn't."""


def output_folder(url: str) -> Finding:
    return _on_s3(url) if folder.is_s3(url) else _on_disk(Path(url))


def _on_disk(path: Path) -> Finding:
    made = [one for one in (path, *path.parents) if not one.exists()]
    probe = path / f".doctor-{uuid.uuid4().hex}"
    lock = probe.with_name(f"{probe.name}.lock")  # as the lease itself names it
    try:
        folder.check_writable(str(path))
        free = shutil.disk_usage(path).free
        finding = _tried_out(str(path), _file_steps(probe, lock))
    finally:
        for one in (probe, lock):
            with contextlib.suppress(OSError):
                one.unlink()
        for one in made:
            with contextlib.suppress(OSError):  # of another process by now
                one.rmdir()
    found = f"{finding.found}; {free / 2**30:.0f} GiB free"
    if finding.state == "ok" and free < LEAST_FREE:
        return Finding("", "warning", found, "A ResNet-152 run keeps some 3 GB: make room.")
    return Finding("", finding.state, found, finding.remedy)


def _on_s3(url: str) -> Finding:
    finding = _tried_out(url, _object_steps(url, f".doctor-{uuid.uuid4().hex}"))
    named = (os.environ.get(name) for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"))
    endpoint = next((one for one in named if one), "https://s3.amazonaws.com")
    certificates = os.environ.get("AWS_CA_BUNDLE") or True
    try:  # unsigned: S3 tells the time also to those whose signatures it refuses because of theirs
        answer = requests.head(endpoint, verify=certificates, timeout=_TIMEOUT_SECONDS, allow_redirects=False)
    except requests.RequestException:
        return finding
    return timed(answer, finding)


def _tried_out(url: str, steps: list[Step]) -> Finding:
    """Take the steps up to one that fails, and then the last one, which tidies up, if there is anything to tidy."""
    done: list[str] = []
    failed: Finding | None = None
    for name, step, remedy in steps:
        if failed and (not done or step is not steps[-1][1]):
            continue
        try:
            problem = "" if step() else "it goes otherwise than it must"
        except (SwaDistError, OSError) as error:
            problem = str(error)
        if not problem:
            done.append(name)
        elif not failed:
            failed = Finding("", "broken", f"{url}: {name} fails: {problem}; done: {', '.join(done) or 'none'}", remedy)
    return failed or Finding("", "ok", f"{url}: {', '.join(done)}")


def _object_steps(url: str, name: str) -> list[Step]:
    from swa_dist.storage.s3 import Prefix  # boto3 is for those who use it

    prefix = Prefix(url)

    def put() -> bool:
        prefix.write(name, b"1")
        return True

    def replace() -> bool:
        seen = prefix.look(name)
        return seen is not None and seen.content == b"1" and prefix.swap(name, b"2", seen.version) is not None

    def delete() -> bool:
        prefix.remove(name)
        return not prefix.has(name)

    return [
        ("put", put, _RIGHTS),
        ("get", lambda: prefix.read(name) == b"1", _RIGHTS),
        ("list", lambda: name in prefix.names(".doctor-"), _RIGHTS),
        ("put if there is none", lambda: prefix.swap(name, b"3", None) is None, _CONDITIONS),
        ("put on another version", lambda: prefix.swap(name, b"3", f'"{"0" * 32}"') is None, _CONDITIONS),
        ("put on this version", replace, _CONDITIONS),
        ("delete", delete, _RIGHTS),
    ]


def _file_steps(path: Path, lock: Path) -> list[Step]:
    lease = register(str(path))

    def locks() -> bool:
        with lock.open("a") as first, lock.open("a") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def remove() -> bool:
        path.unlink()
        lock.unlink()
        return True

    return [
        ("lock", locks, _LOCKS),
        ("write", lambda: lease.swap(b"1", None) is not None, _FILES),
        ("read", lambda: path.read_bytes() == b"1", _FILES),
        ("write if there is none", lambda: lease.swap(b"2", None) is None, _LOCKS),
        ("remove", remove, _FILES),
    ]
