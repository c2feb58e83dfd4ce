"""Decode every image of an index once, and leave out those that can't be."""

import hashlib
import io
import warnings
from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from swa_dist.data.dali import undecodable
from swa_dist.data.index import Index, Progress, make, with_column
from swa_dist.data.reading import Ahead, Bytes, Reader
from swa_dist.data.sizes import read_threads
from swa_dist.errors import DataError

_AT_ONCE = 64
_GROUPS_AHEAD = 4
_LOST = 4096  # a block of most file systems
_USUAL = "RGB"
_NAMES = {"L": "grey", "1": "black and white", "P": "palette", "LA": "grey with alpha", "RGBA": "RGB with alpha"}


@dataclass(frozen=True)
class Verified:
    index: Index
    """With the SHA-256 of every good image, and without those that are bad."""
    bad: dict[str, str]
    """Images that were found to be bad now: their names, and why."""
    unusual: dict[str, int]
    """How many whole images are not plain RGB, by what they are: grey, CMYK, ..."""


def verify(index: Index, cores: int, progress: Progress = lambda done, total: None) -> Verified:
    """Read and decode all images, as the loaders do, with so many cores.

    An image is bad too if its content is another than when it was last verified, though it may decode: a bit that
    flipped. Raises ServiceError where S3 doesn't answer.
    """
    reader = _Noting(index)
    groups = np.array_split(np.arange(len(index)), max(1, -(-len(index) // _AT_ONCE)))
    done = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow; around the threads, not in them
        read = Ahead(read_threads(index.root, cores), _GROUPS_AHEAD).read(reader, groups)
        for ids, contents in zip(groups, read, strict=True):
            there = [number for number in range(len(ids)) if len(contents[number])]
            found = undecodable([contents[number] for number in there], cores)
            reader.bad |= {int(ids[there[number]]): why for number, why in found.items()}
            done += len(ids)
            progress(done, len(index))
    return Verified(
        index=_noted(index, reader),
        bad={index.name(i): why for i, why in sorted(reader.bad.items())},
        unusual=dict(Counter(_NAMES.get(mode, mode) for i, mode in reader.modes.items() if i not in reader.bad)),
    )


class _Noting(Reader):
    """What it reads, it hashes; what it can't read, it notes and gives as nothing."""

    def __init__(self, index: Index) -> None:
        super().__init__(index, None)
        self.sha256: dict[int, str] = {}
        self.bad: dict[int, str] = {}
        self.modes: dict[int, str] = {}
        """Of images that are not plain RGB."""
        self._before = index.good["sha256"]

    def read(self, i: int) -> Bytes:
        nothing: npt.NDArray[np.uint8] = np.empty(0, dtype=np.uint8)
        try:
            content = super().read(i)
        except DataError as error:
            self.bad[i] = str(error)
            return nothing
        whole = content.tobytes()
        self.sha256[i] = hashlib.sha256(whole).hexdigest()
        if self._before[i].is_valid and self._before[i].as_py() != self.sha256[i]:
            self.bad[i] = "its content has changed since it was last verified"
            return nothing
        try:
            file = io.BytesIO(whole)
            with Image.open(file) as image:
                if image.mode != _USUAL:
                    self.modes[i] = image.mode
                # JPEG decoders make grey of what a disk lost. Compressed data has no such run of zeros; metadata may.
                if image.format == "JPEG" and whole.find(bytes(_LOST), file.tell()) >= 0:
                    self.bad[i] = f"{_LOST:,} zero bytes in a row within its pixels"
        except (OSError, SyntaxError, ValueError):
            pass  # decoding it will say why
        return content


def _noted(index: Index, reader: _Noting) -> Index:
    """The index with what was found."""
    good = np.flatnonzero(index.rows["bad"].is_null().to_numpy())
    bad, sha256 = index.rows["bad"].to_pylist(), index.rows["sha256"].to_pylist()
    for i, row in enumerate(good.tolist()):
        bad[row] = reader.bad.get(i)
        if i not in reader.bad:
            sha256[row] = reader.sha256[i]
    rows = with_column(with_column(index.rows, "bad", bad), "sha256", sha256)
    return make(index.root, index.classes, index.shards, rows)
