"""Break the method by one line each, in a copy, and see which test notices.

    .venv/bin/python benchmarks/mutations.py         # about 10 minutes on 2 cores

Exit status 1 if a mutant lives. The table is in docs/numerics.md.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Mutation:
    what: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "Chan's merge without the term between the means",
        "method/moments.py",
        "m2_a + m2_b + delta.square() * n_a * share",
        "m2_a + m2_b",
        "tests/laws/test_moments.py",
    ),
    Mutation(
        "the variance over n - 1",
        "method/moments.py",
        "self.values[2] / self.values[0].clamp(min=1)",
        "self.values[2] / (self.values[0] - 1).clamp(min=1)",
        "tests/laws/test_moments.py",
    ),
    Mutation(
        "the average over one iterate too many",
        "method/averaging.py",
        "for n in names], self.count)",
        "for n in names], self.count + 1)",
        "tests/laws/test_averaging.py",
    ),
    Mutation(
        "an iterate counted twice",
        "method/averaging.py",
        "        self._refuse([id])\n",
        "",
        "tests/laws/test_averaging.py",
    ),
    Mutation(
        "the EMA without its bias correction",
        "method/averaging.py",
        "list(self._sum.values()), self._weight)",
        "list(self._sum.values()), 1.0)",
        "tests/distributed/test_peers.py",
    ),
    Mutation(
        "the last step of a cycle not at the lowest rate",
        "method/schedule.py",
        "if done >= self.cycle_images:",
        "if done > self.cycle_images:",
        "tests/laws/test_schedule.py",
    ),
    Mutation(
        "DDP's plain mean of the workers' means",
        "training/loop.py",
        "weight = world.size / batch.num_images",
        "weight = 1 / max(1, sum(len(group.labels) for group in batch.groups))",
        "tests/distributed/test_results.py -k weights_are_within",
    ),
    Mutation(
        "running statistics that don't decay for the others' groups",
        "training/batchnorm.py",
        "if num_groups:",
        "if num_groups > 10**9:",
        "tests/distributed/test_batchnorm.py",
    ),
    Mutation(
        "a worker without a group that leaves zeros in BatchNorm's statistics",
        "training/loop.py",
        "    with batchnorm.unrecorded(model):\n        (network",
        "    with contextlib.nullcontext():\n        (network",
        "tests/distributed/test_results.py -k batchnorm_is_within",
    ),
    Mutation(
        "one worker's moments instead of all",
        "training/recalibrate.py",
        "for one in stacked(world, flat):",
        "for one in flat[None]:",
        "tests/distributed/test_batchnorm.py",
    ),
    Mutation(
        "dropout on while recalibrating",
        "training/recalibrate.py",
        "            self._model.eval()\n",
        "",
        "tests/distributed/test_batchnorm.py",
    ),
    Mutation(
        "BatchNorm's parts summed when a run resumes within an epoch",
        "training/batchnorm.py",
        "if len(statistics) == self._world.size:",
        "if self._world.size == 10**9:",
        "tests/distributed/test_exact_resume.py -k within_an_epoch",
    ),
    Mutation(
        "DDP's buckets left to settle after a resume",
        "training/train.py",
        "for _ in range(2):",
        "for _ in range(0):",
        "tests/distributed/test_exact_resume.py",
    ),
    Mutation(
        "an epoch's metrics begun anew when a run resumes within it",
        "training/train.py",
        "tallies.begin_epoch(state.tallies)",
        "tallies.begin_epoch({})",
        "tests/distributed/test_exact_resume.py -k within_an_epoch",
    ),
    Mutation(
        "a skipped step that leaves its traces in BatchNorm",
        "training/loop.py",
        "            running.undo()\n",
        "            pass\n",
        "tests/faults/test_worker_faults.py -m faults -k spoils",
    ),
    Mutation(
        "the guard's memory lost when a run resumes",
        "training/state.py",
        'self.guard.restore(facts["guard"])',
        "pass",
        "tests/faults/test_worker_faults.py -m faults -k resumed_run_skips",
    ),
    Mutation(
        "images that can't be decoded counted in the mean",
        "training/loop.py",
        "if any_left_out and not local:",
        "if False:",
        "tests/distributed/test_bad_images.py -k without_their_places",
    ),
    Mutation(
        "the images that can't be decoded forgotten by a checkpoint",
        "training/state.py",
        '"left_out": sorted(self.left_out.items()),',
        '"left_out": [],',
        "tests/distributed/test_bad_images.py -k name_again",
    ),
    Mutation(
        "the crops of the good images of a group moved up into the places of the bad ones",
        "data/dali.py",
        "starts = np.stack([crops.top, crops.left], axis=1)[self._good]",
        "starts = np.stack([crops.top, crops.left], axis=1)[: len(self.ids)]",
        "tests/distributed/test_bad_images.py -k without_their_places",
    ),
    Mutation(
        "the mirroring of the good images of a group moved up into the places of the bad ones",
        "data/dali.py",
        "crops.flip[self._good]",
        "crops.flip[: len(self.ids)]",
        "tests/unit/test_loaders.py -k left_out",
    ),
    Mutation(
        "a gain that chance gives is a gain",
        "evidence/gate.py",
        "paired.shown and paired.gain >= gate.min_gain",
        "paired.gain >= gate.min_gain",
        "tests/unit/test_gate.py",
    ),
    Mutation(
        "classes tested without a correction for their number",
        "evidence/gate.py",
        "p_values = holm(binom.sf(losses[there] - 1, wins[there] + losses[there], 0.5))",
        "p_values = binom.sf(losses[there] - 1, wins[there] + losses[there], 0.5)",
        "tests/unit/test_gate.py",
    ),
    Mutation(
        "@champion's own scores where it was scored on other images",
        "service/promotion.py",
        "if mine.val_digest != theirs.val_digest:",
        "if False:",
        "tests/unit/test_promotion.py -k scored",
    ),
    Mutation(
        "what a paused process wrote after its lease was lost taken for a person's move",
        "service/champion.py",
        "if there and found.champion in self._late(found):",
        "if False:",
        "tests/unit/test_champion.py -k put_right",
    ),
]


def killed(mutation: Mutation, scratch: Path) -> bool:
    """Whether the tests of a mutation fail on a copy that has it."""
    copy = scratch / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    for folder in ("swa_dist", "tests", "jobs"):
        shutil.copytree(ROOT / folder, copy / folder)
    shutil.copy(ROOT / "pyproject.toml", copy)
    path = copy / "swa_dist" / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) < 1:
        sys.exit(f"{mutation.file} no longer has {mutation.old!r}: bring this list up to date")
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutation.tests.split()]
    environment = os.environ | {"PYTHONPATH": str(copy)}
    result = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 1):
        sys.exit(result.stdout + result.stderr)
    return result.returncode == 1


def main() -> None:
    alive = 0
    with tempfile.TemporaryDirectory() as scratch:
        for mutation in MUTATIONS:
            found = killed(mutation, Path(scratch))
            alive += not found
            print(f"{'noticed' if found else 'LIVES  '}  {mutation.what}: {mutation.tests}", flush=True)
    sys.exit(1 if alive else 0)


if __name__ == "__main__":
    main()
