"""Tables, a page and figures from rows of results, and from nothing else.

Accuracies in a figure are published ones and say so: the paper's for VanillaNets, and for other networks those that
torchvision states for its weights.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torchvision
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarking.subjects import is_vanillanet

__all__ = ["TEXT_COLUMNS", "published_top1", "tables", "write_figures", "write_page"]

Row = Mapping[str, Any]
TEXT_COLUMNS = 3
PAPER = Path(__file__).parents[1] / "docs" / "paper_results.csv"
# By timm's names, torchvision's of the same network.
TORCHVISION = {
    "resnet18": "resnet18",
    "resnet34": "resnet34",
    "resnet50": "resnet50",
    "resnet101": "resnet101",
    "swin_tiny_patch4_window7_224": "swin_t",
    "swin_small_patch4_window7_224": "swin_s",
    "mobilenetv3_large_100": "mobilenet_v3_large",
}


# -- tables


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _same(row: Row, *names: str) -> tuple:
    return tuple(row[name] for name in names)


def tables(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """(title, lines with a header) for each kind, device, resolution and batch size, in the order of the rows."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(_same(row, "kind", "device", "resolution", "batch"), []).append(row)
    result = []
    for (kind, device, resolution, batch), chosen in found.items():
        lines = [
            ["network", "engine", "precision", "layers", "params (M)", "MACs (G)", "median (ms)", "p5", "p95", "mean",
             "images/s", "ratio", "GFLOP/s", "of the limit (%)", "memory (MB)", "first answer (s)"]
        ]  # fmt: skip
        for row in chosen:
            share = None if row["share"] is None else 100 * row["share"]
            lines.append(
                [
                    row["network"],
                    row["engine"],
                    row["precision"],
                    _number(row["layers"], 0),
                    _number(row["params_m"], 1),
                    _number(row["macs_g"], 2),
                    *(_number(row[name], 2) for name in ("median_ms", "p5_ms", "p95_ms", "mean_ms")),
                    _number(row["images_per_s"], 1),
                    _number(row["ratio"], 2),
                    _number(row["gflops"], 0),
                    _number(share, 0),
                    _number(row["peak_mb"], 0),
                    _number(row["first_s"], 2),
                ]
            )
        result.append((f"{kind} on {device}, {resolution:g} px, batch {batch:g}", lines))
    return result


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---"] * TEXT_COLUMNS + ["---:"] * (len(header) - TEXT_COLUMNS)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def _conditions(rows: Sequence[Row]) -> list[str]:
    """What the tables hold for, one line each."""
    lines = []
    for name, label in (("processor", "Processor"), ("threads", "Threads"), ("torch", "PyTorch"), ("date", "Date")):
        values = sorted({f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for row in rows})
        lines.append(f"- {label}: {', '.join(values)}")
    libraries = sorted({row["library"] for row in rows if not row["library"].startswith("torch ")})
    if libraries:
        lines.append(f"- Further libraries: {', '.join(libraries)}")
    limits: dict[str, set[str]] = {}
    for row in rows:
        if row["limit_gflops"]:
            limits.setdefault(row["precision"], set()).add(f"{row['limit_gflops']:.0f}")
    stated = "; ".join(f"{precision} {', '.join(sorted(found, key=int))}" for precision, found in limits.items())
    lines.append(f"- The machine's limit, its best large matrix product in each run (GFLOP/s): {stated}")
    anchors: dict[str, list[float]] = {}
    for row in rows:
        if row["anchor_ms"]:
            anchors.setdefault(row["anchor"], []).append(row["anchor_ms"])
    if anchors:
        ranges = "; ".join(f"{min(found):.1f} to {max(found):.1f} ms ({name})" for name, found in anchors.items())
        lines.append(f"- Drift, the range of each anchor's median: {ranges}")
    return lines


def write_page(path: Path, rows: Sequence[Row], *, figures: Path | None) -> None:
    """Write the tables in Markdown, with their conditions, and the figures if they are drawn."""
    parts = [
        "# Benchmark",
        "Written by `benchmark.py --report`; do not edit. What the columns are, and how it was measured, is in "
        "[DEPLOY.md](DEPLOY.md#measuring).",
        "\n".join(_conditions(rows)),
    ]
    if figures is not None:
        names = [name for name, draw in FIGURES.items() if draw(rows) is not None]
        # Both lie where the user says; the links are right if they lie in one folder.
        parts += [f"![{name.replace('_', ' ')}](measured_{name}.png)" for name in names]
    parts += [f"## {title[0].upper()}{title[1:]}\n\n{_markdown(lines)}" for title, lines in tables(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")


# -- figures


def published_top1() -> dict[str, float]:
    """Top-1 accuracy on ImageNet in percent by timm's names, as published."""
    with PAPER.open(newline="") as file:
        paper = {row["network"]: float(row["top1"]) for row in csv.DictReader(file) if row["top1"]}
    found = {}
    for name, top1 in paper.items():
        key = name.lower().replace("-1.5x, adaptive pooling", "_x1_5_ada_pool").replace("-1.5x", "_x1_5")
        found[key.replace("vanillanet-", "vanillanet_")] = top1
    for name, theirs in TORCHVISION.items():
        weights = torchvision.models.get_model_weights(theirs).IMAGENET1K_V1
        found[name] = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return found


def _fastest(rows: Iterable[Row]) -> list[Row]:
    """Of each network and precision, the row of the fastest engine."""
    best: dict[tuple, Row] = {}
    for row in rows:
        key = _same(row, "network", "precision")
        if key not in best or row["median_ms"] < best[key]["median_ms"]:
            best[key] = row
    return list(best.values())


def _figure(xlabel: str, ylabel: str, rows: Sequence[Row]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(f"{rows[0]['processor']}, {rows[0]['threads']:g} threads, {rows[0]['date']}", fontsize="small")
    axes.grid(alpha=0.3)
    return figure, axes


def _lines(axes: Axes, rows: Sequence[Row], by: Sequence[str], x: str, y: str) -> None:
    """A line through the rows that agree in `by`."""
    for key in dict.fromkeys(_same(row, *by) for row in rows):
        points = sorted((row[x], row[y]) for row in rows if _same(row, *by) == key)
        axes.plot(*zip(*points, strict=True), marker=".", label=", ".join(map(str, key)))
    axes.legend(fontsize="small")


def _single(rows: Sequence[Row]) -> list[Row]:
    """Inference of one image at the resolution that most rows have; networks as published, none of their variants."""
    chosen = [row for row in rows if row["kind"] == "inference" and row["batch"] == 1 and " (" not in row["network"]]
    resolutions = [row["resolution"] for row in chosen]
    return [row for row in chosen if row["resolution"] == max(resolutions, key=resolutions.count)]


def latency_accuracy(rows: Sequence[Row]) -> Figure | None:
    """Latency, measured, against accuracy, published; each network in its fastest engine in each precision."""
    top1 = published_top1()
    chosen = [{**row, "top1": top1[row["network"]]} for row in _fastest(_single(rows)) if row["network"] in top1]
    if len({row["network"] for row in chosen}) < 2:
        return None
    figure, axes = _figure("latency (ms), fastest engine, measured", "ImageNet top-1 (%), published", chosen)
    for precision in dict.fromkeys(row["precision"] for row in chosen):
        for family, marker in ((True, "o"), (False, "^")):
            points = [
                row for row in chosen if row["precision"] == precision and is_vanillanet(row["network"]) == family
            ]
            points.sort(key=lambda row: row["median_ms"])
            if points:
                label = f"{'VanillaNet' if family else 'others'}, {precision}"
                xs, ys = [row["median_ms"] for row in points], [row["top1"] for row in points]
                axes.plot(xs, ys, marker=marker, linestyle="-" if family else "", label=label)
        if precision == chosen[0]["precision"]:
            for row in chosen:
                if row["precision"] == precision:
                    name = row["network"].replace("vanillanet_", "V").replace("_patch4_window7_224", "")
                    axes.annotate(name, (row["median_ms"], row["top1"]), fontsize="x-small")
    axes.set_xscale("log")
    axes.legend(fontsize="small")
    return figure


def latency_depth(rows: Sequence[Row]) -> Figure | None:
    """Latency against depth; each network in its fastest engine in each precision."""
    chosen = [
        {**row, "family": "VanillaNet" if is_vanillanet(row["network"]) else "others"}
        for row in _fastest(_single(rows))
        if "x1_5" not in row["network"]
    ]
    if len({row["layers"] for row in chosen}) < 2:
        return None
    figure, axes = _figure("layers", "latency (ms), fastest engine", chosen)
    for family, style in (("VanillaNet", "-"), ("others", "")):
        for index, precision in enumerate(dict.fromkeys(row["precision"] for row in chosen)):
            points = sorted(
                _same(row, "layers", "median_ms")
                for row in chosen
                if row["family"] == family and row["precision"] == precision
            )
            if points:
                marker = "o" if family == "VanillaNet" else "^"
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker=marker, linestyle=style, color=f"C{index}", label=f"{family}, {precision}")
    axes.set_yscale("log")
    axes.legend(fontsize="small")
    return figure


def throughput_batch(rows: Sequence[Row]) -> Figure | None:
    """Images a second by batch size, of the network that was measured at the most sizes."""
    chosen = _varied(rows, "batch", fixed="resolution")
    if not chosen:
        return None
    figure, axes = _figure("batch size", f"images/s, {chosen[0]['network']}", chosen)
    _lines(axes, chosen, ("engine", "precision"), "batch", "images_per_s")
    axes.set_xscale("log", base=2)
    return figure


def latency_resolution(rows: Sequence[Row]) -> Figure | None:
    """Latency of one image by resolution, of the network that was measured at the most of them."""
    chosen = _varied([row for row in rows if row["batch"] == 1], "resolution", fixed="batch")
    if not chosen:
        return None
    figure, axes = _figure("resolution (px)", f"latency (ms), {chosen[0]['network']}", chosen)
    _lines(axes, chosen, ("engine", "precision"), "resolution", "median_ms")
    axes.set_yscale("log")
    return figure


def _varied(rows: Sequence[Row], column: str, *, fixed: str) -> list[Row]:
    """Inference rows of the network, and value of `fixed`, with the most values of `column`; empty for fewer than two.

    Only engines that have all of these values are kept.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if row["kind"] == "inference":
            groups.setdefault(_same(row, "network", fixed), []).append(row)
    if not groups:
        return []
    most = max(groups.values(), key=lambda group: len({row[column] for row in group}))
    values = {row[column] for row in most}
    if len(values) < 2:
        return []
    counts: dict[tuple, set] = {}
    for row in most:
        counts.setdefault(_same(row, "engine", "precision"), set()).add(row[column])
    return [row for row in most if counts[_same(row, "engine", "precision")] == values]


FIGURES = {
    "latency_accuracy": latency_accuracy,
    "latency_depth": latency_depth,
    "throughput_batch": throughput_batch,
    "latency_resolution": latency_resolution,
}


def write_figures(folder: Path, rows: Sequence[Row]) -> list[Path]:
    """Draw the figures that the rows suffice for; returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in FIGURES.items():
        figure = draw(rows)
        if figure is not None:
            written.append(folder / f"measured_{name}.png")
            figure.savefig(written[-1], dpi=100)
    return written
