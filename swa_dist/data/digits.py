"""Real images that every installation has: scikit-learn's handwritten digits, as JPEG files in class folders.

1,797 scans of 8 x 8 pixels by 43 writers (Alpaydin and Kaynak 1998, UCI), enlarged to 32 x 32.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from swa_dist.storage.files import new_folder

NUM_CLASSES = 10
IMAGE_SIZE = 32
NUM_TRAIN = 400  # few, so that there is something to gain
_SPLIT_SEED = 1234
_WHITE = 16  # the scans' brightest value


def write(root: Path) -> None:
    """Write the folders `train` (400 images) and `val` (1,397) under `root`, unless it is there. The split is fixed."""
    if (root / "train").is_dir():
        return
    digits = load_digits()
    order = np.random.Philox(key=_SPLIT_SEED).random_raw(len(digits.target)).argsort(kind="stable")
    with new_folder(root) as folder:
        for split, chosen in (("train", order[:NUM_TRAIN]), ("val", order[NUM_TRAIN:])):
            for label in range(NUM_CLASSES):
                (folder / split / str(label)).mkdir(parents=True)
            for i in chosen:
                scan = Image.fromarray((digits.images[i] * (255 / _WHITE)).astype(np.uint8))
                path = folder / split / str(digits.target[i]) / f"{i:04d}.jpg"
                scan.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).save(path, quality=95)
