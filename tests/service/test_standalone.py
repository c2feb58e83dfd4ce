"""A weights file by itself: `swa-dist evaluate` and `swa-dist recalibrate`, as a person runs them."""

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import safetensors.torch
import torch

from swa_dist import config, models
from swa_dist.errors import ExitCode
from swa_dist.service.quickstart import digits_loaders
from swa_dist.training.evaluate import evaluate
from swa_dist.training.recalibrate import recalibrate_as
from swa_dist.training.world import World
from tests import support
from tests.support import swa_dist_forked as swa_dist

DIGITS = ("--recipe", "digits")
METRICS = ("top1", "top5", "nll", "ece")


def worked(result: CompletedProcess[str]) -> dict[str, Any]:
    """The JSON that a command printed, and nothing but JSON."""
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def refused(result: CompletedProcess[str], code: ExitCode) -> str:
    """What a command said that ended with a foreseen mistake."""
    assert "Traceback" not in result.stderr
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("swa-dist: ")
    return last


def scores(world: World, digits: str, weights: str) -> dict[str, float]:
    """The metrics that a run with the digits recipe finds for these weights."""
    recipe = support.digits_recipe(digits, weights)
    model = models.build(recipe.model, recipe.seed)
    models.load(model, recipe.model)
    loaders = digits_loaders(recipe)
    return evaluate(model, loaders.validation(), loaders.num_val, recipe, world).metrics()


def fresh(world: World, digits: str, weights: str) -> dict[str, Any]:
    """The weights with the BatchNorm that a run with the digits recipe gives them."""
    recipe = support.digits_recipe(digits, weights)
    model = models.build(recipe.model, recipe.seed)
    models.load(model, recipe.model)
    recalibrate_as(recipe, model, digits_loaders(recipe), world)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def recalibrated(digits: Path, start_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recalibrated")
    arguments = (str(start_weights), str(digits / "train"), "--out", "new/fresh.safetensors", *DIGITS, "--json")
    return worked(swa_dist("recalibrate", *arguments, cwd=folder)) | {"folder": folder}


@pytest.fixture(scope="module")
def fresh_weights(recalibrated: dict[str, Any]) -> Path:
    return Path(recalibrated["folder"]) / "new" / "fresh.safetensors"


# Evaluate


def test_evaluate_finds_what_a_run_finds_and_takes_the_recipe_of_the_run_around_the_weights(
    digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "run" / "candidates" / "swa" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    shutil.copy(start_weights, weights)
    recipe = support.digits_recipe(digits, weights, **{"data.group_images": 50})
    (tmp_path / "run" / "recipe.yaml").write_text(config.to_yaml(recipe))
    found = worked(swa_dist("evaluate", str(weights), str(digits / "val"), "--json", cwd=tmp_path))
    (expected,) = support.run_workers(scores, 1, str(digits), str(start_weights))
    assert {name: found[name] for name in METRICS} == pytest.approx(expected, rel=1e-4)
    assert found["top1"] == expected["top1"] > 50
    assert (found["num_images"], found["weights"]) == (1397, str(weights))


def test_evaluate_prints_a_line_per_metric_with_its_unit(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    result = swa_dist("evaluate", str(start_weights), str(digits / "train"), *DIGITS, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert lines["num_images"].strip() == "400"
    assert lines["top1"].endswith(" %")
    assert lines["nll"].endswith(" nats per image")
    assert not list(tmp_path.iterdir())


# Recalibrate


def test_recalibrate_writes_the_weights_with_the_batchnorm_that_a_run_gives_them(
    digits: Path, start_weights: Path, recalibrated: dict[str, Any], fresh_weights: Path
) -> None:
    assert (recalibrated["num_layers"], recalibrated["num_images"], recalibrated["num_groups"]) == (20, 400, 25)
    assert 0 < recalibrated["sampling_error"] < 0.2
    assert recalibrated["grouping_dependence"] is None
    before, after = safetensors.torch.load_file(start_weights), safetensors.torch.load_file(fresh_weights)
    (expected,) = support.run_workers(fresh, 1, str(digits), str(start_weights))
    assert before.keys() == after.keys() == expected.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, torch.from_numpy(expected[name]), rtol=1e-4, atol=1e-5)
        moved = "running_" in name or "num_batches" in name
        assert torch.equal(tensor, before[name]) != moved, name


def test_a_recalibrated_file_can_be_evaluated_and_is_about_as_good(
    digits: Path, start_weights: Path, fresh_weights: Path, tmp_path: Path
) -> None:
    found = worked(swa_dist("evaluate", str(fresh_weights), str(digits / "val"), *DIGITS, "--json", cwd=tmp_path))
    (expected,) = support.run_workers(scores, 1, str(digits), str(fresh_weights))
    assert {name: found[name] for name in METRICS} == pytest.approx(expected, rel=1e-4)
    (before,) = support.run_workers(scores, 1, str(digits), str(start_weights))
    assert found["top1"] > before["top1"] - 10
    assert found["nll"] != before["nll"]


def test_settings_of_the_recalibration_can_be_overridden(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    overrides = ("--set", "recalibrate.images=64", "--set", "recalibrate.second_pass=measure")
    arguments = (str(start_weights), str(digits / "train"), "--out", "few.safetensors", *DIGITS, *overrides)
    result = swa_dist("recalibrate", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines() if not line.startswith(" "))
    assert lines["num_images"].strip() == "64"
    assert lines["grouping_dependence"].endswith(" standard deviations")
    assert (tmp_path / "few.safetensors").is_file()


# Mistakes


def test_a_folder_with_another_number_of_classes_is_bad_data(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    nine = tmp_path / "nine"
    nine.mkdir()
    for name in "012345678":
        (nine / name).symlink_to(digits / "val" / name)
    arguments = (str(start_weights), str(nine), "--out", "out.safetensors", *DIGITS, "--json")
    message = refused(swa_dist("recalibrate", *arguments, cwd=tmp_path), ExitCode.BAD_DATA)
    assert "10 classes" in message
    assert "has 9" in message
    assert not (tmp_path / "out.safetensors").exists()


def test_weights_that_are_missing_are_a_bad_setting(digits: Path, tmp_path: Path) -> None:
    result = swa_dist("evaluate", "absent.safetensors", str(digits / "val"), *DIGITS, "--json", cwd=tmp_path)
    assert "`MODEL` must be a weights file, but absent.safetensors does not exist" in refused(
        result, ExitCode.BAD_CONFIG
    )


def test_weights_outside_a_run_need_a_recipe(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    result = swa_dist("evaluate", str(start_weights), str(digits / "val"), "--json", cwd=tmp_path)
    assert "`--recipe` must be given" in refused(result, ExitCode.BAD_CONFIG)


def test_weights_that_are_damaged_or_for_other_classes_are_bad_data(
    digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(start_weights.read_bytes()[:1000])
    result = swa_dist("evaluate", str(damaged), str(digits / "val"), *DIGITS, "--json", cwd=tmp_path)
    assert str(damaged) in refused(result, ExitCode.BAD_DATA)
    overrides = ("--set", "model.num_classes=9")
    result = swa_dist("evaluate", str(start_weights), str(digits / "val"), *DIGITS, *overrides, cwd=tmp_path)
    assert "must be for 9 classes" in refused(result, ExitCode.BAD_DATA)


def test_a_folder_that_is_missing_is_bad_data_and_is_called_what_the_person_calls_it(
    start_weights: Path, tmp_path: Path
) -> None:
    message = refused(swa_dist("evaluate", str(start_weights), "photos", *DIGITS, cwd=tmp_path), ExitCode.BAD_DATA)
    assert str(tmp_path / "photos") in message
    assert "`data.photos`" not in message, "there is no such setting"


def test_an_output_file_of_another_kind_is_refused_before_any_work(
    digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    arguments = (str(start_weights), str(digits / "train"), "--out", "out.pth", *DIGITS, "--json")
    result = swa_dist("recalibrate", *arguments, cwd=tmp_path)
    assert "`--out` must be a .safetensors file, but is out.pth" in refused(result, ExitCode.BAD_CONFIG)
    assert "index" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_output_file_that_cannot_be_written_is_named(digits: Path, start_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    arguments = (str(start_weights), str(digits / "train"), "--out", "file/out.safetensors", *DIGITS, "--json")
    message = refused(swa_dist("recalibrate", *arguments, cwd=tmp_path), ExitCode.OUTPUT)
    assert "file/out.safetensors" in message
    assert "`output.dir`" not in message, "that is another setting"


def test_images_that_leave_a_group_of_one_are_refused_with_what_to_set(
    digits: Path, start_weights: Path, tmp_path: Path
) -> None:
    """BatchNorm has no variance there: a run refuses it too."""
    overrides = ("--set", "recalibrate.images=17")
    arguments = (str(start_weights), str(digits / "train"), "--out", "out.safetensors", *DIGITS, *overrides, "--json")
    message = refused(swa_dist("recalibrate", *arguments, cwd=tmp_path), ExitCode.BAD_CONFIG)
    assert "`data.group_images`" in message
    assert not list(tmp_path.iterdir())
