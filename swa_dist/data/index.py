"""What a data set is: every image's place, class and size, and a digest that names it all."""

import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from swa_dist.data.files import File
from swa_dist.data.order import Ints
from swa_dist.errors import DataError, OutputError, ServiceError
from swa_dist.storage import folder

SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("label", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("version", pa.string()),
        ("bad", pa.string()),
        ("sha256", pa.string()),
    ]
)
NO_SHARD = -1
ETAG = "etag "
"""What begins the version of an object whose version is its ETag."""

_FILE_SCHEMA = 2
_DIGESTED = ("path", "shard", "num_bytes", "label", "version", "bad")

Progress = Callable[[int, int], None]


class Shard(NamedTuple):
    name: str
    num_bytes: int
    stamp: str
    """Its ETag on S3, "" on disk."""


@dataclass(frozen=True)
class Index:
    """The images of one split, sorted by class and path, or in the order of the shards. A place ("id") in the index
    counts the good ones."""

    root: str
    """An absolute path, or an address on S3."""
    classes: tuple[str, ...]
    """Names in the order of the labels."""
    shards: tuple[Shard, ...]
    """Tar files; none where each image is a file of its own."""
    rows: pa.Table
    """By SCHEMA: `path` relative to the root, with forward slashes, or to its shard; `height` and `width` in pixels,
    upright; `version`, which another content does not have; `bad`, why an image is left out; `sha256` of the content,
    where `verify` has read it. Those that are left out are in it."""
    digest: str
    """SHA-256 over each image's relative path, size, class and version and those that are left out; not over where
    `root` is or when it was made."""

    def __len__(self) -> int:
        return len(self.good)

    @functools.cached_property
    def good(self) -> pa.Table:
        return self.rows.filter(pc.is_null(self.rows["bad"])).combine_chunks()

    @property
    def num_left_out(self) -> int:
        return len(self.rows) - len(self.good)

    @functools.cached_property
    def labels(self) -> Ints:
        """int64 [images]."""
        return self._ints("label")

    @functools.cached_property
    def heights(self) -> Ints:
        return self._ints("height")

    @functools.cached_property
    def widths(self) -> Ints:
        return self._ints("width")

    @functools.cached_property
    def shard_numbers(self) -> Ints:
        """Where each image is in `shards`; -1 for a file of its own."""
        return self._ints("shard")

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(self.good["path"].to_pylist())

    def path(self, i: int) -> str:
        """Relative to the root, or to its shard."""
        return str(self._paths[i].as_py())

    def name(self, i: int) -> str:
        """An image's path, after its shard's where it is in one."""
        return _name(self.path(i), int(self.shard_numbers[i]), self.shards)

    def file(self, i: int) -> File:
        """The file that the image is, or is in."""
        number = int(self.shard_numbers[i])
        if number != NO_SHARD:
            return File(*self.shards[number])
        version = self.version(i)
        stamp = version.removeprefix(ETAG) if version.startswith(ETAG) else ""
        return File(self.path(i), self.num_bytes(i), stamp)

    def num_bytes(self, i: int) -> int:
        return int(self._sizes[i])

    def offset(self, i: int) -> int:
        return int(self._offsets[i])

    def version(self, i: int) -> str:
        return str(self._versions[i].as_py())

    @functools.cached_property
    def _sizes(self) -> Ints:
        return self._ints("num_bytes")

    @functools.cached_property
    def _offsets(self) -> Ints:
        return self._ints("offset")

    @functools.cached_property
    def _paths(self) -> pa.Array:
        return self._texts("path")

    @functools.cached_property
    def _versions(self) -> pa.Array:
        return self._texts("version")

    def _texts(self, column: str) -> pa.Array:
        chunks = self.good[column].combine_chunks()
        return pa.concat_arrays(chunks.chunks) if isinstance(chunks, pa.ChunkedArray) else chunks

    def _ints(self, column: str) -> Ints:
        found: Ints = self.good[column].to_numpy().astype(np.int64)
        return found


def make(root: str, classes: tuple[str, ...], shards: tuple[Shard, ...], rows: pa.Table) -> Index:
    """The index of these rows, with its digest."""
    digest = hashlib.sha256(json.dumps(classes).encode())
    names = [shard.name for shard in shards]
    for batch in rows.select(_DIGESTED).to_batches(max_chunksize=65_536):
        for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            path, shard, *rest = row
            digest.update(json.dumps([path, None if shard == NO_SHARD else names[shard], *rest]).encode())
    return Index(root, classes, shards, rows, digest.hexdigest())


def with_column(rows: pa.Table, name: str, values: Any) -> pa.Table:
    """The rows with other values in a column of SCHEMA."""
    field = SCHEMA.field(name)
    return rows.set_column(SCHEMA.get_field_index(name), field, pa.array(values, field.type))


def carried(found: Index, before: Index, *, left_out: bool = True) -> Index:
    """`found` with what `verify` knew of the images that are as they were `before`: their SHA-256, and, with
    `left_out`, that it left them out."""
    keys = ["path", "shard", "version"]
    known = before.rows.filter(pc.or_(pc.is_valid(before.rows["bad"]), pc.is_valid(before.rows["sha256"])))
    if not len(known) or found.shards != before.shards:
        return found
    rows = found.rows.drop_columns(["sha256"]).append_column("place", pa.array(range(len(found.rows))))
    joined = rows.join(known.select([*keys, "bad", "sha256"]), keys, right_suffix=" before").sort_by("place")
    bad = pc.coalesce(joined["bad"], joined["bad before"]) if left_out else joined["bad"]
    columns = {"bad": bad, **{name: joined[name] for name in SCHEMA.names if name != "bad"}}
    return make(found.root, found.classes, found.shards, pa.table(columns).select(SCHEMA.names).cast(SCHEMA))


def save(index: Index, url: str) -> None:
    """Write the index at a path or an address on S3. Raises OutputError or ServiceError."""
    facts = {"schema": _FILE_SCHEMA, "classes": index.classes, "shards": index.shards, "digest": index.digest}
    written = io.BytesIO()
    pq.write_table(index.rows.replace_schema_metadata({"swa_dist": json.dumps(facts)}), written, compression="zstd")
    folder.write(url, written.getvalue())


def load(url: str, root: str) -> Index:
    """The index saved at a path or an address on S3, of the images under `root`. Raises DataError where it can't be
    read, and ServiceError where S3 doesn't answer."""
    try:
        content = folder.read(url)
        if content is None:
            raise FileNotFoundError("it is not there")
        rows = pq.read_table(pa.BufferReader(content))
        facts = _facts(rows)
        return Index(
            root=root,
            classes=tuple(facts["classes"]),
            shards=tuple(Shard(*shard) for shard in facts["shards"]),
            rows=rows.replace_schema_metadata(None).cast(SCHEMA),
            digest=facts["digest"],
        )
    except (OutputError, ServiceError) as error:
        raise type(error)(f"{error} It is the images' index, as `swa-dist data index` writes it.") from None
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise DataError(
            f"{url} must be an index of images, but can't be read: {error}. Write it with `swa-dist data index`."
        ) from None


def _facts(rows: pa.Table) -> Mapping[str, Any]:
    facts = json.loads(rows.schema.metadata[b"swa_dist"])
    if facts["schema"] != _FILE_SCHEMA:
        raise ValueError(f"it is of schema {facts['schema']}, not {_FILE_SCHEMA}")
    return dict(facts)


def check_pair(train: Index, val: Index, num_classes: int) -> None:
    """Raise DataError unless both splits have the same `num_classes` classes."""
    if train.classes != val.classes:
        missing = sorted(set(train.classes) - set(val.classes))
        extra = sorted(set(val.classes) - set(train.classes))
        parts = [f"{word} {', '.join(names[:5])}" for word, names in (("lacks", missing), ("adds", extra)) if names]
        difference = " and ".join(parts) or "has them in another order"
        raise DataError(f"`data.val` must have the classes of `data.train`, but {difference}.")
    if len(train.classes) != num_classes:
        raise DataError(
            f"`model.num_classes` must be the number of classes of the images ({len(train.classes)}), but is"
            f" {num_classes}. Set it, and `model.head=replace` if the weights are for other classes."
        )


def data_digest(train: Index, val: Index) -> str:
    """Names the data set: SHA-256 over both splits' digests."""
    return hashlib.sha256(f"{train.digest} {val.digest}".encode()).hexdigest()


def left_out(index: Index) -> Iterator[tuple[str, str]]:
    """The names of the images that are left out, and why."""
    bad = index.rows.filter(pc.is_valid(index.rows["bad"]))
    for path, shard, why in zip(*(bad[column].to_pylist() for column in ("path", "shard", "bad")), strict=True):
        yield _name(path, shard, index.shards), why


def _name(path: str, shard: int, shards: tuple[Shard, ...]) -> str:
    return path if shard == NO_SHARD else f"{shards[shard].name}: {path}"
