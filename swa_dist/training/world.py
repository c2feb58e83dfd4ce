"""The workers of a run, as one of them sees them. The same functions run alone and on many."""

import os
import pickle
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from swa_dist.errors import NumericsError, ServiceError

T = TypeVar("T")

_BEAT_SECONDS = 5.0


class World(Protocol):
    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """The number of workers."""

    @property
    def device(self) -> torch.device:
        """This worker's."""

    def sum_(self, tensor: Tensor) -> Tensor:
        """Collective: add up `tensor` over all workers, in place."""

    def max_(self, tensor: Tensor) -> Tensor:
        """Collective: the largest of each element over all workers, in place."""

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Collective: overwrite `tensor` with that of the worker `source`."""

    def gather(self, value: Any) -> list[Any]:
        """Collective: every worker's picklable `value`, by rank, on every worker. For small values."""

    def wrap(self, model: nn.Module) -> nn.Module:
        """Collective: `model` with its gradients averaged over the workers in each backward pass."""


@dataclass(frozen=True)
class SoloWorld:
    """One process."""

    device: torch.device = torch.device("cpu")
    rank: int = 0
    size: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def wrap(self, model: nn.Module) -> nn.Module:
        return model


class TorchWorld:
    """The processes of torch.distributed's default group, which must be initialised."""

    def __init__(self, device: torch.device, timeout_seconds: float) -> None:
        """`timeout_seconds`: how long a worker waits for the others. Of the default group it is the caller's to set."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.device = device
        # Plain values go by gloo, beside the GPUs.
        self._plain: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))

    def sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        dist.broadcast(tensor, src=source)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._plain)
        return values

    def wrap(self, model: nn.Module) -> nn.Module:
        # Buffers are not broadcast: BatchNorm's are each worker's part of a sum (batchnorm.py).
        # The argument's successor, of which torch 2.15 warns, is not in the older versions that are supported.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            return DistributedDataParallel(
                model,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                broadcast_buffers=False,
            )


def join_from_environment(device: torch.device, timeout_seconds: int) -> TorchWorld:
    """Collective: the world of the processes that torchrun started. Raises ServiceError where they don't meet."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # else NCCL takes the first GPU for all
    try:
        dist.init_process_group(
            backend, timeout=timedelta(seconds=timeout_seconds), device_id=device if device.type == "cuda" else None
        )
        return TorchWorld(device, timeout_seconds)
    except (dist.DistError, RuntimeError) as error:
        raise ServiceError(
            f"all workers must meet within {timeout_seconds} s (`cluster.collective_timeout_seconds`), but rank"
            f" {os.environ.get('RANK', '?')} did not meet all: {str(error).splitlines()[0][:300]}. Start them again."
        ) from error


def pin_arithmetic(device: torch.device) -> None:
    """On a GPU: float32 is float32, not TF32, and the same sums come out each time."""
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def agree(world: World, value: Any, name: str) -> None:
    """Collective: raise NumericsError on every worker unless all have the same `value`."""
    values = world.gather(value)
    if any(v != values[0] for v in values):
        listed = ", ".join(f"rank {rank}: {v}" for rank, v in enumerate(values))
        odd = _minority(values)
        blame = f" Rank {odd} is alone with its own." if odd is not None else ""
        raise NumericsError(f"{name} must be the same on all workers, but differ: {listed}.{blame}")


def on_rank_zero(world: World, work: Callable[[], T]) -> T:
    """Collective: what `work` returns on rank 0, on every worker; what it raises there is raised on every worker.

    It may take as long as it takes: a thread of rank 0 does it, who tells the others now and then that it goes on. So
    a worker that is lost meanwhile is noticed in time.
    """
    if world.size == 1:
        return work()
    outcome: list[tuple[T | None, Exception | None]] = []
    thread = threading.Thread(target=lambda: outcome.append(_outcome(work)), name="on-rank-zero", daemon=True)
    if world.rank == 0:
        thread.start()
    while True:
        if world.rank == 0:
            thread.join(_BEAT_SECONDS)
        found = world.gather(outcome[0] if outcome else None)[0]
        if found is not None:
            value, error = found
            if error is not None:
                raise error
            return value  # type: ignore[no-any-return]


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as caught:
        return None, _sendable(caught)
    except BaseException as caught:
        return None, RuntimeError(f"on rank 0: {type(caught).__name__}: {caught}")


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same, where it can't be sent: the others must not be left waiting."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"on rank 0: {type(error).__name__}: {error}")
    return error


def broadcast_tensors(world: World, tensors: dict[str, Tensor] | None, source: int = 0) -> dict[str, Tensor]:
    """Collective: the `tensors` of one worker on every worker's device. What the others give is not looked at."""
    own = tensors if world.rank == source and tensors is not None else {}
    spec = world.gather({name: (t.shape, t.dtype) for name, t in own.items()})[source]
    sent: dict[str, Tensor] = {}
    for name, (shape, dtype) in spec.items():
        given = own[name].to(world.device) if name in own else torch.empty(shape, dtype=dtype, device=world.device)
        sent[name] = world.broadcast_(given, source)
    return sent


def stacked(world: World, tensor: Tensor) -> Tensor:
    """Collective: every worker's `tensor`, by rank, on every worker: [workers, ...]. They must be of one shape."""
    # A sum in which each worker fills its own place is a gather that every backend has.
    places = torch.zeros(world.size, *tensor.shape, dtype=tensor.dtype, device=tensor.device)
    places[world.rank] = tensor
    return world.sum_(places)


def _minority(values: Sequence[Any]) -> int | None:
    """The one rank that differs where all others agree: it takes three to tell."""
    if len(values) < 3:
        return None
    for rank, value in enumerate(values):
        others = [v for r, v in enumerate(values) if r != rank]
        if value != others[0] and all(v == others[0] for v in others):
            return rank
    return None
