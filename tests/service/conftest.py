"""An environment in which commands are as fast as they can be on a machine that others use too."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _patient_threads() -> Iterator[None]:
    """Threads of OpenMP that wait for each other don't spin: a spinning one keeps away the one that it waits for, and
    an epoch of the digits takes twenty times as long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        yield
