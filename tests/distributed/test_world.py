"""Collectives that turn one worker's trouble into the same error on all."""

import pytest

from swa_dist.errors import CheckpointError, NumericsError
from swa_dist.training.world import World, agree, on_rank_zero
from tests.support import WorkerError, run_workers


def disagree(world: World, odd: int | None) -> str:
    try:
        agree(world, "x" if world.rank == odd else "y", "the weights")
    except NumericsError as error:
        return str(error)
    return "agreed"


def fail_on_rank_zero(world: World) -> str:
    def work() -> None:
        raise CheckpointError(f"seen on rank {world.rank}")

    try:
        on_rank_zero(world, work)
    except CheckpointError as error:
        return str(error)
    return "no error"


class UnsendableError(Exception):
    """Can't be made from its arguments alone, as many a library's errors."""

    def __init__(self, what: str, *, why: str) -> None:
        super().__init__(f"{what}, {why}")


def fail_unsendably(world: World) -> str:
    def work() -> None:
        raise UnsendableError("broken", why="because")

    try:
        on_rank_zero(world, work)
    except RuntimeError as error:
        return str(error)
    return "no error"


def answer_of_rank_zero(world: World) -> int:
    return on_rank_zero(world, lambda: 42 + world.rank)


def fail_alone(world: World) -> None:
    if world.rank == 1:
        raise RuntimeError("rank 1 is unwell")


@pytest.mark.parametrize("size", [1, 2, 3])
def test_equal_values_agree(size: int) -> None:
    assert run_workers(disagree, size, None) == ["agreed"] * size


def test_all_values_are_named_and_with_three_workers_the_odd_one() -> None:
    for message in run_workers(disagree, 2, 1):
        assert "rank 0: y, rank 1: x" in message
        assert "alone" not in message
    for message in run_workers(disagree, 3, 1):
        assert "Rank 1 is alone" in message


def test_an_error_of_rank_zero_is_everyones() -> None:
    assert run_workers(fail_on_rank_zero, 2) == ["seen on rank 0"] * 2
    assert run_workers(answer_of_rank_zero, 3) == [42] * 3
    assert run_workers(fail_unsendably, 2) == ["on rank 0: UnsendableError: broken, because"] * 2


def test_a_failed_worker_fails_the_test() -> None:
    with pytest.raises(WorkerError, match="rank 1 is unwell"):
        run_workers(fail_alone, 2)
