"""Fewer validation images: these tests are about how workers share them, and no number of workers divides 97 either."""

from itertools import islice
from pathlib import Path

import pytest

NUM_VAL = 97


@pytest.fixture(scope="session")
def digits(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All training images, and 97 of the validation images."""
    root = tmp_path_factory.mktemp("few") / "data"
    root.mkdir()
    (root / "train").symlink_to(digits / "train")
    for label in range(10):
        folder = root / "val" / str(label)
        folder.mkdir(parents=True)
        for image in islice(sorted((digits / "val" / str(label)).iterdir()), 10 if label < 7 else 9):
            (folder / image.name).symlink_to(image)
    return root
