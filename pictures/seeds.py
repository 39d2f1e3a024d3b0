"""Figure of experiments over several seeds, with runs as dots and their means as bars."""

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.figure import Figure

from pictures import style

Panel = tuple[str, str, Mapping[str, Sequence[float]]]


@style.styled
def seeds_figure(rows: Sequence[Sequence[Panel]], *, title: str, conditions: str, ylabel: str) -> Figure:
    """Draw rows of panels, each as wide as the figure; the panels of a row share one range, so that they compare.

    Args:
        rows: panels, each with its title, the name of what is varied, and the runs' scores by the varied value.
    """
    figure = style.new_figure(9, 3.2 * len(rows) + 0.8)
    for part, panels in zip(figure.subfigures(len(rows), squeeze=False).flat, rows, strict=True):
        line = part.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (heading, varied, scores) in zip(line, panels, strict=True):
            for position, runs in enumerate(scores.values()):
                axes.plot([position] * len(runs), runs, "o", color=style.PEER, alpha=0.8, zorder=3)
                axes.hlines(mean(runs), position - 0.22, position + 0.22, color=style.ACCENT, linewidth=3)
            axes.set_xticks(range(len(scores)), [name.replace(" ", "\n", 1) for name in scores])
            axes.set(title=heading, xlabel=varied, xlim=(-0.6, len(scores) - 0.4))
            axes.grid(visible=False, axis="x")
        line[0].set_ylabel(ylabel)
    style.caption(figure, title, conditions)
    return figure
