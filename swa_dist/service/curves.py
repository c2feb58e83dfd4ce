"""A run's curves as one picture: its loss and learning rate over epochs, and top-1 of the candidates side by side."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_INCHES = (8.0, 9.0)
_DOTS_PER_INCH = 110
_FONT_POINTS = 11
_ROOM = 0.25  # of the range of top-1, for the numbers beside the points


def draw(title: str, rows: Sequence[Mapping[str, Any]], top1: Mapping[str, float]) -> bytes:
    """A PNG file. `rows`: a run's metrics, each with `epoch` and `metrics`. `top1`: of each candidate, in %."""
    figure = Figure(figsize=_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    figure.suptitle(title, fontsize=_FONT_POINTS + 3)
    loss, rate, candidates = figure.subplots(3, 1)
    _curve(loss, rows, "train/loss", "-", "mean of a few steps")
    _curve(loss, rows, "epoch/loss", "o", "mean of an epoch")
    loss.legend(fontsize=_FONT_POINTS)
    _label(loss, "training loss", "epochs", "nats per image")
    _curve(rate, rows, "train/lr", "-", "")
    _label(rate, "learning rate", "epochs", "")
    _compare(candidates, top1)
    _label(candidates, "top-1 on the validation images", "%", "")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, style: str, label: str) -> None:
    points = [(row["epoch"], row["metrics"][name]) for row in rows if name in row["metrics"]]
    axes.plot([epoch for epoch, _ in points], [value for _, value in points], style, label=label, markersize=5)
    axes.set_xlim(left=0)


def _compare(axes: Axes, top1: Mapping[str, float]) -> None:
    """The first candidate on top. The axis begins where the candidates do: differences are small beside the values."""
    names, values = list(top1), list(top1.values())
    places = range(len(names))
    axes.plot(values, places, "o", markersize=8)
    axes.axvline(top1["start"], linestyle="--", linewidth=1)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            f"{value:.2f}",
            (value, place),
            xytext=(9, 0),
            textcoords="offset points",
            verticalalignment="center",
            fontsize=_FONT_POINTS,
        )
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    room = _ROOM * (max(values) - min(values) or 1.0)
    axes.set_xlim(min(values) - room, max(values) + room)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=_FONT_POINTS + 1, loc="left")
    axes.set_xlabel(x, fontsize=_FONT_POINTS)
    axes.set_ylabel(y, fontsize=_FONT_POINTS)
    axes.tick_params(labelsize=_FONT_POINTS)
    axes.grid(visible=True, alpha=0.3)
