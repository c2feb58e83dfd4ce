"""The averages of one run: which there are, when each takes the weights in, and how they are saved."""

import copy
from typing import Any

from torch import Tensor, nn

from swa_dist.config import Average
from swa_dist.method.averaging import ExponentialAverage, WeightAverage, buffers_of

Parts = dict[str, dict[str, Tensor]]

_SWA_PARTS = ("sum", "compensation", "buffers")


class Averages:
    """The Stochastic Weight Average and, where the recipe asks, others beside it."""

    def __init__(self, plan: Average) -> None:
        self._plan = plan
        self.swa = WeightAverage()
        self.after: dict[int, WeightAverage] = {}
        """The average as it was after so many epochs."""
        self.ema = ExponentialAverage(plan.ema.decay) if plan.ema != "off" else None
        self.iterates: dict[int, dict[str, Tensor]] = {}
        """The last iterates that were averaged, by id, oldest first."""

    def collect(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], id: int) -> None:
        """An averaging point: take the weights into the average, and keep them while they are among the last."""
        self.swa.collect_weights(weights, buffers, id)
        kept = max(self._plan.window, self._plan.keep_iterates)
        if kept:
            self.iterates[id] = {name: w.detach().float().clone() for name, w in weights.items()}
            for old in list(self.iterates)[:-kept]:
                del self.iterates[old]

    def step(self, model: nn.Module, id: int, share: float) -> None:
        """After each step, of so large a share of a whole global batch."""
        if self.ema is not None:
            self.ema.collect(model, id, share)

    def sums(self) -> dict[str, Tensor]:
        """Those of the averages that take in every step, unlooked at: to be checked at averaging points."""
        return {} if self.ema is None else {f"ema of {n}": t for n, t in self.ema.state_dict()["sum"].items()}

    def epoch_ended(self, epochs: int) -> None:
        if epochs in self._plan.also_after_epochs and epochs not in self.after:
            self.after[epochs] = copy.deepcopy(self.swa)

    def means(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The mean of each average that has iterates, by the name of its candidate."""
        found = {"swa": self.swa.mean()} if self.swa.count else {}
        found |= {f"swa_{epochs}": average.mean() for epochs, average in self.after.items() if average.count}
        if self._plan.window and self.iterates:
            window = WeightAverage()
            for position, weights in list(self.iterates.items())[-self._plan.window :]:
                window.collect_weights(weights, buffers_of(model), position)
            found["window"] = window.mean()
        if self.ema is not None and self.ema.last_id >= 0:
            found["ema"] = self.ema.mean() | buffers_of(model)
        return found

    def ids(self) -> dict[str, list[int]]:
        """The iterates in each average."""
        found = {"swa": list(self.swa.ids)} | {f"swa_{epochs}": list(a.ids) for epochs, a in self.after.items()}
        if self._plan.window:
            found["window"] = list(self.iterates)[-self._plan.window :]
        return found

    def parts(self) -> Parts:
        named = {"swa": self.swa} | {f"swa_{epochs}": average for epochs, average in self.after.items()}
        parts = {
            f"{name}.{part}": tensors
            for name, average in named.items()
            for part, tensors in average.state_dict().items()
            if part in _SWA_PARTS
        }
        if self.ema is not None:
            parts["ema.sum"] = self.ema.state_dict()["sum"]
        return parts | {f"iterate.{position}": weights for position, weights in self.iterates.items()}

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "swa": list(self.swa.ids),
            "after": {str(epochs): list(average.ids) for epochs, average in self.after.items()},
            "iterates": list(self.iterates),
        }
        if self.ema is not None:
            facts["ema"] = {name: self.ema.state_dict()[name] for name in ("weight", "last_id")}
        return facts

    def restore(self, parts: Parts, facts: dict[str, Any]) -> None:
        def average(name: str, ids: list[int]) -> WeightAverage:
            restored = WeightAverage()
            restored.load_state_dict({part: parts.get(f"{name}.{part}", {}) for part in _SWA_PARTS} | {"ids": ids})
            return restored

        self.swa = average("swa", facts["swa"])
        self.after = {int(epochs): average(f"swa_{epochs}", ids) for epochs, ids in facts["after"].items()}
        self.iterates = {position: dict(parts[f"iterate.{position}"]) for position in facts["iterates"]}
        if self.ema is not None:
            self.ema.load_state_dict({"sum": parts["ema.sum"]} | facts["ema"])
