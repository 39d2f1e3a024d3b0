"""Tables, figures and a page from rows of results alone.

Accuracies in a figure are published ones, and the figure says so: the paper's for VanillaNets, and for other networks
those that torchvision states for its weights.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torchvision
from matplotlib.figure import Figure

from benchmarking.results import PUBLISHED_PRECISION, is_published
from benchmarking.spec import VARIANT
from networks import is_vanillanet
from pictures import style
from pictures.figures import Result, accuracy_figure, paper_results
from runtimes import device_type

Row = Mapping[str, Any]
TEXT_COLUMNS = 3
SAVED, PEAK = "saved for the backward pass (MiB/image)", "at the peak of a step (MiB/image)"
MEMORY_OF = ("channels_last", "bf16")
CARDS = (8, 16, 24, 40, 80)  # GB of a GPU's memory
USABLE = 0.9  # share of a GPU's memory; CUDA, libraries and fragmentation take the rest
# In float32: weight, gradient, AdamW's two moments, average, the guard's copy. In bfloat16: a copy of the weight.
BYTES_PER_PARAMETER = 6 * 4 + 2
# Networks that the paper compares VanillaNet with. By timm's name: the name in words, and torchvision's name for the
# same network if torchvision states its accuracy.
PEERS = {
    "resnet18": ("ResNet-18", "resnet18"),
    "resnet34": ("ResNet-34", "resnet34"),
    "resnet50": ("ResNet-50", "resnet50"),
    "resnet101": ("ResNet-101", "resnet101"),
    "swin_tiny_patch4_window7_224": ("Swin-T", "swin_t"),
    "swin_small_patch4_window7_224": ("Swin-S", "swin_s"),
    "convnextv2_nano": ("ConvNeXtV2-N", None),
    "convnextv2_tiny": ("ConvNeXtV2-T", None),
    "repvgg_a0": ("RepVGG-A0", None),
    "repvgg_b3": ("RepVGG-B3", None),
    "mobilenetv3_large_100": ("MobileNetV3-L", "mobilenet_v3_large"),
}
# Names in words, in the order of the columns.
ENGINES = {
    "eager": "PyTorch",
    "plain": "PyTorch",
    "channels_last": "PyTorch, channels-last",
    "cuda_graphs": "CUDA graph",
    "compile": "torch.compile",
    "compile_cuda_graphs": "torch.compile, CUDA graph",
    "triton": "Triton",
    "aotinductor": "AOTInductor",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}
PRECISIONS = {
    "default": "float32 as torch sets it",
    "fp32": "float32",
    "tf32": "TF32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "int8": "int8",
}
PROCESSORS = {"avx2": "AVX2", "avx512": "AVX-512", "amx": "AMX"}  # by the last word of a file's name
BESIDE = 1.2  # an engine within this factor of the fastest engine's time stands beside it
HERO, RIVAL = "vanillanet_11", "swin_tiny_patch4_window7_224"  # of nearly the same accuracy: 81.1 and 81.5 %


# -- all rows, for the terminal


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or value != value else f"{value:.{digits}f}"


def _same(row: Row, *names: str) -> tuple:
    return tuple(row[name] for name in names)


# Heading in a table, column of the file, digits after the decimal point.
COLUMNS = (
    ("layers", "layers", 0),
    ("params (M)", "params_m", 1),
    ("MACs (G)", "macs_g", 2),
    ("median (ms)", "median_ms", 2),
    ("p5", "p5_ms", 2),
    ("p95", "p95_ms", 2),
    ("mean", "mean_ms", 2),
    ("images/s", "images_per_s", 1),
    ("ratio", "ratio", 2),
    ("GFLOP/s", "gflops", 0),
    ("of the limit", "share", 2),
    ("memory (MB)", "peak_mb", 0),
    ("first answer (s)", "first_s", 2),
    (SAVED, "saved_mib", 1),
    (PEAK, "step_mib", 1),
)


def tables(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """Return (title, header and lines) for each kind, device, resolution and batch size, in the order of the rows."""
    found: dict[tuple, list[list[str]]] = {}
    header = ["network", "engine", "precision", *(heading for heading, _, _ in COLUMNS)]
    for row in rows:
        lines = found.setdefault(_same(row, "kind", "device", "resolution", "batch"), [header])
        numbers = (_number(row.get(name), digits) for _, name, digits in COLUMNS)
        lines.append([*_same(row, "network", "engine", "precision"), *numbers])
    return [
        (f"{kind} on {device}, {resolution:g} px, batch {batch:g}", _without_empty_end(lines))
        for (kind, device, resolution, batch), lines in found.items()
    ]


def _without_empty_end(lines: list[list[str]]) -> list[list[str]]:
    """Drop the last columns, which only training steps fill, while they are empty in all lines."""
    while not any(line[-1] for line in lines[1:]):
        lines = [line[:-1] for line in lines]
    return lines


def memory_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return time and memory of training steps, and the largest batch, by network and mode of gradient checkpointing.

    The steps are in bfloat16 and channels-last. The largest batch for a GPU is
    (`USABLE` x its bytes - `BYTES_PER_PARAMETER` x parameters) / bytes per image at the peak.
    """
    lines = [["network", "time", SAVED, PEAK, *(f"{card} GB" for card in CARDS)]]
    chosen = [row for row in rows if row.get("step_mib") and _same(row, "engine", "precision") == MEMORY_OF]
    chosen = [row for row in chosen if not row["network"].endswith("(guarded)")]
    run = ("resolution", "batch", "device", "processor", "threads", "torch", "date")
    times = {_same(row, "network", *run): row["median_ms"] for row in chosen}
    for row in chosen:
        network, _, mode = row["network"].removesuffix(")").partition(" (checkpointing ")
        fixed, each = BYTES_PER_PARAMETER * 1e6 * row["params_m"], 2**20 * row["step_mib"]
        lines.append(
            [
                f"{_name(network)}, {mode or 'none'}",
                _number(row["median_ms"] / times.get((network, *_same(row, *run)), float("nan")), 2),
                _number(row["saved_mib"], 1),
                _number(row["step_mib"], 1),
                *(f"{max(0, USABLE * 1e9 * card - fixed) // each:.0f}" for card in CARDS),
            ]
        )
    return lines


# -- what a page says about one processor


@cache
def published() -> dict[str, tuple[str, float | None]]:
    """Return each network's name in words and published top-1 accuracy on ImageNet in percent, by timm's name."""
    found = {}
    # The paper's table says VanillaNet-13-1.5x, timm's registry vanillanet_13_x1_5.
    for paper in paper_results():
        if paper.top1 is not None:
            key = paper.network.lower().replace("-1.5x, adaptive pooling", "_x1_5_ada_pool").replace("-1.5x", "_x1_5")
            found[key.replace("vanillanet-", "vanillanet_")] = paper.network, paper.top1
    for key, (name, theirs) in PEERS.items():
        top1 = None
        if theirs:
            top1 = torchvision.models.get_model_weights(theirs).IMAGENET1K_V1.meta["_metrics"]["ImageNet-1K"]["acc@1"]
        found[key] = name, top1
    return found


def single(rows: Iterable[Row]) -> list[Row]:
    """Select inference of one image at the most common resolution, for published networks without their variants."""
    chosen = [row for row in rows if row["kind"] == "inference" and row["batch"] == 1]
    chosen = [row for row in chosen if not VARIANT.search(row["network"])]
    resolutions = [row["resolution"] for row in chosen]
    return [row for row in chosen if row["resolution"] == max(resolutions, key=resolutions.count)]


def fastest(rows: Iterable[Row], *by: str) -> dict[tuple, Row]:
    """Return the row with the lowest median among those that agree in the columns `by`."""
    best: dict[tuple, Row] = {}
    for row in sorted(rows, key=lambda row: row["median_ms"]):
        best.setdefault(_same(row, *by), row)
    return best


def _name(network: str) -> str:
    return published().get(network, (network,))[0]


def _engine(engine: str) -> str:
    return ENGINES.get(engine, engine)


def _way(row: Row) -> str:
    return f"{_engine(row['engine'])}, {PRECISIONS[row['precision']]}"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _listed(parts: Sequence[str]) -> str:
    return " and ".join((", ".join(parts[:-1]), parts[-1])) if len(parts) > 1 else parts[0]


def speed_table(rows: Sequence[Row]) -> list[list[str]]:
    """Return median in ms and ratio to the published way: a line per network, a column per engine and precision.

    VanillaNets come first. The fastest of each line is bold.
    """
    # Columns in the order of `PRECISIONS` and `ENGINES`; engines that are not in them come last.
    order = [(engine, precision) for precision in PRECISIONS for engine in ENGINES]
    present = {_same(row, "engine", "precision") for row in rows}
    columns = [one for one in order if one in present] + sorted(present - set(order))
    # Lines from the smallest network to the largest; the published way has no ratio to itself.
    cells = {_same(row, "network", "engine", "precision"): row for row in rows}
    networks = {row["network"]: (not is_vanillanet(row["network"]), row["macs_g"]) for row in rows}
    lines = [["network", *(f"{_engine(engine)}<br>{PRECISIONS[precision]}" for engine, precision in columns)]]
    for network in sorted(networks, key=networks.get):
        line = [_name(network)]
        best = min(row["median_ms"] for (name, *_), row in cells.items() if name == network)
        for column in columns:
            row = cells.get((network, *column))
            text = "" if row is None else _ms(row["median_ms"])
            if row is not None and row["median_ms"] == best:
                text = f"**{text}**"
            if row is not None and row["ratio"] is not None and not is_published(row):
                text += f"<br>{row['ratio']:.1f}x"
            line.append(text)
        lines.append(line)
    return lines


def _best(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Return the row of the fastest engine by precision and network."""
    best: dict[str, dict[str, Row]] = {}
    for (precision, network), row in fastest(rows, "precision", "network").items():
        best.setdefault(precision, {})[network] = row
    return {precision: best[precision] for precision in PRECISIONS if precision in best}


def statements(rows: Sequence[Row]) -> list[str]:
    """Return sentences on what the rows of one image show about VanillaNets; those without enough rows are left out."""
    ours = [row for row in rows if is_vanillanet(row["network"])]
    best, own = _best(ours), _best(row for row in ours if row["library"].startswith("torch "))
    said = []

    # A network of medium depth, in each precision.
    hero = [found[HERO] for found in best.values() if HERO in found]
    base = [row for row in ours if row["network"] == HERO and is_published(row)]
    if hero and base:
        parts = [
            f"{_ms(row['median_ms'])} ms in {PRECISIONS[row['precision']]} ({_engine(row['engine'])})" for row in hero
        ]
        said.append(
            f"VanillaNet-11 takes {_listed(parts)}, where the published way, PyTorch in float32, takes "
            f"{_ms(base[0]['median_ms'])} ms."
        )

    # How much an engine other than PyTorch would gain.
    lags = {}
    for precision, found in own.items():
        ratios = [row["median_ms"] / best[precision][name]["median_ms"] for name, row in found.items()]
        lags[PRECISIONS[precision]] = median(ratios)
    if lags:
        beside = [precision for precision, lag in lags.items() if lag <= BESIDE]
        behind = [precision for precision in lags if precision not in beside]
        verdict = f"stands beside the best engines in {_listed(beside)}" if beside else "falls behind the best engines"
        if beside and behind:
            verdict += f", but not in {_listed(behind)}"
        parts = [f"{lag:.2f} times in {precision}" for precision, lag in lags.items()]
        said.append(
            f"Plain PyTorch {verdict}: compared with the fastest engine of all, the fastest of PyTorch's own takes "
            f"{_listed(parts)} as long, at the median over the VanillaNets."
        )

    # How much is left to gain.
    shares = {precision: [row["share"] for row in found.values() if row["share"]] for precision, found in best.items()}
    if parts := [f"{_range(found)} in {PRECISIONS[precision]}" for precision, found in shares.items() if found]:
        said.append(
            f"Of the processor's limit, the rate of its fastest large matrix product, the fastest engines reach "
            f"{_listed(parts)}."
        )
    return said


def _conditions(rows: Sequence[Row]) -> str:
    """Describe the conditions of the measurements in one line."""

    def values(name: str) -> str:
        return ", ".join(sorted({f"{row[name]:g}" if isinstance(row[name], float) else str(row[name]) for row in rows}))

    further = {row["library"] for row in rows} - {f"torch {row['torch'].partition('+')[0]}" for row in rows}
    libraries = "; ".join(["torch " + values("torch"), *sorted(further)])
    noise = median(row["median_ms"] / row["p5_ms"] for row in rows)
    counts = {row["calls"] for row in rows}
    calls = [f"{count:g}" for count in sorted({min(counts), max(counts)})]
    spread = f"median of {' to '.join(calls)} calls, {100 * (noise - 1):.0f} % above the 5th percentile"
    return f"{values('processor')}; {values('threads')} threads; {libraries}; {spread}; {values('date')}"


def training_statement(rows: Sequence[Row]) -> str:
    """Return a sentence on the fastest training step."""
    row = min(rows, key=lambda row: row["median_ms"])
    return (
        f"A training step of {_name(row['network'])} with {row['batch']:g} images of {row['resolution']:g} px takes "
        f"{row['median_ms'] / 1e3:.2g} s at best ({_way(row)})."
    )


def varied(rows: Sequence[Row], column: str) -> list[Row]:
    """Return inference rows of the network measured at the most values of `column`, which is `batch` or `resolution`.

    Only engines with all of these values are kept. With fewer than two values, the list is empty.
    """
    fixed = {"batch": "resolution", "resolution": "batch"}[column]
    groups: dict[tuple, dict[tuple, dict[float, Row]]] = {}
    for row in rows:
        if row["kind"] == "inference":
            engines = groups.setdefault(_same(row, "network", fixed), {})
            engines.setdefault(_same(row, "engine", "precision"), {})[row[column]] = row  # of a value the last one
    most = max(groups.values(), key=lambda engines: max(map(len, engines.values())), default={})
    full = max(map(len, most.values()), default=0)
    return [row for found in most.values() for row in found.values() if len(found) == full > 1]


# -- figures


def accuracy_panels(rows: Sequence[Row]) -> dict[str, list[Result]]:
    """Return latency and published accuracy by panel: float32, with the published way, and the fastest precision."""
    names = published()
    chosen = [row for row in single(rows) if names.get(row["network"], (None, None))[1] is not None]

    def results(found: Iterable[Row], way: str = "") -> list[Result]:
        return [
            Result(
                network=names[row["network"]][0],
                series="VanillaNet" + way if is_vanillanet(row["network"]) else row["network"],
                layers=row["layers"],
                latency_ms=row["median_ms"],
                top1=names[row["network"]][1],
                conditions="one image in the fastest engine; accuracy on ImageNet as published, of float32 weights\n"
                + _conditions(chosen),
                source="Latency measured by benchmark.py",
            )
            for row in sorted(found, key=lambda row: row["macs_g"])
        ]

    # The published way beside the fastest engines in float32 shows how much an engine gains.
    plain = [row for row in chosen if row["precision"] == PUBLISHED_PRECISION[device_type(row["device"])]]
    eager = [row for row in plain if is_published(row) and is_vanillanet(row["network"])]
    return {
        "float32": results(fastest(plain, "network").values()) + results(eager, ", published way"),
        "fastest precision of each": results(fastest(chosen, "network").values()),
    }


def accuracy(rows: Sequence[Row], processor: str) -> Figure | None:
    """Draw measured latency against published accuracy; None for fewer than two networks with an accuracy."""
    panels = accuracy_panels(rows)
    if len(panels["fastest precision of each"]) < 2:
        return None
    title = f"VanillaNet on a processor with {processor}"
    times = {row["network"]: row["median_ms"] for row in fastest(single(rows), "network").values()}
    if HERO in times and RIVAL in times:
        verb = "overtakes" if times[HERO] < times[RIVAL] else "stays behind"
        title = f"VanillaNet-11 {verb} Swin-T on {processor}: {_ms(times[HERO])} against {_ms(times[RIVAL])} ms"
    return accuracy_figure(panels, "latency_ms", title=title, xlabel="latency of one image (ms)")


# By column: the quantity drawn over it, both axis labels, and a title that compares the fastest rows at both ends.
SIZES = {
    "resolution": (
        "median_ms", "image size (px)", "latency of one image (ms)", "{:g} px take {:.1f} times as long as {:g} px",
    ),
    "batch": (
        "images_per_s", "images in a call", "images a second",
        "Batches of {:g} have {:.1f} times the throughput of {:g}",
    ),
}  # fmt: skip


@style.styled
def sizes(rows: Sequence[Row], processor: str) -> Figure | None:
    """Draw latency over resolution and throughput over batch size, by engine and precision; None for a single size."""
    panels = {column: found for column in SIZES if (found := varied(rows, column))}
    if not panels:
        return None
    figure = style.new_figure(5.5 * len(panels), 4)
    for axes, (column, found) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        quantity, xlabel, ylabel, said = SIZES[column]
        lines: dict[str, list[tuple]] = {}
        for row in sorted(found, key=lambda row: row[column]):
            lines.setdefault(_way(row), []).append(_same(row, column, quantity))
        for way, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
        best = [row for _, row in sorted(fastest(found, column).items())]
        said = said.format(best[-1][column], best[-1][quantity] / best[0][quantity], best[0][column])
        axes.set(title=said, xlabel=xlabel, ylabel=ylabel, ylim=(0, None), xticks=[row[column] for row in best])
    figure.axes[0].legend()
    shown = [row for found in panels.values() for row in found]
    names = _listed(list(dict.fromkeys(_name(row["network"]) for row in shown)))
    style.caption(figure, f"{names} in other sizes, on {processor}", _conditions(shown))
    return figure


FIGURES: dict[str, Callable[[Sequence[Row], str], Figure | None]] = {"accuracy": accuracy, "sizes": sizes}


def _file(label: str, name: str) -> str:
    return f"measured_{label}_{name}.png"


def write_figures(folder: Path, sections: Mapping[str, Sequence[Row]]) -> list[Path]:
    """Draw the figures for which there are enough rows, and return their files.

    Args:
        sections: rows by the name of their file without its suffix.
    """
    written = []
    for label, rows in sections.items():
        for name, draw in FIGURES.items():
            if figure := draw(rows, _processor(label)):
                written.append(folder / _file(label, name))
                style.save(figure, written[-1])
    return written


# -- the page


def _processor(label: str) -> str:
    """Name the processor of a file in words: AVX-512 for `cpu-avx512`, NVIDIA L4 for `gpu-nvidia-l4`."""
    if label.startswith("gpu-"):
        return label.removeprefix("gpu-").replace("-", " ").upper()
    return PROCESSORS.get(label.rpartition("-")[2], label)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---", *["---:"] * (len(header) - 1)], *body))


def write_page(path: Path, sections: Mapping[str, Sequence[Row]], *, figures: Collection[str] = ()) -> None:
    """Write a page with a part for each file: sentences on what it shows, its figures, and tables.

    Args:
        sections: rows by the name of their file without its suffix.
        figures: names of the files that `write_figures` wrote, in the same folder as the page.
    """
    parts = [
        "# Benchmark",
        "How long VanillaNets and other networks take for an image, in each engine that runs here. Written by "
        "`benchmark.py --report`: do not edit. The rows behind the page, with spread, memory and further sizes, are "
        "in the CSV files that its sections name, and [measuring.md](measuring.md) says how they were measured.",
        "In the tables a cell is the median in ms, and under it how many times as fast that is as the published way, "
        "PyTorch in float32 with contiguous tensors, in the same run; a file may hold several runs. "
        "The fastest of each row is bold. Networks are in deploy form.",
    ]
    # One section per file: sentences, figure and table of single images, then other sizes, then training steps.
    for label, rows in sections.items():
        chosen, training = single(rows), [row for row in rows if row["kind"] == "training"]
        images = {
            name: f"![{_processor(label)}, {name}]({_file(label, name)})"
            for name in FIGURES
            if _file(label, name) in figures
        }
        parts += [f"## {_processor(label) if chosen else 'Training steps'}", f"`{label}.csv`: {_conditions(rows)}."]
        if chosen:
            parts += [" ".join(statements(chosen)), images.get("accuracy", ""), _markdown(speed_table(chosen))]
        parts.append(images.get("sizes", ""))
        for size in dict.fromkeys(_same(row, "resolution", "batch") for row in training):
            steps = [row for row in training if _same(row, "resolution", "batch") == size]
            parts += [training_statement(steps), _markdown(speed_table(steps))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(part for part in parts if part) + "\n")
