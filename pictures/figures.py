"""Depth or latency against accuracy, from tables that name their sources.

A table is a CSV file with the columns `COLUMNS`; others are left alone. Tables are drawn side by side and never into
one another, since their numbers are of different machines and data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pictures import style
from records.logs import read_rows

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
    """A line a series: VanillaNet's in the strong colour, those of others in grey."""
    dashes = iter(("-", "--", ":"))
    for series in dict.fromkeys(result.series for result in results):
        points = [(getattr(result, quantity), result.top1) for result in results if result.series == series]
        look = {"color": style.PEER, "linewidth": 0.8}
        if series.startswith("VanillaNet"):
            look = {"color": style.ACCENT, "linestyle": next(dashes)}
        axes.plot(*zip(*points, strict=True), marker="o", label=series, **look)
    axes.margins(0.08, 0.12)
    named = [line for line in axes.lines if line.get_color() == style.ACCENT]
    if len(named) > 1:
        axes.legend(handles=named, loc="best", handlelength=3.5)


def _name_networks(axes: Axes, results: Sequence[Result], quantity: str) -> None:
    """Every point's name; those of a series of VanillaNets are shortened to what follows the first one's."""
    names, colours, begun = [], [], set()
    for result in results:
        own = result.series.startswith("VanillaNet")
        short = result.network.removeprefix("VanillaNet-") if result.series in begun else result.network
        begun |= {result.series} if own else set()
        names.append(short)
        colours.append(style.ACCENT if own else style.INK)
    style.name_points(axes, [(getattr(result, quantity), result.top1) for result in results], names, colours=colours)


def _draw_latencies_alone(axes: Axes, results: Sequence[Result]) -> None:
    """Below the axis of latency, the networks whose accuracy the source does not give."""
    for position, result in enumerate(sorted(results, key=lambda result: result.latency_ms)):
        axes.plot([result.latency_ms], [-position], marker="o", markersize=4, color=style.PEER, label=result.network)
        axes.annotate(
            f"{result.network}, {result.latency_ms:g} ms",
            (result.latency_ms, -position),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set(yticks=[], ylabel="latency alone")
    axes.margins(y=0.08)


@style.styled
def accuracy_figure(tables: Mapping[str, Sequence[Result]], quantity: str, *, title: str, xlabel: str) -> Figure:
    """A quantity against accuracy, a panel for each table; under it the latencies of networks without an accuracy.

    Args:
        tables: results by the title of their panel. Panels have one range of accuracy if all hold for the same.
        quantity: `layers`, or `latency_ms`, which is drawn on a logarithmic axis.
    """
    drawn = {name: [one for one in rows if getattr(one, quantity) is not None] for name, rows in tables.items()}
    known = {name: [one for one in rows if one.top1 is not None] for name, rows in drawn.items()}
    alone = {name: [one for one in rows if one.top1 is None] for name, rows in drawn.items()}
    provenance = {name: list(dict.fromkeys(f"{one.source}: {one.conditions}" for one in drawn[name])) for name in drawn}
    same = all(lines == next(iter(provenance.values())) for lines in provenance.values())
    strip = quantity == "latency_ms" and any(alone.values())
    figure = style.new_figure(6.5 * len(tables), 6.2 if strip else 4.8)
    grid = figure.subplots(
        1 + strip, len(tables), squeeze=False, sharex="all" if same else "col", sharey="row" if same else False,
        height_ratios=(3, 1.7)[: 1 + strip],
    )  # fmt: skip
    for axes, (name, results) in zip(grid.T, known.items(), strict=True):
        _draw_series(axes[0], results, quantity)
        axes[0].set_title(name if len(tables) > 1 else "")
        if strip:
            _draw_latencies_alone(axes[1], alone[name])
        axes[-1].set_xlabel(xlabel)
        if quantity == "latency_ms":
            style.plain_log(axes[-1].xaxis)
    grid[0, 0].set_ylabel("top-1 (%)")
    lines = provenance.popitem()[1] if same else [f"{name}: {line}" for name in drawn for line in provenance[name]]
    style.caption(figure, title, "\n".join(lines))
    for axes, results in zip(grid[0], known.values(), strict=True):  # last, as names keep clear of what is drawn
        _name_networks(axes, results, quantity)
    return figure


def results_figures(tables: Mapping[str, Sequence[Result]]) -> dict[str, Figure]:
    """The paper's two figures by the name of their file: depth and latency against accuracy.

    Args:
        tables: results by the title of their panel; the titles of the figures speak of the first.
    """
    results = next(iter(tables.values()))
    depth = accuracy_figure(
        tables, "layers", title=_title(results, "layers", "{:g} layers reach {:g} % top-1"), xlabel="depth (layers)"
    )
    latency = accuracy_figure(
        tables,
        "latency_ms",
        title=_title(results, "latency_ms", "VanillaNet needs {:g} ms for {:g} % top-1"),
        xlabel="latency of one image (ms)",
    )
    return {"depth_accuracy.png": depth, "latency_accuracy.png": latency}


def _title(results: Sequence[Result], quantity: str, words: str) -> str:
    """What the most accurate VanillaNet reaches, which is what such a figure should be seen for."""
    known = [one for one in results if one.series.startswith("VanillaNet") and one.top1 and getattr(one, quantity)]
    if not known:
        return "Accuracy"
    best = max(known, key=lambda one: one.top1)
    return words.format(getattr(best, quantity), best.top1)
