"""Confusion matrix of an evaluation: which classes a network mistakes for which others."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

from pictures import style

NAMED = 40  # largest number of classes for which rows and columns are named
NUMBERED = 20  # largest number of classes for which cells show their counts
SHADES = LinearSegmentedColormap.from_list("shades", [(style.ACCENT, 0), (style.ACCENT, 1)])


def _shares(counts: np.ndarray) -> np.ndarray:
    """Share of each prediction among a class's images; the row of a class without images is 0."""
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def worst_pairs(counts: np.ndarray, limit: int = 20) -> list[tuple[int, int]]:
    """Return (true class, prediction) of the errors with the largest share of their class's images, worst first.

    Args:
        counts: (C, C), number of images by true class and prediction.
    """
    wrong = _shares(counts) * (1 - np.eye(len(counts)))
    order = np.lexsort((-counts.ravel(), -wrong.ravel()))[:limit]  # of equal shares, more images first
    return [divmod(int(index), len(counts)) for index in order if wrong.flat[index] > 0]


def _draw_matrix(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    shares, size = _shares(counts), len(classes)
    # The square root of the share makes a few per cent distinguishable from zero.
    axes.imshow(shares, cmap=SHADES, norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    axes.set(xlabel="prediction", ylabel="true class")
    axes.grid(visible=False)
    axes.spines[:].set_visible(True)
    if size > NAMED:
        return
    axes.set_xticks(range(size), classes, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(size), classes, fontsize=8)
    if size <= NUMBERED:
        for (row, column), count in np.ndenumerate(counts):
            colour = "white" if shares[row, column] > 0.3 else style.INK
            axes.text(column, row, f"{count}" if count else "", ha="center", va="center", fontsize=8, color=colour)


def _list_pairs(axes: Axes, counts: np.ndarray, classes: Sequence[str]) -> None:
    """Draw a bar for each of the worst pairs, with their share of the true class's images and their number."""
    pairs, shares = worst_pairs(counts), _shares(counts)
    names = [f"{classes[true]} \N{RIGHTWARDS ARROW} {classes[predicted]}" for true, predicted in pairs]
    bars = axes.barh(range(len(pairs)), [100 * shares[pair] for pair in pairs], color=style.ACCENT)
    axes.bar_label(bars, [f"{counts[pair]} of {counts[pair[0]].sum()}" for pair in pairs], padding=4, fontsize=8)
    axes.set_yticks(range(len(pairs)), names, fontsize=8)
    axes.set(title="Most frequent confusions", xlabel="share of the true class (%)")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.grid(visible=False, axis="y")


@style.styled
def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw true classes as rows and predictions as columns; for more than 40 classes, also list the 20 worst pairs.

    Args:
        counts: (C, C), integers, number of images by true class and prediction.
        classes: names of the C classes; if a class has several names, as in ImageNet, the first is shown.
    """
    classes = [name.partition(",")[0] for name in classes]
    # The figure is as large as the names need. For many classes, names are replaced by a list of the worst pairs.
    if len(classes) > NAMED:
        figure = style.new_figure(13, 6.5)
        matrix, pairs = figure.subplots(1, 2)
        _list_pairs(pairs, counts, classes)
    else:
        side = max(5.0, 0.42 * len(classes) + 1.8) if len(classes) <= NUMBERED else 0.24 * len(classes) + 2
        figure = style.new_figure(side, side + 0.4)
        matrix = figure.subplots()
    _draw_matrix(matrix, counts, classes)
    # The title states the share of right answers and the most frequent error.
    title = f"Right for {100 * np.trace(counts) / counts.sum():.2f} % of {counts.sum():,} images"
    for true, predicted in worst_pairs(counts, 1):
        title += f"; {100 * _shares(counts)[true, predicted]:.0f} % of {classes[true]} taken for {classes[predicted]}"
    style.caption(figure, title, "Colour: share of the true class's images.")
    return figure
