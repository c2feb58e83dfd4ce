"""Start, last iterate, SWA, EMA and a window on the digits, over seeds that no tuning used: mean and deviation.

    .venv/bin/python benchmarks/digits.py            # seeds 10 to 14, about 3 minutes on 2 cores

Each seed trains its own starting weights and fine-tunes them by jobs/digits.yaml, with an EMA (decay 0.9 a step) and
the mean of the last 3 iterates beside the SWA, in this process: the number of workers is no part of the result.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from swa_dist import config
from swa_dist.data import digits
from swa_dist.evidence.verdict import control_of
from swa_dist.service import quickstart
from swa_dist.service.progress import Display, display
from swa_dist.storage.store import DiskStore
from swa_dist.training.finetune import finetune
from swa_dist.training.state import Row
from swa_dist.training.world import SoloWorld

RECIPE = Path(__file__).parent.parent / "jobs" / "digits.yaml"
TUNING_SEEDS = range(10)  # 0 to 2 were looked at while the recipe was made; keep clear of them


class Untracked:
    """Progress to the display; the rest is for nobody."""

    def __init__(self, seed: int, shown: Display) -> None:
        self._seed, self._shown = seed, shown

    def progress(self, phase: str, done: int, total: int, note: str = "") -> None:
        self._shown.progress(f"seed {self._seed} {phase}", done, total, note)

    def publish(self, rows: list[Row]) -> None:
        pass

    def warn(self, message: str) -> None:
        self._shown.say(message)


def run(seed: int, root: Path, shown: Display) -> dict[str, float]:
    """Top-1 in percent of each set of weights."""
    folder = root / str(seed)
    folder.mkdir()
    recipe = config.replace(
        config.load(RECIPE),
        **{
            "seed": seed,
            "average.ema": {"decay": 0.9},
            "average.window": 3,
            "model.weights": str(folder / "start.safetensors"),
            "data.train": str(root / "data" / "train"),
            "data.val": str(root / "data" / "val"),
        },
    )
    loaders = quickstart.digits_loaders(recipe)
    quickstart.train_start(recipe, loaders, Path(recipe.model.weights), shown)
    found = finetune(recipe, SoloWorld(), loaders, DiskStore(folder), Untracked(seed, shown), lambda: False)
    top1 = {name: candidate.outcomes.metrics()["top1"] for name, candidate in found.items()}
    return top1 | {"control": top1[control_of({name: c.outcomes for name, c in found.items()})]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    seeds = parser.parse_args().seeds
    if set(seeds) & set(TUNING_SEEDS):
        parser.error("seeds 0 to 9 are for tuning and not reported")
    shown = display()
    with tempfile.TemporaryDirectory() as scratch:
        digits.write(Path(scratch) / "data")
        rows = [run(seed, Path(scratch), shown) for seed in seeds]
    shown.close()
    print(f"\ntop-1 %, {len(seeds)} seeds {seeds}: mean ± standard deviation")
    for name in rows[0]:
        values = np.array([row[name] for row in rows])
        print(f"  {name:<12}{values.mean():6.2f} ± {values.std(ddof=1):.2f}   {' '.join(f'{v:.2f}' for v in values)}")
    for against in ("start", "control"):
        gains = np.array([row["swa"] - row[against] for row in rows])
        print(f"  swa - {against:<8}{gains.mean():+6.2f} ± {gains.std(ddof=1):.2f}")


if __name__ == "__main__":
    main()
