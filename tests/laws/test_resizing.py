"""Images are resized as Pillow does, on any machine, by any number of threads, whatever their sizes."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from swa_dist.data.resizing import Pixels, Placements, Resizer, placements, resized

SIDES = st.integers(1, 600) | st.integers(1, 4) | st.just(224)
SEEDS = st.integers(0, 2**31)


def noise(seed: int, height: int, width: int) -> Pixels:
    """As far as can be from smooth, so that no rounding hides."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_pillow(image: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


@given(SEEDS, SIDES, SIDES, SIDES, SIDES)
def test_any_image_to_any_size_is_pillows(seed: int, height: int, width: int, new_height: int, new_width: int) -> None:
    image = noise(seed, height, width)
    ours, theirs = resized(image, new_height, new_width), by_pillow(image, new_height, new_width)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    apart = np.abs(ours.astype(int) - theirs)
    assert apart.max() <= 2
    assert apart.mean() <= 0.5


@given(SEEDS, SIDES, SIDES)
def test_an_image_that_has_its_size_already_keeps_every_bit(seed: int, height: int, width: int) -> None:
    image = noise(seed, height, width)
    assert (resized(image, height, width) == image).all()


@given(st.integers(0, 255), SIDES, SIDES, SIDES, SIDES)
def test_one_colour_stays_that_colour(level: int, height: int, width: int, new_height: int, new_width: int) -> None:
    assert (resized(np.full((height, width, 3), level, np.uint8), new_height, new_width) == level).all()


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Pixels], Placements, int]:
    """Images of any sizes, each made any size of at least a square's, of which any square is taken, mirrored or not."""
    side, num_images = draw(st.integers(1, 64)), draw(st.integers(1, 7))
    generator = np.random.default_rng(draw(SEEDS))
    images = [noise(n, *generator.integers(1, 200, 2)) for n in range(num_images)]
    height, width = generator.integers(side, side + 60, (2, num_images))
    top, left = generator.integers(0, height - side + 1), generator.integers(0, width - side + 1)
    return images, placements(height, width, top, left, generator.random(num_images) < 0.5), side


@given(groups())
def test_a_group_is_each_image_resized_cut_and_mirrored_for_any_number_of_threads(
    group: tuple[list[Pixels], Placements, int],
) -> None:
    images, places, side = group
    expected = []
    for image, (height, width, top, left, flip) in zip(images, places.tolist(), strict=True):
        square = resized(image, height, width)[top : top + side, left : left + side]
        expected.append(square[:, ::-1] if flip else square)
    for num_threads in (1, 2, 5):
        fitted = Resizer(num_threads).fit(images, places, side)
        assert (fitted.numpy() == np.stack(expected)).all()


def test_placements_may_be_the_same_for_all() -> None:
    assert placements(8, 9, 0, 1, np.array([True, False])).tolist() == [[8, 9, 0, 1, 1], [8, 9, 0, 1, 0]]


def digest() -> str:
    """Of what comes out for some images."""
    sizes = np.random.default_rng(0).integers(1, 600, (40, 4)).tolist()
    parts = [resized(noise(n, *of), *to) for n, (*of, a, b) in enumerate(sizes) for to in ((a, b), (224, 224))]
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_a_processor_that_can_do_less_gives_the_same_bits(capability: str) -> None:
    """Results depend on the recipe: torch chooses its kernels by what the processor can do."""
    code = "from tests.laws.test_resizing import digest; print(digest())"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == digest(), ran.stderr
