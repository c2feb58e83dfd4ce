"""Objects under a prefix of a bucket, and committed entries there. The only importer of boto3.

Credentials, region and endpoint are boto3's own settings (AWS_* variables, profiles, the machine's role).
"""

import contextlib
import functools
import itertools
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError
from urllib3.exceptions import HTTPError

from swa_dist.errors import BusyError, CheckpointError, ConfigError, OutputError, ServiceError, SwaDistError
from swa_dist.storage.files import new_folder, read_json, write_atomic, writing
from swa_dist.storage.lease import Seen
from swa_dist.storage.store import MANIFEST, DiskStore

# For many threads that read at once, and want to know soon that a connection is dead.
READ_SETTINGS = Config(
    connect_timeout=10, read_timeout=20, retries={"mode": "standard", "total_max_attempts": 5}, max_pool_connections=64
)
_SETTINGS = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "total_max_attempts": 5})
# All attempts together take less than the time that a lease has left after a heartbeat.
_LEASE_SETTINGS = Config(connect_timeout=5, read_timeout=8, retries={"mode": "standard", "total_max_attempts": 4})
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_REFUSED = frozenset({"403", "AccessDenied", "ExpiredToken", "InvalidToken"})
_LOST = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})
_DELETED_PER_REQUEST = 1000
_BODY_ATTEMPTS = 5  # boto3 repeats requests, but not the reading of an answer's body that was cut off
_DATA = ".data-"
_CORRUPT = ".corrupt-"


@dataclass(frozen=True)
class Object:
    name: str
    num_bytes: int
    version: str
    """Its ETag, without quotes."""


class Prefix:
    """The objects whose names begin like `url`, s3://BUCKET/PREFIX. Names are relative to it.

    Every method raises ServiceError where S3 doesn't answer, or OutputError where it refuses.
    """

    def __init__(self, url: str, settings: Config = _SETTINGS) -> None:
        self.url = url.rstrip("/")
        self._settings = settings
        self._bucket, _, path = self.url.removeprefix("s3://").partition("/")
        self._prefix = path.strip("/")
        if not url.startswith("s3://") or not _BUCKET.fullmatch(self._bucket):
            raise ConfigError(f"an S3 address must be like s3://BUCKET/PREFIX, but is {_without_secrets(url)}.")

    @functools.cached_property
    def _client(self) -> Any:
        with self._answering("reach"):
            return boto3.session.Session().client("s3", config=self._settings)

    def read(self, name: str) -> bytes | None:
        seen = self.look(name)
        return None if seen is None else seen.content

    def look(self, name: str) -> Seen | None:
        with self._answering("read", name):
            try:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._key(name))
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return None
                raise
            now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
            # Both times are in whole seconds: what was written a moment ago can seem to be a second old.
            age = (now - answer["LastModified"]).total_seconds() - 1
            return Seen(answer["Body"].read(), answer["ETag"], age)

    def write(self, name: str, content: bytes) -> None:
        with self._answering("write", name):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content)

    def swap(self, name: str, content: bytes, version: str | None) -> str | None:
        """Write if the object is still of this version (None: if there is none); the new version, or None if not."""
        condition = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
        with self._answering("write", name):
            try:
                answer = self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=content, **condition)
            except ClientError as error:
                if _code(error) in _LOST or (version is not None and _code(error) in _ABSENT):
                    return None
                raise
            return str(answer["ETag"])

    def has(self, name: str) -> bool:
        with self._answering("read", name):
            try:
                self._client.head_object(Bucket=self._bucket, Key=self._key(name))
            except ClientError as error:
                if _code(error) in _ABSENT:
                    return False
                raise
            return True

    def read_part(self, name: str, version: str, start: int = 0, length: int | None = None) -> bytes | None:
        """Bytes [start, start + length) of an object, or all from `start` on; fewer where it ends before.

        None where it is not there, or is no longer of this version. A cut connection is tried again, with growing
        pauses.
        """
        stop = "" if length is None else str(start + length - 1)
        asked = {"Range": f"bytes={start}-{stop}"} if start or length is not None else {}
        with self._answering("read", name):
            for attempt in itertools.count(1):
                try:
                    answer = self._client.get_object(
                        Bucket=self._bucket, Key=self._key(name), IfMatch=f'"{version}"', **asked
                    )
                except ClientError as error:
                    if _code(error) in _ABSENT | _LOST:
                        return None
                    raise
                try:
                    return bytes(answer["Body"].read())
                except (HTTPError, BotoCoreError):
                    if attempt == _BODY_ATTEMPTS:
                        raise
                    time.sleep(random.uniform(0.5, 1.0) * 2 ** (attempt - 2))
        raise AssertionError

    def upload(self, path: Path, name: str) -> None:
        """A file of any size, in parts if it is large."""
        with self._answering("write", name):
            self._client.upload_file(str(path), self._bucket, self._key(name))

    def download(self, name: str, path: Path) -> None:
        with writing(path), self._answering("read", name):
            self._client.download_file(self._bucket, self._key(name), str(path))

    def names(self, under: str = "") -> list[str]:
        """All objects whose names begin so, in the order of their names."""
        return [one.name for one in self.objects(under)]

    def objects(self, under: str = "", *, directly: bool = False) -> Iterator[Object]:
        """All objects whose names begin so, in the order of their names; `directly`: without those in folders below."""
        for page in self._pages(under, directly):
            for entry in page.get("Contents", []):
                yield Object(self._name(entry["Key"]), entry["Size"], entry["ETag"].strip('"'))

    def folders(self) -> list[str]:
        """The names, sorted, of what lies directly under this prefix and has objects in it."""
        pages = self._pages("", directly=True)
        return sorted(self._name(one["Prefix"]).rstrip("/") for page in pages for one in page.get("CommonPrefixes", []))

    def _pages(self, under: str, directly: bool) -> Iterator[dict[str, Any]]:
        """Answers to a listing. What the caller raises between them is its own."""
        with self._answering("list", under):
            pages = iter(
                self._client.get_paginator("list_objects_v2").paginate(
                    Bucket=self._bucket,
                    Prefix=self._key(under) if under else f"{self._prefix}/".lstrip("/"),
                    **({"Delimiter": "/"} if directly else {}),
                )
            )
        while True:
            with self._answering("list", under):
                page = next(pages, None)
            if page is None:
                return
            yield page

    def _name(self, key: str) -> str:
        return key.removeprefix(f"{self._prefix}/")

    def remove(self, *names: str) -> None:
        keys = [{"Key": self._key(name)} for name in names]
        with self._answering("remove", *names[:1]):
            for first in range(0, len(keys), _DELETED_PER_REQUEST):
                some = keys[first : first + _DELETED_PER_REQUEST]
                answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
                if failures := answer.get("Errors"):  # in an answer that says 200
                    raise ClientError({"Error": failures[0]}, "DeleteObjects")

    def copy(self, name: str, to: str) -> None:
        """Copy an object, on the server."""
        with self._answering("copy", name):
            self._client.copy({"Bucket": self._bucket, "Key": self._key(name)}, self._bucket, self._key(to))

    def abort_uploads(self, under: str) -> None:
        """End what kills left of uploads in parts: it is invisible, and paid for."""
        with self._answering("list", under):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._key(under)
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", [])):
                self._abort(upload["Key"], upload["UploadId"])

    def _abort(self, key: str, upload: str) -> None:
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload)
        except ClientError as error:
            if _code(error) != "NoSuchUpload":  # it ended meanwhile
                raise

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    @contextlib.contextmanager
    def _answering(self, what: str, name: str = "") -> Iterator[None]:
        """Turn what boto3 raises into errors of ours."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error, HTTPError) as raised:
            # Uploads in parts have errors of their own, around those that S3 answers.
            error = raised.__context__ if isinstance(raised, Boto3Error) and raised.__context__ else raised
            said = _without_secrets(str(error)).rstrip(".")
            if isinstance(error, ClientError) and _code(error) == "NoSuchBucket":
                raise OutputError(
                    f"{where} must be in a bucket that is there, but S3 knows none of the name {self._bucket}. Make it,"
                    " or choose another."
                ) from None
            if _is_refusal(error):
                raise OutputError(
                    f"{where} must be allowed to be used, but S3 refuses to {what} it: {said}. Look at the AWS"
                    " credentials and at the bucket's policy."
                ) from None
            raise ServiceError(f"S3 must {what} {where}, but does not: {said}.") from None


@dataclass(frozen=True)
class S3Register:
    """An object that is replaced on condition, for a lease."""

    prefix: Prefix
    name: str

    @classmethod
    def at(cls, url: str) -> "S3Register":
        parent, _, name = url.rpartition("/")
        return cls(Prefix(parent, _LEASE_SETTINGS), name)

    def __str__(self) -> str:
        return f"{self.prefix.url}/{self.name}"

    def look(self) -> Seen | None:
        return self.prefix.look(self.name)

    def swap(self, content: bytes, version: str | None) -> str | None:
        return self.prefix.swap(self.name, content, version)


class S3Store:
    """Entries under a prefix, each with a copy on this machine while it is used.

    An entry's files go up under a name of their own; the manifest, which is one object and comes last, makes them the
    entry. So an entry is replaced at once, and what a kill leaves half-written is never one.
    """

    def __init__(
        self, remote: Prefix, local: DiskStore, guard: Callable[[], None] = lambda: None, keep: object = None
    ) -> None:
        """`keep` lives as long as this does: what `local` is in."""
        self._remote = remote
        self._local = local
        self._guard = guard
        self._keep = keep

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        before = self._remote.look(f"{name}/{MANIFEST}")
        at = f"{_DATA}{uuid.uuid4().hex}"
        try:
            self._local.commit(name, fill)
            folder = self._local.root / name
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8")) | {"at": at}
            for file in manifest["files"]:
                self._remote.upload(folder / file, f"{name}/{at}/{file}")
            self._guard()
            self._publish(name, json.dumps(manifest, indent=1).encode(), None if before is None else before.version)
        finally:
            self._local.remove(name)
        with contextlib.suppress(SwaDistError):  # it is committed; `sweep` removes what this leaves
            self._remote.remove(*_stale(name, self._remote.names(f"{name}/"), manifest))

    def open(self, name: str) -> Path:
        manifest = self._manifest(name)
        if manifest is None:
            raise CheckpointError(f"{self._remote.url}/{name} must be a committed entry, but has no {MANIFEST}.")
        with contextlib.suppress(CheckpointError):  # of a copy that was damaged on this machine
            if read_json(self._local.root / name / MANIFEST) == manifest:
                return self._local.open(name)
        self._fetch(name, manifest)
        try:
            return self._local.open(name)
        except CheckpointError as error:
            self._local.remove(name)
            raise CheckpointError(str(error).replace(str(self._local.root), self._remote.url)) from None

    def names(self, kind: str) -> list[str]:
        found = (one.split("/") for one in self._remote.names(f"{kind}/") if one.endswith(f"/{MANIFEST}"))
        return sorted(
            "/".join(parts[:-1])
            for parts in found
            if len(parts) == kind.count("/") + 3 and not parts[-2].startswith(".")
        )

    def set_aside(self, name: str) -> str:
        self._guard()
        self._local.remove(name)
        kind, _, own = name.rpartition("/")
        aside = f"{_CORRUPT}{own}-{uuid.uuid4().hex[:8]}"
        found = self._remote.names(f"{name}/")
        for one in found:
            self._remote.copy(one, f"{kind}/{aside}{one.removeprefix(name)}")
        self._remote.remove(f"{name}/{MANIFEST}")
        self._remote.remove(*found)
        return aside

    def has(self, name: str) -> bool:
        return self._remote.has(f"{name}/{MANIFEST}")

    def remove(self, name: str) -> None:
        self._guard()
        self._local.remove(name)
        self._remote.remove(f"{name}/{MANIFEST}")
        self._remote.remove(*self._remote.names(f"{name}/"))

    def sweep(self, kind: str) -> None:
        self._guard()
        self._remote.abort_uploads(f"{kind}/")
        by_entry: dict[str, list[str]] = {}
        for one in self._remote.names(f"{kind}/"):
            own = one.removeprefix(f"{kind}/").split("/")[0]
            if not own.startswith(_CORRUPT):
                by_entry.setdefault(f"{kind}/{own}", []).append(one)
        for name, objects in by_entry.items():
            with contextlib.suppress(CheckpointError):  # of a damaged manifest, which `newest` names
                self._remote.remove(*_stale(name, objects, self._manifest(name)))

    def _publish(self, name: str, manifest: bytes, version: str | None) -> None:
        """Write the manifest, unless another has: one that took the run over while this request was under way."""
        written = self._remote.swap(f"{name}/{MANIFEST}", manifest, version)
        # A write whose answer was lost is made again, and then refused for what it did itself.
        if written is None and self._remote.read(f"{name}/{MANIFEST}") != manifest:
            raise BusyError(
                f"{self._remote.url}/{name} must be written by one process at a time, but another has written it"
                " meanwhile. Nothing was written; let that one go on."
            )

    def _manifest(self, name: str) -> dict[str, Any] | None:
        content = self._remote.read(f"{name}/{MANIFEST}")
        if content is None:
            return None
        try:
            manifest = json.loads(content)
        except ValueError:
            manifest = None
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or not all(_is_file_name(file) for file in files):
            raise CheckpointError(f"{self._remote.url}/{name}/{MANIFEST} must list files, but does not: it is damaged.")
        return dict(manifest)

    def _fetch(self, name: str, manifest: dict[str, Any]) -> None:
        there = set(self._remote.names(f"{name}/"))
        with new_folder(self._local.root / name) as folder:
            for file in manifest["files"]:
                source = f"{name}/{manifest.get('at')}/{file}"
                if source not in there:
                    raise CheckpointError(f"{self._remote.url}/{source} must be there, but is not.")
                self._remote.download(source, folder / file)
            write_atomic(folder / MANIFEST, json.dumps(manifest))


def _stale(name: str, objects: list[str], manifest: dict[str, Any] | None) -> list[str]:
    """Data of an entry that its manifest, if there is one, doesn't name. None where what it names isn't all there: the
    entry is damaged, and what it meant isn't known."""
    data = [one for one in objects if one.startswith(f"{name}/{_DATA}")]
    if manifest is None:
        return data
    own = f"{name}/{manifest.get('at')}/"
    if not {f"{own}{file}" for file in manifest["files"]} <= set(objects):
        return []
    return [one for one in data if not one.startswith(own)]


def _is_file_name(name: str) -> bool:
    return name not in ("", ".", "..") and "/" not in name and "\0" not in name


def _is_refusal(error: BaseException) -> bool:
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return status in (401, 403) or _code(error) in _REFUSED
    return isinstance(error, NoCredentialsError | PartialCredentialsError)


def _without_secrets(text: str) -> str:
    """Addresses can hold a user's name and password: those of endpoints and proxies, or what was taken for a bucket."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
