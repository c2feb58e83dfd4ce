"""A logged model: what it holds, that it loads elsewhere without pickles, and that one that differs is never ready."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
import mlflow.artifacts
import pandas as pd
import pytest
import safetensors.torch
import torch
import torchvision
from mlflow.entities import LoggedModelStatus
from torch import nn

from swa_dist.errors import CheckpointError
from swa_dist.service import classifier, logged_model, tracking
from swa_dist.service.logged_model import Contents
from swa_dist.storage.files import sha256_file

SIZE = 32
CLASSES = tuple(f"class {number}" for number in range(10))


def network_of(seed):
    """In train mode, as it comes from training, with BatchNorm statistics of its own."""
    torch.manual_seed(seed)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(2 * torch.randn(16, 3, SIZE, SIZE) + 1)
        network.fc.weight *= 100  # as sure of its answers as one that was trained
    return network


def contents_of(network, **fields):
    files = {
        "model.safetensors": safetensors.torch.save(network.state_dict()),
        "recipe.yaml": b"name: small\n",
        "model_card.md": b"# A card\n",
    }
    usual = {"network": network, "classes": CLASSES, "resize_size": 40, "image_size": SIZE, "files": files}
    return Contents(**usual | fields)


@dataclass(frozen=True)
class Log:
    client: mlflow.MlflowClient
    uri: str
    run_id: str
    model_id: str
    contents: Contents
    before: nn.Module
    """A copy of the network as it was before it was logged."""
    folder: Path
    """What MLflow holds, downloaded."""
    answer: dict[str, Any]
    """What the model said in its round trip."""


def new_run(client, root):
    experiment = client.create_experiment("test", artifact_location=(root / "mlruns").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_param(run_id, "seed", 3)
    return run_id


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    root = tmp_path_factory.mktemp("logged")
    tracking.configure_client()
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    run_id = new_run(client, root)
    contents = contents_of(network_of(0))
    before = copy.deepcopy(contents.network)
    ask, said = logged_model._answers_elsewhere, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logged_model, "_answers_elsewhere", lambda *question: said.append(ask(*question)) or said[0])
        model_id = logged_model.log(run_id, uri, contents)
    place = client.get_logged_model(model_id).artifact_location
    folder = Path(mlflow.artifacts.download_artifacts(place, dst_path=str(root / "back"), tracking_uri=uri))
    return Log(client, uri, run_id, model_id, contents, before, folder, said[0])


@pytest.fixture
def own(logged, tmp_path):
    """A copy that may be damaged."""
    return Path(shutil.copytree(logged.folder, tmp_path / "own"))


def test_it_is_the_ready_model_of_its_run_and_no_run_is_left_active(logged):
    found = logged.client.get_logged_model(logged.model_id)
    assert (found.name, found.status, found.source_run_id) == ("model", LoggedModelStatus.READY, logged.run_id)
    assert found.params == {"seed": "3"}
    run = logged.client.get_run(logged.run_id)
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert run.info.status == "RUNNING"
    assert mlflow.active_run() is None


def test_it_holds_the_files_and_the_facts_of_them(logged):
    files = logged.folder / "artifacts/model"
    for name, content in logged.contents.files.items():
        assert (files / name).read_bytes() == content
    facts = json.loads((files / "facts.json").read_text())
    assert facts == {
        "classes": list(CLASSES),
        "resize_size": 40,
        "image_size": SIZE,
        "sha256": {name: sha256_file(files / name) for name in ("model.pt2", "model.safetensors")},
    }


def test_it_holds_no_pickle_and_names_released_packages(logged):
    assert not [path for path in logged.folder.rglob("*") if path.suffix in (".pkl", ".pth", ".pt")]
    requirements = (logged.folder / "requirements.txt").read_text().split()
    assert {line.partition("==")[0] for line in requirements} == {
        "mlflow", "torch", "torchvision", "numpy", "pandas", "pillow"
    }  # fmt: skip
    assert all("==" in line and "+" not in line for line in requirements)


def test_its_signature_takes_bytes_or_a_path_and_its_example_is_an_image(logged):
    model = mlflow.models.Model.load(str(logged.folder))
    inputs = {column.name: (column.type.name, column.required) for column in model.signature.inputs}
    assert inputs == {"image": ("binary", False), "path": ("string", False)}
    assert model.signature.outputs.input_names() == ["class_index", "class_name", "probability"]
    assert [(param.name, param.default) for param in model.signature.params] == [("top_k", 5)]
    example = model.load_input_example(str(logged.folder))
    assert example["image"][0].startswith(b"\x89PNG")


def test_the_network_that_was_given_is_as_it_was(logged):
    now, before = logged.contents.network, logged.before
    assert [module.training for module in now.modules()] == [module.training for module in before.modules()]
    assert all(module.training for module in now.modules())
    was = before.state_dict()
    assert [name for name, tensor in now.state_dict().items() if not torch.equal(tensor, was[name])] == []


ELSEWHERE = """
import json, sys, torch, mlflow
folder, png = sys.argv[1:]
program = mlflow.pytorch.load_model(folder)
torch.save(program.state_dict(), "weights.pt")
table = mlflow.pyfunc.load_model(folder).predict(__import__("pandas").DataFrame({"path": [png]}), params={"top_k": 2})
json.dump({"modules": sorted(sys.modules), "row": table.iloc[0].to_dict()}, sys.stdout)
"""


def test_it_loads_both_ways_with_pickles_off_and_without_this_package(logged, own, tmp_path):
    """Its weights, BatchNorm's statistics among them, are those of the network to the last bit."""
    png = tmp_path / "example.png"
    png.write_bytes(mlflow.models.Model.load(str(own)).load_input_example(str(own))["image"][0])
    ended = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(own), str(png)],
        cwd=tmp_path,
        env=os.environ | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "SWA_DIST_READ_PATHS": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert not [name for name in said["modules"] if name.startswith("swa_dist")]
    assert [len(said["row"][name]) for name in ("class_index", "class_name", "probability")] == [2, 2, 2]
    expected = logged.before.state_dict()
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert found.keys() == expected.keys()
    assert any("running_var" in name for name in found)
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


def test_it_takes_the_columns_that_its_signature_has(logged):
    """As MLflow enforces it: one column or the other, or both; and numbers of classes that are whole."""
    model = mlflow.pyfunc.load_model(str(logged.folder))
    example = model.metadata.load_input_example(str(logged.folder))
    expected = model.predict(example, params={"top_k": 2}).iloc[0].to_dict()
    both = pd.DataFrame({"image": [example["image"][0]], "path": [None]})
    assert model.predict(both, params={"top_k": 2}).iloc[0].to_dict() == expected
    with pytest.raises(mlflow.MlflowException, match="must have a column `image` or `path`"):
        model.predict(pd.DataFrame({"other": [1]}))
    with pytest.raises(mlflow.MlflowException):
        model.predict(example, params={"top_k": "many"})


# What is not the same


@pytest.fixture
def answered(logged, monkeypatch):
    """As a real round trip had it, which takes seconds."""
    monkeypatch.setattr(logged_model, "_answers_elsewhere", lambda *question: logged.answer)


@pytest.mark.usefixtures("answered")
def test_a_round_trip_gives_the_same_logits(logged):
    assert logged_model.check_round_trip(logged.folder, logged.contents) <= 1e-5


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize(
    ("what", "fields"),
    [
        ("logits", {"network": network_of(1)}),
        ("classes", {"classes": CLASSES[::-1]}),
        ("probabilities", {"resize_size": 64}),
    ],
    ids=["network", "classes", "transform"],
)
def test_a_model_that_says_something_else_does_not_pass(logged, what, fields):
    with pytest.raises(CheckpointError, match=f"{what} of the logged model must be"):
        logged_model.check_round_trip(logged.folder, replace(logged.contents, **fields))


def test_a_model_that_does_not_load_elsewhere_does_not_pass(logged, own):
    (own / "artifacts/model/model.pt2").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="the logged model must load in a new process, but does not: "):
        logged_model.check_round_trip(own, logged.contents)


def test_one_that_does_not_pass_is_no_model_of_the_run(logged):
    run_id = logged.client.create_run(logged.client.get_run(logged.run_id).info.experiment_id).info.run_id
    other = {"model.safetensors": safetensors.torch.save(network_of(1).state_dict())}
    with pytest.raises(CheckpointError, match=r"weights of the logged model must be those of model\.safetensors"):
        logged_model.log(run_id, logged.uri, replace(logged.contents, files=other))
    run = logged.client.get_run(run_id)
    found = logged.client.search_logged_models([run.info.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    assert (list(found), run.outputs.model_outputs) == ([], [])


# Its digest


def test_the_digest_is_of_what_decides_and_the_same_wherever_it_is_downloaded(logged, own):
    expected = logged_model.digest(logged.folder)
    (own / "artifacts/model/model_card.md").write_text("another card")
    (own / "registered_model_meta").write_text("x")
    (own / "__pycache__").mkdir(exist_ok=True)
    (own / "__pycache__/classifier.cpython-311.pyc").write_text("x")
    assert logged_model.digest(own) == expected
    assert classifier.digest(own) == expected, "the model says so itself"
    names = ("model.pt2", "model.safetensors", "facts.json", "recipe.yaml")
    own_files = (own / "artifacts/model" / name for name in names)
    for path in (own / "classifier.py", own / "MLmodel", own / "requirements.txt", *own_files):
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert logged_model.digest(own) != expected, path
        path.write_bytes(content)
        assert logged_model.digest(own) == classifier.digest(own) == expected
    (own / "more.py").write_text("")
    assert logged_model.digest(own) != expected
    (own / "more.py").unlink()
    (own / "artifacts/model/recipe.yaml").rename(own / "artifacts/model/recipe.yml")
    assert logged_model.digest(own) != expected


@pytest.mark.parametrize("name", ["classifier.py", "artifacts/model/model.pt2", "artifacts/model/facts.json"])
def test_a_folder_without_a_file_that_decides_is_no_logged_model(own, name):
    (own / name).unlink()
    with pytest.raises(CheckpointError, match=f"must be a logged model, but has no {name}"):
        logged_model.digest(own)


def test_a_server_that_is_not_there_is_mlflows_own_error(logged, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(mlflow.MlflowException):
        logged_model.log(logged.run_id, "http://127.0.0.1:1", logged.contents)
    assert (
        logged.client.search_logged_models(
            [logged.client.get_run(logged.run_id).info.experiment_id],
            filter_string=f"source_run_id = '{logged.run_id}'",
        )[0].model_id
        == logged.model_id
    )
