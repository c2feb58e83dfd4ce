"""What to do where an MLflow server is there, and refuses."""

from urllib.parse import urlsplit


def remedy(uri: str, status: int, text: str) -> str | None:
    """One sentence for an answer's HTTP status and text; None where it is no refusal."""
    if status == 401:
        return "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
    if status == 403 and "Invalid Host header" in text:
        return f"It guards its host name: start it with --allowed-hosts {urlsplit(uri).netloc}."
    if status == 403:
        return "Grant this user the right to write this experiment and this registered model."
    return None
