"""What a run came to: the evidence, the registered model, `summary.json`, and what MLflow has yet to be told."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from swa_dist import config
from swa_dist.config import Recipe
from swa_dist.errors import SwaDistError
from swa_dist.evidence import verdict as evidence
from swa_dist.service import curves, post_mortem, registry, tracking
from swa_dist.service.layout import CURVES, RECIPE, SUMMARY, lease_url
from swa_dist.service.progress import Display
from swa_dist.service.run import Finished, Job
from swa_dist.service.spool import Spool
from swa_dist.storage import folder as folders
from swa_dist.storage import lease
from swa_dist.storage.folder import Folder, join, open_folder
from swa_dist.training.checkpoints import CANDIDATES
from swa_dist.training.evaluate import Outcomes
from swa_dist.training.state import load_entry

_UNITS = (
    "Steps are training images. top1, top5 and ece are in %, loss and nll in nats an image, times in seconds. Of"
    " system/node_N, steps are samples."
)
"""Where a run's charts are looked at, since MLflow's metrics have no units."""

_ORDER = ("start", "last", "last_fresh", "window", "ema", "swa")


def _rank(name: str) -> tuple[int, str]:
    """Where a candidate stands in tables: swa_5, the average after 5 epochs, before swa."""
    if name in _ORDER:
        return 2 * _ORDER.index(name), ""
    return 2 * _ORDER.index("swa") - 1, name.rjust(20)


def conclude(job: Job, display: Display) -> Finished:
    """Weigh the scored candidates, register the one that the recipe names, and leave `summary.json`."""
    job.check_lease()
    recipe = config.from_tree(job.recipe)
    folder = job.open()
    store, spool = folder.store, registry.spool_of(folder)
    scored = {Path(entry).name: entry for entry in store.names(CANDIDATES)}
    entries = {name: load_entry(store, scored[name]) for name in sorted(scored, key=_rank)}
    outcomes = {name: Outcomes.of(parts["outcomes"]) for name, (parts, _) in entries.items()}
    facts = {name: found for name, (_, found) in entries.items()}
    control = evidence.control_of(outcomes)
    candidate = control if recipe.evaluate.candidate == "last" else recipe.evaluate.candidate
    pairs = [
        evidence.compare(name, outcomes[name], against, outcomes[against])
        for name, against in dict.fromkeys([(candidate, "start"), (candidate, control), (control, "start")])
        if name != against
    ]
    paired = {(p.candidate, p.against): p for p in pairs}
    found = evidence.verdict(paired[candidate, "start"], paired.get((candidate, control)))
    metrics = {name: o.metrics() for name, o in outcomes.items()}
    summary = {
        "schema": 1,
        "name": recipe.name,
        "status": "finished",
        "fingerprint": job.fingerprint,
        "run_key": job.run_key,
        "attempt": job.attempt,
        "run_dir": job.run_dir,
        "arch": recipe.model.arch,
        "epochs": recipe.optim.epochs,
        "weights": {"source": job.weights, "sha256": job.weights_sha256},
        "data": {"name": recipe.data.name, "digest": job.data_digest, "val_images": len(outcomes["start"].ids)},
        "phases": _phases(facts),
        "candidates": metrics,
        "control": control,
        "average": facts["swa"]["average"],
        "recalibration": facts["swa"]["recalibration"],
        "bitwise": len(set(facts["last"]["training"]["world_sizes"])) == 1,
        "paired": [asdict(p) for p in pairs],
        "verdict": asdict(found),
        "candidate": candidate,
        "mlflow": asdict(spool.target),
    }
    _draw_curves(folder, spool, summary, display)
    _spool_result(job, recipe, spool, summary)
    unsent = deliver(folder, summary, display)
    return Finished(summary, already=False, unregistered=_weighed(folder, summary, unsent, display))


def catch_up(finished: Finished, display: Display) -> Finished:
    """A run that had finished before, after what still waited in its spool was sent or has to wait on."""
    folder = open_folder(finished.summary["run_dir"])
    if not finished.summary["waiting"] and not registry.spool_of(folder).waiting():
        return finished
    unsent = deliver(folder, finished.summary, display)
    unregistered = _weighed(folder, finished.summary, unsent, display)
    return Finished(finished.summary, already=True, unregistered=unregistered)


def deliver(folder: Folder, summary: dict[str, Any], display: Display) -> SwaDistError | None:
    """Send what the spool holds, register, and write `summary`, brought up to date, with what came of it. Returns what
    keeps any of it from being sent."""
    tracking.configure_client()
    _note(folder, summary)  # before what may take long: from here on the run is finished
    unsent: SwaDistError | None = None
    try:
        summary["mlflow"]["run_id"] = registry.send(folder, display)
    except SwaDistError as error:
        unsent = error
    _note(folder, summary)
    if unsent is None:
        registry.spool_of(folder).append({"kind": "artifact", "name": SUMMARY})
        try:
            registry.send(folder, display)
        except SwaDistError as error:
            unsent = error
    if unsent is None:
        return None
    waiting = registry.spool_of(folder).waiting()
    model = ", its model among them" if any(event["kind"] == "model" for event in waiting) else ""
    return type(unsent)(
        f"{unsent} Of the run {len(waiting)} events wait to be sent{model}. When that is mended: `swa-dist replay"
        f" {folder.url}`, or the run's own command again."
    )


def _note(folder: Folder, summary: dict[str, Any]) -> None:
    summary["registered"] = folder.read_json(registry.REGISTERED)
    summary["waiting"] = len(registry.spool_of(folder).waiting())
    folder.write(SUMMARY, json.dumps(summary, indent=1))


def _weighed(
    folder: Folder, summary: dict[str, Any], unsent: SwaDistError | None, display: Display
) -> SwaDistError | None:
    """What the run must end with: a model that isn't registered is no success. That MLflow lacks the rest, a line of
    its last words or the summary, is only said."""
    if unsent is None:
        return None
    if summary["registered"] is not None:
        display.say(f"warning: {unsent}")
        return None
    folder.pull(RECIPE)
    recipe = (folder.local / RECIPE).read_text(encoding="utf-8")
    if (written := post_mortem.write(folder, summary["attempt"], unsent, recipe)) is not None:
        unsent.add_note(f"post-mortem: {written}")
    return unsent


def replay(run_dir: str, display: Display) -> None:
    """Send what waits in a run's spool. Raises ServiceError where MLflow still doesn't answer, and BusyError where the
    run is at work, which sends it itself."""
    folder = open_folder(run_dir)
    tracking.configure_client()
    with lease.hold(lease.register(lease_url(folder.url)), f"the run in {folder.url}", display.say):
        if waiting := registry.spool_of(folder).waiting():
            display.say(f"sending {len(waiting)} events")
        summary = folder.read_json(SUMMARY)
        if summary is None:
            registry.send(folder, display)
        elif (unsent := deliver(folder, summary, display)) is not None:
            raise unsent


def _draw_curves(folder: Folder, spool: Spool, summary: dict[str, Any], display: Display) -> None:
    """Leave curves.png, and tell MLflow of it. No run fails of a picture."""
    top1 = {name: metrics["top1"] for name, metrics in summary["candidates"].items()}
    title = f"{summary['name']}: {summary['arch']}, {summary['epochs']} epochs"
    rows = [event for event in spool.read() if event["kind"] == "row"]
    try:
        picture = curves.draw(title, rows, top1)
    except Exception as error:  # of matplotlib, its fonts or its settings
        display.say(f"warning: there is no {CURVES}: {error}")
        return
    folders.write(join(folder.url, CURVES), picture)
    spool.append({"kind": "artifact", "name": CURVES})


def _spool_result(job: Job, recipe: Recipe, spool: Spool, summary: dict[str, Any]) -> None:
    now = time.time_ns() // 1_000_000
    finished = {"kind": "status", "status": "FINISHED", "time_ms": now}
    if any(event["kind"] == "model" for event in spool.read()):  # an attempt before this one got so far
        spool.append(finished)  # once more: this one has said that it is running
        return
    metrics = dict(_final_metrics(summary))
    position = summary["phases"]["train"]["images"]
    row = {"kind": "row", "position": position, "epoch": float(recipe.optim.epochs), "time_ms": now, "metrics": metrics}
    verdict = summary["verdict"]["sentence"]
    note = f"{verdict[:1].upper()}{verdict[1:]}\n\n{_UNITS}"
    spool.append(
        row,
        {"kind": "tags", "tags": {"swa.verdict": verdict, "swa.control": summary["control"], MLFLOW_RUN_NOTE: note}},
        {
            "kind": "model",
            "recipe": job.recipe,
            "uri": spool.target.uri,
            "entry": f"{CANDIDATES}/{summary['candidate']}",
            "time_ms": now,
            "tags": {
                "run_key": job.run_key,
                "attempt": job.attempt,
                "verdict": verdict,
                "data_digest": job.data_digest,
                "top1": summary["candidates"][summary["candidate"]]["top1"],
            },
        },
        finished,
    )


def _final_metrics(summary: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, metrics in summary["candidates"].items():
        for metric, value in metrics.items():
            yield f"val/{name}/{metric}", value
    for phase, facts in summary["phases"].items():
        yield f"time/{phase}_seconds", facts["seconds"]
        yield f"throughput/{phase}_images_per_second", facts["images_per_second"]


def _phases(facts: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds and images per second by phase, over all attempts."""
    training = facts["last"]["training"]
    recalibration = facts["swa"]["recalibration"]
    evaluation = facts["swa"]["evaluation"]
    timed = {
        "train": (training["images"], training["seconds"]),
        "recalibrate": (recalibration["num_images"], recalibration["seconds"]),
        "evaluate": (evaluation["num_images"], evaluation["seconds"]),
    }
    return {
        phase: {"images": images, "seconds": seconds, "images_per_second": images / seconds}
        for phase, (images, seconds) in timed.items()
    }
