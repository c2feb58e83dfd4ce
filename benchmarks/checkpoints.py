"""What checkpoints cost training: a synthetic step of 0.3 s, the state of a ResNet-50, the disk of this machine.

    .venv/bin/python benchmarks/checkpoints.py [--rounds 5] [--out FOLDER]

A step sleeps, as a process does that waits for its GPU. Rounds with one checkpoint and without alternate; what one
costs is the difference of their medians, and the overhead that, per interval of `checkpoint.interval_seconds: auto`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from swa_dist import config, models
from swa_dist.data.memory import MemoryLoaders
from swa_dist.storage.store import DiskStore
from swa_dist.training import loop
from swa_dist.training.averages import Averages
from swa_dist.training.checkpoints import Checkpoints
from swa_dist.training.guard import Guard
from swa_dist.training.ports import Ports
from swa_dist.training.state import Row, TrainState
from swa_dist.training.world import SoloWorld

STEP_SECONDS = 0.3
STEPS = 40  # of a round: long enough for a checkpoint to be written within it
JOBS = Path(__file__).parent.parent / "jobs"


class Silent:
    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        pass

    def publish(self, rows: "list[Row]") -> None:
        pass

    def warn(self, message: str) -> None:
        print(message)


def state_of(recipe: config.Recipe) -> TrainState:
    """As after some steps: weights, momentum, and an average of two iterates."""
    model = models.build(recipe.model, 0)
    optimizer = loop.sgd(model, models.head_names(model), recipe)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    averages = Averages(recipe.average)
    for position in (1, 2):
        averages.swa.collect(model, position)
    return TrainState(model=model, optimizer=optimizer, averages=averages, guard=Guard(recipe.guard), position=1)


def steps(checkpoints: Checkpoints, state: TrainState, save: bool) -> float:
    began = time.perf_counter()
    for number in range(STEPS):
        time.sleep(STEP_SECONDS)
        if save and number == STEPS // 4:
            checkpoints.save(state)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None, help="Where to write. Default: a temporary folder.")
    chosen = parser.parse_args()
    recipe = config.load(JOBS / "resnet50-swa5.yaml")
    few = torch.zeros(10, 3, 8, 8, dtype=torch.uint8), torch.zeros(10, dtype=torch.int64)
    loaders = MemoryLoaders(*few, *few, recipe.data, 0)
    state = state_of(recipe)
    with tempfile.TemporaryDirectory(dir=chosen.out) as folder:
        ports = Ports(recipe, SoloWorld(), loaders, DiskStore(Path(folder)), Silent(), lambda: False)
        took: dict[bool, list[float]] = {True: [], False: []}
        waits = []
        with Checkpoints(ports) as checkpoints:
            checkpoints.save(state)  # the first touches memory and folders for the first time
            checkpoints.settle()
            for round_number in range(2 * chosen.rounds):
                save = round_number % 2 == 0
                state.position += 1
                took[save].append(steps(checkpoints, state, save))
                checkpoints.settle()
                waits.append(checkpoints.pace.interval_seconds)
        size = sum(file.stat().st_size for file in next(Path(folder).glob("checkpoints/0*")).iterdir())
    with_it, without = (statistics.median(took[save]) for save in (True, False))
    cost, interval = with_it - without, statistics.median(waits)
    print(f"state {size / 2**20:.0f} MiB; {chosen.rounds} rounds of {STEPS} steps of {STEP_SECONDS} s each")
    print(f"overhead {100 * cost / interval:.2f} % of step time at the automatic interval of {interval:.0f} s")
    print(f"a checkpoint costs training {cost:.3f} s (waits {checkpoints.pace.wait_seconds:.3f} s), and is written in")
    print(
        f"{checkpoints.pace.write_seconds:.1f} s beside it; rounds: {with_it:.3f} s with one, {without:.3f} s without"
    )


if __name__ == "__main__":
    main()
