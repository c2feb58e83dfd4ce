"""The command line: verbs only. What a verb needs is imported inside it, so that `--help` is instant."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swa_dist import config
from swa_dist.errors import ConfigError, ExitCode, SwaDistError

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
    from swa_dist.service.progress import display

    shown = display()
    try:
        service.replay(run.resolve(), shown)
    finally:
        shown.close()
    print(f"nothing waits in {run}")


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
    from swa_dist.service.progress import display

    shown = display()
    try:
        found = source.scan(folder.resolve(), folder.name, lambda done, total: shown.progress("index", done, total))
    finally:
        shown.close()
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


def _run(service: Any, recipe: str, overrides: list[str] | None) -> None:
    import os

    from rich.console import Console

    from swa_dist.service import report
    from swa_dist.service.progress import display

    checked = config.load(_find(recipe), overrides or ())
    shown = display()
    try:
        finished = service(checked, shown)
    finally:
        shown.close()
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
