"""The recipe: what is refused and how it is explained, what round-trips, and what the run key holds."""

import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swa_dist import config
from swa_dist.errors import ConfigError, ExitCode

TREE = {
    "name": "small",
    "model": {"arch": "resnet18", "weights": "start.safetensors", "num_classes": 10},
    "data": {"name": "digits", "train": "data/train", "val": "data/val", "global_batch": 64, "group_images": 16},
    "optim": {"epochs": 6},
    "schedule": {"name": "cyclical", "max_lr": 0.05, "min_lr": 0.005},
    "registry": {"model": "small-resnet"},
}

# The other kinds of sections that have several: a base recipe for each.
KINDS = {
    "plain": {},
    "constant": {"schedule": {"name": "constant", "lr": 0.05}},
    "cosine": {"schedule": {"name": "cosine", "max_lr": 0.05, "min_lr": 0.005}},
    "linear": {"schedule": {"name": "linear", "max_lr": 0.05, "min_lr": 0.005}},
    "ema": {"average.ema": {"decay": 0.99}},
}

# A valid other value for every field that decides the result.
OTHER = {
    "guard.spike_factor": 50.0,
    "seed": 1,
    "precision": "bf16",
    "model.arch": "resnet34",
    "model.num_classes": 11,
    "model.head": "replace",
    "data.global_batch": 128,
    "data.group_images": 8,
    "data.image_size": 200,
    "data.resize_size": 300,
    "data.crop_area": [0.1, 1.0],
    "data.crop_ratio": [0.8, 1.25],
    "data.flip": False,
    "optim.epochs": 12,
    "optim.momentum": 0.8,
    "optim.weight_decay": 0.0,
    "optim.label_smoothing": 0.1,
    "optim.head_lr_multiplier": 10.0,
    "optim.scale_lr": "linear",
    "schedule.lr": 0.06,
    "schedule.start_lr": 0.01,
    "schedule.ramp_epochs": 0.5,
    "schedule.max_lr": 0.06,
    "schedule.min_lr": 0.004,
    "data.shard_window": 4,
    "schedule.cycle_epochs": 2,
    "schedule.warmup_epochs": 0.5,
    "average.points": 3,
    "average.include_start": True,
    "average.start_epoch": 2,
    "average.also_after_epochs": [3],
    "average.window": 2,
    "average.ema": {"decay": 0.9},
    "average.ema.decay": 0.9,
    "average.keep_iterates": 1,
    "average.sync": "local",
    "average.num_replicas": 2,
    "average.sync_every": 10,
    "recalibrate.images": 100,
    "recalibrate.error_below": 0.02,
    "recalibrate.transforms": "eval",
    "recalibrate.second_pass": "remove",
    "evaluate.candidate": "last",
}

# What must be so for a field of OTHER to have another value, of the recipe before and after.
WHERE = {
    "average.num_replicas": ({"average.sync": "local"}, {"cluster.num_workers": 2}),
    "average.sync_every": ({"average.sync": "local"}, {}),
}

# A valid other value for every field that says where things are and how they are run.
ELSEWHERE = {
    "name": "other",
    "model.weights": "/elsewhere/start.pth",
    "model.weights_sha256": "0" * 64,
    "data.name": "numbers",
    "data.kind": "imagenet",
    "data.train": "s3://bucket/train",
    "data.val": "/mnt/val",
    "data.index": "s3://bucket/index",
    "data.num_threads": 7,
    "data.read_threads": 64,
    "data.groups_ahead": 8,
    "data.keep_decoded_gb": 2.5,
    "data.cache_dir": "/scratch/images",
    "data.cache_gb": 100.0,
    "data.max_bad_share": 0.01,
    "data.val_labels": "/data/labels.txt",
    "evaluate.published_top1": 76.1,
    "evaluate.preflight": "warn",
    "checkpoint.keep_last": 5,
    "checkpoint.interval_seconds": 60.0,
    "checkpoint.keep_epochs": 2,
    "checkpoint.mean_hours_between_failures": 100.0,
    "guard.max_skips_in_a_row": 3,
    "retention.checkpoints": "all",
    "retention.run_days": 30,
    "retention.spools": "unsent",
    "checkpoint.extend_from": "/mnt/runs/swa-0123456789ab",
    "tracking.uri": "https://mlflow.example:5000",
    "tracking.experiment": "another",
    "tracking.log_every_steps": 1,
    "tracking.system_metrics": False,
    "registry.model": "renamed",
    "registry.first": "promote",
    "registry.promote": "hold",
    "registry.lock_url": "s3://locks/model",
    "registry.gate.evidence": "start",
    "registry.gate.min_gain": 0.2,
    "registry.gate.max_class_loss": 10.0,
    "registry.gate.max_ece_rise": 2.0,
    "cluster.launcher": "process",
    "cluster.num_workers": 4,
    "cluster.min_workers": 1,
    "cluster.max_failures": 0,
    "cluster.cpus_per_worker": 2.5,
    "cluster.gpus_per_worker": 1,
    "cluster.address": "ray://head:10001",
    "cluster.start_timeout_seconds": 5,
    "cluster.collective_timeout_seconds": 6,
    "output.dir": "/mnt/runs",
}


@pytest.fixture
def recipe():
    return config.from_tree(TREE)


@pytest.fixture
def write(tmp_path):
    def write_text(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_text


@pytest.fixture
def recipe_file(recipe, write):
    return write(config.to_yaml(recipe))


def refusal(*arguments, **keywords):
    """The message of the ConfigError that loading ends with."""
    with pytest.raises(ConfigError) as caught:
        config.load(*arguments, **keywords)
    return str(caught.value)


# Mistakes and how they are explained


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("optim.epcohs", "epochs"),
        ("data.group_image", "group_images"),
        ("schedule.maxlr", "max_lr"),
        ("cluster.workers", "num_workers"),
        ("sed", "seed"),
        ("optmi.epochs", "optim"),
    ],
)
def test_a_misspelt_key_gives_the_likely_one(recipe_file, misspelt, meant):
    assert f"did you mean `{meant}`?" in refusal(recipe_file, [f"{misspelt}=3"])


def test_a_key_like_no_other_lists_those_of_its_section(recipe_file):
    message = refusal(recipe_file, ["output.zzz=3"])
    assert "`output.zzz` is not a setting; known here: dir." in message


def test_a_key_of_the_other_schedule_is_refused_with_those_of_this_one(recipe_file):
    message = refusal(recipe_file, ["schedule={name: constant, lr: 0.1, qqq: 2}"])
    assert "`schedule.qqq` is not a setting; known here: lr, name, ramp_epochs, start_lr, warmup_epochs." in message


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("average.ema={decay: 2}", "`average.ema.decay` must be less than 1, but is 2."),
        ("average.ema={dcay: 0.9, decay: 0.9}", "`average.ema.dcay` is not a setting; did you mean `decay`?"),
        ("average.ema={}", "`average.ema.decay` is missing."),
    ],
)
def test_a_mistake_in_an_optional_section_is_explained_in_one_sentence(recipe_file, override, sentence):
    message = refusal(recipe_file, [override])
    assert sentence in message
    assert "1 problem" in message


def test_three_mistakes_in_one_file_are_all_named_in_one_error(recipe, write):
    text = config.to_yaml(recipe).replace("epochs: 6", "epochs: 0").replace("num_classes: 10", "num_classes: ten")
    path = write(text.replace("momentum:", "momentun:"))
    message = refusal(path)
    assert f"{path}: 3 problems" in message
    assert "`optim.epochs` must be greater than or equal to 1, but is 0." in message
    assert "`model.num_classes` must be a valid integer, but is 'ten'." in message
    assert "`optim.momentun` is not a setting; did you mean `momentum`?" in message


def test_every_missing_section_is_named(write):
    message = refusal(write("name: empty\n"))
    for section in ("model", "data", "optim", "schedule", "registry"):
        assert f"`{section}` is missing." in message


def test_a_field_that_takes_a_word_or_a_number_is_explained_in_one_sentence(recipe_file):
    message = refusal(recipe_file, ["data.num_threads=-1"])
    assert "`data.num_threads` must be 'auto' or greater than or equal to 1, but is -1." in message
    assert "1 problem" in message


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("schedule.max_lr=.nan", "finite"),
        ("schedule.max_lr=.inf", "finite"),
        ("optim.epochs=2.5", "integer"),
        ("optim.epochs='5'", "integer"),
        ("data.flip=yes", "boolean"),  # YAML 1.2: only true and false are
        ("seed=-1", "greater than or equal to 0"),
        ("precision=fp16", "'float32' or 'bf16'"),
        ("schedule.name=cosinus", "one of 'cyclical', 'constant', 'cosine', 'linear'"),
        ("schedule.cycle_epochs=0", "greater than"),
        ("optim.scale_lr=log", "'none', 'linear' or 'sqrt'"),
        ("average.points=0", "'cycle' or 'epoch' or greater than or equal to 1"),
        ("average.points=0.5", "'cycle' or 'epoch' or a valid integer"),
        ("average.also_after_epochs=5", "array"),
        ("average.sync_every=0", "'never' or greater than or equal to 1"),
        ("recalibrate.images=some", "'all' or 'auto' or a valid integer"),
        ("recalibrate.error_below=0", "greater than 0"),
        ("evaluate.published_top1=101", "less than or equal to 100"),
        ("data.kind=cifar", "'imagenet' or 'other'"),
        ("model.weights_sha256=abc", "like ^(auto|"),
        ("data.crop_area=[0.9, 0.1]", "0 < least <= most <= 1"),
        ("data.crop_ratio=[0, 1]", "0.01 <= least"),
        ("average=", "object"),
    ],
)
def test_a_value_of_the_wrong_kind_or_range_is_refused_by_name(recipe_file, override, says):
    message = refusal(recipe_file, [override])
    assert f"`{override.partition('=')[0]}` must be" in message
    assert says in message


def test_a_missing_file_is_a_config_error(tmp_path):
    assert f"{tmp_path / 'absent.yaml'} does not exist" in refusal(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "just words",
        "- a\n- list\n",
        "a: [",
        "a: b: c",
        "\tname: x",
        "name: x\n---\nname: y\n",
        "name: !!python/object/apply:os.system [true]\n",
        "? [a, b]\n: c\n",
        "name: &a [*a]\n",
        pytest.param("name: " + "[" * 2000 + "]" * 2000, id="nested-too-deeply"),
        pytest.param("seed: " + "9" * 5000, id="a-number-of-5000-digits"),
    ],
)
def test_a_file_that_is_no_tree_of_settings_is_a_config_error(write, text):
    with pytest.raises(ConfigError):
        config.load(write(text))


def test_a_folder_and_a_binary_file_are_config_errors(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path, tmp_path / "binary.yaml"):
        assert "must be a readable YAML file" in refusal(path)


# YAML 1.2


def test_a_number_without_a_point_in_scientific_notation_is_a_number(recipe, write):
    path = write(config.to_yaml(recipe).replace("max_lr: 0.05", "max_lr: 1e-1").replace("0.005", "1e-3"))
    loaded = config.load(path)
    assert (loaded.schedule.max_lr, loaded.schedule.min_lr) == (0.1, 0.001)


def test_a_doubled_key_is_an_error_that_names_it(recipe, write):
    message = refusal(write(config.to_yaml(recipe) + "\nseed: 1\n"))
    assert '"seed"' in message
    assert "duplicate" in message


# Overrides


def test_an_override_replaces_one_setting_and_leaves_the_rest(recipe, recipe_file):
    loaded = config.load(recipe_file, ["optim.epochs=12"])
    assert loaded.optim.epochs == 12
    assert config.replace(loaded, **{"optim.epochs": 6}) == recipe


def test_the_last_override_of_a_setting_wins(recipe_file):
    assert config.load(recipe_file, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("schedule.min_lr=1e-3", "schedule.min_lr", 0.001),
        ("data.crop_area=[0.5, 1]", "data.crop_area", [0.5, 1.0]),
        ("model.weights=/a=b/c.pth", "model.weights", "/a=b/c.pth"),
        ("data.flip=false", "data.flip", False),
        ("average.include_start=true", "average.include_start", True),
        ("recalibrate={images: 99}", "recalibrate.images", 99),
    ],
)
def test_an_override_is_a_yaml_value(recipe_file, override, field, value):
    assert config.flatten(config.to_tree(config.load(recipe_file, [override])))[field] == value


def test_an_override_may_name_a_section_that_the_file_leaves_out(write):
    text = "\n".join(
        (
            "name: small",
            "model: {arch: resnet18, weights: w.pth}",
            "data: {name: d, train: t, val: v}",
            "optim: {epochs: 5}",
            "schedule: {name: constant, lr: 0.1}",
            "registry: {model: m}",
        )
    )
    assert config.load(write(text), ["output.dir=/mnt/runs"]).output.dir == "/mnt/runs"


@pytest.mark.parametrize("override", ["optim.epochs", "=3", "optim.=3", "optim..epochs=3", "optim.epochs=[", ""])
def test_a_malformed_override_is_named(recipe_file, override):
    message = refusal(recipe_file, [override])
    assert "`--set" in message
    assert repr(override) in message or "optim.epochs" in message


def test_an_override_inside_a_value_says_that_it_is_no_section(recipe_file):
    assert "`name` is a value, not a section" in refusal(recipe_file, ["name.x=3"])


# Settings that are each fine and together are not


@pytest.mark.parametrize(
    ("global_batch", "group_images", "workers"),
    [(64, 16, 5), (64, 32, 3), (64, 64, 2), (256, 32, 9), (100, 30, 7), (8, 4, 4), (8, 4, 5), (2, 2, 2)],
)
def test_more_workers_than_groups_names_a_group_size_or_a_batch_that_does(recipe, global_batch, group_images, workers):
    fields = {
        "data.global_batch": global_batch,
        "data.group_images": group_images,
        "cluster.num_workers": workers,
    }
    with pytest.raises(ConfigError, match=r"`cluster\.num_workers` must be at most the groups") as caught:
        config.replace(recipe, **fields)
    message = str(caught.value)
    group = re.search(r"`data\.group_images` to (\d+)", message)
    batch = re.search(r"`data\.global_batch` to (\d+)", message)
    assert group or batch, "no remedy is named"
    if group:
        assert config.replace(recipe, **fields | {"data.group_images": int(group[1])}).groups_per_batch >= workers
    if batch:
        assert config.replace(recipe, **fields | {"data.global_batch": int(batch[1])}).groups_per_batch >= workers


def test_as_many_workers_as_groups_are_fine(recipe):
    assert config.replace(recipe, **{"cluster.num_workers": 4}).groups_per_batch == 4


def test_a_group_larger_than_the_batch_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"`data\.group_images` must be at most `data\.global_batch` \(64\)"):
        config.replace(recipe, **{"data.group_images": 65})
    assert config.replace(recipe, **{"data.group_images": 64}).groups_per_batch == 1


CYCLE_REMEDY = re.compile(r"([0-9.e+-]+) \((\d+) cycles?\)")


def test_a_cycle_that_does_not_divide_the_epochs_names_the_nearest_that_do(recipe):
    with pytest.raises(ConfigError, match=r"`schedule\.cycle_epochs` must divide `optim\.epochs` \(6\)") as caught:
        config.replace(recipe, **{"schedule.cycle_epochs": 4})
    assert "Nearest: 6 (1 cycle) or 3 (2 cycles)." in str(caught.value)
    for cycle in (0.25, 1, 1.5, 2, 3, 6):
        assert config.replace(recipe, **{"schedule.cycle_epochs": cycle}).cycle_epochs == cycle


@settings(deadline=None, derandomize=True, database=None)
@given(epochs=st.integers(1, 1000), cycle_epochs=st.floats(1e-3, 1000))
def test_a_cycle_that_the_message_names_is_accepted_and_is_so_many_cycles(epochs, cycle_epochs):
    base = TREE | {"optim": {"epochs": epochs}}
    try:
        config.from_tree(base | {"schedule": TREE["schedule"] | {"cycle_epochs": cycle_epochs}})
    except ConfigError as error:
        remedies = CYCLE_REMEDY.findall(str(error))
    else:
        assume(False)
    assert remedies
    for written, cycles in remedies:
        mended = config.from_tree(base | {"schedule": TREE["schedule"] | {"cycle_epochs": float(written)}})
        assert mended.cycle_epochs * int(cycles) == epochs


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 10, 300])
@pytest.mark.parametrize(("written", "cycles"), [(0.333333, 3), (0.666667, 1.5), (0.166667, 6), (0.142857, 7)])
def test_a_fraction_of_an_epoch_written_with_six_digits_is_that_fraction(recipe, epochs, written, cycles):
    if epochs * cycles % 1:
        epochs *= 2
    cyclical = config.replace(recipe, **{"optim.epochs": epochs, "schedule.cycle_epochs": written})
    assert cyclical.cycle_epochs * Fraction(cycles) == 1


@pytest.mark.parametrize("cycle_epochs", [6.1, 1000, 5.999, 1e-320])
def test_a_cycle_longer_than_the_run_or_unthinkably_short_is_refused(recipe, cycle_epochs):
    with pytest.raises(ConfigError, match=r"`schedule\.cycle_epochs` must"):
        config.replace(recipe, **{"schedule.cycle_epochs": cycle_epochs})


@pytest.mark.parametrize(
    ("schedule", "points", "epochs"),
    [
        ("plain", "cycle", Fraction(3)),
        ("constant", "cycle", Fraction(1)),
        ("cosine", "cycle", Fraction(1)),
        ("plain", "epoch", Fraction(1)),
        ("plain", 3, Fraction(1, 3)),
    ],
)
def test_averaging_points_are_so_far_apart(recipe, schedule, points, epochs):
    base = config.replace(recipe, **{"schedule.cycle_epochs": 3.0})
    assert config.replace(base, **KINDS[schedule] | {"average.points": points}).averaging_epochs == epochs


# Each pair: settings that contradict each other, the field the message names, and what it says to do.
CONTRADICTIONS = {
    "an average after the last epoch": (
        {"average.also_after_epochs": [6]},
        "average.also_after_epochs",
        {"average.also_after_epochs": [5]},
    ),
    "an average before the first iterate": (
        {"average.also_after_epochs": [2, 4], "average.start_epoch": 2},
        "average.also_after_epochs",
        {"average.also_after_epochs": [3, 4]},
    ),
    "averages out of order": (
        {"average.also_after_epochs": [4, 3, 3]},
        "average.also_after_epochs",
        {"average.also_after_epochs": [3, 4]},
    ),
    "an EMA that is not kept": (
        {"evaluate.candidate": "ema"},
        "evaluate.candidate",
        {"average.ema": {"decay": 0.99}},
    ),
    "a window that is not kept": ({"evaluate.candidate": "window"}, "evaluate.candidate", {"average.window": 3}),
    "replicas under DDP": ({"average.num_replicas": 2}, "average.num_replicas", {"average.num_replicas": 1}),
    "meetings under DDP": ({"average.sync_every": 3}, "average.sync_every", {"average.sync_every": "never"}),
    "fewer replicas than workers": (
        {"average.sync": "local", "cluster.num_workers": 2},
        "average.num_replicas",
        {"average.num_replicas": 2},
    ),
    "more replicas than workers": (
        {"average.sync": "local", "average.num_replicas": 3},
        "average.num_replicas",
        {"average.num_replicas": 1},
    ),
    "an EMA of replicas": (
        {"average.sync": "local", "average.ema": {"decay": 0.99}},
        "average.ema",
        {"average.ema": "off"},
    ),
    "a ramp longer than the run": (
        KINDS["constant"] | {"schedule.ramp_epochs": 6.5},
        "schedule.ramp_epochs",
        {"schedule.ramp_epochs": 6.0},
    ),
    "a cosine extended": (
        KINDS["cosine"] | {"checkpoint.extend_from": "runs/shorter"},
        "checkpoint.extend_from",
        {"checkpoint.extend_from": "nothing"},
    ),
    "a line extended": (
        KINDS["linear"] | {"checkpoint.extend_from": "runs/shorter"},
        "checkpoint.extend_from",
        {"checkpoint.extend_from": "nothing"},
    ),
    "a cosine that rises": (
        KINDS["cosine"] | {"schedule.min_lr": 0.06},
        "schedule.min_lr",
        {"schedule.min_lr": 0.05},
    ),
    "a line that rises": (KINDS["linear"] | {"schedule.min_lr": 0.06}, "schedule.min_lr", {"schedule.min_lr": 0.05}),
}


@pytest.mark.parametrize(("fields", "named", "remedy"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_named_once_and_what_it_says_to_do_mends_it(recipe, fields, named, remedy):
    with pytest.raises(ConfigError) as caught:
        config.replace(recipe, **fields)
    message = str(caught.value)
    assert f"`{named}`" in message
    assert "1 problem\n" in message
    for field in remedy:
        assert f"`{field}`" in message
    mended = config.flatten(config.to_tree(config.replace(recipe, **fields | remedy)))
    assert mended.items() >= config.flatten(remedy).items()


@pytest.mark.parametrize("kind", ["plain", "constant"])
def test_a_schedule_that_does_not_depend_on_the_length_of_the_run_may_be_extended(recipe, kind):
    fields = KINDS[kind] | {"checkpoint.extend_from": "runs/shorter"}
    assert config.replace(recipe, **fields).checkpoint.extend_from == "runs/shorter"


def test_a_start_epoch_that_leaves_nothing_to_average_is_refused(recipe):
    assert config.replace(recipe, **{"average.start_epoch": 5}).average.start_epoch == 5
    with pytest.raises(ConfigError, match=r"`average\.start_epoch` must be less than .*nothing would be averaged"):
        config.replace(recipe, **{"average.start_epoch": 6})


def test_a_lowest_rate_above_the_highest_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"`schedule\.min_lr` must be at most `schedule\.max_lr` \(0\.05\)"):
        config.replace(recipe, **{"schedule.min_lr": 0.06})
    assert config.replace(recipe, **{"schedule.min_lr": 0.05}).schedule.min_lr == 0.05


def test_a_warm_up_longer_than_the_run_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"`schedule\.warmup_epochs` must be at most `optim\.epochs` \(6\)"):
        config.replace(recipe, **{"schedule.warmup_epochs": 6.5})


def test_an_evaluation_crop_larger_than_the_resized_image_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"`data\.resize_size` must be at least `data\.image_size`"):
        config.replace(recipe, **{"data.image_size": 257})


def test_all_contradictions_are_named_at_once(recipe):
    with pytest.raises(ConfigError) as caught:
        config.replace(recipe, **{"schedule.cycle_epochs": 4, "average.start_epoch": 6, "schedule.min_lr": 0.06})
    for field in ("schedule.cycle_epochs", "average.start_epoch", "schedule.min_lr"):
        assert f"`{field}`" in str(caught.value)


# Values and copies


def test_replace_checks_again(recipe):
    with pytest.raises(ConfigError, match=r"`optim\.epochs`"):
        config.replace(recipe, **{"optim.epochs": 0})
    with pytest.raises(ConfigError, match=r"did you mean `epochs`"):
        config.replace(recipe, **{"optim.epoch": 3})


def test_replace_leaves_the_original_alone(recipe):
    before = config.to_tree(recipe)
    assert config.replace(recipe, **{"optim.epochs": 12}).optim.epochs == 12
    assert config.to_tree(recipe) == before


def test_a_recipe_cannot_be_changed_in_place(recipe):
    with pytest.raises(Exception, match=r"frozen|cannot assign"):
        recipe.optim.epochs = 7


ROUND_TRIPS = KINDS | {
    "other": {name: OTHER[name] for name in config.flatten(config.to_tree(config.from_tree(TREE))) if name in OTHER}
    | {"average.ema": "off", "cluster.num_workers": 2},
    "elsewhere": ELSEWHERE,
}


@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_a_recipe_round_trips_through_its_tree_and_its_yaml(recipe, write, fields):
    recipe = config.replace(recipe, **fields)
    assert config.from_tree(config.to_tree(recipe)) == recipe
    again = config.load(write(config.to_yaml(recipe)))
    assert again == recipe
    assert config.fingerprint(again) == config.fingerprint(recipe)


@pytest.mark.parametrize(
    "word", ["null", "~", "true", "1", "1e-3", "0x10", ".nan", "2020-01-01", "a: b", "# x", " é\n", "[", "'", "*a", ""]
)
def test_a_text_that_looks_like_something_else_stays_a_text(recipe, write, word):
    recipe = config.replace(recipe, **{"data.name": word, "output.dir": word})
    assert config.load(write(config.to_yaml(recipe))) == recipe


def test_a_whole_number_where_a_fraction_may_stand_is_the_same_recipe(recipe_file):
    one, other = (config.load(recipe_file, [f"schedule.max_lr={text}"]) for text in ("1", "1.0"))
    assert config.run_key(one, "w", "d") == config.run_key(other, "w", "d")


def test_the_schema_allows_no_other_key_and_describes_every_section():
    schema = config.schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(config.to_tree(config.from_tree(TREE)))
    assert all(part["additionalProperties"] is False for part in schema["$defs"].values())


# The run key


def of_kind(kind):
    return config.replace(config.from_tree(TREE), **KINDS[kind])


def field_names(kind, *, in_key):
    flat = config.flatten(config.to_tree(of_kind(kind)))
    return sorted(name for name in flat if config.in_key(name) is in_key)


# Every field in the key, once: of the plain recipe, and those that only another kind of a section has.
IN_KEY = [
    pytest.param(kind, field, id=f"{kind}-{field}")
    for kind in KINDS
    for field in field_names(kind, in_key=True)
    if field != "schedule.name" and (kind == "plain" or field.startswith(("schedule.", "average.ema")))
]


def test_every_kind_of_schedule_is_tried():
    kinds = {of_kind(kind).schedule.name for kind in KINDS}
    assert kinds == set(config.schema()["properties"]["schedule"]["discriminator"]["mapping"])


def test_every_entry_of_not_in_key_is_a_field_or_a_section(recipe):
    tree = config.to_tree(recipe)
    assert set(tree) | set(config.flatten(tree)) >= config.NOT_IN_KEY


@pytest.mark.parametrize(("kind", "field"), IN_KEY)
def test_the_key_changes_with_each_field_that_decides_the_result(kind, field):
    before, after = WHERE.get(field, ({}, {}))
    recipe = config.replace(of_kind(kind), **before)
    changed = config.replace(recipe, **{field: OTHER[field]} | after)
    assert config.run_key(changed, "w", "d") != config.run_key(recipe, "w", "d")


def test_the_key_changes_with_the_kind_of_schedule(recipe):
    rates = {"max_lr": 0.05, "min_lr": 0.05, "warmup_epochs": 0.0}
    schedules = [{"name": name} | rates for name in ("cyclical", "cosine", "linear")]
    schedules.append({"name": "constant", "lr": 0.05})
    assert len({config.run_key(config.replace(recipe, schedule=one), "w", "d") for one in schedules}) == 4


@pytest.mark.parametrize("field", field_names("plain", in_key=False))
def test_the_key_is_the_same_wherever_and_on_however_many_workers_it_runs(recipe, field):
    changed = config.replace(recipe, **{field: ELSEWHERE[field]})
    assert changed != recipe
    assert config.run_key(changed, "w", "d") == config.run_key(recipe, "w", "d")
    assert config.fingerprint(changed) != config.fingerprint(recipe)


def test_the_key_changes_with_the_weights_and_with_the_data(recipe):
    keys = {config.run_key(recipe, weights, data) for weights in ("a", "b") for data in ("a", "b")}
    assert len(keys) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in keys)


def test_the_key_changes_with_the_numerics_version(recipe, monkeypatch):
    before = config.run_key(recipe, "w", "d")
    monkeypatch.setattr(config, "NUMERICS_VERSION", config.NUMERICS_VERSION + 1)
    assert config.run_key(recipe, "w", "d") != before


def test_the_key_is_the_same_in_another_process(recipe, recipe_file):
    script = f"from swa_dist import config; print(config.run_key(config.load({str(recipe_file)!r}), 'w', 'd'))"
    environment = {"PYTHONHASHSEED": "123", "PATH": ""}
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert out.stdout.strip() == config.run_key(recipe, "w", "d")


def test_no_field_in_the_key_is_left_to_the_hardware():
    """`auto` in the key would give two machines one key and two results."""
    for path in sorted((Path(__file__).parents[2] / "jobs").glob("*.yaml")):
        flat = config.flatten(config.to_tree(config.load(path)))
        assert [name for name, value in flat.items() if config.in_key(name) and value == "auto"] == []


# Starting is instant


@pytest.mark.parametrize(
    "arguments",
    [None, ["--help"], ["check", "RECIPE"], ["show", "RECIPE"], ["schema"], ["finetune", "--help"]],
    ids=lambda a: "import" if a is None else "-".join(a),
)
def test_what_needs_no_network_imports_no_torch(recipe_file, arguments):
    script = "import sys, swa_dist.config\n"
    if arguments is not None:
        arguments = [str(recipe_file) if a == "RECIPE" else a for a in arguments]
        script += f"import swa_dist.cli\nsys.argv = ['swa-dist', *{arguments!r}]\n"
        script += "try:\n    swa_dist.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
    script += "heavy = {'torch', 'torchvision', 'mlflow', 'ray', 'nvidia', 'numpy', 'scipy', 'sklearn', 'pyarrow'}\n"
    script += "sys.exit(f'HEAVY {sorted(heavy & set(sys.modules))}' if heavy & set(sys.modules) else 0)\n"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stdout + out.stderr


def test_a_config_error_ends_the_command_line_with_its_own_code():
    assert ConfigError.exit_code == ExitCode.BAD_CONFIG == 78
