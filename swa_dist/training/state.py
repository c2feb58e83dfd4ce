"""Everything that a resume needs, in one place and committed in one write."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from swa_dist.errors import CheckpointError
from swa_dist.storage.store import Store
from swa_dist.training.averages import Averages, Parts
from swa_dist.training.guard import Guard

SCHEMA = 4

_SUFFIX = ".safetensors"
_FACTS = "facts.json"

Row = dict[str, Any]
"""Metrics with the position they belong to and the time they were taken, which is theirs for good:
{"position": 512, "epoch": 1.28, "time_ms": 1764000000000, "metrics": {"train/loss": 0.3}}."""


@dataclass
class TrainState:
    model: nn.Module
    optimizer: torch.optim.SGD
    averages: Averages
    guard: Guard
    position: int = 0
    """Images of the run so far, over all epochs."""
    rows: list[Row] = field(default_factory=list)
    """The metrics of all steps so far."""
    seconds: float = 0.0
    """Time spent training so far, over all attempts."""
    running: dict[str, Tensor] = field(default_factory=dict)
    """Within an epoch: all workers' parts of BatchNorm's running statistics (`RunningStatistics.parts`)."""
    tallies: dict[str, list[float]] = field(default_factory=dict)
    """Within an epoch: the sums over all workers that its next metrics begin with."""
    left_out: dict[int, str] = field(default_factory=dict)
    """Training images that could not be decoded: their places in the index, and why."""
    world_sizes: list[int] = field(default_factory=list)
    """The number of workers of each attempt that committed; more than one value: the run is not bitwise repeatable."""

    def parts(self) -> Parts:
        running = {"running": self.running} if self.running else {}
        return self.own_parts() | self.averages.parts() | running

    def own_parts(self) -> Parts:
        """What the workers don't share where each trains by itself."""
        return {"model": self.model.state_dict(), "momentum": self._momentum()}

    def facts(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "position": self.position,
            "averages": self.averages.facts(),
            "rows": list(self.rows),
            "seconds": self.seconds,
            "tallies": self.tallies,
            "guard": self.guard.facts(),
            "left_out": sorted(self.left_out.items()),
            "world_sizes": list(self.world_sizes),
        }

    def restore(self, parts: Parts, facts: dict[str, Any]) -> None:
        """Become the state that had these. Raises CheckpointError for those of another version."""
        if facts["schema"] != SCHEMA:
            raise CheckpointError(
                f"a checkpoint must be of schema {SCHEMA}, but is of {facts['schema']}."
                " Finish the run with the version that began it, or start over with --again."
            )
        self.model.load_state_dict(parts["model"])
        parameters = dict(self.model.named_parameters())
        for name, tensor in parts["momentum"].items():
            self.optimizer.state[parameters[name]]["momentum_buffer"] = tensor
        self.averages.restore(parts, facts["averages"])
        self.position = facts["position"]
        self.rows = list(facts["rows"])
        self.seconds = facts["seconds"]
        self.running = parts.get("running", {})
        self.tallies = facts["tallies"]
        self.guard.restore(facts["guard"])
        self.left_out = {image: why for image, why in facts["left_out"]}
        self.world_sizes = list(facts["world_sizes"])

    def _momentum(self) -> dict[str, Tensor]:
        state = self.optimizer.state
        buffers = {name: state[p].get("momentum_buffer") for name, p in self.model.named_parameters() if p in state}
        return {name: buffer for name, buffer in buffers.items() if buffer is not None}


def save_entry(store: Store, name: str, parts: Parts, facts: dict[str, Any]) -> None:
    """Commit tensors, a .safetensors file for each part, and JSON facts as one entry."""

    def fill(folder: Path) -> None:
        for part, tensors in parts.items():
            contiguous = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            # Not save_file, whose errors on a full disk are its own.
            (folder / f"{part}{_SUFFIX}").write_bytes(safetensors.torch.save(contiguous))
        (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")

    store.commit(name, fill)


def load_entry(store: Store, name: str) -> tuple[Parts, dict[str, Any]]:
    """The parts' tensors, on the CPU, and the facts of a committed entry. Verified: raises CheckpointError."""
    folder = store.open(name)
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    return {path.stem: safetensors.torch.load_file(path) for path in folder.glob(f"*{_SUFFIX}")}, facts
