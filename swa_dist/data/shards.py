"""Reading tar shards, named and laid out as WebDataset has them: KEY.jpg and KEY.cls side by side."""

import io
import os
import tarfile
from typing import IO, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from swa_dist.data import index
from swa_dist.data.files import File, Files, is_image, printable
from swa_dist.data.headers import Row, ends_digest, read_whole
from swa_dist.data.index import Index
from swa_dist.errors import DataError
from swa_dist.storage.folder import is_s3, join

CLASSES = "classes.txt"
"""Beside shards whose images have numbers for classes: the classes' names, a line each, in the order of the numbers."""
INDEX = "index.parquet"
"""Beside shards that `write` made: their index."""
_LABEL = "cls"
_BLOCK = 512
_READ_AT_ONCE = 1 << 20
_NUMBER = "/"  # before a class that is a number: no folder's name has it


def is_shard(name: str) -> bool:
    return name.endswith(".tar")


def read_rows(files: Files, made: Index | None, file: File) -> list[Row]:
    """The images of a shard, in their order. Their classes are the numbers in their .cls files, as "/7", else the
    folders that they lie in. Raises DataError where the shard is damaged, or an image has no class.

    `made`: the index that was written with the shards, if there is one; it is taken for those whose size and last image
    it has right.
    """
    if made is not None and (rows := _rows_made(made, file)) and _is_of(files, file, rows[-1]):
        return rows
    images: dict[str, Row] = {}
    numbers: dict[str, bytes] = {}
    end = 0
    streamed = is_s3(files.root)  # read from front to back, once; on disk the images' middles are skipped
    try:
        with files.open(file) as opened, _tar(opened, streamed) as tar:
            for member in tar:
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                content = tar.extractfile(member) if member.isfile() else None
                if content is None or _is_hidden(member.name):
                    continue
                key, extension = _split(member.name)
                if extension == _LABEL:
                    numbers[key] = content.read()
                elif is_image(member.name):
                    images[member.name] = _image(member, io.BytesIO(content.read()) if streamed else content)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise _damaged(files, file, str(error)) from None
    if not _is_end(files, file, end):
        raise _damaged(files, file, f"what is at byte {end:,} is neither a file nor the archive's end")
    return [row._replace(label=_label(files, file, row, numbers)) for row in images.values()]


def classes_of(files: Files, labels: list[str], named: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names in the order of their numbers, and the number of each of `labels`, which `read_rows` gave."""
    numbers = {label: int(label[1:]) for label in labels if label.startswith(_NUMBER)}
    if not numbers:
        return tuple(labels), {label: number for number, label in enumerate(labels)}
    if folder := next((label for label in labels if label not in numbers), None):
        raise DataError(
            f"the images of `{named}` must all have numbers for classes, in .{_LABEL} files, or all lie in folders, but"
            f" in {files.root} some have and some lie in {folder!r}."
        )
    most = max(numbers.values())
    known = next((one for one in files.directly() if one.name == CLASSES), None)
    if known is None:
        return tuple(str(number) for number in range(1 + most)), numbers
    try:
        names = files.read(known).decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{files.place(CLASSES)} must be UTF-8, but is not: {error}.") from None
    if most >= len(names):
        raise DataError(
            f"{files.place(CLASSES)} must name every class of `{named}`, but has {len(names)} names, and an image is"
            f" of class {most}."
        )
    return tuple(names), numbers


def made_with(files: Files) -> Index | None:
    """The index that was written with the shards of a folder, if there is one."""
    if all(file.name != INDEX for file in files.directly()):
        return None
    return index.load(join(files.root, INDEX), files.root)


def _rows_made(made: Index, file: File) -> list[Row]:
    numbers = [n for n, shard in enumerate(made.shards) if (shard.name, shard.num_bytes) == (file.name, file.num_bytes)]
    found = made.rows.filter(pc.is_in(made.rows["shard"], pa.array(numbers, pa.int32())))
    return [
        Row(
            r["path"],
            f"{_NUMBER}{r['label']}",
            r["num_bytes"],
            r["height"],
            r["width"],
            r["version"],
            r["offset"],
            r["bad"],
        )
        for r in found.to_pylist()
    ]


def _is_of(files: Files, file: File, row: Row) -> bool:
    return ends_digest(files.read(file, row.offset, row.num_bytes)) == row.version


def _tar(opened: BinaryIO, streamed: bool) -> tarfile.TarFile:
    return tarfile.open(fileobj=opened, mode="r|" if streamed else "r:")


def _image(member: tarfile.TarInfo, content: IO[bytes]) -> Row:
    header, version = read_whole(content, member.size)
    place = (printable(member.name), "", member.size)
    if isinstance(header, str):
        return Row(*place, 0, 0, version, member.offset_data, header)
    return Row(*place, header.height, header.width, version, member.offset_data, None)


def _is_end(files: Files, file: File, start: int) -> bool:
    """Whether only the empty blocks that end an archive are there. tarfile takes any damaged header for the end."""
    rest = range(start, file.num_bytes, _READ_AT_ONCE)
    return bool(rest) and not any(files.read(file, at, _READ_AT_ONCE).strip(b"\0") for at in rest)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _label(files: Files, file: File, row: Row, numbers: dict[str, bytes]) -> str:
    key, _ = _split(row.path)
    if key in numbers:
        number = numbers[key].decode(errors="replace").strip()
        if not (number.isascii() and number.isdigit()):
            raise DataError(
                f"a class must be a number from 0 on, but {key}.{_LABEL} in {files.place(file.name)} holds {number!r}."
            )
        return f"{_NUMBER}{int(number)}"
    label = os.path.dirname(row.path).rpartition("/")[2]
    if label in ("", "."):
        raise DataError(
            f"each image of a shard must have a class, but {row.path} in {files.place(file.name)} has none: there is no"
            f" {key}.{_LABEL}, and it lies in no folder."
        )
    return label


def _split(name: str) -> tuple[str, str]:
    """A member's key and extension, as WebDataset splits them: at the first dot of the file's name."""
    folder, slash, own = name.rpartition("/")
    key, _, extension = own.partition(".")
    return folder + slash + key, extension.lower()


def _damaged(files: Files, file: File, why: str) -> DataError:
    return DataError(f"{files.place(file.name)} must be a whole tar file, but is damaged: {why}. Make it again.")
