"""The command line: verbs only. What a verb needs is imported inside it, so that `--help` is instant."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from swa_dist import config
from swa_dist.errors import ConfigError, ExitCode, SwaDistError
from swa_dist.storage.folder import absolute

if TYPE_CHECKING:
    from rich.console import Console

    from swa_dist.data.index import Index
    from swa_dist.service.data import Images
    from swa_dist.service.kube import Kube
    from swa_dist.service.progress import Display
    from swa_dist.service.promotion import Ruling
    from swa_dist.service.ray_jobs import RayJobs

T = TypeVar("T")

app = typer.Typer(
    name="swa-dist",
    help="Fine-tune image classifiers on many workers, keep a Stochastic Weight Average, and say whether it is better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets.")
app.add_typer(data_app, name="data")

_LOG_WIDTH = 120

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="A weights file, of a run or from elsewhere.")]
DataPath = Annotated[str, typer.Argument(metavar="DATA", help="A folder of class folders, or of shards; or s3://.")]
Source = Annotated[str | None, typer.Argument(metavar="[SRC]", help="Class folders, shards, ...; or s3://.")]
Labels = Annotated[str, typer.Option(help="Of a flat folder: the file that says the images' classes.")]
OfBoth = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="Its data.train and data.val, with indices in its data.index."),
]
OfRun = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="Default: that of the run MODEL is in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipePath = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, the name of one that is shipped, or env:VARIABLE.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Replace a setting of the recipe. Repeatable.")
]
ModelName = Annotated[str, typer.Argument(metavar="NAME", help="A registered model, `registry.model` of a recipe.")]
TrackingUri = Annotated[
    str | None,
    typer.Option("--tracking-uri", metavar="URL", help="MLflow. Default: MLFLOW_TRACKING_URI, else ./mlflow.db."),
]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A Ray job: swa-KEY-aN.")]
To = Annotated[Literal["ray", "kube"], typer.Option("--to", help="A Ray cluster's jobs server, or Kubernetes.")]
Address = Annotated[
    str | None, typer.Option("--address", metavar="URL", help="http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS.")
]
CaFile = Annotated[Path | None, typer.Option("--ca-file", metavar="FILE", help="Certificates to trust, for https.")]
Namespace = Annotated[str | None, typer.Option("--namespace", help="With --to kube. Default: the context's.")]
Context = Annotated[str | None, typer.Option("--context", help="With --to kube: of the kubeconfig.")]
Again = Annotated[bool, typer.Option("--again", help="Set a finished run aside and begin anew.")]


@app.command()
def quickstart(overrides: Overrides = None, again: Again = False) -> None:
    """Run the whole service on real images of digits, here and now, in a few minutes."""
    from swa_dist.service import quickstart as service

    _run(lambda recipe, display: service.quickstart(recipe, display, again=again), "digits", overrides)


@app.command()
def finetune(recipe: RecipePath, overrides: Overrides = None, again: Again = False) -> None:
    """Fine-tune, average, recalibrate, evaluate and register. Resumes what was begun; shows what is finished.

    Runs on Ray Train workers, in this process (--set cluster.launcher=process), or under
    torchrun --nproc-per-node N -m swa_dist finetune RECIPE.
    """
    from swa_dist.service import launch

    _run(lambda checked, display: launch.finetune(checked, display, again=again), recipe, overrides)


@app.command()
def check(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, and say everything that is wrong with it."""
    checked = _load(recipe, overrides)
    print(f"{checked.name}: no problems. fingerprint {config.fingerprint(checked)[:12]}")


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with everything it leaves to defaults."""
    print(config.to_yaml(_load(recipe, overrides)), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    print(json.dumps(config.schema(), indent=2))


@app.command()
def replay(run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run, on disk or on S3.")]) -> None:
    """Send MLflow what a run could not send, and register what it could not register."""
    from swa_dist.service import result as service

    _shown(lambda display: service.replay(absolute(run), display))
    print(f"nothing waits in {run}")


@app.command()
def promote(
    name: ModelName,
    version: Annotated[str | None, typer.Option(help="Its number. Default: @challenger.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="A.B=C", help="Another rule, registry.gate...=, or place of the images, data.val="
        ),
    ] = None,
    uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Compare a version with @champion on the same images, and put it in its place if the rules of its recipe hold.

    Ends with 10 if they don't, with 0 if there is none to compare. @champion then becomes @previous.
    """
    from swa_dist.service import promotion

    place = _tracking_uri(uri)

    def work(display: "Display") -> "Ruling | None":
        keeper = promotion.gatekeeper(place, name, display)
        which = keeper.challenger if version is None else promotion.which_version(place, name, version)
        return None if which is None else keeper.promote(which, tuple(overrides or ()))

    ruling = _shown(work, quiet=as_json)
    if ruling is None:
        nothing = {"name": name, "status": "no challenger"}
        print(json.dumps(nothing, indent=1) if as_json else f"{name} has no @challenger: there is nothing to promote")
        return
    print(json.dumps(ruling.facts(), indent=1) if as_json else promotion.text(ruling))
    if not ruling.is_champion:
        sys.exit(ExitCode.GATE_REJECTED)


@app.command()
def rollback(
    name: ModelName,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")],
    to: Annotated[str | None, typer.Option(metavar="VERSION", help="Its number. Default: @previous.")] = None,
    uri: TrackingUri = None,
) -> None:
    """Make the version before @champion, or another, @champion again, whatever the evidence."""
    from swa_dist.service import promotion

    place = _tracking_uri(uri)
    entry = _shown(lambda display: promotion.gatekeeper(place, name, display).rollback(to, reason))
    print(f"models:/{name}@champion is version {entry.version} again, instead of {entry.before or 'none'}")


@app.command()
def history(name: ModelName, uri: TrackingUri = None, as_json: AsJson = False) -> None:
    """Say which versions were @champion, since when, by whom and why; and which were refused."""
    from swa_dist.service import promotion, report

    place = _tracking_uri(uri)
    entries = _shown(lambda display: promotion.gatekeeper(place, name, display).history(), quiet=as_json)
    if as_json:
        print(json.dumps([entry.facts() for entry in entries], indent=1))
    else:
        report.show_history([entry.facts() for entry in entries], _console())


@app.command()
def evaluate(
    model: ModelPath, data: DataPath, recipe: OfRun = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Score a weights file on a folder of images, as a run does."""
    from swa_dist.service import standalone

    checked = _load(recipe or str(standalone.recipe_beside(model)), overrides)
    found = _shown(lambda display: standalone.evaluate_file(model, data, checked, display), quiet=as_json)
    _print(found, as_json, {"top1": " %", "top5": " %", "ece": " %", "nll": " nats per image"})


@app.command()
def recalibrate(
    model: ModelPath,
    data: DataPath,
    out: Annotated[Path, typer.Option("--out", help="Where to write: a .safetensors file.")],
    recipe: OfRun = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Give a weights file the BatchNorm statistics of a folder of images, exactly, and say how sure they are."""
    from swa_dist.service import standalone

    checked = _load(recipe or str(standalone.recipe_beside(model)), overrides)
    found = _shown(lambda display: standalone.recalibrate_file(model, data, out, checked, display), quiet=as_json)
    errors = ("sampling_error", "split_half", "grouping_dependence")
    _print(found, as_json, dict.fromkeys(errors, " standard deviations"))


@data_app.command()
def digits(folder: Annotated[Path, typer.Argument(help="Where to write; left alone if it is there.")]) -> None:
    """Write scikit-learn's handwritten digits as JPEG files: FOLDER/train and FOLDER/val, a folder per class."""
    from swa_dist.data import digits as source

    source.write(folder)
    print(f"{folder}: train ({source.NUM_TRAIN} images) and val")


@data_app.command()
def index(
    source: Source = None,
    out: Annotated[str | None, typer.Option(help="Where to write the index of SRC (Parquet), on disk or S3.")] = None,
    labels: Labels = "auto",
    recipe: OfBoth = None,
    overrides: Overrides = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Leave out files that are no whole images, instead of refusing them.")
    ] = False,
) -> None:
    """Read images' headers: how many, which classes, which files are damaged, and the digest that names it all.

    SRC: class folders, a flat folder with a file of labels, or tar shards. With --recipe, where the images are, for
    submissions from where they are not. A second time only what has changed is read.
    """
    from swa_dist.data.index import data_digest
    from swa_dist.service import data

    if recipe is not None and source is None:
        checked = _absolute(recipe, overrides)
        train, val = _shown(lambda display: data.write_indices(checked, display, quarantine=quarantine))
        for images, found in zip(data.of_recipe(checked), (train, val), strict=True):
            print(_index_line(images.root, found))
        print(f"{checked.data.index}: indices of train and val, digest {data_digest(train, val)}")
        return
    (images,) = _places(source, out, labels, recipe, overrides)
    found = _shown(lambda display: data.write_index(images, display, quarantine=quarantine))
    print(f"{_index_line(str(source), found)}, digest {found.digest}")


@data_app.command()
def verify(
    source: Source = None,
    out: Annotated[str | None, typer.Option(help="The index of SRC, to note in what was found.")] = None,
    labels: Labels = "auto",
    recipe: OfBoth = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Decode every image. Those that can't be are named, and left out of the index and so of training.

    Without an index to note it in, ends with 65 where an image is bad.
    """
    from swa_dist.service import data

    places = _places(source, out, labels, recipe, overrides)
    found = _shown(lambda display: data.check(places, display), quiet=as_json)
    print(json.dumps([one.facts() for one in found], indent=1) if as_json else "\n".join(map(str, found)))
    if any(one.bad and one.images.index is None for one in found):
        sys.exit(ExitCode.BAD_DATA)


@data_app.command()
def shard(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Images as `data index` takes them.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="An empty folder, on disk or S3.")],
    out: Annotated[str | None, typer.Option("--index", help="The index of SRC, whose bad images are left out.")] = None,
    labels: Labels = "auto",
    images_per_shard: Annotated[int, typer.Option(min=2, help="About 110 KB each, of ImageNet.")] = 1024,
) -> None:
    """Write images as tar shards in a fixed random order, readable by WebDataset too. Goes on where it was ended."""
    from swa_dist.service import data

    (images,) = _places(source, out, labels, None, None)
    found = _shown(lambda display: data.shard(images, absolute(target), images_per_shard, display))
    print(f"{target}: {len(found):,} images in {len(found.shards):,} shards, digest {found.digest}")


@app.command()
def submit(
    recipe: RecipePath,
    overrides: Overrides = None,
    to: To = "ray",
    address: Address = None,
    ca_file: CaFile = None,
    overlay: Annotated[str, typer.Option(help="With --to kube: the overlay of k8s/ that the RayJob is of.")] = "gpu",
    template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --to kube: the RayJob, rendered before, instead.")
    ] = None,
    namespace: Namespace = None,
    context: Context = None,
    wait: Annotated[bool, typer.Option(help="Follow the run to its end, and end with its exit code.")] = True,
) -> None:
    """Have a cluster run a recipe. Attaches to the run if it runs already; says so if it is finished; resumes it if it
    failed.

    Ctrl-C detaches; the run goes on. Paths in the recipe are the cluster's.
    """
    from swa_dist.service import submit as service

    checked = _load(recipe, overrides)
    place = _place(to, address, ca_file, namespace, context, template=template, overlay=overlay)
    sys.exit(_shown(lambda display: service.submit(checked, place, display, wait=wait)))


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="swa-KEY-aN. Default: all of the cluster.")] = None,
    to: To = "ray",
    address: Address = None,
    ca_file: CaFile = None,
    namespace: Namespace = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """Say how submitted runs are."""
    from swa_dist.service import report

    facts = _place(to, address, ca_file, namespace, context).describe(run)
    if as_json:
        print(json.dumps(facts, indent=1))
    else:
        report.show_submissions(facts, _console())


@app.command()
def logs(
    run: RunName,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends; its exit code.")] = False,
    address: Address = None,
    ca_file: CaFile = None,
) -> None:
    """Print what a Ray job has printed."""
    jobs = _ray_jobs(address, ca_file)
    if follow:
        try:
            sys.exit(_shown(lambda display: jobs.follow(run, display)))
        except KeyboardInterrupt:
            print(f"detached; {run} goes on")
            return
    print(jobs.logs(run), end="")


@app.command()
def stop(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A Ray job, swa-KEY-aN, or a run's folder.")],
    address: Address = None,
    ca_file: CaFile = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which the job is ended as it is.")] = 600.0,
) -> None:
    """Have a run commit its state at its next steps and end. The same command as before then resumes it."""
    if config.parse_attempt_name(run) is None:
        from swa_dist.service import layout

        layout.request_stop(absolute(run))
        print(f"asked the run in {run} to stop; it ends with exit code {ExitCode.STOPPED}, its state saved")
        return
    jobs = _ray_jobs(address, ca_file)
    _shown(lambda display: jobs.stop(run, display, timeout))


@app.command()
def render(
    recipe: RecipePath,
    overrides: Overrides = None,
    overlay: Annotated[str, typer.Option(help="The overlay of k8s/.")] = "gpu",
) -> None:
    """Print an overlay's Kubernetes manifests, its RayJob as a submission of the recipe would create it."""
    from swa_dist.service import kube

    print(kube.rendered(_load(recipe, overrides), overlay), end="")


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="Also try what this recipe names.")] = None,
    overrides: Overrides = None,
    address: Address = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
) -> None:
    """Look at everything a run depends on: a line each, with what to do. Ends with 69 if something is broken."""
    from swa_dist.service import doctor as service

    checked = None if recipe is None else _load(recipe, overrides)
    found = service.examine(checked, address, ca_file)
    if as_json:
        print(json.dumps([finding.facts() for finding in found], indent=1))
    else:
        service.show(found, _console())
    sys.exit(service.exit_code(found))


def main() -> None:
    """Entry point: a mistake or fault that is foreseen ends with one message and its own exit code."""
    try:
        app()
    except SwaDistError as error:
        _say_end(str(error), error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt as error:
        _say_end("interrupted. What was committed is kept; the same command resumes it.", error)
        sys.exit(ExitCode.STOPPED)


def _say_end(why: str, error: BaseException) -> None:
    from swa_dist.service.environment import redact

    print(redact("\n".join([f"swa-dist: {why}", *getattr(error, "__notes__", ())])), file=sys.stderr)


def _absolute(recipe: str, overrides: list[str] | None) -> config.Recipe:
    from swa_dist.service import identity

    return identity.absolute_addresses(_load(recipe, overrides))


def _tracking_uri(uri: str | None) -> str:
    from swa_dist.service import identity

    return identity.tracking_uri_here(uri or "auto")


def _places(
    source: str | None, out: str | None, labels: str, recipe: str | None, overrides: list[str] | None
) -> "list[Images]":
    from swa_dist.service.data import Images, of_recipe

    if (source is None) == (recipe is None):
        raise typer.BadParameter("give either SRC or --recipe RECIPE")
    if recipe is not None:
        return of_recipe(_absolute(recipe, overrides))
    assert source is not None
    labels = labels if labels == "auto" else absolute(labels)
    return [Images("SRC", absolute(source), labels, None if out is None else absolute(out))]


def _index_line(place: str, found: "Index") -> str:
    left_out = f", {found.num_left_out:,} left out" if found.num_left_out else ""
    return f"{place}: {len(found):,} images, {len(found.classes):,} classes{left_out}"


def _shown(work: "Callable[[Display], T]", *, quiet: bool = False) -> T:
    """What `work` returns, its progress shown; with `quiet` on standard error, so that the output is for machines."""
    from swa_dist.service.progress import display

    shown = display(error=quiet)
    try:
        return work(shown)
    finally:
        shown.close()


def _print(facts: dict[str, Any], as_json: bool, units: dict[str, str]) -> None:
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    for name, value in facts.items():
        text = f"{value:.4f}{units.get(name, '')}" if isinstance(value, float) else value
        print(f"{name + ':':<22}{text}")


def _run(service: Any, recipe: str, overrides: list[str] | None) -> None:
    from swa_dist.service import report

    checked = _load(recipe, overrides)
    finished = _shown(lambda display: service(checked, display))
    if int(os.environ.get("RANK", "0")) == 0:
        report.show(finished.summary, _console(), already=finished.already)
        if finished.unregistered is not None:
            raise finished.unregistered


def _console() -> "Console":
    from rich.console import Console

    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=_LOG_WIDTH)


def _ray_jobs(address: str | None, ca_file: Path | None) -> "RayJobs":
    from swa_dist.service.ray_jobs import RayJobs

    return RayJobs(address, True if ca_file is None else str(ca_file))


def _place(
    to: str,
    address: str | None,
    ca_file: Path | None,
    namespace: str | None,
    context: str | None,
    *,
    template: Path | None = None,
    overlay: str | None = None,
) -> "RayJobs | Kube":
    if to == "ray":
        return _ray_jobs(address, ca_file)
    from swa_dist.service import kube

    job: dict[str, Any] | None = None
    if template is not None:
        job = kube.load_template(template)
    elif overlay is not None:
        job = kube.template_of(kube.render(overlay))
    return kube.Kube(namespace=namespace, context=context, template=job)


def _load(recipe: str, overrides: list[str] | None) -> config.Recipe:
    if recipe.startswith("env:"):
        variable = recipe.removeprefix("env:")
        if variable not in os.environ:
            raise ConfigError(f"`RECIPE` must name a variable that is set, but {variable} is not.")
        return config.parse(os.environ[variable], variable, overrides or ())
    return config.load(_find(recipe), overrides or ())


def _find(recipe: str) -> Path:
    """A recipe's file: a path, or the name of a shipped one."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    here = Path(__file__).parent
    shipped = {file.stem: file for folder in (here / "jobs", here.parent / "jobs") for file in folder.glob("*.yaml")}
    if recipe not in shipped:
        raise ConfigError(f"`RECIPE` must be a YAML file or one of {', '.join(sorted(shipped))}, but is {recipe!r}.")
    return shipped[recipe]
