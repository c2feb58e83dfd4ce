"""Encoded images to classes: the pyfunc of a registered model.

MLflow copies this script into every logged model and runs it where the model is used, so it needs nothing of
swa_dist. It takes a table with a row per image, of which one column holds

- `image`: the bytes of a JPEG or PNG file (in JSON: base64), or
- `path`: the file on this machine, or at an http(s):// or s3:// address,

and gives `class_index`, `class_name` and `probability` of the `top_k` likeliest classes, likeliest first.
"""

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import urllib.request
from collections.abc import Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
import yaml  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import PythonModel, PythonModelContext
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional

READ_PATHS = "SWA_DIST_READ_PATHS"
"""Environment variable: `true` lets the column `path` be read. On a server its clients would name files of the server
and addresses in its network, and nothing tells here whether it is one."""

_CHUNK = 32  # images in memory at a time
_THREADS = 4  # each holds a decoded image, of up to _MAX_PIXELS
_MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MiB decoded
_MAX_BYTES = 256 * 2**20
_TIMEOUT_SECONDS = 60

_BEGINNINGS = (b"\xff\xd8", b"\x89PNG")  # of files, JPEG and PNG; base64 has neither

# Of ImageNet's red, green and blue, from 0 to 1.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Classifier(PythonModel):  # type: ignore[misc]
    def load_context(self, context: PythonModelContext) -> None:
        """Raises MlflowException where the files are not those that were registered."""
        folder = Path(context.artifacts["model"])
        _check_registered(folder.parents[1])
        self._facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        program = folder / "model.pt2"
        expected = self._facts["sha256"][program.name]
        with program.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise MlflowException(
                f"{program.name} must have the SHA-256 {expected}, but has {found}: the model is damaged."
                " Download it again, or serve another version."
            )
        self._network = torch.export.load(program).module()

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Raises MlflowException, which a server answers as HTTP 400, for the first row that is no image."""
        classes = self._facts["classes"]
        top_k = int((params or {}).get("top_k", 5))
        if top_k < 1:
            raise MlflowException.invalid_parameter_value(f"`top_k` must be at least 1, but is {top_k}.")
        if not {"image", "path"} & set(model_input.columns):  # MLflow drops others, and their rows
            raise MlflowException.invalid_parameter_value(
                "the table must have a column `image` or `path`, but has neither. Name one so."
            )
        rows = list(enumerate(zip(*(_column(model_input, name) for name in ("image", "path")), strict=True)))
        found: dict[str, list[Any]] = {"class_index": [], "class_name": [], "probability": []}
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(rows), _CHUNK):
                images = torch.stack(list(pool.map(self._image, rows[first : first + _CHUNK])))
                with torch.inference_mode():
                    likeliest = self._network(normalised(images)).softmax(1).topk(min(top_k, len(classes)))
                found["class_index"] += likeliest.indices.tolist()
                found["class_name"] += [[classes[index] for index in row] for row in likeliest.indices.tolist()]
                found["probability"] += likeliest.values.double().tolist()
        return pd.DataFrame(found)

    def _image(self, row: tuple[int, tuple[Any, Any]]) -> Tensor:
        number, (image, path) = row
        if (image is None) == (path is None):
            which = "neither" if image is None else "both"
            raise _bad(number, f"must have either `image` or `path`, but has {which}. Set one of them")
        if path is not None and os.environ.get(READ_PATHS, "").lower() != "true":
            raise _bad(
                number,
                "must have `image`, but has `path`, which is not read unless it is allowed. Give the file's bytes in"
                f" `image`, or start this with {READ_PATHS}=true in its environment",
            )
        try:
            content = image if path is None else _read(str(path))
        except Exception as error:  # of a disk, a server, a bucket's client: each has its own
            raise _bad(number, f"must be readable, but is not ({_said(error)}). Mend its `path`") from None
        try:
            return evaluation_transform(_bytes(content), self._facts["resize_size"], self._facts["image_size"])
        except Exception as error:  # a damaged file fails in whichever way its damage has it
            raise _bad(
                number, f"must be a JPEG or PNG image, but is not ({_said(error)}). Leave it out or save it anew"
            ) from None


def _check_registered(root: Path) -> None:
    """Of a model that came from a registry: compare its files with the digest in the version's tag. Raises
    MlflowException where they differ. A registry that can't be asked from here is not asked."""
    origin = root / "registered_model_meta"  # MLflow's, where it downloads a version
    if not origin.is_file() or not mlflow.is_tracking_uri_set():
        return
    named = yaml.safe_load(origin.read_text(encoding="utf-8"))
    try:
        tags = mlflow.MlflowClient().get_model_version(named["model_name"], named["model_version"]).tags
    except Exception as error:
        logging.getLogger(__name__).warning("the model's files were not compared with its registry's tag: %s", error)
        return
    stated = tags.get("model_sha256")
    if stated is not None and stated != (found := digest(root)):
        raise MlflowException(
            f"the files of models:/{named['model_name']}/{named['model_version']} must have the SHA-256 in its tag,"
            f" {stated[:12]}, but have {found[:12]}: they were changed since they were registered. Serve another one."
        )


def digest(root: Path) -> str:
    """SHA-256 over the names and contents of the model's files, as swa_dist has it."""
    names = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    ignored = ("artifacts/model/model_card.md", "registered_model_meta")
    deciding = [name for name in sorted(names) if name not in ignored and "__pycache__" not in name]
    lines = [f"{hashlib.sha256(names[name].read_bytes()).hexdigest()}  {name}\n" for name in deciding]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def evaluation_transform(content: bytes, resize_size: int, image_size: int) -> Tensor:
    """uint8 [3, image_size, image_size] of a JPEG or PNG file: upright, the shorter side resized, the centre cropped.

    Raises whatever Pillow does where it can't be decoded, and ValueError where it is too large.
    """
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
        width, height = image.size
        resized_pixels = resize_size**2 * max(width, height) // min(width, height)
        if max(width * height, resized_pixels) > _MAX_PIXELS:
            raise ValueError(f"{width} x {height} pixels are too many")
        upright = _rgb(ImageOps.exif_transpose(image))
    resized = functional.resize(upright, [resize_size], antialias=True)
    pixels: Tensor = functional.pil_to_tensor(functional.center_crop(resized, [image_size]))
    return pixels


def normalised(images: Tensor) -> Tensor:
    """uint8 [images, 3, height, width] as the float32 that the network takes."""
    mean = torch.tensor([255 * m for m in _MEAN])[:, None, None]
    factor = torch.tensor([1 / (255 * s) for s in _STD])[:, None, None]
    return images.float().sub_(mean).mul_(factor)


def _rgb(image: Image.Image) -> Image.Image:
    """What is transparent keeps its colour."""
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _column(table: pd.DataFrame, name: str) -> Sequence[Any]:
    """Its values, None for one that is missing or empty."""
    if name not in table:
        return [None] * len(table)
    return [None if _missing(value) else value for value in table[name]]


def _missing(value: Any) -> bool:
    return not len(value) if isinstance(value, Sized) else bool(pd.isna(value))


def _bytes(image: Any) -> bytes:
    """As they are, or out of base64, which MLflow's server undoes in some of its forms of JSON and not in others."""
    content = image.encode() if isinstance(image, str) else bytes(image)
    if not content.startswith(_BEGINNINGS):
        with contextlib.suppress(binascii.Error):
            return base64.b64decode(content, validate=True)
    return content


def _read(path: str) -> bytes:
    scheme, separator, rest = path.partition("://")
    if not separator:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    elif scheme in ("http", "https"):
        with urllib.request.urlopen(path, timeout=_TIMEOUT_SECONDS) as answer:
            content = answer.read(_MAX_BYTES + 1)
    elif scheme == "s3":
        bucket, _, key = rest.partition("/")
        content = _s3().get_object(Bucket=bucket, Key=key)["Body"].read(_MAX_BYTES + 1)
    else:
        raise ValueError(f"{scheme}:// is none of http://, https:// and s3://")
    if len(content) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES:,} bytes")
    return content


@functools.cache
def _s3() -> Any:
    import boto3

    return boto3.session.Session().client("s3")  # boto3's own session is not for several threads


def _bad(number: int, what: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(f"row {number} {what}.")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")


mlflow.models.set_model(Classifier())
