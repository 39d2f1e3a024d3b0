"""Compare networks in engines with each other and the machine's limit: latency, throughput, memory, training steps.

python benchmark.py --quick true
python benchmark.py --model all --peers paper --output results/cpu.csv
python benchmark.py --loading true --data_path DIR
python benchmark.py --report results/cpu.csv --docs docs/benchmark.md --figures docs
"""

from collections.abc import Sequence

import runtimes
from options import COUNT, POSITIVE, WHOLE, Arguments, Parser, boolean, file_path, path

TRAINING_ENGINES = ("plain", "channels_last", "compile")
TRAINING_PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("default", "fp32", "tf32", "bf16")}
QUICK = {
    "model": ["vanillanet_5"],
    "peers": ["resnet18"],
    "engine": ["eager", "aotinductor", "onnxruntime", "openvino"],
    "precision": ["fp32", "bf16"],
    "calls": 10,
    "together": 2,
}
LOADING = {"loading", "data_path", "num_workers", "input_size", "batch_size", "threads", "device", "output"}
CALLS_PER_TURN = {"cpu": 5, "cuda": 50}  # calls on a GPU are short, and the first ones after a pause are slow


# -- the command line


def build_parser() -> Parser:
    parser = Parser(prog="benchmark.py", description="Measure networks in engines, beside each other.", check=_check)
    add = parser.add_argument_group("what is measured").add_argument
    models = "VanillaNet variants, timm models and checkpoints; all: every variant"
    add("--model", "--models", nargs="+", type=file_path, default=[], help=models)
    add("--peers", nargs="+", default=[], metavar="NAME", help="further timm models; paper: those of the paper's table")
    engines = ("all", *dict.fromkeys((*runtimes.ENGINES, *TRAINING_ENGINES)))
    meaning = f"engines; all: those that run on --device; of training steps {', '.join(TRAINING_ENGINES)}"
    add("--engine", "--runtimes", nargs="+", choices=engines, default=["all"], help=meaning)
    add("--precision", "--precisions", nargs="+", choices=runtimes.PRECISIONS, help="precisions [all of an engine]")
    sizes = "heights and widths of the images in pixels"
    add("--input_size", "--resolutions", nargs="+", type=COUNT, default=[224], help=sizes)
    add("--batch_size", "--batches", nargs="+", type=COUNT, default=[1], help="images in a call")
    add("--training", type=boolean, default=False, help="measure training steps instead of inference")
    add("--loading", type=boolean, default=False, help="measure training's loader beside timm's instead of networks")
    add("--data_path", type=path, metavar="DIR", help="with --loading true, a folder with images in it")
    add("--num_workers", type=WHOLE, default=2, help="with --loading true, loader processes")
    kept = ("none", "activations", "full")
    checkpointing = "gradient checkpointing of training steps"
    add("--grad_checkpointing", nargs="+", choices=kept, default=["none"], help=checkpointing)
    add("--profile", type=boolean, default=False, help="print the time of each kind of layer by the engine's own clock")
    add("--twins", type=boolean, default=False, help="measure VanillaNets as built in deploy form, too")
    add("--int8_depthwise", type=boolean, default=False, help="measure int8 with quantized series activations, too")
    add("--width_mult", type=POSITIVE, help="factor on VanillaNets' channels, for trials [their own]")
    add = parser.add_argument_group("how").add_argument
    add("--calls", type=COUNT, default=200, help="calls of each network that count")
    add("--together", type=COUNT, default=1, help="networks that are in memory together and take turns")
    add("--threads", type=COUNT, help="threads of each process [as many as torch chooses]")
    add("--device", default="cpu", help="what to compute on: cpu or cuda")
    add("--quick", type=boolean, default=False, help="measure a small choice of everything in two minutes")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=path, metavar="FILE.csv", help="add the results to this file")
    add("--report", type=path, nargs="+", metavar="FILE.csv", help="measure nothing; report the results in these files")
    add("--docs", type=path, metavar="FILE.md", help="write the tables to this page")
    add("--figures", type=path, metavar="DIR", help="draw the figures in this folder")
    return parser


def _check(args: Arguments) -> None:
    # --report and --loading share few flags with the measurement of networks.
    if args.report:
        for flag in sorted({*args.given} - {"report", "docs", "figures"}):
            args.pass_over(flag, f"--report measures nothing: leave --{flag} out")
    elif args.loading:
        if args.data_path is None:
            raise ValueError("--loading true needs --data_path, a folder with images in it")
        for flag in sorted({*args.given} - LOADING):
            args.pass_over(flag, f"--loading true measures no network: leave --{flag} out")
        if "batch_size" not in args.given:
            args.batch_size = [64]
    elif not args.model and not args.quick:
        raise ValueError("name --model, or add --quick true")
    for flag in ("calls", "docs", "figures", "output", "together", "training") if args.profile else ():
        args.pass_over(flag, f"--profile true prints a table of its own: leave --{flag} out")
    args.needs("docs", args.report or args.output or args.profile, "its sections name files of results: add --output")
    kind = runtimes.device_type(args.device)
    if kind not in TRAINING_PRECISIONS:
        raise ValueError(f"--device {args.device} is not measured: use cpu or cuda")
    # Flags that belong to one kind of measurement.
    for flag in ("data_path", "num_workers"):
        args.needs(flag, args.loading or flag not in args.given, "it is for --loading true")
    args.needs("twins int8_depthwise", not args.training, "--training true has engines of its own")
    if others := set(args.engine) - {"all", *(TRAINING_ENGINES if args.training else runtimes.ENGINES)}:
        found = f"--training {str(args.training).lower()}"
        raise ValueError(f"--engine {' '.join(sorted(others))} does not go with {found}: leave it out")
    if not args.training:
        args.pass_over("grad_checkpointing", "--grad_checkpointing belongs to training steps: add --training true")
    precisions = TRAINING_PRECISIONS[kind]
    if args.training and not set(args.precision or ()) <= set(precisions):
        raise ValueError(f"--training true computes in {' and '.join(precisions)}: name no other --precision")
    # --quick sets the flags that were not given.
    if args.quick:
        for flag in QUICK.keys() - {*args.given, *(["engine"] if args.training else [])}:
            setattr(args, flag, QUICK[flag])
        if "engine" not in args.given and not args.training:
            args.engine = [name for name in args.engine if kind in runtimes.find(name).computes]


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import argparse
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarking import loading, profiling, report, results, subjects
from benchmarking.spec import Spec
from benchmarking.worker import Worker, WorkerError, prepare
from networks import is_file, is_vanillanet, read
from records import logs
from records.files import mistakes_end


@cache
def _is_ours(network: str) -> bool:
    """Whether a model's name or a checkpoint is of a VanillaNet."""
    return is_vanillanet((read(network).record.model or "") if is_file(network) else network)


def _networks(args: argparse.Namespace) -> list[str]:
    names = []
    for name in args.model:
        names += timm.list_models(filter="vanillanet*") if name == "all" else [name]
    for name in args.peers:
        names += report.PEERS if name == "paper" else [name]
    names = list(dict.fromkeys(names))
    labels = [Path(name).stem for name in names]
    for name, label in zip(names, labels, strict=True):
        if labels.count(label) > 1:
            raise ValueError(f"{name} and another would both be called {label}: give their files different names")
    files = [name for name in names if is_file(name)]
    for flag in ("width_mult", "twins"):
        if getattr(args, flag) and not any(is_vanillanet(name) for name in names if name not in files):
            raise ValueError(f"--{flag} is for VanillaNets by name, and none is measured")
    if args.training and files:
        raise ValueError(f"--training true measures models by their names: leave out {files[0]}")
    if missing := [name for name in files if not Path(name).is_file()]:
        raise ValueError(f"{missing[0]} does not exist")
    # The processes that measure run in the repository's folder, whatever this one's is.
    return [str(Path(name).absolute()) if name in files else name for name in names]


def _engines(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Return the requested pairs (engine, precision) that can run on this device."""
    kind = runtimes.device_type(args.device)
    if args.training:
        chosen = TRAINING_ENGINES if "all" in args.engine else args.engine
        return list(itertools.product(chosen, args.precision or TRAINING_PRECISIONS[kind]))
    every = list(runtimes.ENGINES) if "all" in args.engine else args.engine
    pairs = []
    for name in every:
        engine = runtimes.find(name)
        if kind not in engine.computes:
            if "all" in args.engine:
                continue
            raise ValueError(f"{name} does not run on {kind}: leave it out of --engine")
        for precision in engine.computes[kind]:
            # Skip float16 on a CPU: eager PyTorch converts in each operator, which is slow and which nobody would use.
            fits = (kind, precision) != ("cpu", "fp16")
            if fits and precision in (args.precision or runtimes.PRECISIONS):
                pairs.append((name, precision))
    lacking = [one for one in args.precision or () if one not in {precision for _, precision in pairs}]
    if lacking or not pairs:
        raise ValueError(f"--precision {' '.join(lacking)}: no engine of --engine computes in it here")
    return pairs


def _specs(args: argparse.Namespace, network: str) -> list[Spec]:
    """Return everything to measure for one network."""
    built = is_vanillanet(network) and not is_file(network)
    shared = {"device": args.device, "width_mult": args.width_mult if built else None}
    shared["kind"] = "training" if args.training else "inference"
    twins = (False, True) if args.twins and built else (False,)
    specs = []
    for resolution, batch, (engine, precision) in itertools.product(args.input_size, args.batch_size, _engines(args)):
        spec = Spec(network, engine, precision, resolution, batch, **shared)
        for twin, mode in itertools.product(twins, args.grad_checkpointing):
            specs.append(replace(spec, twin=twin, grad_checkpointing=mode))
        if args.int8_depthwise and precision == "int8" and runtimes.find(engine).leaves_depthwise and _is_ours(network):
            specs.append(replace(spec, int8_depthwise=True))
    return list(dict.fromkeys(specs))


# -- measuring


def _start(
    specs: Sequence[Spec], folder: Path, args: argparse.Namespace, alive: ExitStack
) -> dict[Worker, dict[str, float]]:
    """Start a process per spec, to be closed by `alive`; return what each reports, and print what cannot be built."""
    failures = {} if args.profile else prepare(specs, folder, threads=args.threads)
    waiting = [spec for spec in specs if spec not in failures]
    started: list[Worker] = []
    facts = {}
    while waiting or started:
        # On a GPU one at a time, so that each process knows how much memory was in use before its network.
        while waiting and len(started) < (args.threads if args.device == "cpu" else 1):
            worker = Worker(waiting.pop(0), folder, threads=args.threads, profile=args.profile)
            started.append(alive.enter_context(closing(worker)))
        worker = started.pop(0)
        try:
            facts[worker] = worker.ready()
        except WorkerError as error:
            failures[worker.spec] = str(error)
            worker.close()
    for spec, reason in failures.items():
        print(f"left out: {spec}: {reason}", flush=True)
    return facts


def _measure_group(
    facts: dict[Worker, dict[str, float]],
    anchor: Worker,
    limit: Worker,
    limits: dict[str, float],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Measure the networks in `facts` by turns; yield their rows without the columns that `results.complete` adds."""
    turn = CALLS_PER_TURN[runtimes.device_type(args.device)]
    rounds = -(-args.calls // turn)
    # Measure the limit of each precision right after the times, because the machine's clock drifts.
    takes = [partial(worker.times, turn) for worker in (anchor, *facts)]
    anchor_seconds, *seconds = profiling.interleave(takes, rounds=rounds, warm_up=1)
    for precision in {worker.spec.precision for worker in facts}:
        limits[precision] = max(limits.get(precision, 0.0), limit.ask(precision))
    for worker, times in zip(facts, seconds, strict=True):
        yield {
            **results.row(worker.spec, times, threads=args.threads),
            **subjects.costs(worker.spec),
            "peak_mb": worker.peak_mb(),
            **facts[worker],
            "anchor_ms": results.statistics(anchor_seconds, 1)["median_ms"],
            "anchor": f"{anchor.spec.network}, {anchor.spec.resolution} px",
        }


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows so far after each group of `--together` networks, and so in the end all rows of the run.

    The processes of a group live at the same time and take turns, in a new order in each round.

    One process, the anchor, is measured in every round from the first to the last. The changes of its median show how
    much the machine drifted between networks.
    """
    # Report impossible requests before anything is measured.
    names = _networks(args)
    wanted = [spec for name in names for spec in _specs(args, name)]
    if args.int8_depthwise and not any(spec.int8_depthwise for spec in wanted):
        raise ValueError("--int8_depthwise is for VanillaNets in int8, in engines that leave it out: none is measured")
    rows: list[dict[str, Any]] = []
    limits: dict[str, float] = {}
    groups = [names[i : i + args.together] for i in range(0, len(names), args.together)]
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as lasting:
        folder = Path(temporary)
        # The anchor and the process that measures the machine's limit live for the whole run.
        published = results.PUBLISHED_PRECISION[runtimes.device_type(args.device)]
        first = Spec(names[0], "eager", published, args.input_size[0], device=args.device, width_mult=args.width_mult)
        anchor = lasting.enter_context(closing(Worker(first, folder, threads=args.threads)))
        anchor.ready()
        machine = Spec("", "limit", "fp32", device=args.device)
        limit = lasting.enter_context(closing(Worker(machine, folder, threads=args.threads)))
        limit.ready()

        # Each group has its own processes.
        for group in groups:
            with ExitStack() as alive:
                facts = _start([spec for name in group for spec in _specs(args, name)], folder, args, alive)
                for row in _measure_group(facts, anchor, limit, limits, args):
                    rows.append(row)
                    print(
                        f"{row['network']}, {row['engine']}, {row['precision']}, {row['resolution']} px, "
                        f"batch {row['batch']}: {row['median_ms']:.2f} ms",
                        flush=True,
                    )
            if rows:
                results.complete(rows, limits)
                yield rows
    if not rows:
        raise ValueError("nothing could be measured; the lines above say why")


def print_profiles(args: argparse.Namespace) -> None:
    """Print the time of each kind of layer in one call of each network and engine, by the engine's own clock."""
    for spec in [spec for name in _networks(args) for spec in _specs(args, name)]:
        with tempfile.TemporaryDirectory() as temporary, ExitStack() as alive:
            workers = list(_start([spec], Path(temporary), args, alive))
            if not workers:
                continue
            try:
                layers = workers[0].layers()
            except WorkerError as error:
                print(f"left out: {spec}: {error}")
                continue
        kinds: Counter[str] = Counter()
        for layer in layers:
            kinds[layer["kind"]] += layer["ms"]
        total = sum(kinds.values())
        rows = [["kind of layer", "ms", "%"]]
        rows += [[kind, f"{ms:.2f}", f"{100 * ms / total:.1f}"] for kind, ms in kinds.most_common(20)]
        print(logs.table([*rows, ["all", f"{total:.2f}", "100.0"]], str(spec)))


# -- the command


def measure_loading(args: argparse.Namespace) -> None:
    """Measure training's loader and timm's by turns, print the results, and add them to --output."""
    kept = results.read(args.output, loading.COLUMNS) if args.output and args.output.exists() else []
    for resolution, batch in itertools.product(args.input_size, args.batch_size):
        found = loading.measure(
            args.data_path,
            resolution=resolution,
            batch=batch,
            workers=args.num_workers,
            device=torch.device(args.device),
            threads=args.threads,
        )
        cells = []
        for row in found:
            speed = f"{row['images_per_s']:.0f}" if row["stage"] == "all" else ""
            cells.append([row["loader"], row["stage"], f"{row['ms_per_image']:.2f}", speed])
        title = f"{resolution} px, batch {batch}, {args.num_workers} loader processes: {found[0]['ratio']:.2f} x timm"
        print(logs.table([["loader", "stage", "ms an image", "images/s"], *cells], title, text_columns=2))
        kept += found
        if args.output:
            results.write(args.output, kept, loading.COLUMNS)


def run(args: argparse.Namespace) -> None:
    # Read the rows from files, or measure them.
    if args.report:
        stems = [path.stem for path in args.report]
        if len(set(stems)) < len(stems):
            raise ValueError("--report names two files alike, and its sections are named after them: rename one")
        sections = {path.stem: [row for row in results.read(path) if row["kind"] != "machine"] for path in args.report}
        rows = [row for found in sections.values() for row in found]
    else:
        kept = results.read(args.output) if args.output and args.output.exists() else []
        for rows in measure(args):
            if args.output:  # after each group, so that an interrupted run keeps its rows
                results.write(args.output, [*kept, *rows])
        sections = {args.output.stem if args.output else "cpu": rows}
    # Report the rows on the terminal, as figures, and as a page.
    for title, table in report.tables(rows):
        print(logs.table(table, title, text_columns=report.TEXT_COLUMNS))
    if len(memory := report.memory_table(rows)) > 1:
        print(logs.table(memory, "gradient checkpointing, and the largest batch by a GPU's memory"))
    drawn = report.write_figures(args.figures, sections) if args.figures else []
    if args.docs:
        report.write_page(args.docs, sections, figures=[path.name for path in drawn])
    for written in (args.docs, *drawn):
        if written:
            print(written)


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    with mistakes_end("benchmark.py"):
        args.threads = args.threads or torch.get_num_threads()
        if args.loading:
            if args.device != "cpu" and not torch.cuda.is_available():
                raise ValueError(f"--device {args.device}: no CUDA device is available here; use --device cpu")
            torch.set_num_threads(args.threads)
            measure_loading(args)
        elif args.profile:
            print_profiles(args)
        else:
            run(args)


if __name__ == "__main__":
    main(args=ARGS)
