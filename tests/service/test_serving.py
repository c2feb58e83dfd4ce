"""A registered model as people use it: from Python, behind `mlflow models serve`, in batches, as README.md says."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from benchmarks.loader import write_images
from swa_dist import models
from swa_dist.config import Data
from swa_dist.data import digits as digits_source
from swa_dist.data.dali import DaliLoaders
from swa_dist.data.scan import scan
from swa_dist.data.sizes import Sizes
from swa_dist.service import classifier, logged_model, tracking
from swa_dist.service.logged_model import Contents
from swa_dist.training.world import World
from tests import support

README = Path(__file__).parents[2] / "README.md"
NAME = "digits-resnet"
SIZES = Sizes(decode_threads=1, read_threads=2, groups_ahead=2, kept_bytes=0, cache_dir="unused", cache_bytes=0)


@dataclass(frozen=True)
class Registry:
    uri: str
    network: torch.nn.Module
    """What was registered."""

    @property
    def environment(self) -> dict[str, str]:
        scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return os.environ | {"MLFLOW_TRACKING_URI": self.uri, "PATH": scripts}


@pytest.fixture(scope="module")
def registry(start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """A ResNet-18 fitted to the digits, as models:/digits-resnet@champion."""
    root = tmp_path_factory.mktemp("registry")
    tracking.configure_client()
    uri = f"sqlite:///{root / 'mlflow.db'}"
    client = mlflow.MlflowClient(uri, uri)
    experiment = client.create_experiment("test", artifact_location=(root / "mlruns").as_uri())
    run_id = client.create_run(experiment).info.run_id
    network = models.build(support.digits_recipe("unused", start_weights).model, 0)
    network.load_state_dict(safetensors.torch.load_file(start_weights))
    files: dict[str, bytes | Path] = {"model.safetensors": start_weights}
    contents = Contents(network, tuple(f"digit {n}" for n in range(10)), 32, 32, files)
    model_id = logged_model.log(run_id, uri, contents)
    client.create_registered_model(NAME)
    place = client.get_logged_model(model_id).artifact_location
    client.create_model_version(NAME, place, run_id, model_id=model_id)
    client.set_registered_model_alias(NAME, "champion", "1")
    return Registry(uri, network.eval())


@pytest.fixture(scope="module")
def few(digits: Path) -> dict[str, int]:
    """Files of some validation images, and what they show."""
    return {
        str(path): label for label in range(10) for path in islice(sorted((digits / "val" / str(label)).iterdir()), 4)
    }


def blocks(title: str) -> list[str]:
    """The indented blocks of a section of README.md."""
    section = README.read_text().partition(f"## {title}\n")[2].partition("\n## ")[0]
    found = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", section, re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip() for block in found]


@contextlib.contextmanager
def running(command: str, registry: Registry, cwd: Path, port: int) -> Iterator[None]:
    """A server, with all that it starts."""
    with (cwd / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=cwd,
            env=registry.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        support.wait_for_port(port, server)
        yield
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@dataclass(frozen=True)
class Server:
    port: int
    folder: Path
    commands: list[str]
    """Those that README.md gives, after the one that starts it."""

    def ask(self, body: Any) -> tuple[int, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/invocations",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture(scope="module")
def server(registry: Registry, few: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Started as README.md says, on a port that is free, with the registry of these tests."""
    folder, port = tmp_path_factory.mktemp("server"), support.free_port()
    shutil.copy(next(iter(few)), folder / "image.jpg")
    (folder / "paths.csv").write_text("\n".join(["path", *few]))
    _, shell = blocks("Use the model")
    where, first, *commands = re.split(r"\n(?! )", shell.replace("5001", str(port)))
    assert where == "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db"
    assert first.endswith("&")
    with running(first.removesuffix("&"), registry, folder, port):
        yield Server(port, folder, commands)


def encoded(path: str) -> str:
    return base64.b64encode(Path(path).read_bytes()).decode()


def test_the_readmes_python_gives_classes_and_the_network(registry, few, tmp_path):
    shutil.copy(next(iter(few)), tmp_path / "image.jpg")
    snippet, _ = blocks("Use the model")
    ended = subprocess.run(
        [sys.executable, "-c", snippet.replace("sqlite:///mlflow.db", registry.uri)],
        cwd=tmp_path,
        env=registry.environment | {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "'class_name': ['digit 0', " in ended.stdout
    assert "tensor([[" in ended.stdout


def test_a_server_says_what_digits_are(server, registry, few):
    body = {"dataframe_records": [{"image": encoded(path)} for path in few], "params": {"top_k": 2}}
    status, answer = server.ask(body)
    assert status == 200
    rows = answer["predictions"]
    assert sum(row["class_index"][0] == label for row, label in zip(rows, few.values(), strict=True)) >= 30
    assert all(row["class_name"] == [f"digit {index}" for index in row["class_index"]] for row in rows)
    pixels = torch.stack([classifier.evaluation_transform(Path(path).read_bytes(), 32, 32) for path in few])
    with torch.inference_mode():
        expected = registry.network(classifier.normalised(pixels)).softmax(1).topk(2).values
    assert np.abs(expected.numpy() - [row["probability"] for row in rows]).max() <= 1e-5


def test_a_server_takes_the_other_forms_of_json_that_mlflow_has(server, few):
    image = encoded(next(iter(few)))
    forms = {
        "dataframe_split": {"columns": ["image"], "data": [[image]]},
        "dataframe_records": [{"image": image, "path": None}],
        "instances": [{"image": image}],
        "inputs": {"image": [image]},
    }
    answers = [server.ask({form: body}) for form, body in forms.items()]
    assert [status for status, _ in answers] == [200] * 4
    assert len({json.dumps(answer) for _, answer in answers}) == 1
    assert len(answers[0][1]["predictions"][0]["class_index"]) == 5


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"image": base64.b64encode(b"no image").decode()}, "row 1 must be a JPEG or PNG image"),
        ({"image": ""}, "row 1 must have either `image` or `path`, but has neither"),
        ({"image": "", "path": "/etc/passwd"}, "row 1 must have `image`, but has `path`"),
        ({"image": "", "path": "http://127.0.0.1:1/"}, "row 1 must have `image`, but has `path`"),
        ({"image": None}, "column image"),  # MLflow's own
    ],
)
def test_a_row_that_is_no_image_is_answered_with_400_and_its_number(server, few, row, said):
    status, answer = server.ask({"dataframe_records": [{"image": encoded(next(iter(few)))}, row]})
    assert status == 400
    assert said in answer["message"]


def test_a_server_reads_none_of_its_machines_files(server):
    status, answer = server.ask({"dataframe_records": [{"path": str(server.folder / "image.jpg")}]})
    assert status == 400
    assert "row 0 must have `image`, but has `path`, which is not read unless it is allowed" in answer["message"]


@pytest.mark.parametrize("body", [{"dataframe_records": [{"picture": "x"}]}, {"images": []}, []])
def test_a_request_of_another_shape_is_answered_with_400(server, body):
    assert server.ask(body)[0] == 400


def test_the_readmes_request_and_its_batch_work(server, registry, few):
    request, batch = server.commands
    for command in (request, batch):
        ended = subprocess.run(
            ["bash", "-c", command], cwd=server.folder, env=registry.environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        if command is request:
            assert len(json.loads(ended.stdout)["predictions"][0]["class_name"]) == 3
    rows = json.loads((server.folder / "classes.json").read_text())["predictions"]
    assert sum(row["class_index"][0] == label for row, label in zip(rows, few.values(), strict=True)) >= 30


# What it sees, beside what the evaluation saw


def seen(world: World, root: str, resize_size: int, image_size: int) -> tuple[list[str], Any]:
    """The images in a folder as the evaluation sees them, by DALI: their names, and float32 [n, 3, size, size]."""
    fields: dict[str, Any] = {"group_images": 32, "image_size": image_size, "resize_size": resize_size}
    index = scan(root, "data.val")
    loaders = DaliLoaders(
        index,
        index,
        Data(name="test", train=root, val=root, **fields),
        seed=0,
        rank=0,
        world_size=1,
        device=torch.device("cpu"),
        sizes=SIZES,
    )
    groups = list(loaders.validation())
    return [index.name(i) for group in groups for i in group.ids], torch.cat([group.images for group in groups]).numpy()


def levels(images: torch.Tensor) -> torch.Tensor:
    """Normalised pixels as the 8-bit levels that they were."""
    return (images * torch.tensor(classifier._STD)[:, None, None] + torch.tensor(classifier._MEAN)[:, None, None]) * 255


def both(root: Path, resize_size: int, image_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the pyfunc sees, and what the evaluation does."""
    ((names, theirs),) = support.run_workers(seen, 1, str(root), resize_size, image_size)
    ours = [classifier.evaluation_transform((root / name).read_bytes(), resize_size, image_size) for name in names]
    return classifier.normalised(torch.stack(ours)), torch.from_numpy(theirs)


def kinds_of_files(root: Path) -> None:
    """A photograph in all that a JPEG or a PNG file can be."""
    (root / "photograph").mkdir(parents=True)
    write_images(root / "made", 1)
    (made,) = (root / "made").rglob("*.jpg")
    image = Image.open(made)
    grey, few, turned = image.convert("L"), image.quantize(50), Image.Exif()
    turned[0x0112] = 6
    for name, saved, options in [
        ("cmyk.jpg", image.convert("CMYK"), {}),
        ("grey.jpg", grey, {}),
        ("progressive.jpg", image, {"progressive": True, "subsampling": 0}),
        ("turned.jpg", image, {"exif": turned}),
        ("turned.png", image, {"exif": turned}),
        ("grey.png", grey, {}),
        ("clear.png", image.convert("RGBA"), {}),
        ("palette.png", few, {"transparency": bytes(range(50))}),
        ("deep.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        ("black-and-white.png", image.convert("1"), {}),
    ]:
        saved.save(root / "photograph" / name, **options)


@pytest.mark.parametrize(
    ("what", "make", "resize_size", "image_size"),
    [
        ("photographs", lambda root: write_images(root, 64), 256, 224),
        ("kinds of files", kinds_of_files, 256, 224),
        ("digits", digits_source.write, 32, 32),
    ],
    ids=["photographs", "files", "digits"],
)
def test_the_pyfunc_sees_nearly_what_the_evaluation_saw(registry, tmp_path, what, make, resize_size, image_size):
    make(tmp_path / "images")
    root = tmp_path / "images" / ("val" if what == "digits" else "")
    ours, theirs = both(root, resize_size, image_size)
    apart = (levels(ours) - levels(theirs)).abs()
    print(f"{len(ours)} {what}: mean absolute difference {apart.mean():.3f} levels of 255, largest {apart.max():.0f}")
    assert apart.mean() <= 0.05
    assert apart.max() <= 1.1
    with torch.inference_mode():
        said, other = registry.network(ours), registry.network(theirs)
    apart, agree = (said - other).abs(), int((said.argmax(1) == other.argmax(1)).sum())
    print(f"logits: mean {apart.mean():.1e}, largest {apart.max():.1e}, of {said.std():.2f}; top-1 equal in {agree}")
    assert apart.mean() <= 1e-3 * said.std()
    assert agree == len(ours)
