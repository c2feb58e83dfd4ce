"""Where a run goes on from, and what it leaves to go on from."""

from typing import Any

from torch import nn

from swa_dist import models
from swa_dist.errors import CheckpointError, ConfigError
from swa_dist.storage.folder import open_folder
from swa_dist.storage.store import newest
from swa_dist.training import loop
from swa_dist.training.averages import Averages, Parts
from swa_dist.training.ports import Ports
from swa_dist.training.state import TrainState, load_entry, save_entry
from swa_dist.training.world import broadcast_tensors, on_rank_zero

CANDIDATES = "candidates"
CHECKPOINTS = "checkpoints"


def resume(ports: Ports, model: nn.Module) -> TrainState:
    """Collective: the state of the newest valid checkpoint, of the run to be extended, or of the start: `model`."""
    if ports.local and ports.world.size != ports.recipe.average.num_replicas:
        raise ConfigError(
            f"`average.num_replicas` must be the number of workers ({ports.world.size}) where `average.sync` is"
            f" local, but is {ports.recipe.average.num_replicas}. Run it on as many."
        )
    optimizer = loop.sgd(model, models.head_names(model), ports.recipe)
    state = TrainState(model=model, optimizer=optimizer, averages=Averages(ports.recipe.average))
    found = _newest_on_rank_zero(ports)
    facts = on_rank_zero(ports.world, lambda: found[1] if found else None)
    if facts is not None:
        names = on_rank_zero(ports.world, lambda: list(found[0]) if found else [])
        parts = {n: broadcast_tensors(ports.world, found[0][n] if found else None) for n in names}
        own = f"replica{ports.world.rank}."
        parts |= {n.removeprefix(own): tensors for n, tensors in parts.items() if n.startswith(own)}
        state.restore(parts, facts)
        on_rank_zero(ports.world, lambda: ports.tracker.publish(state.rows))
    state.world_sizes.append(ports.world.size)
    return state


def commit(ports: Ports, state: TrainState) -> None:
    """Collective: one checkpoint; then its metrics are out for good, and older checkpoints go."""
    parts = state.parts()
    if ports.local:
        for rank in range(ports.world.size):
            for part, tensors in state.own_parts().items():
                sent = broadcast_tensors(ports.world, tensors, source=rank)
                if ports.world.rank == 0:
                    parts[f"replica{rank}.{part}"] = {n: t.cpu().clone() for n, t in sent.items()}

    def write() -> None:
        save_entry(ports.store, f"{CHECKPOINTS}/{state.position:012d}", parts, state.facts())
        ports.tracker.publish(state.rows)
        for name in ports.store.names(CHECKPOINTS)[: -ports.recipe.checkpoint.keep_last]:
            ports.store.remove(name)

    on_rank_zero(ports.world, write)


def _newest_on_rank_zero(ports: Ports) -> tuple[Parts, dict[str, Any]] | None:
    """Collective: large, so it stays on rank 0; an error there is everyone's."""
    kept: list[tuple[Parts, dict[str, Any]]] = []

    def read() -> None:
        found = _newest(ports)
        if found is not None:
            kept.append(found)

    on_rank_zero(ports.world, read)
    return kept[0] if kept else None


def _newest(ports: Ports) -> tuple[Parts, dict[str, Any]] | None:
    ports.store.sweep(CHECKPOINTS)
    ports.store.sweep(CANDIDATES)
    name = newest(ports.store, CHECKPOINTS, ports.tracker.warn)
    if name is not None:
        return load_entry(ports.store, name)
    if ports.recipe.checkpoint.extend_from == "nothing":
        return None
    shorter = open_folder(ports.recipe.checkpoint.extend_from)
    names = shorter.store.names(CHECKPOINTS)
    if not names:
        raise CheckpointError(
            f"`checkpoint.extend_from` must be the folder of a finished run, but {shorter.url} has no checkpoints."
        )
    return load_entry(shorter.store, names[-1])
