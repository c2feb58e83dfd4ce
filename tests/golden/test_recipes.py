"""The shipped recipes resolve to what is checked in, and the ImageNet ones are the paper's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from swa_dist import config

GOLDEN = Path(__file__).parent
REPOSITORY = GOLDEN.parents[1]
JOBS = REPOSITORY / "jobs"
HOW = "If that is meant, run `python -m tests.golden.regenerate` and read the difference."

IMAGENET = [f"{arch}-swa{epochs}" for arch in ("densenet161", "resnet152", "resnet50") for epochs in (5, 10)]


def shipped():
    return {path.stem: path for path in sorted(JOBS.glob("*.yaml"))}


def test_every_recipe_has_a_golden_file_and_every_golden_file_a_recipe():
    golden = {path.stem for path in (GOLDEN / "recipes").glob("*.yaml")}
    assert shipped().keys() == golden, f"recipes and golden files differ. {HOW}"


@pytest.mark.parametrize("name", shipped())
def test_a_shipped_recipe_resolves_to_its_golden_file(name):
    golden = GOLDEN / "recipes" / f"{name}.yaml"
    assert golden.is_file(), f"{golden} must be there, but is not. {HOW}"
    resolved = config.to_yaml(config.load(shipped()[name]))
    assert resolved == golden.read_text(encoding="utf-8"), f"the recipe {name} resolves to something new. {HOW}"


@pytest.mark.parametrize("name", shipped())
def test_a_golden_file_is_a_recipe_equal_to_the_one_it_is_of(name):
    assert config.load(GOLDEN / "recipes" / f"{name}.yaml") == config.load(shipped()[name]), HOW


def test_the_schema_is_the_golden_one():
    golden = json.loads((GOLDEN / "schema.json").read_text(encoding="utf-8"))
    assert config.schema() == golden, f"the schema of recipes has changed. {HOW}"


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_is_called_what_its_file_is_called(name):
    assert config.load(shipped()[name]).name == name


def test_no_two_recipes_have_one_run_key():
    keys = {config.run_key(config.load(path), path.stem.partition("-")[0], "data") for path in shipped().values()}
    assert len(keys) == len(shipped())


def test_regenerating_changes_nothing_here(tmp_path):
    """The command that the messages name runs, in a copy, and writes what is checked in."""
    copy = tmp_path / "tests" / "golden"
    copy.mkdir(parents=True)
    (tmp_path / "jobs").symlink_to(JOBS)
    (tmp_path / "tests" / "__init__.py").touch()  # else the installed checkout's `tests` comes first
    (copy / "__init__.py").touch()
    (copy / "regenerate.py").write_bytes((GOLDEN / "regenerate.py").read_bytes())
    (copy / "recipes").mkdir()
    (copy / "recipes" / "gone.yaml").touch()
    subprocess.run([sys.executable, "-m", "tests.golden.regenerate"], cwd=tmp_path, check=True, capture_output=True)
    written = {path.name: path.read_bytes() for path in (copy / "recipes").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (GOLDEN / "recipes").iterdir()}
    assert (copy / "schema.json").read_bytes() == (GOLDEN / "schema.json").read_bytes()


# The paper: Izmailov et al. 2018, section 4.2 (ImageNet)


def test_the_six_imagenet_recipes_are_shipped():
    assert set(IMAGENET) <= shipped().keys()


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_recipe_is_the_papers(name):
    recipe = config.load(shipped()[name])
    arch, _, epochs = name.partition("-swa")
    assert (recipe.model.arch, recipe.optim.epochs) == (arch, int(epochs))
    assert recipe.model.weights == "IMAGENET1K_V1"
    assert (recipe.model.num_classes, recipe.model.head) == (1000, "keep")
    assert (recipe.data.global_batch, recipe.data.group_images) == (256, 32)
    assert (recipe.data.image_size, recipe.data.resize_size) == (224, 256)
    assert (recipe.data.crop_area, recipe.data.flip) == ((0.08, 1.0), True)
    assert (recipe.optim.momentum, recipe.optim.weight_decay) == (0.9, 1e-4)
    assert recipe.optim.label_smoothing == 0
    assert (recipe.data.kind, recipe.evaluate.preflight) == ("imagenet", "stop")
    assert (recipe.optim.scale_lr, recipe.optim.head_lr_multiplier) == ("none", 1)
    assert recipe.schedule == config.Cyclical(name="cyclical", max_lr=1e-3, min_lr=1e-5, cycle_epochs=1)
    # The paper's table has the average after 5 epochs and after 10: a run of 10 gives both.
    assert recipe.average == config.Average(also_after_epochs=(5,) if epochs == "10" else ())
    assert (recipe.average.include_start, recipe.average.start_epoch) == (False, 0)
    assert (recipe.average.points, recipe.average.sync) == ("cycle", "replicated")
    assert (recipe.recalibrate.transforms, recipe.recalibrate.second_pass) == ("train", "off")
    assert recipe.precision == "bf16"
    assert recipe.evaluate.candidate == "swa"
    assert recipe.recalibrate.images == "all"


@pytest.mark.parametrize("name", IMAGENET)
def test_an_imagenet_model_is_not_promoted_without_proof(name):
    assert config.load(shipped()[name]).registry.first == "hold"
