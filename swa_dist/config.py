"""The recipe: a frozen tree of settings, loaded from YAML, overridden, checked and explained. Imports no torch.

Every field decides the result and enters the run key, unless it is listed in `NOT_IN_KEY`.
"""

import dataclasses
import difflib
import hashlib
import io
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import ruamel.yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from ruamel.yaml.error import YAMLError

from swa_dist.errors import ConfigError

# Bump by hand when a change alters the numbers of an unchanged recipe: finished runs are then not taken for new ones.
NUMERICS_VERSION = 3

# The head of torchvision's models and the paper's learning rates are for this global batch.
PAPER_GLOBAL_BATCH = 256

_FROZEN = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

Positive = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, le=10)]
Floor = Annotated[float, Field(ge=0, le=10)]
Epochs = Annotated[float, Field(ge=0, le=1000)]


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Model:
    arch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
    """A torchvision classifier: resnet50, resnet152, densenet161, ..."""
    weights: str
    """Where the run starts: a torchvision weights name (IMAGENET1K_V1), a path or an https:// address of a state_dict
    (.pth, .pt) or a .safetensors file, or a version in the model registry (models:/NAME@champion)."""
    weights_sha256: Annotated[str, Field(pattern=r"^(auto|[0-9a-f]{64})$")] = "auto"
    """The file's SHA-256. `auto`: the one found at first use, which the run key holds from then on."""
    num_classes: Annotated[int, Field(ge=2, le=1_000_000)] = 1000
    """How many classes the data has."""
    head: Literal["keep", "replace"] = "keep"
    """`replace`: a new, randomly initialised last layer, for other classes than those of the weights."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Data:
    name: str
    """What the data set is called in MLflow."""
    kind: Literal["imagenet", "other"] = "other"
    """`imagenet`: ILSVRC 2012, whose numbers of images and classes are then checked."""
    train: str
    """Where the training images are, on disk or S3: a folder with a sub-folder per class, or tar shards as WebDataset
    names them."""
    val: str
    """Where the validation images are, with the same classes; or one flat folder of them, for `val_labels`."""
    val_labels: str = "auto"
    """For a flat folder: the file that says the images' classes. `auto`: one of the names that ImageNet's have, in the
    folder or beside it."""
    global_batch: Annotated[int, Field(ge=2, le=1_048_576)] = PAPER_GLOBAL_BATCH
    """Images per optimizer step, over all workers."""
    group_images: Annotated[int, Field(ge=2, le=65_536)] = 32
    """Images that go through the network, and so through BatchNorm, together. Not per worker: a part of the result."""
    image_size: Annotated[int, Field(ge=8, le=4096)] = 224
    """Height and width of the network's input, pixels."""
    resize_size: Annotated[int, Field(ge=8, le=4096)] = 256
    """Evaluation: the shorter side after resizing, before the centre crop, pixels."""
    crop_area: Annotated[tuple[float, float], Field(strict=False)] = (0.08, 1.0)
    """Training: share of the image's area that a random crop takes, least and most."""
    crop_ratio: Annotated[tuple[float, float], Field(strict=False)] = (0.75, 4 / 3)
    """Training: width / height of a random crop, least and most."""
    flip: bool = True
    """Training: mirror every other image."""
    index: str = "scan"
    """Folder, on disk or S3, of the indices that `swa-dist data index --recipe` wrote. `scan`: read the images' headers
    at each start; a submission, which doesn't see the images, needs an index."""
    shard_window: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Training from shards: so many at a time, in random order, are shuffled together. More are closer to a shuffle of
    all images, fewer are read more locally."""
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Share of a split's images that may turn out not to be decodable; each is left out and named. With more the run
    ends. One image may always be bad, unless this is 0."""
    num_threads: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    """Decoding threads per worker. `auto`: the cores this worker has."""
    read_threads: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Reading threads per worker. `auto`: the cores this worker has; 32 for S3."""
    groups_ahead: Literal["auto"] | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    """Groups whose encoded images each worker reads ahead. `auto`: 4; for S3 256 images."""
    keep_decoded_gb: Literal["auto"] | Annotated[float, Field(ge=0, le=1_000_000)] = "auto"
    """Memory per worker for decoded images of the evaluation and the recalibration, which are looked at several times.
    `auto`: its share of a quarter of what is free."""
    cache_dir: Annotated[str, Field(min_length=1)] = "auto"
    """Folder on each machine for images from S3. `auto`: in the user's cache folder."""
    cache_gb: Literal["auto"] | Annotated[float, Field(ge=0, le=1_000_000)] = "auto"
    """How much of them is kept there. `auto`: half of what is free on that disk; in a Kubernetes pod nothing, unless
    `cache_dir` is given, since the limits of its volumes can't be seen from within. 0: nothing."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Optim:
    epochs: Annotated[int, Field(ge=1, le=1000)]
    """Passes over the training images."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-4
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    head_lr_multiplier: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """The last layer's learning rate, as a multiple of the others'."""
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    """How the schedule's rates change with `data.global_batch`, from those for 256."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Cyclical:
    """The paper's: falls linearly from `max_lr` to `min_lr` in each cycle, then jumps back."""

    name: Literal["cyclical"]
    max_lr: Rate
    min_lr: Floor
    cycle_epochs: Annotated[float, Field(ge=1e-6, le=1000)] = 1.0
    """Length of a cycle; 0.25 is four cycles an epoch. Must divide the run."""
    warmup_epochs: Epochs = 0.0
    """Over so many epochs at the start the rate is scaled up linearly from zero."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Constant:
    """The authors' code: one rate, after a ramp from another."""

    name: Literal["constant"]
    lr: Rate
    start_lr: Literal["same"] | Rate = "same"
    """Rate at the start of the ramp: the one that the starting weights were trained with at last."""
    ramp_epochs: Epochs = 0.0
    """`start_lr` for the first half of so many epochs, then linear; `lr` from nine tenths on."""
    warmup_epochs: Epochs = 0.0
    """Over so many epochs at the start the rate is scaled up linearly from zero."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Cosine:
    """Half a cosine from `max_lr` to `min_lr` over the whole run: a control."""

    name: Literal["cosine"]
    max_lr: Rate
    min_lr: Floor = 0.0
    warmup_epochs: Epochs = 0.0
    """Over so many epochs at the start the rate is scaled up linearly from zero."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Linear:
    """A line from `max_lr` to `min_lr` over the whole run: a control."""

    name: Literal["linear"]
    max_lr: Rate
    min_lr: Floor = 0.0
    warmup_epochs: Epochs = 0.0
    """Over so many epochs at the start the rate is scaled up linearly from zero."""


Schedule = Cyclical | Constant | Cosine | Linear
_SCHEDULES: dict[str, type] = {kind.__name__.lower(): kind for kind in typing.get_args(Schedule)}


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Ema:
    """An exponential moving average of the weights after every step, bias-corrected."""

    decay: Annotated[float, Field(gt=0, lt=1)]
    """Per step over a whole global batch; a shorter batch counts by its share."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Average:
    points: Literal["cycle", "epoch"] | Annotated[int, Field(ge=1, le=1000)] = "cycle"
    """When the weights are taken into the average: at the end of each cycle, of each epoch, or so many times an epoch.
    Of a schedule without cycles, `cycle` is an epoch."""
    include_start: bool = False
    """Whether the starting weights are one of the averaged iterates. The authors' code: no."""
    start_epoch: Annotated[int, Field(ge=0)] = 0
    """Iterates of the first so many epochs are left out."""
    also_after_epochs: Annotated[tuple[Positive, ...], Field(strict=False)] = ()
    """The average as it was after so many epochs is scored too, as swa_5 for 5. Costs an evaluation each."""
    window: Annotated[int, Field(ge=0, le=1000)] = 0
    """The mean of the last so many iterates is scored too, as window (LAWA, Kaddour 2022). 0: not."""
    ema: Literal["off"] | Ema = "off"
    """An exponential moving average that is scored too, as ema."""
    keep_iterates: Annotated[int, Field(ge=0, le=1000)] = 0
    """So many of the last iterates are kept in the run's folder."""
    sync: Literal["replicated", "local"] = "replicated"
    """`replicated`: DDP, all workers have equal weights. `local`: each worker trains by itself on its share of each
    batch, and the average is over workers too (post-local SGD, Lin et al. 2020; SWAP, Gupta et al. 2020)."""
    num_replicas: Positive = 1
    """With `local`: how many workers, since their number decides the result."""
    sync_every: Literal["never"] | Positive = "never"
    """With `local`: after so many global batches the workers' weights and momentum are set to their mean."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Recalibrate:
    images: Literal["all", "auto"] | Annotated[int, Field(ge=2)] = "all"
    """Training images that fresh BatchNorm statistics are computed from. `auto`: until `error_below` is reached."""
    error_below: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """For `auto`: the sampling error of the means, in standard deviations, of the layer where it is largest."""
    transforms: Literal["train", "eval"] = "train"
    """Random crops as in training, or the centre crops of the evaluation."""
    second_pass: Literal["off", "measure", "remove"] = "off"
    """A pass with the fresh statistics in place: `measure` how much they depend on the grouping of the images, or
    `remove` that, layer by layer: a pass for each BatchNorm layer."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Evaluate:
    candidate: Literal["swa", "last", "ema", "window"] = "swa"
    """Which weights are to be registered. Named beforehand: choosing by the result would flatter it."""
    published_top1: Literal["auto", "unknown"] | Annotated[float, Field(gt=0, le=100)] = "auto"
    """Top-1 in percent that the starting weights are known to have on this data. `auto`: torchvision's own figure where
    both are its."""
    preflight: Literal["stop", "warn"] = "stop"
    """What to do, before any training, when the starting weights are far below that."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Checkpoint:
    interval_seconds: Literal["auto", "epoch"] | Annotated[float, Field(ge=0.001, le=86_400)] = "auto"
    """Time between checkpoints within an epoch; each epoch's end is one besides. `auto`: the interval that loses the
    least to writing and to failures together (Young 1974, Daly 2006), from the measured cost of a checkpoint and
    `mean_hours_between_failures`. `epoch`: none but those at epochs' ends."""
    mean_hours_between_failures: Annotated[float, Field(gt=0, le=100_000)] = 6.0
    """Of all machines of the run together, for `auto`. Machines that can be reclaimed: about 6; others: far more."""
    keep_last: Positive = 2
    """Checkpoints that are kept while the run goes on, beside those of epochs' ends."""
    keep_epochs: Literal["all"] | Annotated[int, Field(ge=0, le=1000)] = "all"
    """Checkpoints of epochs' ends that are kept while the run goes on: the last so many."""
    extend_from: str = "nothing"
    """Folder of a finished, shorter run of the same recipe, which this one then goes on from."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Guard:
    """Steps that would do harm are skipped, by all workers alike."""

    spike_factor: Literal["off"] | Annotated[float, Field(ge=10, le=1e12)] = 1000.0
    """Skip a step whose gradient is so many times longer than the median of the last 64. One that is not finite is
    skipped in any case."""
    max_skips_in_a_row: Positive = 10
    """After so many skipped steps in a row the run ends, at its last good checkpoint."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Retention:
    """What is kept of finished runs. Files of a version that has an alias in the registry (@champion) always are."""

    checkpoints: Literal["all", "last"] = "last"
    """Of this run, once it is finished. The last is what a longer run can go on from."""
    spools: Literal["all", "unsent"] = "all"
    """Of this run, once it is finished: what MLflow was told. `unsent`: removed when all of it is sent."""
    run_days: Literal["forever"] | Annotated[int, Field(ge=1, le=36_500)] = "forever"
    """Finished runs in `output.dir` that are older are removed when a run finishes."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Tracking:
    uri: str = "auto"
    """MLflow's address. `auto`: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the folder of the command."""
    experiment: str = "swa_dist"
    log_every_steps: Positive = 50
    system_metrics: bool = True
    """Log CPU, memory, disk, network and GPUs of each machine too: a sample every 10 seconds, or as
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says, in seconds."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Gate:
    """What a version must show to become @champion, on the images that the one there was scored on."""

    evidence: Literal["start-and-last", "start"] = "start-and-last"
    """What it must be better than in its own run: where it started and plain fine-tuning, or where it started alone.
    Of `evaluate.candidate: last`, which is plain fine-tuning, the start alone."""
    min_gain: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Top-1 over @champion's, percentage points. In any case more than chance would give."""
    max_class_loss: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Percentage points of top-1 that any class may lose; one that loses more, beyond chance among so many classes,
    stands in the way."""
    max_ece_rise: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Expected calibration error over @champion's, percentage points."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Registry:
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]
    """Name of the registered model."""
    promote: Literal["auto", "hold"] = "auto"
    """At the run's end: make its version @champion if the gate lets it, or leave that to `swa-dist promote`."""
    first: Literal["promote", "hold"] = "hold"
    """While the name has never had a @champion: make a version it whatever the verdict, or leave that to a person."""
    gate: Gate = Gate()
    lock_url: Annotated[str, Field(min_length=1)] = "auto"
    """File, on a disk that all who promote share or on S3, by which one at a time does. `auto`: in `output.dir`. The
    registered model keeps the first one."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Cluster:
    launcher: Literal["ray", "process"] = "ray"
    """`ray`: Ray Train workers. `process`: this one process. Under torchrun its processes are the workers."""
    num_workers: Annotated[int, Field(ge=1, le=16_384)] = 1
    min_workers: Literal["all"] | Annotated[int, Field(ge=1, le=16_384)] = "all"
    """With `ray`: go on with as few as these while the cluster has no more. `all`: wait for `num_workers`."""
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    """With `ray`: how often workers that died are started again, from the last checkpoint, before the run fails. Nodes
    that are taken away with notice don't count."""
    cpus_per_worker: Annotated[float, Field(gt=0, le=1024)] = 1.0
    gpus_per_worker: Literal["auto"] | Annotated[int, Field(ge=0, le=1)] = "auto"
    """`auto`: one where the machine has any."""
    address: Annotated[str, Field(min_length=1)] = "local"
    """`local`: a Ray of its own, ended with the run. `auto`: the Ray that this runs in. Else a head's address."""
    start_timeout_seconds: Positive = 600
    """How long to wait for workers where a cluster can still grow."""
    collective_timeout_seconds: Positive = 300
    """How long a worker waits for the others before it gives up."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Output:
    dir: str = "runs"
    """Where runs are kept; all workers must see it."""


@dataclass(frozen=True, kw_only=True, config=_FROZEN)
class Recipe:
    """Everything a fine-tuning run is told."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,40}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    precision: Literal["float32", "bf16"] = "float32"
    """Arithmetic of the forward and backward pass. Weights, sums and averages are always float32."""
    model: Model
    data: Data
    optim: Optim
    schedule: Annotated[Schedule, Field(discriminator="name")]
    average: Average = Average()
    recalibrate: Recalibrate = Recalibrate()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    guard: Guard = Guard()
    retention: Retention = Retention()
    tracking: Tracking = Tracking()
    registry: Registry
    cluster: Cluster = Cluster()
    output: Output = Output()

    @property
    def groups_per_batch(self) -> int:
        return math.ceil(self.data.global_batch / self.data.group_images)

    @property
    def cycle_epochs(self) -> Fraction:
        """Exact length of a cycle; of a schedule without cycles, one epoch."""
        if not isinstance(self.schedule, Cyclical):
            return Fraction(1)
        return Fraction(self.optim.epochs, round(self.optim.epochs / self.schedule.cycle_epochs))

    @property
    def averaging_epochs(self) -> Fraction:
        """From one averaged iterate to the next."""
        if self.average.points == "cycle":
            return self.cycle_epochs
        return Fraction(1) if self.average.points == "epoch" else Fraction(1, self.average.points)


# Where things are and how they are run. Their content enters the key by digest: `weights` and the data's.
NOT_IN_KEY = frozenset(
    {
        "name",
        "model.weights",
        "model.weights_sha256",
        "data.name",
        "data.kind",
        "data.train",
        "data.val",
        "data.index",
        "data.val_labels",
        "data.max_bad_share",
        "data.num_threads",
        "data.read_threads",
        "data.groups_ahead",
        "data.keep_decoded_gb",
        "data.cache_dir",
        "data.cache_gb",
        "evaluate.published_top1",
        "evaluate.preflight",
        "checkpoint",
        "guard.max_skips_in_a_row",
        "retention",
        "tracking",
        "registry",
        "cluster",
        "output",
    }
)

_WHOLE = 1e-5  # relative: a third of an epoch, written as 0.333333, still makes a whole number of cycles

_ADAPTER = TypeAdapter(Recipe)


def load(source: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in the YAML file `source`, with `a.b=value` overrides. Raises ConfigError naming every mistake."""
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"`RECIPE` must be a YAML file, but {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"`RECIPE` must be a readable YAML file, but {path} is not: {error}.") from None
    return parse(text, str(path), overrides)


def parse(text: str, origin: str, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in YAML text from `origin`, with `a.b=value` overrides. Raises ConfigError naming every mistake."""
    try:
        tree = _yaml().load(text)
    except (YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{origin} must be YAML, but is not: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin} must hold a tree of settings, but holds {type(tree).__name__}.")
    for override in overrides:
        _override(tree, override)
    return from_tree(tree, origin=origin)


def from_tree(tree: Mapping[str, Any], origin: str = "the recipe") -> Recipe:
    """The recipe of a plain tree of dicts, lists and scalars. Raises ConfigError naming every mistake."""
    try:
        recipe = _ADAPTER.validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        problems = _explain_all(error)
    except (ValueError, TypeError, RecursionError) as error:
        problems = [f"it must be a plain tree of settings, but is not: {error}"]
    else:
        problems = list(_contradictions(recipe))
        if not problems:
            return recipe
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise ConfigError("\n  ".join([f"{origin}: {count}", *problems]))


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dicts, lists and scalars; `from_tree` takes it back."""
    tree = _ADAPTER.dump_python(recipe, mode="json")
    assert isinstance(tree, dict)
    return tree


def to_yaml(recipe: Recipe) -> str:
    out = io.StringIO()
    writer = _yaml()
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(to_tree(recipe), out)
    return out.getvalue()


def schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors."""
    return _ADAPTER.json_schema()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 of the whole resolved recipe."""
    return _digest(to_tree(recipe))


def in_key(field: str) -> bool:
    """Whether the field, by its dotted name, decides the result."""
    return field not in NOT_IN_KEY and field.partition(".")[0] not in NOT_IN_KEY


def run_key(recipe: Recipe, weights_digest: str, data_digest: str) -> str:
    """SHA-256 over what decides the result: the same key means the same weights, wherever it runs."""
    fields = {name: value for name, value in flatten(to_tree(recipe)).items() if in_key(name)}
    return _digest({"numerics": NUMERICS_VERSION, "recipe": fields, "weights": weights_digest, "data": data_digest})


def attempt_name(run_key: str, attempt: int) -> str:
    """Of an attempt's Ray run, Ray job and RayJob: names that are given out once, and short enough for Kubernetes."""
    return f"swa-{run_key[:12]}-a{attempt}"


def parse_attempt_name(name: str) -> tuple[str, int] | None:
    """The first 12 digits of the run key and the attempt that `attempt_name` named; None for other names."""
    found = re.fullmatch(r"swa-([0-9a-f]{12})-a([1-9][0-9]*)", name)
    return (found[1], int(found[2])) if found else None


def holds_credentials(address: str) -> bool:
    """Whether there is a user, a password or a token in an address, https://user:password@host."""
    return bool(re.search(r"://[^/\s]*@", address))


def replace(recipe: Recipe, **fields: Any) -> Recipe:
    """A copy of `recipe` with dotted fields replaced, `replace(r, **{"model.weights": path})`, checked again."""
    tree = to_tree(recipe)
    for name, value in fields.items():
        *sections, last = name.split(".")
        node = tree
        for section in sections:
            node = node[section]
        node[last] = value
    return from_tree(tree)


def _contradictions(r: Recipe) -> Iterable[str]:
    """Settings that are each fine and together are not."""
    yield from _data_contradictions(r)
    yield from _schedule_contradictions(r)
    yield from _average_contradictions(r)
    yield from _secrets(r)


def _data_contradictions(r: Recipe) -> Iterable[str]:
    workers, groups = r.cluster.num_workers, r.groups_per_batch
    if r.data.group_images > r.data.global_batch:
        yield (
            f"`data.group_images` must be at most `data.global_batch` ({r.data.global_batch}), but is"
            f" {r.data.group_images}. Make it smaller."
        )
    elif workers > groups:
        smaller = r.data.global_batch // workers
        remedy = f"`data.group_images` to {smaller} or less, or " if smaller >= 2 else ""
        yield (
            f"`cluster.num_workers` must be at most the groups in a global batch ({groups} ="
            f" {r.data.global_batch} images / {r.data.group_images}), but is {workers}. Set {remedy}"
            f"`data.global_batch` to {workers * r.data.group_images} or more: another result and another key."
        )
    if r.cluster.min_workers != "all" and r.cluster.min_workers > workers:
        yield (
            f"`cluster.min_workers` must be at most `cluster.num_workers` ({workers}), but is {r.cluster.min_workers}."
        )
    if r.data.resize_size < r.data.image_size:
        yield (
            f"`data.resize_size` must be at least `data.image_size` ({r.data.image_size}), but is {r.data.resize_size}."
        )
    low, high = r.data.crop_area
    if not 0 < low <= high <= 1:
        yield f"`data.crop_area` must be two shares with 0 < least <= most <= 1, but is [{low:g}, {high:g}]."
    low, high = r.data.crop_ratio
    if not 0.01 <= low <= high <= 100:
        yield f"`data.crop_ratio` must be two ratios with 0.01 <= least <= most <= 100, but is [{low:g}, {high:g}]."


def _schedule_contradictions(r: Recipe) -> Iterable[str]:
    schedule, epochs = r.schedule, r.optim.epochs
    if not isinstance(schedule, Constant) and schedule.min_lr > schedule.max_lr:
        yield (
            f"`schedule.min_lr` must be at most `schedule.max_lr` ({schedule.max_lr:g}), but is {schedule.min_lr:g}."
        )
    if isinstance(schedule, Cyclical):
        cycles = epochs / schedule.cycle_epochs
        if cycles < 1 - _WHOLE or abs(cycles - round(cycles)) > _WHOLE * cycles:
            nearest = sorted({max(1, math.floor(cycles)), max(1, math.ceil(cycles))})
            fits = " or ".join(f"{epochs / n:.6g} ({n} cycle{'s' if n > 1 else ''})" for n in nearest)
            yield (
                f"`schedule.cycle_epochs` must divide `optim.epochs` ({epochs}), but is {schedule.cycle_epochs:g}."
                f" Nearest: {fits}."
            )
    if isinstance(schedule, Constant) and schedule.ramp_epochs > epochs:
        yield f"`schedule.ramp_epochs` must be at most `optim.epochs` ({epochs}), but is {schedule.ramp_epochs:g}."
    if schedule.warmup_epochs > epochs:
        yield f"`schedule.warmup_epochs` must be at most `optim.epochs` ({epochs}), but is {schedule.warmup_epochs:g}."
    if r.checkpoint.extend_from != "nothing" and isinstance(schedule, Cosine | Linear):
        yield (
            f"`checkpoint.extend_from` must be `nothing` with a {schedule.name} schedule, whose rates depend on the"
            f" run's length, but is {r.checkpoint.extend_from}."
        )


def _average_contradictions(r: Recipe) -> Iterable[str]:
    average, epochs = r.average, r.optim.epochs
    if average.start_epoch >= epochs:
        yield (
            f"`average.start_epoch` must be less than `optim.epochs` ({epochs}), but is {average.start_epoch}: nothing"
            " would be averaged."
        )
    for after in average.also_after_epochs:
        if not average.start_epoch < after < epochs:
            yield (
                f"`average.also_after_epochs` must be after `average.start_epoch` ({average.start_epoch}) and before"
                f" `optim.epochs` ({epochs}), but has {after}."
            )
    if list(average.also_after_epochs) != sorted(set(average.also_after_epochs)):
        yield f"`average.also_after_epochs` must grow, but is {list(average.also_after_epochs)}."
    for name, on in (("ema", average.ema != "off"), ("window", average.window > 0)):
        if r.evaluate.candidate == name and not on:
            yield f"`evaluate.candidate` must be an average that the run keeps, but is {name}. Set `average.{name}`."
    if average.sync == "replicated":
        if average.num_replicas != 1 or average.sync_every != "never":
            yield (
                "`average.num_replicas` and `average.sync_every` must be left alone where `average.sync` is replicated,"
                f" but are {average.num_replicas} and {average.sync_every}."
            )
    else:
        if average.num_replicas != r.cluster.num_workers:
            yield (
                f"`average.num_replicas` must be `cluster.num_workers` ({r.cluster.num_workers}) where `average.sync`"
                f" is local, but is {average.num_replicas}: each worker is a replica of its own."
            )
        if r.cluster.min_workers != "all":
            yield (
                "`cluster.min_workers` must be all where `average.sync` is local, but is"
                f" {r.cluster.min_workers}: the number of replicas decides the result."
            )
        if average.ema != "off":
            yield (
                "`average.ema` must be off where `average.sync` is local, but is on: it would need all workers'"
                " weights after every step."
            )


def _secrets(r: Recipe) -> Iterable[str]:
    """A recipe travels in the open: to the cluster, into MLflow, into logs."""
    for name, value in flatten(to_tree(r)).items():
        if isinstance(value, str) and holds_credentials(value):
            yield (
                f"`{name}` must be an address without a password, but holds one. Give it where the run is, in the"
                " environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, AWS_*)."
            )


def _yaml() -> ruamel.yaml.YAML:
    return ruamel.yaml.YAML(typ="safe", pure=True)  # YAML 1.2: 1e-3 is a number, a doubled key an error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _override(tree: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not all(name.split(".")):
        raise ConfigError(f"`--set` must be like optim.epochs=10, but is {override!r}.")
    try:
        value = _yaml().load(text)
    except YAMLError:
        raise ConfigError(f"`--set {name}` must be a YAML value, but is {text!r}.") from None
    *sections, last = name.split(".")
    for section in sections:
        node = tree.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"`--set {name}`: `{section}` is a value, not a section.")
        tree = node
    tree[last] = value


def _explain_all(errors: ValidationError) -> list[str]:
    """A sentence for each wrong setting. One that takes a word or a number fails once per kind, and is said once."""
    sentences: dict[str, str] = {}
    for error in errors.errors():
        if error["type"] == "literal_error" and isinstance(error["input"], dict):
            continue  # a section where a word would do as well: what is wrong with it is said of its fields
        name, sentence = _explain(error)
        if name in sentences and ", but is" in sentence:
            sentence = sentences[name].replace(
                ", but is", f" or {sentence.split(' must be ')[1].split(', but is')[0]}, but is"
            )
        sentences[name] = sentence
    return list(sentences.values())


def _explain(error: Mapping[str, Any]) -> tuple[str, str]:
    """The setting of one pydantic error, and a sentence, with the likely key for a misspelt one."""
    where = [str(part) for part in error["loc"] if str(part) not in {*_SCHEDULES, Ema.__name__}]
    # The kinds of a union are pydantic's names, not the person's.
    where = [part for part in where if not part.startswith(("literal[", "constrained-", "function-"))]
    name = ".".join(where)
    kind = error["type"]
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _fields_at(where[:-1], error)
        close = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(sorted(known))}."
        return name, f"`{name}` is not a setting; {hint}"
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        if kind == "union_tag_not_found":
            name += ".name"
        return name, f"`{name}` is missing."
    if kind == "union_tag_invalid":
        name, given = name + ".name", error["ctx"]["tag"]
        return name, f"`{name}` must be one of {error['ctx']['expected_tags']}, but is {given!r}."
    if kind == "string_pattern_mismatch":
        return name, f"`{name}` must be like {error['ctx']['pattern']}, but is {error['input']!r}."
    message = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return name, f"`{name}` must be {message}, but is {error['input']!r}."


def _fields_at(sections: list[str], error: Mapping[str, Any]) -> list[str]:
    """The settings of the section at a dotted place of the recipe."""
    kinds: list[Any] = [Recipe]
    for section in sections:
        hints = [typing.get_type_hints(kind) for kind in kinds if dataclasses.is_dataclass(kind)]
        found = [hint[section] for hint in hints if section in hint]
        kinds = [kind for hint in found for kind in (typing.get_args(hint) or (hint,))]
    if sections == ["schedule"]:
        kinds = [_SCHEDULES[part] for part in error["loc"] if part in _SCHEDULES] or list(_SCHEDULES.values())
    return [f.name for kind in kinds if dataclasses.is_dataclass(kind) for f in dataclasses.fields(kind)]
