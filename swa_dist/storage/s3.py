"""Objects under a prefix of a bucket, and committed entries there. The only importer of boto3.

Credentials, region and endpoint are boto3's own settings (AWS_* variables, profiles, the machine's role).
"""

import contextlib
import functools
import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from swa_dist.errors import CheckpointError, ConfigError, OutputError, ServiceError
from swa_dist.storage.files import new_folder, write_atomic
from swa_dist.storage.lease import Seen
from swa_dist.storage.store import MANIFEST, DiskStore

_SETTINGS = Config(connect_timeout=10, read_timeout=60, retries={"mode": "standard", "max_attempts": 5})
_ABSENT = frozenset({"404", "NoSuchKey", "NotFound"})
_REFUSED = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"})
_LOST = frozenset({"412", "PreconditionFailed", "409", "ConditionalRequestConflict"})
_DELETED_PER_REQUEST = 1000


class Prefix:
    """The objects whose names begin like `url`, s3://BUCKET/PREFIX. Names are relative to it.

    Every method raises ServiceError where S3 doesn't answer, or OutputError where it refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        parts = urlparse(self.url)
        if parts.scheme != "s3" or not parts.netloc:
            raise ConfigError(f"an S3 address must be like s3://BUCKET/PREFIX, but is {url}.")
        self._bucket, self._prefix = parts.netloc, parts.path.strip("/")

    @functools.cached_property
    def _client(self) -> Any:
        with self._answering("reach"):
            return boto3.session.Session().client("s3", config=_SETTINGS)

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
            age = (now - answer["LastModified"]).total_seconds()
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

    def upload(self, path: Path, name: str) -> None:
        """A file of any size, in parts if it is large."""
        with self._answering("write", name):
            self._client.upload_file(str(path), self._bucket, self._key(name))

    def download(self, name: str, path: Path) -> None:
        with self._answering("read", name):
            self._client.download_file(self._bucket, self._key(name), str(path))

    def names(self, under: str = "") -> list[str]:
        """All objects whose names begin so, in the order of their names."""
        with self._answering("list", under):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._key(under) if under else f"{self._prefix}/".lstrip("/")
            )
            found = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return [key.removeprefix(f"{self._prefix}/") for key in found]

    def remove(self, *names: str) -> None:
        keys = [{"Key": self._key(name)} for name in names]
        with self._answering("remove", *names[:1]):
            for first in range(0, len(keys), _DELETED_PER_REQUEST):
                some = keys[first : first + _DELETED_PER_REQUEST]
                self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})

    def rename(self, name: str, to: str) -> None:
        """Move an object, on the server. Not at once: for a moment there are both."""
        with self._answering("copy", name):
            source = {"Bucket": self._bucket, "Key": self._key(name)}
            self._client.copy(source, self._bucket, self._key(to))
        self.remove(name)

    def abort_uploads(self, under: str) -> None:
        """End what kills left of uploads in parts: it is invisible, and paid for."""
        with self._answering("list", under):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._key(under)
            )
            for upload in (upload for page in pages for upload in page.get("Uploads", [])):
                self._client.abort_multipart_upload(Bucket=self._bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".lstrip("/")

    @contextlib.contextmanager
    def _answering(self, what: str, name: str = "") -> Iterator[None]:
        """Turn what boto3 raises into errors of ours."""
        where = f"{self.url}/{name}" if name else self.url
        try:
            yield
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and _code(error) in _REFUSED:
                raise OutputError(
                    f"{where} must be allowed to be used, but S3 refuses to {what} it: {error}. Look at the AWS"
                    " credentials and at the bucket's policy."
                ) from None
            raise ServiceError(f"S3 must {what} {where}, but does not: {error}.") from None
        except OSError as error:
            if error.filename is not None:
                raise  # a file of this machine
            raise ServiceError(f"S3 must {what} {where}, but does not: {error}.") from None


@dataclass(frozen=True)
class S3Register:
    """An object that is replaced on condition, for a lease."""

    prefix: Prefix
    name: str

    def look(self) -> Seen | None:
        return self.prefix.look(self.name)

    def swap(self, content: bytes, version: str | None) -> str | None:
        return self.prefix.swap(self.name, content, version)


class S3Store:
    """Entries under a prefix, each with a copy on this machine while it is used.

    An entry's files go up under a name of their own; the manifest, which is one object and comes last, makes them the
    entry. So an entry is replaced at once, and what a kill leaves half-written is never one.
    """

    def __init__(self, remote: Prefix, local: DiskStore, guard: Callable[[], None] = lambda: None) -> None:
        self._remote = remote
        self._local = local
        self._guard = guard

    def commit(self, name: str, fill: Callable[[Path], None]) -> None:
        self._local.commit(name, fill)
        folder = self._local.open(name)
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        at = f".data-{uuid.uuid4().hex}"
        for file in manifest["files"]:
            self._remote.upload(folder / file, f"{name}/{at}/{file}")
        self._guard()
        self._remote.write(f"{name}/{MANIFEST}", json.dumps(manifest | {"at": at}, indent=1).encode())
        self._local.remove(name)
        self._remote.remove(*self._stale(name, self._remote.names(f"{name}/"), at))

    def open(self, name: str) -> Path:
        if not self._local.has(name):
            self._fetch(name)
        try:
            return self._local.open(name)
        except CheckpointError as error:
            self._local.remove(name)
            raise CheckpointError(f"{self._remote.url}/{name} must be whole, but is not: {error}") from None

    def names(self, kind: str) -> list[str]:
        manifests = (name for name in self._remote.names(f"{kind}/") if name.endswith(f"/{MANIFEST}"))
        return sorted(name.removesuffix(f"/{MANIFEST}") for name in manifests)

    def set_aside(self, name: str) -> str:
        self._local.remove(name)
        aside = f"{name}/corrupt-{uuid.uuid4().hex[:8]}.json"
        self._remote.rename(f"{name}/{MANIFEST}", aside)
        return aside

    def has(self, name: str) -> bool:
        return self._remote.has(f"{name}/{MANIFEST}")

    def remove(self, name: str) -> None:
        self._local.remove(name)
        self._remote.remove(f"{name}/{MANIFEST}")
        self._remote.remove(*self._remote.names(f"{name}/"))

    def sweep(self, kind: str) -> None:
        self._remote.abort_uploads(f"{kind}/")
        by_entry: dict[str, list[str]] = {}
        for object_name in self._remote.names(f"{kind}/"):
            by_entry.setdefault("/".join(object_name.split("/")[:2]), []).append(object_name)
        for name, objects in by_entry.items():
            if any("/corrupt-" in one for one in objects):
                continue  # set aside, to be looked at
            with contextlib.suppress(CheckpointError):  # of a damaged manifest, which `newest` names
                self._remote.remove(*self._stale(name, objects, self._manifest(name).get("at", "")))

    def _manifest(self, name: str) -> dict[str, Any]:
        content = self._remote.read(f"{name}/{MANIFEST}")
        if content is None:
            return {}
        try:
            manifest = json.loads(content)
        except ValueError:
            manifest = None
        files = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(files, dict) or any(Path(file).name != file for file in files):
            raise CheckpointError(f"{self._remote.url}/{name}/{MANIFEST} must list files, but does not: it is damaged.")
        return dict(manifest)

    def _stale(self, name: str, objects: list[str], at: str) -> list[str]:
        """Data of an entry that its manifest doesn't name."""
        return [one for one in objects if one.startswith(f"{name}/.data-") and not one.startswith(f"{name}/{at}/")]

    def _fetch(self, name: str) -> None:
        manifest = self._manifest(name)
        if not manifest:
            raise CheckpointError(f"{self._remote.url}/{name} must be a committed entry, but has no {MANIFEST}.")
        there = set(self._remote.names(f"{name}/"))
        with new_folder(self._local.root / name) as folder:
            for file in manifest["files"]:
                source = f"{name}/{manifest.get('at')}/{file}"
                if source not in there:
                    raise CheckpointError(f"{self._remote.url}/{source} must be there, but is not.")
                self._remote.download(source, folder / file)
            write_atomic(folder / MANIFEST, json.dumps(manifest))


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))
