"""A network as a logged model of MLflow, which is ready only once it gave the same answers elsewhere. Imports mlflow.

The model is two flavours over one exported program: `pytorch`, and the pyfunc of classifier.py. Neither holds a pickle,
but for torch's own of an example's tensors in the program, which is read as nothing but tensors.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import pandas as pd
import safetensors.torch
import torch
from mlflow.entities import LoggedModelOutput, LoggedModelStatus
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, DataType
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from swa_dist.data.pixels import normalised
from swa_dist.errors import CheckpointError, ServiceError
from swa_dist.service import tracking
from swa_dist.storage.files import sha256_file

FILES = "artifacts/model"
"""The folder of a logged model's own files, within it."""
PROGRAM, WEIGHTS, FACTS, CARD = "model.pt2", "model.safetensors", "facts.json", "model_card.md"
MODEL_SHA256 = "model_sha256"
"""Tag of a logged model, and of a version of it: `digest` of its files when they passed."""

_CLASSIFIER = Path(__file__).with_name("classifier.py")
_NOT_IN_DIGEST = (f"{FILES}/{CARD}", "registered_model_meta")  # as classifier.py has it
_TOLERANCE = 1e-5  # of logits, absolute or relative, and of probabilities
_BATCH = 3  # not the exported example's number of images
_TOP_K = 5
_TIMEOUT_SECONDS = 900
_PACKAGES = ("torch", "torchvision", "numpy", "pandas", "pillow")

_SIGNATURE = ModelSignature(
    inputs=Schema(
        [ColSpec(DataType.binary, "image", required=False), ColSpec(DataType.string, "path", required=False)]
    ),
    outputs=Schema(
        [
            ColSpec(Array(DataType.long), "class_index"),
            ColSpec(Array(DataType.string), "class_name"),
            ColSpec(Array(DataType.double), "probability"),
        ]
    ),
    params=ParamSchema([ParamSpec("top_k", DataType.long, _TOP_K)]),
)


@dataclass(frozen=True)
class Contents:
    """What a logged model is made of."""

    network: nn.Module
    """On the CPU. It is copied, and never changed."""
    classes: tuple[str, ...]
    """Names, by the class's index."""
    resize_size: int
    """Of the evaluation transform: the shorter side after resizing, pixels."""
    image_size: int
    """Height and width of the network's input, pixels."""
    files: Mapping[str, bytes | Path]
    """More files, by name: model.safetensors, which must be the network's weights, and whatever else is to be kept."""


def log(run_id: str, uri: str, contents: Contents) -> str:
    """Log `contents` as the model "model" of an MLflow run. Returns the logged model's id.

    It becomes READY after it was downloaded again and passed `check_round_trip`; otherwise it is deleted. Raises
    CheckpointError where it doesn't pass, and whatever MLflow raises where MLflow doesn't answer.
    """
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.get_run(run_id)
    logged = client.create_logged_model(
        run.info.experiment_id, name="model", source_run_id=run_id, params=run.data.params
    )
    try:
        with tempfile.TemporaryDirectory(prefix="swa-dist-model-") as scratch:
            made = Path(scratch) / "made"
            _save(made, contents, Model(logged.artifact_location, run_id, model_id=logged.model_id))
            client.log_model_artifacts(logged.model_id, str(made))
            # By its place: an address models:/ID is looked up at MLflow's global URI, whatever is passed.
            place = logged.artifact_location
            back = Path(mlflow.artifacts.download_artifacts(place, dst_path=f"{scratch}/back", tracking_uri=uri))
            if (found := digest(back)) != (expected := digest(made)):
                raise CheckpointError(
                    f"the model at {place} must come back with the SHA-256 {expected}, but has {found}."
                    " Look at MLflow's artifact store and log it again."
                )
            check_round_trip(back, contents)
        # Of what passed, so that whatever is changed from here on is found.
        _insist(uri, lambda: client.set_logged_model_tags(logged.model_id, {MODEL_SHA256: expected}))
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        _insist(uri, lambda: client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY))
    except BaseException:
        with contextlib.suppress(Exception):  # one that stays is not READY either
            client.delete_logged_model(logged.model_id)
        raise
    return str(logged.model_id)


def _insist(uri: str, ask: Callable[[], object]) -> None:
    """Ask again where the answer is lost, rather than throw away a model that passed."""

    def once() -> None:
        with tracking.answering(uri):
            ask()

    tracking.patiently(once)


def digest(folder: Path) -> str:
    """SHA-256 over names and contents of all files of a logged model in `folder`, but its card, and what MLflow and
    Python add where it is loaded, be it the artifact store itself. Raises CheckpointError where it is none."""
    needed = (_CLASSIFIER.name, "MLmodel", *(f"{FILES}/{name}" for name in (PROGRAM, WEIGHTS, FACTS)))
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} must be a logged model, but has no {missing[0]}.")
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    deciding = [name for name in sorted(names) if name not in _NOT_IN_DIGEST and "__pycache__" not in name]
    lines = [f"{sha256_file(names[name])}  {name}\n" for name in deciding]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def check_round_trip(folder: Path, contents: Contents) -> float:
    """Load the logged model in `folder` in a new process, as its users do, with pickles off, and compare what it says
    with what `contents.network` says. Returns the largest difference of logits.

    Raises CheckpointError where a logit differs by more than 1e-5 (absolute or relative), a probability by more than
    1e-5, a class has another name, or where the program's weights are not model.safetensors to the last bit.
    """
    size = contents.image_size
    images = torch.randn(_BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))
    png = _example_png()
    with torch.inference_mode():
        network = copy.deepcopy(contents.network).eval()
        logits = network(images)
        probability = network(normalised(_transformed(png, contents)[None])).softmax(1)[0].double()
    answer = _answers_elsewhere(folder, images, png)
    found = torch.tensor(answer["logits"])
    difference = float((found - logits).abs().max()) if found.shape == logits.shape else float("inf")
    if not torch.allclose(found, logits, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise _differs("logits", f"the network's within {_TOLERANCE:g}", f"differ by {difference:.3g}")
    if answer["strange_tensors"]:
        raise _differs("weights", f"those of {WEIGHTS}", f"`{answer['strange_tensors'][0]}` is another")
    likeliest = answer["class_index"]
    expected = probability.topk(min(_TOP_K, len(contents.classes))).values
    for given in (torch.tensor(answer["probability"]), probability[likeliest]):
        if given.shape != expected.shape or (given - expected).abs().max() > _TOLERANCE:
            raise _differs("probabilities", f"the network's within {_TOLERANCE:g}", f"are {answer['probability']}")
    if answer["class_name"] != [contents.classes[index] for index in likeliest]:
        raise _differs("classes", "those that were given", f"are {answer['class_name']}")
    return difference


def _differs(what: str, expected: str, but: str) -> CheckpointError:
    return CheckpointError(
        f"{what} of the logged model must be {expected}, but {but}. It is not registered; log it again."
    )


def _answers_elsewhere(folder: Path, images: Tensor, png: bytes) -> dict[str, Any]:
    """What the model says of `images` and of `png`, loaded in a new process: see round_trip.py."""
    environment = os.environ | {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # sums in the same order
    }
    with tempfile.TemporaryDirectory(prefix="swa-dist-round-trip-") as scratch:
        question, answer = Path(scratch) / "question.safetensors", Path(scratch) / "answer.json"
        encoded = torch.frombuffer(bytearray(png), dtype=torch.uint8)
        safetensors.torch.save_file({"images": images, "png": encoded}, question)
        command = [sys.executable, "-m", "swa_dist.service.round_trip", str(folder), str(question), str(answer)]
        try:
            ended = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise ServiceError(
                f"the logged model must load in a new process, but has not within {_TIMEOUT_SECONDS} s. See what else"
                " this machine does."
            ) from None
        if ended.returncode:
            said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
            raise CheckpointError(f"the logged model must load in a new process, but does not: {said}")
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found


def _save(folder: Path, contents: Contents, model: Model) -> None:
    """Write the logged model to `folder`, which is made."""
    network = copy.deepcopy(contents.network).eval()  # in train mode a pass would change BatchNorm's statistics
    with tempfile.TemporaryDirectory(prefix="swa-dist-files-") as scratch:
        files = Path(scratch) / Path(FILES).name
        files.mkdir()
        for name, content in contents.files.items():
            if isinstance(content, Path):
                shutil.copyfile(content, files / name)
            else:
                (files / name).write_bytes(content)
        example = torch.zeros(2, 3, contents.image_size, contents.image_size)  # one image would fix the batch at one
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        torch.export.save(program, files / PROGRAM)
        facts = {
            "classes": contents.classes,
            "resize_size": contents.resize_size,
            "image_size": contents.image_size,
            "sha256": {name: sha256_file(files / name) for name in (PROGRAM, WEIGHTS)},
        }
        (files / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        model.add_flavor("pytorch", model_data=FILES, pytorch_version=str(torch.__version__), code=None)
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=str(_CLASSIFIER),
            artifacts={files.name: str(files)},
            mlflow_model=model,
            signature=_SIGNATURE,
            input_example=pd.DataFrame({"image": [_example_png()]}),
            pip_requirements=[f"{name}=={_public_version(name)}" for name in _PACKAGES],
        )
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)


def _public_version(package: str) -> str:
    """As package indices have it: without the suffix of a build for a certain GPU."""
    return importlib.metadata.version(package).partition("+")[0]


def _example_png() -> bytes:
    """An image of our own: colours that change smoothly, 96 x 64."""
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    pixels = np.stack([across, down, 255 - across], axis=2).astype(np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


def _transformed(png: bytes, contents: Contents) -> Tensor:
    """uint8 [height, width, 3] after the evaluation transform."""
    image = Image.open(io.BytesIO(png))
    resized = functional.resize(image, [contents.resize_size], antialias=True)
    cropped = functional.center_crop(resized, [contents.image_size])
    pixels: Tensor = functional.pil_to_tensor(cropped).permute(1, 2, 0)
    return pixels
