"""Fewer validation images: these tests are about how workers share them, not about how many there are."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def digits(few_digits: Path) -> Path:
    return few_digits
