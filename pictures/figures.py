"""Figures of depth or latency against accuracy; the caption names the source of every number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pictures import style
from records.logs import read_rows

PAPER_RESULTS = Path(__file__).parents[1] / "docs" / "paper_results.csv"


@dataclass(frozen=True)
class Result:
    """A network's numbers; None where its source does not give one."""

    network: str
    series: str  # the family; a line joins its networks
    layers: float | None  # its depth
    latency_ms: float | None  # of one image
    top1: float | None  # accuracy in percent
    conditions: str  # device, precision, batch and data that the numbers hold for
    source: str  # where they are from


def paper_results() -> list[Result]:
    """Read docs/paper_results.csv; columns that are not fields of `Result` are ignored."""
    rows = [{field.name: row[field.name] for field in fields(Result)} for row in read_rows(PAPER_RESULTS)]
    for row in rows:
        row |= {column: float(row[column]) if row[column] else None for column in ("layers", "latency_ms", "top1")}
    return [Result(**row) for row in rows]


def _draw_series(axes: Axes, results: Sequence[Result], quantity: str) -> None:
    """Draw a line for each series, VanillaNets in the strong colour and others in grey."""
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
    """Name every point. Within a series, only the first name keeps the prefix `VanillaNet-`."""
    names, colours, begun = [], [], set()
    for result in results:
        names.append(result.network.removeprefix("VanillaNet-") if result.series in begun else result.network)
        colours.append(style.ACCENT if result.series.startswith("VanillaNet") else style.INK)
        begun.add(result.series)
    style.name_points(axes, [(getattr(result, quantity), result.top1) for result in results], names, colours=colours)


def _draw_latencies_alone(axes: Axes, results: Sequence[Result]) -> None:
    """Draw networks whose accuracy the source does not give, by latency alone."""
    for position, result in enumerate(sorted(results, key=lambda result: result.latency_ms)):
        axes.plot([result.latency_ms], [-position], marker="o", markersize=4, color=style.PEER, label=result.network)
        text, place = f"{result.network}, {result.latency_ms:g} ms", (result.latency_ms, -position)
        axes.annotate(text, place, (6, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(yticks=[], ylabel="latency alone")
    axes.margins(y=0.08)


@style.styled
def accuracy_figure(panels: Mapping[str, Sequence[Result]], quantity: str, *, title: str, xlabel: str) -> Figure:
    """Draw a quantity against accuracy in panels of the same range, above the latencies of networks without accuracy.

    Args:
        panels: results by the title of their panel; the caption names the sources of all panels.
        quantity: `layers`, or `latency_ms`, which is drawn on a logarithmic axis.
    """
    # Networks with both numbers are points of the panels; those with a latency alone are in a strip below.
    drawn = {name: [one for one in rows if getattr(one, quantity) is not None] for name, rows in panels.items()}
    known = {name: [one for one in rows if one.top1 is not None] for name, rows in drawn.items()}
    alone = {name: [one for one in rows if one.top1 is None] for name, rows in drawn.items()}
    strip = quantity == "latency_ms" and any(alone.values())
    figure = style.new_figure(6.5 * len(panels), 6.2 if strip else 4.8)
    heights = (3, 1.7)[: 1 + strip]
    grid = figure.subplots(1 + strip, len(panels), squeeze=False, sharex="all", sharey="row", height_ratios=heights)
    for axes, (name, results) in zip(grid.T, known.items(), strict=True):
        _draw_series(axes[0], results, quantity)
        axes[0].set_title(name if len(panels) > 1 else "")
        if strip:
            _draw_latencies_alone(axes[1], alone[name])
        axes[-1].set_xlabel(xlabel)
        if quantity == "latency_ms":
            style.plain_log(axes[-1].xaxis)
    grid[0, 0].set_ylabel("top-1 (%)")
    provenance = dict.fromkeys(f"{one.source}: {one.conditions}" for rows in drawn.values() for one in rows)
    style.caption(figure, title, "\n".join(provenance))
    for axes, results in zip(grid[0], known.values(), strict=True):  # last, because names avoid what is drawn
        _name_networks(axes, results, quantity)
    return figure


def results_figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Draw the paper's two figures, depth and latency against accuracy. Returns them by file name."""
    # The titles state what the most accurate VanillaNet reaches.
    best = max((one for one in results if one.series.startswith("VanillaNet")), key=lambda one: one.top1)
    depth = f"{best.layers:g} layers reach {best.top1:g} % top-1"
    speed = f"VanillaNet needs {best.latency_ms:g} ms for {best.top1:g} % top-1"
    panels, latency = {"": results}, "latency of one image (ms)"
    return {
        "depth_accuracy.png": accuracy_figure(panels, "layers", title=depth, xlabel="depth (layers)"),
        "latency_accuracy.png": accuracy_figure(panels, "latency_ms", title=speed, xlabel=latency),
    }
