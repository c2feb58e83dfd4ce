"""A finished run as a person reads it."""

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

_ROWS = {
    "start": "start",
    "last": "last iterate",
    "last_fresh": "last, fresh BatchNorm",
    "window": "mean of the last iterates",
    "ema": "EMA",
    "swa": "SWA",
}


def show(summary: dict[str, Any], console: Console, *, already: bool) -> None:
    """Print the table of a run, what came of it and where it is."""
    average = summary["average"]
    table = Table(
        title=f"{summary['name']}: {summary['arch']}, {summary['epochs']} epochs,"
        f" average of {len(average['iterates'])} iterates, {summary['data']['val_images']:,} validation images",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("weights")
    for column in ("top-1 %", "gain", "top-5 %", "NLL", "ECE %"):
        table.add_column(column, justify="right")
    table.add_column("")
    start = summary["candidates"]["start"]["top1"]
    for name, row in summary["candidates"].items():
        remarks = []
        if name == summary["control"]:
            remarks.append("control: plain fine-tuning")
        if name == summary["candidate"]:
            remarks.append("candidate")
        gain = "" if name == "start" else f"{row['top1'] - start:+.2f}"
        cells = [f"{row['top1']:.2f}", gain, f"{row['top5']:.2f}", f"{row['nll']:.4f}", f"{row['ece']:.2f}"]
        table.add_row(_ROWS.get(name) or f"SWA after {name.partition('_')[2]} epochs", *cells, ", ".join(remarks))
    console.print()
    if already:
        console.print(f"This run is finished already (key {summary['run_key'][:12]}); to run it anew: --again")
    console.print(table)
    lines = {
        "verdict": summary["verdict"]["sentence"],
        "average": f"{average['regime']}; workers' weights differed by at most {average['spread']:.3g}",
        "registered": _registered(summary),
        "time": ", ".join(
            f"{phase} {facts['seconds']:.1f} s ({facts['images_per_second']:,.0f} images/s)"
            for phase, facts in summary["phases"].items()
        ),
        "run": f"{summary['run_dir']} (key {summary['run_key'][:12]}, attempt {summary['attempt']})",
        "look": f"mlflow ui --backend-store-uri {summary['mlflow']['uri']}"
        if summary["mlflow"]["uri"].startswith("sqlite:")
        else summary["mlflow"]["uri"],
    }
    for what, text in lines.items():
        console.print(f"{what + ':':<12}{text}", highlight=False, soft_wrap=True)


def show_history(entries: list[dict[str, Any]], console: Console) -> None:
    """Print a table of what was @champion and what was refused."""
    if not entries:
        console.print("no version was ever promoted, refused or rolled back")
        return
    table = Table()
    for column in ("when (UTC)", "what", "version", "@champion before", "by", "why"):
        table.add_column(column, overflow="fold")
    for one in entries:
        what = one["kind"] if one["state"] == "done" else f"{one['kind']} ({one['state']})"
        when = one["when"].partition("+")[0].replace("T", " ")
        table.add_row(when, what, one["version"] or "none", one["before"] or "none", one["who"], one["why"])
    console.print(table)


def show_submissions(submissions: list[dict[str, Any]], console: Console) -> None:
    """Print a table of submitted runs."""
    if not submissions:
        console.print("no runs")
        return
    table = Table()
    for column in ("run", "recipe", "status", "exit code", "started", "time", "folder"):
        table.add_column(column, overflow="fold")
    for one in submissions:
        code, seconds = one["exit_code"], one["seconds"]
        table.add_row(
            one["name"],
            one["recipe"],
            one["status"],
            "" if code is None else str(code),
            one["started"] or "",
            "" if seconds is None else str(timedelta(seconds=seconds)),
            one["run_dir"],
        )
    console.print(table)


def _registered(summary: dict[str, Any]) -> str:
    registered = summary["registered"]
    if registered is None:
        return f"waits with {summary['waiting']} events; when MLflow answers: swa-dist replay {summary['run_dir']}"
    alias = f" = models:/{registered['name']}@champion" if registered["champion"] else f", {registered['status']}"
    return f"{registered['name']} version {registered['version']}{alias}: {registered['why']}"
