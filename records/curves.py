"""Training curves: `curves.png` of a run, and several runs in one figure."""

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from records.files import replacing, writing
from records.logs import CsvSink, Metrics, Sink, read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Panels = Sequence[tuple[str, Sequence[str]]]  # title and columns of each panel
CURVES: Panels = (
    ("loss", ("train_loss", "test_loss")),
    ("top-1 (%)", ("test_acc1", "ema_acc1")),
    ("learning rate", ("lr",)),
    ("lambda", ("act_learn",)),
)
DETECTION_CURVES: Panels = (
    ("loss", ("train_loss",)),
    ("box AP", ("test_box_AP", "test_box_AP50", "ema_box_AP")),
    ("mask AP", ("test_mask_AP", "test_mask_AP50", "ema_mask_AP")),
    ("learning rate", ("lr",)),
)


def curve(rows: Iterable[Mapping[str, object]], column: str) -> list[tuple[int, float]]:
    """Return (epoch, value) of each filled cell in a column of `summary.csv`. Raises ValueError for a non-number."""
    return [(int(row["epoch"]), float(row[column])) for row in rows if row.get(column) not in (None, "")]


def curves_figure(runs: Mapping[str, Iterable[Mapping[str, object]]], panels: Panels) -> "Figure":
    """Plot the curves of one or several runs in one figure.

    With one run, each column has its own colour. With several runs, each run has its own colour and each column of a
    panel its own line style; a line is labelled with its run and column.

    Args:
        runs: rows of each run's `summary.csv`, by the name of the run.
        panels: the four panels of the figure.

    Raises:
        ValueError: a cell is not a number.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(10, 6), layout="constrained")
    single = len(runs) == 1
    # There are ten default colours; more than ten runs divide the turbo colormap among them.
    colors = [f"C{i}" if len(runs) <= 10 else colormaps["turbo"](i / (len(runs) - 1)) for i in range(len(runs))]
    for axes, (title, columns) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        styles = dict(zip(columns, ("-", "--", ":"), strict=False))
        for column, style in styles.items():
            for color, (run, rows) in zip(colors, runs.items(), strict=True):
                points = curve(rows, column)
                if not points:
                    continue
                look = {"label": column} if single else {"label": f"{run}: {column}", "color": color, "ls": style}
                axes.plot(*zip(*points, strict=True), marker=".", **look)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        # With one run, the legend names its lines; with several runs, it explains the line styles.
        if len(columns) > 1 and axes.lines:
            shown = [Line2D([], [], color="gray", ls=style, label=column) for column, style in styles.items()]
            axes.legend(handles=axes.lines if single else shown)
    if not single:
        names = [Line2D([], [], color=color, marker=".", label=run) for color, run in zip(colors, runs, strict=True)]
        figure.legend(handles=names, loc="outside upper center", ncols=4)
    return figure


def runs_figure(folders: Sequence[Path]) -> "Figure":
    """Plot the curves of the runs in these folders, named by folder or, if two folders share a name, by path.

    Raises:
        ValueError: a folder is given twice, or has no table of epochs.
    """
    if len(set(folders)) < len(folders):
        raise ValueError("the same run is named twice")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = {name: _read_run(folder / "summary.csv") for name, folder in zip(names, folders, strict=True)}
    classifies = any("act_learn" in rows[0] for rows in runs.values())
    return curves_figure(runs, CURVES if classifies else DETECTION_CURVES)


def _read_run(path: Path) -> list[dict[str, str]]:
    try:
        rows = read_rows(path)
        points = [point for _, columns in CURVES for column in columns for point in curve(rows, column)]
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; name the folder of a run of main.py") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no table of epochs: {error}") from error
    if not points:
        raise ValueError(f"{path} has no finished epoch")
    return rows


class CurvesSink(Sink):
    """`curves.png`: the columns of `panels` by epoch, from all rows of the table; drawn every 10 s and at the end.

    A figure takes a quarter of a second, as may a whole epoch on a few small images.
    """

    EVERY = 10.0  # seconds

    def __init__(self, path: Path, table: CsvSink, panels: Panels):
        self.path, self.table, self.panels = path, table, panels
        self.drawn = time.monotonic()

    def log(self, metrics: Metrics, step: int) -> None:
        if time.monotonic() - self.drawn >= self.EVERY:
            self._draw()

    def close(self) -> None:
        if self.table.rows:
            self._draw()

    def _draw(self) -> None:
        # A figure is 5 MB of reference cycles, which Python might free only many epochs later. Without collections in
        # between, all of its objects are in the youngest generation, which is quick to collect.
        gc.disable()
        try:
            with writing(self.path), replacing(self.path) as temporary:
                curves_figure({"": self.table.rows}, self.panels).savefig(temporary, dpi=100, format="png")
        finally:
            gc.collect(0)
            gc.enable()
        self.drawn = time.monotonic()
