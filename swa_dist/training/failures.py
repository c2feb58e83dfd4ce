"""What a worker meets when another is lost, or when its memory is full, as errors of ours."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from swa_dist.config import Recipe
from swa_dist.errors import OutOfMemoryError, ServiceError
from swa_dist.training.world import World

# gloo's are plain RuntimeErrors. On a CPU so is torch's own when memory is full.
_OF_GLOO = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "Broken pipe")
_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "out of memory",
    "STATUS_ALLOC_FAILED",
)


@contextlib.contextmanager
def named(recipe: Recipe, world: World) -> Iterator[None]:
    """Within the block a lost worker is a ServiceError, and full memory an OutOfMemoryError."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(recipe, world, error) from error
    except RuntimeError as error:
        said = str(error)
        if any(text in said for text in _OF_MEMORY):
            raise _out_of_memory(recipe, world, error) from error
        if isinstance(error, dist.DistError) or any(text in said for text in _OF_GLOO):
            first = said.strip().splitlines()[0][:300] if said.strip() else type(error).__name__
            raise ServiceError(
                f"every worker must answer the others within {recipe.cluster.collective_timeout_seconds} s"
                f" (`cluster.collective_timeout_seconds`), but to rank {world.rank} one did not: {first}. Look at the"
                " other workers' logs for what ended them; the same command goes on from the last checkpoint."
            ) from error
        raise


def _out_of_memory(recipe: Recipe, world: World, error: BaseException) -> OutOfMemoryError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    size = recipe.data.group_images
    smaller = f"{size // 2} images" if size >= 4 else "fewer pixels (`data.image_size`)"
    return OutOfMemoryError(
        f"a group of {size} images (`data.group_images`) must fit into the memory of {world.device} on rank"
        f" {world.rank}, but does not: {first} Free memory there, or set groups of {smaller}: another result, another"
        " key. The last checkpoint is kept."
    )
