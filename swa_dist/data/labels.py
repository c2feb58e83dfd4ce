"""The classes of images that lie in one flat folder, as ImageNet's validation images do: from a file that says them."""

import csv
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

from swa_dist.errors import DataError, OutputError
from swa_dist.storage import folder
from swa_dist.storage.folder import join

AUTO = "auto"
_KNOWN = (
    "LOC_val_solution.csv",
    "val_annotations.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
)
"""Kaggle's; that of tiny ImageNet and its like; TensorFlow's; that of the devkit, which needs its meta.mat."""
_META = "meta.mat"


def labels_of(root: str, names: Sequence[str], where: str, named: str) -> dict[str, str]:
    """The class of each image of a flat folder, by its file's name.

    `where`: a file, on disk or S3, or "auto": one of a known name, in the folder or beside it. It holds lines of
    NAME CLASS, separated by commas, tabs or blanks; or a class for each image in the order of their names; or the
    numbers of ILSVRC's devkit, with its meta.mat beside. Raises DataError.
    """
    url, content = _find(root, where, named)
    lines = [line for line in content.decode("utf-8-sig", errors="replace").splitlines() if line.strip()]
    if not lines:
        raise DataError(f"`{_setting(named)}` must name the images' classes, but {url} is empty.")
    if all(len(line.split()) == 1 and "," not in line for line in lines):
        if len(lines) != len(names):
            raise DataError(
                f"`{_setting(named)}` must hold a class for each image, but {url} has {len(lines):,} for the"
                f" {len(names):,} images of {root}."
            )
        values = [line.strip() for line in lines]
        if all(value.isdigit() for value in values):
            values = _wnids(url, values)
        return dict(zip(sorted(names), values, strict=True))
    return _named(url, lines, names, named)


def _setting(named: str) -> str:
    return f"{named}_labels" if named.startswith("data.") else "--labels"


def _find(root: str, where: str, named: str) -> tuple[str, bytes]:
    parent = root.rstrip("/").rpartition("/")[0]
    urls = [where] if where != AUTO else [join(place, name) for place in (root, parent) for name in _KNOWN]
    for url in urls:
        content = _read(url)
        if content is not None:
            return url, content
    if where != AUTO:
        raise DataError(f"`{_setting(named)}` must be a file that names the images' classes, but {where} is not there.")
    raise DataError(
        f"`{named}` must be a folder of class folders of images, or of tar shards, but {root} holds the images"
        f" themselves. Where a file says which class each is of, name it: `{_setting(named)}`."
    )


def _read(url: str) -> bytes | None:
    try:
        return folder.read(url)
    except (OSError, OutputError) as error:
        raise DataError(f"{url} must be readable, for the images' classes, but is not: {error}") from None


def _named(url: str, lines: list[str], names: Sequence[str], named: str) -> dict[str, str]:
    found: dict[str, str] = {}
    images = {os.path.splitext(name)[0]: name for name in names} | {name: name for name in names}
    for fields in _fields(lines):
        name = fields[0].strip()
        image = images.get(name) or images.get(os.path.splitext(name)[0])
        if image is not None and len(fields) > 1 and (words := fields[1].split()):
            found[image] = words[0]  # Kaggle's are followed by boxes
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"`{_setting(named)}` must name the class of each image, but {url} does not name {missing[0]!r}"
            f" and {len(missing) - 1:,} more."
        )
    return found


def _fields(lines: list[str]) -> Iterable[list[str]]:
    if "\t" in lines[0]:
        return (line.split("\t") for line in lines)
    return csv.reader(io.StringIO("\n".join(lines))) if "," in lines[0] else map(str.split, lines)


def _wnids(url: str, numbers: list[str]) -> list[str]:
    """What the devkit's numbers stand for. The numbers of torchvision's labels are others: sorted by these names."""
    parent = url.rpartition("/")[0]
    for place in (join(parent, _META), join(parent, f"data/{_META}")):
        content = _read(place)
        if content is not None:
            by_number = _synsets(place, content)
            if unknown := sorted(set(numbers) - set(by_number)):
                raise DataError(f"{url} must hold numbers of classes that {place} has, but it has no {unknown[0]}.")
            return [by_number[number] for number in numbers]
    raise DataError(
        f"{url} holds the numbers of ILSVRC's devkit, and must have its {_META} beside it, which says what they stand"
        " for, but has not. Copy it there, or give a file of lines NAME CLASS."
    )


def _synsets(place: str, content: bytes) -> dict[str, str]:
    """The classes' names by their numbers: of the synsets without children."""
    from scipy.io import loadmat  # half a second, for the few who need it

    try:
        synsets: Any = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
        return {str(int(row[0])): str(row[1]) for row in synsets if int(row[4]) == 0}
    except Exception as error:  # loadmat has no errors of its own
        raise DataError(f"{place} must be the meta.mat of ILSVRC's devkit, but can't be read: {error!r}.") from None
