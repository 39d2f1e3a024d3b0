"""Style of all figures: one font, a strong colour for the subject of a figure, and grey for its peers.

Figures have no background, and their colours are legible on both white and dark pages.
"""

from collections.abc import Sequence
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

INK = "#737b85"  # text and axes; the contrast is at least 4 on white and on almost black pages
ACCENT = "#e8590c"  # VanillaNet, or another subject of a figure
PEER = "#8b949e"  # what the subject is compared with
RIGHT, WRONG = "#1f883d", "#cf222e"
# For series of equal rank: Okabe and Ito's colour-blind safe palette, with a lighter blue and no black or yellow.
COLOURS = ("#0080c6", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#d55e00")

_SETTINGS = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "text.parse_math": False,  # names of classes and files may have dollar signs
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
# Decorator of functions that draw figures; the settings above apply within them only.
styled = matplotlib.rc_context(_SETTINGS)


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure of this size in inches, with a layout that makes room for all texts."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def caption(figure: Figure, title: str, conditions: str) -> None:
    """Write the title above a figure and, in small print below it, the conditions that it holds for."""
    width = figure.get_figwidth()  # inches; the factors below are letters per inch
    figure.suptitle(fill(title, int(8.6 * width)), x=0.01, ha="left", fontsize=13, fontweight="bold")
    small = "\n".join(fill(line, int(15.5 * width)) for line in conditions.splitlines())
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8)


def plain_log(axis: Axis) -> None:
    """Make an axis logarithmic, labelled with plain numbers: 20, 50, 100, not 10^2."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low > 4 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def name_points(
    axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str], *, colours: Sequence[str]
) -> None:
    """Write each point's name beside it, inside the axes and clear of points, lines and other names if possible.

    Of several places around a point, near and far, the one that covers least is used. A thin line joins a distant name
    to its point. Call this function last, because the limits of the axes must not change afterwards.
    """
    # Collect what names must not cover, as boxes in pixels: points, the legend, and lines.
    figure = axes.figure.figure
    figure.draw_without_rendering()  # the layout places the axes
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    dots = axes.transData.transform(points)
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in dots]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent(renderer).extents)
    for line in axes.lines:
        if line.get_linestyle() != "None":  # as a chain of small boxes
            ends = axes.transData.transform(line.get_xydata())
            for one, other in pairwise(ends):
                steps = np.linspace(one, other, 2 + int(np.hypot(*(other - one)) // 5))
                taken += [(x - 2, y - 2, x + 2, y + 2) for x, y in steps]
    # Put each name where it costs least: the overlap in pixels, a little for distance, and most for leaving the axes.
    for name, point, (x, y), colour in zip(names, points, dots, colours, strict=True):
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", fontsize=8, color=colour, va="center")
        extent = text.get_window_extent(renderer)
        places = []
        for distance in (8, 16, 26, 38):
            for dx, dy in ((1, 0), (-1, 0), (0.7, -0.7), (-0.7, 0.7), (0.7, 0.7), (-0.7, -0.7), (0, 1), (0, -1)):
                # Text right of a point is aligned at its left edge, text left of it at its right edge.
                align = "left" if dx > 0 else "right" if dx < 0 else "center"
                left = x + dx * distance - {"left": 0, "center": 0.5, "right": 1}[align] * extent.width
                bottom = y + dy * distance - extent.height / 2
                box = (left, bottom, left + extent.width, bottom + extent.height)
                cost = sum(_overlap(box, other) for other in taken) + distance / 100
                cost += 10 * (extent.width * extent.height - _overlap(box, frame.extents))
                places.append((cost, box, (dx * distance, dy * distance), align, distance))
        _, box, shift, align, distance = min(places, key=itemgetter(0))
        taken.append(box)
        text.set(position=[value * 72 / figure.dpi for value in shift], ha=align)
        if distance > 16:
            end = axes.transData.inverted().transform((x + shift[0], y + shift[1]))
            axes.plot(*zip(point, end, strict=True), color=colour, linewidth=0.6, alpha=0.6, zorder=1)


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area shared by two boxes (left, bottom, right, top)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG with a transparent background, creating its folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, transparent=True)
