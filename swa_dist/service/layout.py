"""What lies where in a run's folder, `output.dir`/swa-KEY, on disk or on S3. Starts without torch."""

from swa_dist.errors import ConfigError
from swa_dist.storage.folder import join, open_folder

RECIPE = "recipe.yaml"
SUMMARY = "summary.json"
"""There once the run is finished."""
CURVES = "curves.png"
ATTEMPT = "attempt.json"
STOP_REQUEST = "stop"


def run_dir(output_dir: str, run_key: str) -> str:
    return join(output_dir, f"swa-{run_key[:12]}")


def lease_url(run_dir: str) -> str:
    """Beside the run's folder, which is renamed when a run is begun anew."""
    parent, _, name = run_dir.rpartition("/")
    return join(parent, f".{name}.lease")


def request_stop(run_dir: str) -> None:
    """Ask the run in a folder to commit its state and end. Raises ConfigError where no run is."""
    folder = open_folder(run_dir)
    if not folder.has(ATTEMPT):
        raise ConfigError(f"`RUN` must be the folder of a run, but {run_dir} is none.")
    folder.write(STOP_REQUEST, "")
