"""A model's card: it says what the summary says, names the control, and claims nothing else."""

import re
from pathlib import Path

import pytest

from swa_dist import config
from swa_dist.service import model_card
from tests import support

ROWS = {
    "start": {"top1": 95.2756, "top5": 99.7853, "nll": 0.16554, "ece": 1.4201},
    "last": {"top1": 96.8504, "top5": 99.8568, "nll": 0.09861, "ece": 1.0354},
    "last_fresh": {"top1": 96.5641, "top5": 99.7853, "nll": 0.10298, "ece": 1.1116},
    "swa_5": {"top1": 96.1, "top5": 99.7, "nll": 0.1, "ece": 0.9},
    "swa": {"top1": 96.5641, "top5": 99.8568, "nll": 0.09952, "ece": 0.864},
}
PAIRED = {"gain": 1.2885, "low": 0.5011, "high": 2.1475, "wins": 26, "losses": 8, "p_value": 0.002935}
SUMMARY = {
    "name": "digits",
    "run_key": "e9d9a340" * 8,
    "attempt": 2,
    "arch": "resnet18",
    "epochs": 5,
    "weights": {"source": "runs/quickstart/start.safetensors", "sha256": "db" * 32},
    "data": {"name": "digits", "digest": "37" * 32, "val_images": 1397},
    "phases": {"train": {"images": 2000}},
    "candidates": ROWS,
    "control": "last",
    "candidate": "swa",
    "average": {"iterates": [400, 800, 1200, 1600, 2000], "regime": "replicated"},
    "recalibration": {"num_layers": 20, "num_images": 400},
    "paired": [{"candidate": "swa", "against": "start", **PAIRED}],
    "verdict": {"sentence": "swa is better than the start: +1.29 points (95 % interval +0.50 to +2.15, p = 0.0029)."},
}
CLASSES = tuple(f"digit {n}" for n in range(12))


def card(summary=SUMMARY, **fields):
    recipe = support.digits_recipe("unused", "/runs/start.safetensors", **fields)
    return model_card.card(summary, recipe, CLASSES, model="digits-resnet", date="2026-11-24")


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_each_candidate_has_a_row_with_its_figures_and_the_control_and_the_model_are_marked():
    rows = [line for line in section(card(), "Result").splitlines() if line.startswith("| ")][1:]
    figures = [[float(cell) for cell in row.split(" | ")[1:5]] for row in rows]
    assert figures == [pytest.approx(list(row.values()), abs=0.005) for row in ROWS.values()]
    assert [name for name, row in zip(ROWS, rows, strict=True) if "control" in row] == ["last"]
    assert [name for name, row in zip(ROWS, rows, strict=True) if "**this model**" in row] == ["swa"]


def test_the_verdict_and_its_intervals_are_the_summarys():
    result = section(card(), "Result")
    assert SUMMARY["verdict"]["sentence"] in result
    assert "+1.29 percentage points of top-1, 95 % interval +0.50 to +2.15" in result
    assert "26 images won, 8 lost" in result


def test_it_says_what_it_started_from_what_it_saw_and_when():
    text = card()
    for said in (
        SUMMARY["weights"]["source"], SUMMARY["weights"]["sha256"], SUMMARY["data"]["digest"], SUMMARY["run_key"],
        "resnet18", "2026-11-24", "400 training images in each epoch", "1,397 validation images",
        "average: 5 iterates, replicated", "resized to 32 pixels", "12 classes (digit 0, ", "digit 9, ...)",
    ):  # fmt: skip
        assert said in text, said


def test_its_limits_have_the_calibration_of_the_model_itself():
    limits = section(card(), "Limits")
    assert "0.86 percentage\n  points" in limits
    assert "one seed" in limits
    for unmeasured in ("other domains", "adversarial", "fairness"):
        assert unmeasured in limits


@pytest.mark.parametrize(
    ("weights", "said", "unsaid"),
    [
        ("IMAGENET1K_V1", "non-commercial", "CC BY-NC"),
        ("IMAGENET1K_SWAG_E2E_V1", "CC BY-NC 4.0", "not stated"),
        ("/runs/start.safetensors", "not stated", "torchvision"),
        ("models:/digits-resnet/1", "not stated", "torchvision"),
        ("https://host/x.pth", "not stated", "torchvision"),
        ("random", "random weights", "torchvision"),
    ],
)
def test_the_licence_of_the_starting_weights_is_what_is_known_of_it(weights, said, unsaid):
    licence = section(card(**{"model.weights": weights}), "Licence")
    assert said in licence
    assert unsaid not in licence
    assert "the user's to check" in licence


@pytest.mark.parametrize("candidate", ["last", "swa", "swa_5", "ema", "window"])
def test_whatever_is_registered_is_called_by_what_it_is(candidate):
    rows = ROWS | {name: ROWS["swa"] for name in ("ema", "window")}
    said = card(SUMMARY | {"candidate": candidate, "candidates": rows})
    first = section(said, "What it is").strip().splitlines()[0]
    assert ("average" in first) == (candidate in ("swa", "swa_5", "ema"))
    assert section(said, "Result").count("**this model**") == 1


def test_its_snippet_is_whole_and_names_the_model():
    (code,) = re.findall(r"```python\n(.*?)```", card(), re.DOTALL)
    compile(code, "card", "exec")
    assert code.count("models:/digits-resnet@champion") == 2


def test_every_recipe_of_ours_has_a_card():
    for path in sorted(support.JOBS.glob("*-*.yaml")):
        recipe = config.load(Path(path))
        assert f"learning rate: {recipe.schedule.name}" in model_card.card(
            SUMMARY, recipe, CLASSES, model=recipe.registry.model, date="2026-11-24"
        )
