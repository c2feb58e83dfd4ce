"""Killed anywhere and started again with as many workers, a run ends with the same bits."""

from pathlib import Path
from typing import Any

import pytest

from swa_dist.storage.store import DiskStore
from tests import small_run
from tests.small_run import Result, Trap, WithinAnEpoch

SIZES = (1, 2, 3)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return {size: small_run.completed(size, root / str(size)) for size in SIZES}


def assert_as_if_nothing_happened(found: list[Result], undisturbed: list[Result], size: int) -> None:
    first, wanted = found[0], undisturbed[0]
    assert first.digests == wanted.digests
    assert first.iterates == wanted.iterates == [96, 120, 216, 240, 336, 360]
    assert set(first.world_sizes) == {size}
    assert [position for position, _ in first.rows] == [position for position, _ in wanted.rows]
    for (position, ours), (_, theirs) in zip(first.rows, wanted.rows, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12), position


FAST = [
    (1, Trap("batch", 4)),
    (3, Trap("batch", 7, rank=2)),
    (2, Trap("commit", 2)),  # between the average and its commit
    pytest.param(2, Trap("committed", 2), marks=pytest.mark.faults),
    (1, Trap("file", 9)),
    pytest.param(2, Trap("recalibrate", 1, rank=1), marks=pytest.mark.faults),
    (2, Trap("evaluate", 4, rank=1)),
]


@pytest.mark.parametrize(("size", "trap"), FAST, ids=lambda value: str(value).replace("Trap", ""))
def test_a_killed_run_ends_with_the_same_bits(undisturbed: Any, size: int, trap: Trap, tmp_path: Path) -> None:
    small_run.killed(size, tmp_path, trap)
    assert_as_if_nothing_happened(small_run.completed(size, tmp_path), undisturbed[size], size)


@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.faults), *SIZES[1:]])
def test_a_run_killed_within_an_epoch_goes_on_within_it(undisturbed: Any, size: int, tmp_path: Path) -> None:
    small_run.killed(size, tmp_path, WithinAnEpoch("nowhere", 0, root=str(tmp_path)))
    position = small_run.committed(tmp_path)
    assert position % small_run.NUM_TRAIN
    found = small_run.completed(size, tmp_path)
    assert_as_if_nothing_happened(found, undisturbed[size], size)
    resumed = [group for result in found for group in result.groups]
    whole = [group for result in undisturbed[size] for group in result.groups]
    assert len(whole) - len(resumed) == position // small_run.NUM_TRAIN * 8 + position % small_run.NUM_TRAIN // 16


def test_where_checkpoints_fall_changes_nothing(undisturbed: Any, tmp_path: Path) -> None:
    found = small_run.completed(2, tmp_path, checkpoint__interval_seconds="epoch")
    assert_as_if_nothing_happened(found, undisturbed[2], 2)


def test_every_epochs_end_is_kept_and_the_last_ones(undisturbed: Any, tmp_path: Path) -> None:
    small_run.completed(1, tmp_path)
    names = [int(name.rpartition("/")[2]) for name in DiskStore(tmp_path).names("checkpoints")]
    assert {120, 240, 360} <= set(names)
    assert len(names) <= 3 + 1  # of the last two, one is the last epoch's end
