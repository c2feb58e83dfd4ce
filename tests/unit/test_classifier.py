"""What a logged model's pyfunc makes of images: the pixels, the answers, and every row that is none."""

import ast
import base64
import functools
import http.server
import io
import json
import sys
import threading
from pathlib import Path

import boto3
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision import transforms

from swa_dist.data import pixels
from swa_dist.service import classifier
from swa_dist.service.classifier import Classifier, evaluation_transform, normalised
from swa_dist.storage.files import sha256_file

RESIZE, SIZE = 40, 32
CLASSES = tuple(f"class {number}" for number in range(7))
ORIENTATION = 0x0112


class Means(nn.Module):
    """Logits that say how red, green, blue, ... an image is."""

    def forward(self, images):
        colours = images.mean((2, 3))
        return torch.cat([10 * colours, colours, -colours[:, :1]], 1)


@pytest.fixture(autouse=True)
def _reads_paths(monkeypatch):
    monkeypatch.setenv("SWA_DIST_READ_PATHS", "true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the pyfunc loads: an exported program and the facts of it."""
    folder = tmp_path_factory.mktemp("model")
    shapes = ({0: torch.export.Dim.AUTO},)
    torch.export.save(
        torch.export.export(Means(), (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=shapes), folder / "model.pt2"
    )
    facts = {"classes": CLASSES, "resize_size": RESIZE, "image_size": SIZE}
    digest = {"model.pt2": sha256_file(folder / "model.pt2")}
    (folder / "facts.json").write_text(json.dumps(facts | {"sha256": digest}))
    return folder


def loaded(folder):
    made = Classifier()
    made.load_context(mlflow.pyfunc.PythonModelContext({"model": str(folder)}, None))
    return made


@pytest.fixture(scope="module")
def predict(folder):
    return functools.partial(loaded(folder).predict, None)


@functools.cache
def photograph(number=0):
    return Image.fromarray(load_sample_images().images[number]).resize((120, 90), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def given(*images):
    return pd.DataFrame({"image": list(images)})


# Pixels


def test_it_imports_nothing_that_its_users_lack():
    """They have what the model's requirements name, and mlflow."""
    imports = [
        node
        for node in ast.walk(ast.parse(Path(classifier.__file__).read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    names = {
        name
        for node in imports
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    known = {"mlflow", "yaml", "numpy", "pandas", "torch", "torchvision", "PIL", "boto3"}  # yaml: mlflow's
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == known


@pytest.mark.parametrize(("resize_size", "image_size"), [(40, 32), (256, 224), (32, 32), (100, 96)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("upright", [True, False])
def test_the_transform_is_torchvisions_for_evaluation(kind, upright, resize_size, image_size):
    theirs = transforms.Compose(
        [
            transforms.Resize(resize_size),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize(pixels.MEAN, pixels.STD),
        ]
    )
    image = photograph() if upright else photograph().rotate(90, expand=True)
    content = encoded(image, kind)
    ours = normalised(evaluation_transform(content, resize_size, image_size)[None])[0]
    assert (ours - theirs(Image.open(io.BytesIO(content)))).abs().max() <= 1e-6


def test_normalisation_is_that_of_the_loaders():
    levels = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(256, 3, 1, 1)
    assert torch.equal(normalised(levels), pixels.normalised(levels.permute(0, 2, 3, 1)))


def transformed(content):
    return evaluation_transform(content, RESIZE, SIZE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_by_its_orientation(orientation):
    undone_by = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for kind in ("PNG", "JPEG"):
        found = transformed(encoded(photograph(), kind, exif=exif))
        raw = Image.open(io.BytesIO(encoded(photograph(), kind)))
        upright = raw.transpose(Image.Transpose(undone_by[orientation])) if orientation > 1 else raw
        assert torch.equal(found, transformed(encoded(upright)))


def test_grey_with_colours_of_a_palette_and_transparent_images_are_their_colours():
    grey = photograph().convert("L")
    assert torch.equal(transformed(encoded(grey)), transformed(encoded(grey.convert("RGB"))))
    clear = photograph().convert("RGBA")
    clear.putalpha(grey)
    assert torch.equal(transformed(encoded(clear)), transformed(encoded(photograph())))
    grey_and_clear = grey.convert("LA")
    assert torch.equal(transformed(encoded(grey_and_clear)), transformed(encoded(grey)))
    few = photograph().quantize(50)
    assert torch.equal(
        transformed(encoded(few, transparency=bytes(range(50)))), transformed(encoded(few.convert("RGB")))
    )
    assert torch.equal(transformed(encoded(few, transparency=3)), transformed(encoded(few.convert("RGB"))))


def test_sixteen_bits_of_grey_are_the_upper_eight():
    grey = np.asarray(photograph().convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert torch.equal(transformed(encoded(deep)), transformed(encoded(Image.fromarray(grey))))


def test_cmyk_is_what_it_looks_like():
    found = transformed(encoded(photograph().convert("CMYK"), "JPEG", quality=95)).float()
    assert (found - transformed(encoded(photograph())).float()).abs().mean() <= 2


# Answers


def test_answers_are_the_likeliest_classes_by_softmax(predict):
    (row,) = predict(given(encoded(photograph()))).to_dict("records")
    expected = Means()(normalised(transformed(encoded(photograph()))[None])).softmax(1)[0]
    assert row["class_index"] == expected.argsort(descending=True)[:5].tolist()
    assert row["class_name"] == [CLASSES[index] for index in row["class_index"]]
    assert row["probability"] == pytest.approx(expected.sort(descending=True).values[:5].tolist())


@pytest.mark.parametrize(("top_k", "expected"), [(1, 1), (3, 3), (7, 7), (8, 7), (10**9, 7)])
def test_there_are_top_k_classes_or_as_many_as_there_are(predict, top_k, expected):
    (row,) = predict(given(encoded(photograph())), {"top_k": top_k}).to_dict("records")
    assert {len(values) for values in row.values()} == {expected}
    if expected == 7:
        assert sum(row["probability"]) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [0, -1])
def test_no_classes_are_too_few(predict, top_k):
    with pytest.raises(MlflowException, match=f"`top_k` must be at least 1, but is {top_k}"):
        predict(given(encoded(photograph())), {"top_k": top_k})


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 70])
def test_rows_are_answered_in_their_order_however_many(predict, count):
    shades = [Image.new("RGB", (40, 40), (3 * i, 255 - 3 * i, 100)) for i in range(count)]
    found = predict(given(*map(encoded, shades)))
    assert list(found.columns) == ["class_index", "class_name", "probability"]
    alone = [predict(given(encoded(shade))).iloc[0].to_dict() for shade in shades]
    assert [row["class_index"] for row in found.to_dict("records")] == [row["class_index"] for row in alone]
    together = np.array([row["probability"] for row in found.to_dict("records")])
    assert np.abs(together - np.array([row["probability"] for row in alone])).max(initial=0) <= 1e-6


# Places


@pytest.fixture
def image_file(tmp_path):
    path = tmp_path / "photo graph.jpg"
    path.write_bytes(encoded(photograph(), "JPEG"))
    return path


@pytest.fixture
def website(tmp_path, image_file):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_paths_on_disk_on_the_web_and_on_s3_and_bytes_in_one_table(predict, image_file, website, s3):
    bucket = s3.removeprefix("s3://")
    boto3.client("s3").upload_file(str(image_file), bucket, "a/b.jpg")
    content = image_file.read_bytes()
    paths = [str(image_file), f"{website}/photo%20graph.jpg", f"{s3}/a/b.jpg", None, None, float("nan"), ""]
    images = [None, None, float("nan"), content, bytearray(content), base64.b64encode(content).decode(), content]
    found = predict(pd.DataFrame({"image": images, "path": paths}))
    assert len(found) == 7
    assert len({str(row) for row in found.to_dict("records")}) == 1
    only_paths = predict(pd.DataFrame({"path": paths[:3]}))
    assert only_paths.to_dict("records") == found.to_dict("records")[:3]


@pytest.mark.parametrize(
    "place",
    [
        "{folder}/none.jpg",
        "{website}/none.jpg",
        "{s3}/none.jpg",
        "ftp://host/x.jpg",
        "http://127.0.0.1:1/x",
        "{folder}",
        "s3://",
        "http://",
    ],
)
def test_a_place_that_can_not_be_read_is_named_by_its_row(predict, image_file, website, s3, tmp_path, place):
    named = place.format(folder=tmp_path, website=website, s3=s3)
    with pytest.raises(MlflowException, match="row 1 must be readable, but is not") as caught:
        predict(pd.DataFrame({"path": [str(image_file), named]}))
    assert caught.value.get_http_status_code() == 400


def test_paths_are_read_only_where_that_is_allowed(predict, image_file, monkeypatch):
    """Whatever the server is: its clients would name its files and the addresses of its network."""
    table = pd.DataFrame({"path": [str(image_file)]})
    for value in (None, "", "false", "no"):
        monkeypatch.delenv("SWA_DIST_READ_PATHS")
        if value is not None:
            monkeypatch.setenv("SWA_DIST_READ_PATHS", value)
        with pytest.raises(MlflowException, match="SWA_DIST_READ_PATHS=true") as caught:
            predict(table)
        assert caught.value.get_http_status_code() == 400
        monkeypatch.setenv("SWA_DIST_READ_PATHS", "true")
    assert len(predict(table)) == 1


# Rows that are no images


def narrow(height):
    """So long an image that resizing it to 40 pixels across would take more memory than there is."""
    return encoded(Image.new("L", (1, height)))


BAD = {
    "empty": b"",
    "text": b"hello",
    "gif": encoded(Image.new("L", (4, 4)), "GIF"),
    "html": b"<html>404</html>",
    "half-jpeg": encoded(Image.fromarray(load_sample_images().images[0]), "JPEG")[:20_000],
    "half-png": encoded(Image.fromarray(load_sample_images().images[0]))[:20_000],
    "header-alone": encoded(Image.new("L", (4, 4)))[:33],
    "bomb": encoded(Image.new("1", (30_000, 30_000))),
    "large": encoded(Image.new("1", (10_000, 10_000))),
    "narrow": narrow(100_000),
    "no-base64": "?? no base64 ??",
    "number": 3.5,
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_row_that_is_no_image_is_named(predict, kind):
    good = encoded(photograph())
    with pytest.raises(MlflowException, match=r"^row 2 must ") as caught:
        predict(given(good, good, BAD[kind], good))
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("table", [{"image": [None], "path": [None]}, {"image": [""]}, {"path": [float("nan")]}])
def test_a_row_without_an_image_is_named(predict, table):
    with pytest.raises(MlflowException, match="row 0 must have either `image` or `path`, but has neither"):
        predict(pd.DataFrame(table))


@pytest.mark.parametrize("table", [pd.DataFrame({"pixels": [1]}), pd.DataFrame()], ids=["another", "none"])
def test_a_table_without_either_column_is_refused(predict, table):
    with pytest.raises(MlflowException, match="the table must have a column `image` or `path`") as caught:
        predict(table)
    assert caught.value.get_http_status_code() == 400


def test_a_row_with_both_is_named(predict, image_file):
    table = pd.DataFrame({"image": [None, image_file.read_bytes()], "path": [str(image_file)] * 2})
    with pytest.raises(MlflowException, match="row 1 must have either `image` or `path`, but has both"):
        predict(table)


# Damage


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_program_with_one_bit_flipped_is_refused(folder, tmp_path, place):
    for name in ("facts.json", "model.pt2"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    content = bytearray((folder / "model.pt2").read_bytes())
    content[int(place * len(content))] ^= 1
    (tmp_path / "model.pt2").write_bytes(content)
    with pytest.raises(MlflowException, match=r"model\.pt2 must have the SHA-256 .* the model is damaged"):
        loaded(tmp_path)
