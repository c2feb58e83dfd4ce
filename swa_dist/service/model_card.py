"""The card of a registered model: what a run's summary says, for people who meet the model and not the run."""

from typing import Any

from swa_dist import config, models
from swa_dist.config import Recipe
from swa_dist.service import identity

_NAMES = {
    "start": "the starting weights",
    "last": "last iterate",
    "last_fresh": "last iterate, fresh BatchNorm statistics",
    "window": "mean of the last iterates",
    "ema": "exponential moving average",
    "swa": "stochastic weight average",
}
_TORCHVISION = """\
The starting weights are torchvision's. Its code is under the BSD 3-Clause licence; of its weights it says that they
may have their own licences or terms, derived from the data set they were trained on. They were trained on ImageNet,
whose terms of access are for non-commercial research and education."""
_SWAG = " Of its weights named SWAG it says that they are under CC BY-NC 4.0."
_ELSEWHERE = "The licence of the starting weights is not stated."


def card(summary: dict[str, Any], recipe: Recipe, classes: tuple[str, ...], *, model: str, date: str) -> str:
    """Markdown. `summary`: as result.py makes it; `classes`: names by index; `model`: the name under which the model is
    registered; `date`: when the run finished, as a person writes it."""
    sections = {
        "What it is": _what(summary, recipe, date),
        "Result": _result(summary),
        "Use": _use(model),
        "Input and output": _preprocessing(recipe, classes),
        "Data": _data(summary, recipe, classes),
        "Recipe": _recipe(summary, recipe),
        "Limits": _limits(summary),
        "Licence": _licence(recipe),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# {model}: {recipe.name}\n\n{body}\n"


def _what(summary: dict[str, Any], recipe: Recipe, date: str) -> str:
    weights = summary["weights"]
    average = summary["average"]
    candidate = _called(summary["candidate"])
    averaged = f" of {len(average['iterates'])} iterates" if summary["candidate"] == "swa" else ""
    return (
        f"A classifier of images, torchvision's {summary['arch']}: the {candidate}{averaged} of"
        f" {summary['epochs']} epochs of fine-tuning, finished on {date}.\n\n"
        f"It started from `{weights['source']}` (SHA-256 `{weights['sha256']}`)"
        + (", with a new last layer." if recipe.model.head == "replace" else ".")
        + f"\n\nRun key `{summary['run_key']}`, attempt {summary['attempt']}."
    )


def _result(summary: dict[str, Any]) -> str:
    val = summary["data"]["val_images"]
    rows = [
        "| weights | top-1, % | top-5, % | NLL, nats per image | ECE, % | |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in summary["candidates"].items():
        marks = []
        if name == summary["candidate"]:
            marks.append("**this model**")
        if name == summary["control"]:
            marks.append("the control: plain fine-tuning")
        figures = f"{found['top1']:.2f} | {found['top5']:.2f} | {found['nll']:.4f} | {found['ece']:.2f}"
        rows.append(f"| {_called(name)} | {figures} | {', '.join(marks)} |")
    paired = [
        f"- {_called(p['candidate'])} over {_called(p['against'])}: {p['gain']:+.2f} percentage points of top-1, 95 %"
        f" interval {p['low']:+.2f} to {p['high']:+.2f} (paired bootstrap); {p['wins']:,} images won,"
        f" {p['losses']:,} lost, p = {p['p_value']:.2g} (McNemar's exact test)"
        for p in summary["paired"]
    ]
    return (
        f"On {val:,} validation images, the same for all candidates:\n\n"
        + "\n".join(rows)
        + f"\n\n**Verdict:** {summary['verdict']['sentence']}\n\n"
        + "\n".join(paired)
    )


def _use(model: str) -> str:
    return f"""\
```python
import mlflow
import pandas as pd

classifier = mlflow.pyfunc.load_model("models:/{model}@champion")
with open("image.jpg", "rb") as file:
    print(classifier.predict(pd.DataFrame({{"image": [file.read()]}}), params={{"top_k": 3}}))
network = mlflow.pytorch.load_model("models:/{model}@champion")  # float32 [images, 3, height, width] to logits
```

`@champion` is the version in use, which may be another than the one this card is of."""


def _preprocessing(recipe: Recipe, classes: tuple[str, ...]) -> str:
    resize, size = recipe.data.resize_size, recipe.data.image_size
    return f"""\
The pyfunc takes a column `image` (the bytes of a JPEG or PNG file; base64 in JSON) or `path`, and gives
`class_index`, `class_name` and `probability` of the `top_k` likeliest of {len(classes):,} classes.

Each image is turned upright by its EXIF orientation, made RGB, resized to {resize} pixels on its shorter side
(bilinear, antialiased), cropped to the central {size} x {size} pixels, and normalised by ImageNet's mean and
deviation. The evaluation decoded with NVIDIA DALI, and on a GPU resized with it: its pixels differ a little."""


def _data(summary: dict[str, Any], recipe: Recipe, classes: tuple[str, ...]) -> str:
    data = summary["data"]
    each = summary["phases"]["train"]["images"] // summary["epochs"]
    names = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
    return (
        f"{recipe.data.name}: {each:,} training images in each epoch, {data['val_images']:,} validation images,"
        f" {len(classes):,} classes ({names}).\n\nDigest of the images' index: `{data['digest']}`."
    )


def _recipe(summary: dict[str, Any], recipe: Recipe) -> str:
    schedule = ", ".join(f"{n} {v}" for n, v in config.to_tree(recipe)["schedule"].items() if n != "name")
    average, recalibration = summary["average"], summary["recalibration"]
    lines = [
        f"{summary['epochs']} epochs of SGD, momentum {recipe.optim.momentum}, weight decay"
        f" {recipe.optim.weight_decay}, global batches of {recipe.data.global_batch:,} images, {recipe.precision},"
        f" seed {recipe.seed}",
        f"learning rate: {recipe.schedule.name} ({schedule})",
        f"average: {len(average['iterates'])} iterates, {average['regime']}",
        f"BatchNorm: {recalibration['num_layers']} layers"
        + (f", statistics from {recalibration['num_images']:,} training images" if recalibration["num_layers"] else ""),
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n\nAll of it is in `recipe.yaml` beside this card."


def _limits(summary: dict[str, Any]) -> str:
    ece = summary["candidates"][summary["candidate"]]["ece"]
    val = summary["data"]["val_images"]
    return f"""\
- The figures are of one run, with one seed, on the {val:,} validation images of one data set.
- Not measured: other domains, other cameras, corrupted or adversarial images, images of none of the classes, fairness
  between groups of people or places.
- A probability is the network's own, not corrected: on the validation images it was off by {ece:.2f} percentage
  points on average (expected calibration error)."""


def _licence(recipe: Recipe) -> str:
    weights = recipe.model.weights
    if weights == models.RANDOM:
        return "It started from random weights. The terms of the training images are the user's to check."
    text = _TORCHVISION if identity.is_torchvision_name(weights) else _ELSEWHERE
    if "SWAG" in weights:
        text += _SWAG
    return f"{text} It is the user's to check, as are the terms of the training images."


def _called(name: str) -> str:
    return _NAMES.get(name) or f"stochastic weight average after {name.partition('_')[2]} epochs"
