"""The main job as a newcomer runs it: one real Ray run, looked at from all sides."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Run

from swa_dist.config import Model
from swa_dist.errors import ConfigError
from swa_dist.service import versions, weights
from swa_dist.storage.files import sha256_file
from tests import support
from tests.service.forked import swa_dist
from tests.support import left_behind

MARK = "SWA_DIST_TEST_ID"


@dataclass(frozen=True)
class Quickstart:
    folder: Path
    output: str
    seconds: float
    left: list[str]

    @property
    def summary(self) -> dict[str, Any]:
        (path,) = self.folder.glob(f"runs/swa-{'?' * 12}/summary.json")
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    @property
    def client(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(f"sqlite:///{self.folder / 'mlflow.db'}")

    @property
    def runs(self) -> list[Run]:
        return list(self.client.search_runs([e.experiment_id for e in self.client.search_experiments()]))


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart")
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, folder.name)
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")  # it takes less than the usual 10 seconds
        result = support.swa_dist("quickstart", cwd=folder)
    assert result.returncode == 0, result.stderr
    return Quickstart(folder, result.stdout, time.monotonic() - began, left_behind(MARK, folder.name))


def test_it_prints_a_table_the_verdict_and_where_to_look(first: Quickstart) -> None:
    for text in ("start", "last iterate", "SWA", "verdict:", "there was no @champion", "mlflow ui --backend-store-uri"):
        assert text in first.output
    assert str(first.folder / "runs" / "swa-") in first.output
    assert first.seconds < 240


def test_it_leaves_no_process_and_no_scratch(first: Quickstart) -> None:
    assert first.left == []
    assert sorted(p.name for p in first.folder.iterdir()) == ["mlflow.db", "mlruns", "runs"]


def test_the_summary_says_what_was_found(first: Quickstart) -> None:
    summary = first.summary
    assert set(summary["candidates"]) == {"start", "last", "last_fresh", "swa"}
    for metrics in summary["candidates"].values():
        assert set(metrics) == {"top1", "top5", "nll", "ece"}
    assert summary["candidates"]["start"]["top1"] > 85
    assert summary["average"]["iterates"] == [400, 800, 1200, 1600, 2000]
    assert summary["recalibration"]["num_images"] == 400
    assert {p["against"] for p in summary["paired"]} >= {"start", summary["control"]}
    assert summary["registered"] == {
        "name": "digits-resnet",
        "version": "1",
        "status": "promoted",
        "over": None,
        "decision": None,
        "champion": True,
        "why": "there was no @champion and `registry.first` is promote, whatever the verdict",
    }
    assert summary["attempt"] == 1
    assert all(phase["images_per_second"] > 0 for phase in summary["phases"].values())


def test_mlflow_has_the_curves_the_config_and_the_data(first: Quickstart) -> None:
    (run,) = first.runs
    summary = first.summary
    assert run.info.status == "FINISHED"
    assert run.data.tags["swa.run_key"] == summary["run_key"]
    assert run.data.params["schedule.max_lr"] == "0.05"
    losses = first.client.get_metric_history(run.info.run_id, "epoch/loss")
    assert [m.step for m in losses] == [400, 800, 1200, 1600, 2000]
    assert len({m.timestamp for m in losses}) == 5
    for name, metrics in summary["candidates"].items():
        assert run.data.metrics[f"val/{name}/top1"] == metrics["top1"]
    assert {d.dataset.name for d in run.inputs.dataset_inputs} == {"digits-train", "digits-val"}
    artifacts = {a.path for a in first.client.list_artifacts(run.info.run_id)}
    assert artifacts == {"recipe.yaml", "curves.png", "summary.json", "promotion"}
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(first.folder)


def test_the_metrics_are_those_of_the_documented_table(first: Quickstart) -> None:
    (run,) = first.runs
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    table = text.partition("| metric | when | unit |\n|---|---|---|\n")[2].partition("\n\n")[0]
    documented = [line.split("`")[1] for line in table.splitlines()]
    logged = {re.sub(r"^val/[^/]+/", "val/CANDIDATE/", name) for name in run.data.metrics}
    logged = {re.sub(r"^system/node_0/.+", "system/node_N/...", name) for name in logged}
    assert logged == set(documented)
    assert len(documented) == len(set(documented))


LOAD = """
import sys, numpy as np, torch, mlflow
from pathlib import Path
from PIL import Image
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pytorch.load_model("models:/digits-resnet@champion")
paths = sorted(Path(sys.argv[2]).glob("*/*.jpg"))
pixels = np.stack([np.asarray(Image.open(p).convert("RGB")) for p in paths]).transpose(0, 3, 1, 2) / 255
mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).reshape(2, 1, 3, 1, 1)
with torch.no_grad():
    found = model(torch.from_numpy((pixels - mean) / std).float()).argmax(1).numpy()
print(sum(found == [int(p.parent.name) for p in paths]), len(paths))
"""


def test_the_champion_loads_in_a_fresh_process_and_is_as_good_as_the_summary_says(first: Quickstart) -> None:
    uri, val = f"sqlite:///{first.folder / 'mlflow.db'}", str(first.folder / "runs/quickstart/data/val")
    environment = os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    result = subprocess.run(
        [sys.executable, "-c", LOAD, uri, val], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    correct, images = map(int, result.stdout.split())
    assert images == 1397
    assert 100 * correct / images == pytest.approx(first.summary["candidates"]["swa"]["top1"], abs=100 / 1397 + 1e-9)


def test_a_run_can_start_from_the_champion_by_its_address(first: Quickstart) -> None:
    uri = f"sqlite:///{first.folder / 'mlflow.db'}"
    (candidate,) = first.folder.glob("runs/swa-*/candidates/swa/model.safetensors")
    model = Model(arch="resnet18", weights="models:/digits-resnet@champion", num_classes=10)
    for _ in range(2):  # the second from the cache
        fetched = weights.fetch(model, uri)
        assert fetched.sha256 == sha256_file(candidate) == versions.stated_sha256(uri, model.weights)
    assert versions.pinned(uri, model.weights) == "models:/digits-resnet/1"
    for wrong in ("models:/digits-resnet@nobody", "models:/digits-resnet/7", "models:/absent/1", "models:/x"):
        with pytest.raises(ConfigError, match=r"`model\.weights` must be"):
            weights.fetch(Model(arch="resnet18", weights=wrong, num_classes=10), uri)


def test_a_second_one_finds_the_finished_run(first: Quickstart) -> None:
    began = time.monotonic()
    result = swa_dist("quickstart", cwd=first.folder)
    assert result.returncode == 0, result.stderr
    assert "finished already" in result.stdout
    assert first.summary["verdict"]["sentence"] in result.stdout
    assert time.monotonic() - began < 30
    assert len(first.runs) == 1


def test_again_is_another_attempt_with_another_mlflow_run_and_the_champion_stays(first: Quickstart) -> None:
    before = first.summary
    # Not on Ray, to save a minute: where it runs is no part of the key, and of no part of the result.
    process = ["--set", "cluster.launcher=process", "--set", "cluster.num_workers=1"]
    result = swa_dist("quickstart", "--again", *process, cwd=first.folder)
    assert result.returncode == 0, result.stderr
    after = first.summary
    assert (after["run_key"], after["attempt"]) == (before["run_key"], 2)
    assert (first.folder / "runs" / f"swa-{before['run_key'][:12]}.attempt-1" / "summary.json").is_file()
    assert len(first.runs) == 2
    assert after["registered"]["version"] == "2"
    assert (after["registered"]["status"], after["registered"]["over"]) == ("rejected", "1")
    assert "over @champion" in after["registered"]["why"]
    assert str(first.client.get_model_version_by_alias("digits-resnet", "champion").version) == "1"
    for name, metrics in before["candidates"].items():
        assert after["candidates"][name]["top1"] == pytest.approx(metrics["top1"], abs=0.3)
