"""Averages of weights, as values that are merged, saved and restored. The Stochastic Weight Average is the first."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from swa_dist.errors import NumericsError


class WeightAverage:
    """The mean of the parameters of the iterates collected so far (Izmailov et al. 2018, algorithm 1).

    Parameters are matched by name and summed in float32 with compensation (Kahan 1965), so an element of the mean of n
    iterates is within 2 eps max|w| of the exact one whatever n. Each iterate has an id, its position in the run, and
    is counted once. Buffers are not averaged: those of the latest iterate are kept, and BatchNorm's must be
    recalibrated before the mean is used.
    """

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._sum: dict[str, Tensor] = {}
        self._compensation: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}

    @property
    def count(self) -> int:
        return len(self.ids)

    def collect(self, model: nn.Module, id: int) -> None:
        """Take in the weights of `model` as the iterate `id`.

        Raises NumericsError, and leaves the average as it was, where the id is in already or a weight is not finite;
        ValueError where the names or shapes are not those of the iterates before.
        """
        self.collect_weights(parameters_of(model), buffers_of(model), id)

    @torch.no_grad()
    def collect_weights(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], id: int) -> None:
        """As `collect`, of parameters and buffers by name."""
        self._refuse([id])
        self._match(weights)
        _refuse_non_finite(weights, id)
        self._add({name: w.float() for name, w in weights.items()})
        self._buffers = {name: b.clone() for name, b in buffers.items()}
        self.ids.append(id)

    @torch.no_grad()
    def merge(self, other: "WeightAverage") -> None:
        """Take in the iterates of `other`, which stays as it is. Raises NumericsError where they share an id."""
        if not other.count:
            return
        self._refuse(other.ids)
        self._match(other._sum)
        self._add({name: -c for name, c in other._compensation.items()})
        self._add(other._sum)
        self._buffers = {name: b.clone() for name, b in other._buffers.items()}
        self.ids.extend(other.ids)

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """A full state_dict: float32 means of the parameters, and the latest iterate's buffers."""
        if not self.count:
            raise ValueError("`mean` must be asked of an average with iterates, but it has none.")
        names = list(self._sum)
        means = torch._foreach_div([self._sum[n] - self._compensation[n] for n in names], self.count)
        buffers = {name: b.clone() for name, b in self._buffers.items()}
        return dict(zip(names, means, strict=True)) | buffers

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name under "sum", "compensation" and "buffers", and the list "ids". Not copied."""
        return {
            "ids": list(self.ids),
            "sum": dict(self._sum),
            "compensation": dict(self._compensation),
            "buffers": dict(self._buffers),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ids = list(state["ids"])
        self._sum, self._compensation, self._buffers = (
            {name: t.clone() for name, t in state[part].items()} for part in ("sum", "compensation", "buffers")
        )

    def _add(self, weights: Mapping[str, Tensor]) -> None:
        if not self._sum:
            self._sum = {name: w.clone() for name, w in weights.items()}
            self._compensation = {name: torch.zeros_like(w) for name, w in weights.items()}
            return
        sums, compensations = list(self._sum.values()), list(self._compensation.values())
        terms = torch._foreach_sub([weights[name] for name in self._sum], compensations)
        totals = torch._foreach_add(sums, terms)
        lost = torch._foreach_sub(torch._foreach_sub(totals, sums), terms)
        torch._foreach_copy_(compensations, lost)
        torch._foreach_copy_(sums, totals)

    def _refuse(self, ids: Iterable[int]) -> None:
        twice = sorted(set(ids) & set(self.ids))
        if twice:
            raise NumericsError(
                f"`id` must be an iterate not yet averaged, but {twice[0]} is in already: it would count twice."
            )

    def _match(self, weights: Mapping[str, Tensor]) -> None:
        if not self._sum:
            return
        if weights.keys() != self._sum.keys():
            odd = sorted(weights.keys() ^ self._sum.keys())[0]
            raise ValueError(f"iterates must have the same parameters, but `{odd}` is in only one of them.")
        for name, weight in weights.items():
            if weight.shape != self._sum[name].shape:
                raise ValueError(
                    f"`{name}` must have shape {tuple(self._sum[name].shape)}, but has {tuple(weight.shape)}."
                )


class ExponentialAverage:
    """The exponential moving average of the weights, bias-corrected as Adam's (Kingma and Ba 2015).

    It is the weighted mean of the iterates, of which each counts `decay` times less than the one after it; float32.
    Each iterate has an id, and ids only grow. Whether weights are finite is not looked at, which would make each step
    wait for the device: `first_non_finite` of `state_dict()["sum"]` tells.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.last_id = -1
        self._weight = 0.0
        self._sum: dict[str, Tensor] = {}

    @torch.no_grad()
    def collect(self, model: nn.Module, id: int, share: float = 1.0) -> None:
        """Take in the weights of `model`, decaying those before by decay ** share.

        Raises NumericsError, and leaves the average as it was, where the id is not a new one.
        """
        if id <= self.last_id:
            raise NumericsError(f"`id` must be more than that of the last iterate ({self.last_id}), but is {id}.")
        weights = parameters_of(model)
        if not self._sum:
            self._sum = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
        decay = self.decay**share
        torch._foreach_lerp_(list(self._sum.values()), [weights[name].float() for name in self._sum], 1 - decay)
        self._weight = decay * self._weight + (1 - decay)
        self.last_id = id

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """Float32 means of the parameters, without buffers."""
        if not self._sum:
            raise ValueError("`mean` must be asked of an average with iterates, but it has none.")
        means = torch._foreach_div(list(self._sum.values()), self._weight)
        return dict(zip(self._sum, means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Tensors by name under "sum", and the numbers "weight" and "last_id". Not copied."""
        return {"sum": dict(self._sum), "weight": self._weight, "last_id": self.last_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sum = {name: tensor.clone() for name, tensor in state["sum"].items()}
        self._weight = state["weight"]
        self.last_id = state["last_id"]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Not copied."""
    return {name: p.detach() for name, p in model.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Not copied."""
    return {name: b.detach() for name, b in model.named_buffers()}


def first_non_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first parameter that holds a NaN or an infinity. Waits for the device once."""
    finite = torch.stack([torch.isfinite(w).all() for w in weights.values()]).tolist()
    return next((name for name, ok in zip(weights, finite, strict=True) if not ok), None)


def _refuse_non_finite(weights: Mapping[str, Tensor], id: int) -> None:
    bad = first_non_finite(weights)
    if bad is not None:
        raise NumericsError(
            f"weights must be finite to be averaged, but `{bad}` of iterate {id} is not. The average was left as it"
            " was; lower the learning rate."
        )
