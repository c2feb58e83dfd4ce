"""The command line: verbs only. What a verb needs is imported inside it, so that `--help` is instant."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swa_dist import config
from swa_dist.errors import ConfigError, ExitCode, SwaDistError

if TYPE_CHECKING:
    from swa_dist.service.progress import Display

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
DataPath = Annotated[Path, typer.Argument(metavar="DATA", help="A folder of class folders of images.")]
OfRun = Annotated[str | None, typer.Option("--recipe", metavar="RECIPE", help="Default: that of the run MODEL is in.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of one that is shipped.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Replace a setting of the recipe. Repeatable.")
]
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
    checked = config.load(_find(recipe), overrides or ())
    print(f"{checked.name}: no problems. fingerprint {config.fingerprint(checked)[:12]}")


@app.command()
def show(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Print a recipe with everything it leaves to defaults."""
    print(config.to_yaml(config.load(_find(recipe), overrides or ())), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    print(json.dumps(config.schema(), indent=2))


@app.command()
def replay(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]) -> None:
    """Send MLflow what a run could not send, and register what it could not register."""
    from swa_dist.service import result as service

    _shown(lambda display: service.replay(run.resolve(), display))
    print(f"nothing waits in {run}")


@app.command()
def evaluate(
    model: ModelPath, data: DataPath, recipe: OfRun = None, overrides: Overrides = None, as_json: AsJson = False
) -> None:
    """Score a weights file on a folder of images, as a run does."""
    from swa_dist.service import standalone

    checked = config.load(_find(recipe) if recipe else standalone.recipe_beside(model), overrides or ())
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

    checked = config.load(_find(recipe) if recipe else standalone.recipe_beside(model), overrides or ())
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
    folder: Annotated[Path, typer.Argument(help="A folder of class folders.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the index (Parquet).")] = None,
) -> None:
    """Read a folder of images: how many, which classes, which files are damaged, and the digest that names it all."""
    from swa_dist.data import index as source

    found = _shown(
        lambda display: source.scan(
            folder.resolve(), "FOLDER", lambda done, total: display.progress("index", done, total)
        )
    )
    if out is not None:
        source.save(found, out)
    print(f"{folder}: {len(found):,} images, {len(found.classes):,} classes, digest {found.digest}")


def main() -> None:
    """Entry point: a mistake or fault that is foreseen ends with one message and its own exit code."""
    try:
        app()
    except SwaDistError as error:
        print(f"swa-dist: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("swa-dist: interrupted. What was committed is kept; the same command resumes it.", file=sys.stderr)
        sys.exit(ExitCode.STOPPED)


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
    import os

    from rich.console import Console

    from swa_dist.service import report

    checked = config.load(_find(recipe), overrides or ())
    finished = _shown(lambda display: service(checked, display))
    if int(os.environ.get("RANK", "0")) == 0:
        terminal = Console()
        console = terminal if terminal.is_terminal else Console(width=_LOG_WIDTH)
        report.show(finished.summary, console, already=finished.already)


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
