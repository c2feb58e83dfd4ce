"""Decoded images made as large as the network takes them, on the CPU: by torch's kernel for bytes.

Its pixels are Pillow's, which published accuracies of weights are of, to a level or two, and the same with and without
a processor's vector instructions. DALI's resize, which a GPU has, takes four times as long on a CPU.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from swa_dist.data.order import Bools, Ints

Pixels = npt.NDArray[np.uint8]
Placements = npt.NDArray[np.int32]
"""A row for each image: the height and width that it is made, the top and left of the square of it that is taken, and
whether that is mirrored. [images, 5]."""


def placements(
    height: Ints | int, width: Ints | int, top: Ints | int, left: Ints | int, flip: Bools | bool
) -> Placements:
    """Of each image, or the same for all."""
    return np.stack(np.broadcast_arrays(height, width, top, left, flip), axis=1).astype(np.int32)


class Resizer:
    """Threads that resize."""

    def __init__(self, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="resize-images")
        self._num_threads = num_threads

    def fit(self, images: Sequence[Pixels], places: Placements, side: int) -> Tensor:
        """uint8 [images, side, side, 3] of images [height, width, 3], which are not looked at after the return.
        The same for any number of threads."""
        fitted = torch.empty(len(images), side, side, 3, dtype=torch.uint8)
        pixels = fitted.numpy()

        def fit_some(numbers: list[int]) -> None:
            for n in numbers:
                height, width, top, left, _ = places[n].tolist()
                # By numpy, since torch would start threads of its own within each of these.
                pixels[n] = resized(images[n], height, width)[top : top + side, left : left + side]

        shares = np.array_split(np.arange(len(images)), self._num_threads)
        list(self._pool.map(fit_some, (share.tolist() for share in shares)))
        for n in places[:, 4].nonzero()[0].tolist():
            # Channels before the sides: torch mirrors these at once, any others byte by byte.
            one = fitted[n : n + 1].permute(0, 3, 1, 2)
            one.copy_(one.flip(3))
        return fitted


def resized(image: Pixels, height: int, width: int) -> Pixels:
    """uint8 [height, width, 3] of an image [any height, any width, 3], by the means of triangles as Pillow's. In this
    thread alone, and other Python threads run meanwhile."""
    # The fourth dimension first: only then does torch see that the channels lie together, which is twice as fast.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    out: Pixels = interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return out
