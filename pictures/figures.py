"""The paper's two figures, depth against accuracy and latency against accuracy, from tables that name their sources.

A table is a CSV file with the columns `COLUMNS`; others are left alone. Tables are drawn side by side and never into
one another, since their numbers are of different machines and data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from records.logs import read_rows

__all__ = ["COLUMNS", "Result", "depth_figure", "latency_figure", "read_results", "results_figures"]

COLUMNS = ("network", "series", "layers", "latency_ms", "top1", "conditions", "source")


@dataclass(frozen=True)
class Result:
    """A network's numbers; None where its source does not give one.

    Attributes:
        network, series: its name, and the family that it is joined to by a line.
        layers: its depth.
        latency_ms: of one image.
        top1: accuracy in percent.
        conditions: device, precision, batch and data that the numbers hold for.
        source: where they are from.
    """

    network: str
    series: str
    layers: float | None
    latency_ms: float | None
    top1: float | None
    conditions: str
    source: str


def read_results(path: str | Path) -> list[Result]:
    """The rows of a table of results.

    Raises:
        ValueError: names the file, and the line that has no source or a cell that is no number.
    """
    path = Path(path)
    try:
        rows = read_rows(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    absent = [column for column in COLUMNS if column not in (rows[0] if rows else {})]
    if absent:
        raise ValueError(f"{path} has no column {', '.join(absent)}" if rows else f"{path} has no row")
    results = []
    for line, row in enumerate(rows, 2):
        cells = {column: (row[column] or "").strip() for column in COLUMNS}
        for column in ("network", "series", "conditions", "source"):
            if not cells[column]:
                raise ValueError(f"{path}, line {line}: the {column} is missing")
        for column in ("layers", "latency_ms", "top1"):
            try:
                cells[column] = float(cells[column]) if cells[column] else None
            except ValueError:
                raise ValueError(f"{path}, line {line}: {column} is no number: {cells[column]}") from None
            if cells[column] is not None and not (math.isfinite(cells[column]) and cells[column] > 0):
                raise ValueError(f"{path}, line {line}: {column} must be above 0, not {row[column]}")
        results.append(Result(**cells))
    return results


def _draw_series(axes: Axes, results: Sequence[Result], quantity: str) -> None:
    """A line a series through the networks that have both numbers, each with its name."""
    shown = [result for result in results if getattr(result, quantity) is not None and result.top1 is not None]
    for series in dict.fromkeys(result.series for result in shown):
        points = [(getattr(result, quantity), result.top1) for result in shown if result.series == series]
        axes.plot(*zip(*points, strict=True), marker="o", label=series)
    for result in shown:
        axes.annotate(
            result.network,
            (getattr(result, quantity), result.top1),
            xytext=(5, -3),
            textcoords="offset points",
            va="top",
            fontsize=7,
        )
    axes.set_ylabel("top-1 (%)")
    axes.margins(0.05, 0.1)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(loc="lower right", fontsize=8)


def _draw_latencies_alone(axes: Axes, results: Sequence[Result]) -> None:
    """Below the axis of latency, the networks whose accuracy the source does not give."""
    for position, result in enumerate(sorted(results, key=lambda result: result.latency_ms)):
        axes.plot([result.latency_ms], [-position], marker="|", color="0.3", label=result.network)
        axes.annotate(
            f"{result.network}  {result.latency_ms:g}",
            (result.latency_ms, -position),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set(yticks=[], ylabel="latency only")
    axes.grid(alpha=0.3, axis="x")
    axes.margins(y=0.08)


def _finish(axes: Axes, results: Sequence[Result], *, title: str, room: float) -> None:
    """Above a panel, its table, and all conditions and sources in it; `room` for the last names, in widths of it."""
    provenance = dict.fromkeys(f"{result.source}: {result.conditions}" for result in results)
    axes.set_title("\n".join([title, *provenance]), fontsize=7, loc="left")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + room * (high - low))


def depth_figure(tables: Mapping[str, Sequence[Result]]) -> Figure:
    """Depth against accuracy, a panel for each table that has such numbers."""
    figure = Figure(figsize=(6.5 * len(tables), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, results) in zip(figure.subplots(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        drawn = [result for result in results if result.layers is not None and result.top1 is not None]
        _draw_series(axes, drawn, "layers")
        axes.set_xlabel("depth (layers)")
        _finish(axes, drawn, title=title, room=0.45)
    return figure


def latency_figure(tables: Mapping[str, Sequence[Result]]) -> Figure:
    """Latency against accuracy, a panel for each table; under it the latencies of networks without an accuracy."""
    figure = Figure(figsize=(6.5 * len(tables), 6), layout="constrained")
    FigureCanvasAgg(figure)
    for part, (title, results) in zip(figure.subfigures(1, len(tables), squeeze=False)[0], tables.items(), strict=True):
        drawn = [result for result in results if result.latency_ms is not None]
        alone = [result for result in drawn if result.top1 is None]
        ratios = (3, 1.6) if alone else (1,)
        axes, *below = part.subplots(len(ratios), 1, height_ratios=ratios, sharex=True, squeeze=False)[:, 0]
        _draw_series(axes, drawn, "latency_ms")
        for strip in below:
            _draw_latencies_alone(strip, alone)
        (below or [axes])[-1].set_xlabel("latency of one image (ms)")
        _finish(axes, drawn, title=title, room=0.2)
    return figure


def results_figures(tables: Mapping[str, Sequence[Result]]) -> dict[str, Figure]:
    """The figures by the name of their file.

    Args:
        tables: results by the title of their panel.
    """
    return {"depth_accuracy.png": depth_figure(tables), "latency_accuracy.png": latency_figure(tables)}
