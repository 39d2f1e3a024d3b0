"""The paper's claims, measured anew: many runs of `main.py`, and the tables and figure of docs/RESULTS.md from them.

python ablation.py --data_path DIR --cifar10 DIR    # do the missing runs, experiment by experiment, then report
python ablation.py --report                         # report from the CSV files in results/ablation/ alone

An interrupted run continues where it stopped. A run whose CSV file is in results/ablation/ is not repeated.
"""

import csv
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev, variance
from textwrap import fill

from options import COUNT, Arguments, Parser, boolean, file_path, parse_args, path

ROOT = Path(__file__).resolve().parent
RECORDS = ROOT / "results" / "ablation"
DECAYED = ROOT / "results" / "ablation_decayed"  # trainings with weight decay of biases and BatchNorms
LATENCIES = ROOT / "results" / "equal_latency.csv"  # measured by benchmark.py: networks compared at equal latency
PAGE = ROOT / "docs" / "RESULTS.md"
FIGURE = ROOT / "docs" / "ablation.png"
SEEDS = 3


# -- the experiments


@dataclass(frozen=True)
class Trial:
    """One run, given by its changes to recipes/`recipe`.args."""

    recipe: str = "ablation"
    depth: int = 6  # layers of the deployed network
    act_num: int = 3  # n of the series activation; 0: no series activation
    decay_epochs: int = 4  # epochs until lambda is 1; 0: no deep training
    seed: int = 0
    epochs: int | None = None  # None: the recipe's
    model: str | None = None  # a network's name in timm; then the recipe sets depth, act_num, decay_epochs and epochs

    @property
    def name(self) -> str:
        epochs = f"-epochs{self.epochs}" if self.epochs else ""
        varied = self.model or f"depth{self.depth}-n{self.act_num}-ramp{self.decay_epochs}{epochs}"
        return f"{self.recipe}-{varied}-seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        own = f"--model vanillanet_{self.depth} --act_num {self.act_num} --decay_epochs {self.decay_epochs}"
        epochs = f" --epochs {self.epochs}" if self.epochs else ""
        varied = f"--model {self.model}" if self.model else own + epochs
        return [f"@{ROOT}/recipes/{self.recipe}.args", *varied.split(), "--seed", str(self.seed)]

    def record(self, folder: Path) -> Path:
        return folder / f"{self.name}.csv"

    def top1(self, folder: Path) -> float:
        """Top-1 after the last epoch, in percent, so that nothing is selected on the test images."""
        with self.record(folder).open(newline="") as file:
            return float(list(csv.DictReader(file))[-1]["test_acc1"])


@dataclass(frozen=True)
class Experiment:
    """A comparison of variants, all else being equal."""

    title: str  # title of the panel in the figure
    varied: str  # heading of the table's first column
    variants: dict[str, Trial]  # each variant's trial of seed 0, by name
    # The paper's ImageNet top-1 by variant, in percent, if the paper makes this comparison.
    paper: dict[str, float] = field(default_factory=dict)

    def trials(self) -> list[Trial]:
        """All runs, seed by seed: all variants with one seed come before the next seed."""
        return [replace(trial, seed=seed) for seed in range(SEEDS) for trial in self.variants.values()]

    def scores(self, folder: Path) -> dict[str, list[float]]:
        """Top-1 of each variant's finished runs, in percent."""
        found = {name: [] for name in self.variants}
        for seed in range(SEEDS):
            for name, first in self.variants.items():
                trial = replace(first, seed=seed)
                if trial.record(folder).exists():
                    found[name].append(trial.top1(folder))
        return found


SHORT = Trial(recipe="ablation_short", decay_epochs=2)
PHOTOGRAPHS = Trial(recipe="cifar10")
LONG = Trial(epochs=20, decay_epochs=8)
PEERS = {  # networks of about the same latency (`LATENCIES`), with their names in timm
    "VanillaNet-6": "vanillanet_6",
    "ResNet-18": "resnet18",
    "ConvNeXt-Atto": "convnext_atto",
    "EfficientNet-Lite0": "efficientnet_lite0",
}

PAPER = {"neither": 59.58, "deep training": 60.53, "series activation": 75.23, "both": 76.36}


def four(both: Trial) -> dict[str, Trial]:
    """Variants with and without each of the paper's two ideas."""
    return {
        "neither": replace(both, decay_epochs=0, act_num=0),
        "deep training": replace(both, act_num=0),
        "series activation": replace(both, decay_epochs=0),
        "both": both,
    }


# The most important experiments come first, because a measurement may end early. The paper's numbers are from its
# ablation table (VanillaNet-6) and its main table.
EXPERIMENTS = {
    "claims": Experiment("The paper's two ideas, 10 epochs", "trained with", four(Trial()), paper=PAPER),
    "photographs": Experiment("The two ideas on CIFAR-10, 10 epochs", "trained with", four(PHOTOGRAPHS), paper=PAPER),
    "act_num": Experiment(
        "Reach of the series activation, 5 epochs", "n", {str(n): replace(SHORT, act_num=n) for n in range(5)}
    ),
    "depth": Experiment(
        "Depth, 5 epochs",
        "layers",
        {str(depth): replace(SHORT, depth=depth) for depth in (5, 6, 9, 13)},
        paper={"5": 72.49, "6": 76.36, "9": 79.87, "13": 82.05},
    ),
    "peers": Experiment(
        "Networks of equal latency, 5 epochs",
        "network",
        {name: Trial(recipe="equal_latency", model=model) for name, model in PEERS.items()},
    ),
    "long": Experiment(
        "Deep training, 20 epochs", "trained with", {"series activation": replace(LONG, decay_epochs=0), "both": LONG}
    ),
}

# Comparisons of the page: what is added, the experiment, and its variants with and without the addition.
COMPARISONS = (
    ("series activation, without deep training", "claims", "series activation", "neither"),
    ("series activation, with deep training", "claims", "both", "deep training"),
    ("deep training, without series activation", "claims", "deep training", "neither"),
    ("deep training, with series activation, 10 epochs", "claims", "both", "series activation"),
    ("series activation, without deep training, on CIFAR-10", "photographs", "series activation", "neither"),
    ("series activation, with deep training, on CIFAR-10", "photographs", "both", "deep training"),
    ("deep training, without series activation, on CIFAR-10", "photographs", "deep training", "neither"),
    ("deep training, with series activation, on CIFAR-10", "photographs", "both", "series activation"),
    ("deep training, with series activation, 20 epochs", "long", "both", "series activation"),
    *((f"VanillaNet-6 instead of {peer}", "peers", "VanillaNet-6", peer) for peer in PEERS if peer != "VanillaNet-6"),
    *((f"n of {n} instead of {n - 1}", "act_num", str(n), str(n - 1)) for n in range(1, 5)),
    *((f"{more} layers instead of {less}", "depth", more, less) for less, more in pairwise(("5", "6", "9", "13"))),
)


# -- running


def run(trial: Trial, data: Sequence[str], output_dir: Path, threads: int) -> None:
    """Run a trial, or resume its run, and keep its CSV file.

    Args:
        data: flags for the location of the images.

    Raises:
        RuntimeError: main.py failed; the message contains its last line of standard error.
    """
    folder = output_dir / trial.name
    own = ["--auto_resume", "true", "--save_ckpt_num", "1", "--output_dir", str(folder)]
    command = [sys.executable, "main.py", *trial.flags, *data, *own]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{trial.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    RECORDS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "summary.csv", trial.record(RECORDS))
    print(f"{trial.name}: top-1 {trial.top1(RECORDS):.2f}", flush=True)


def cifar10_flags(folder: Path) -> list[str]:
    """Flags for CIFAR-10 as torchvision stores it, or as image files in train/CLASS/ and test/CLASS/."""
    files = ["--data_set", "image_folder", "--val_split", "test"] if (folder / "train").is_dir() else []
    return ["--data_path", str(folder), *files]


def run_all(names: Iterable[str], data_path: Path | None, cifar10: Path, output_dir: Path, jobs: int) -> None:
    wanted = dict.fromkeys(trial for name in names for trial in EXPERIMENTS[name].trials())
    missing = {
        trial: cifar10_flags(cifar10) if trial.recipe == PHOTOGRAPHS.recipe else ["--data_path", str(data_path)]
        for trial in wanted
        if not trial.record(RECORDS).exists()
    }
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # Download the data before the runs, because parallel runs would all download to the same files.
    for trial in {trial.recipe: trial for trial in missing}.values():
        from datasets import build_dataset  # slow, because this imports torch

        args = parse_args([*trial.flags, *missing[trial]])
        for train, split in ((True, args.train_split), (False, args.val_split)):
            build_dataset(args.data_set, args.data_path, train=train, split=split, transform=None, download=True)
    print(f"{len(missing)} of {len(wanted)} runs to do, {jobs} at a time, {threads} thread(s) each", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, trial, data, output_dir, threads) for trial, data in missing.items()]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # after an error, runs in progress are finished, but no other is started
            pool.shutdown(cancel_futures=True)


# -- the page


def difference(on: Sequence[float], off: Sequence[float]) -> tuple[float, float] | None:
    """Difference of two means in points, and half its 95 % interval by Student's t; None while seeds are missing."""
    if len(on) < SEEDS or len(off) < SEEDS:
        return None
    student = 2.776  # t of the interval for three seeds each, that is 4 degrees of freedom
    return mean(on) - mean(off), student * math.sqrt((variance(on) + variance(off)) / SEEDS)


def verdict(found: tuple[float, float] | None) -> str:
    if found is None:
        return "not measured yet"
    points, margin = found
    return "gain" if points > margin else "loss" if points < -margin else "no more than the seeds"


def _table(*rows: Sequence[str]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def _points(found: tuple[float, float] | None) -> str:
    return "" if found is None else f"{found[0]:+.2f} ± {found[1]:.2f}"


def _scores(top1: Sequence[float]) -> list[str]:
    """Mean and standard deviation. A mean over fewer seeds is not shown, because it is not comparable to the others."""
    if len(top1) < SEEDS:
        return [f"not measured yet ({len(top1)} of {SEEDS} seeds)" if top1 else "not measured yet", ""]
    return [f"{mean(top1):.2f}", f"{stdev(top1):.2f}"]


def scores_table(experiment: Experiment) -> str:
    """Table with a row for each variant, and with the paper's numbers in a column of their own."""
    paper = experiment.paper
    header = [experiment.varied, "top-1 (%)", "std", *(["paper: ImageNet top-1 (%)"] if paper else [])]
    rows = [
        [name, *_scores(top1), *([f"{paper[name]:.2f}"] if paper else [])]
        for name, top1 in experiment.scores(RECORDS).items()
    ]
    return _table(header, *rows)


def peers_table() -> str:
    """Table of each network's accuracy, beside its costs in its fastest engine (`LATENCIES`)."""
    from benchmarking import report, results  # slow, because this imports torch

    fastest = report.fastest(results.read(LATENCIES), "network")
    rows = []
    for name, top1 in EXPERIMENTS["peers"].scores(RECORDS).items():
        row = fastest[PEERS[name],]
        costs = f"{row['layers']:.0f}", f"{row['params_m']:.1f}", f"{row['median_ms']:.2f}"
        rows.append([name, *costs, *_scores(top1)])
    return _table(["network", "layers", "parameters (M)", "latency (ms)", "top-1 (%)", "std"], *rows)


def comparisons() -> str:
    """Table of what each part adds, below sentences that summarize the verdicts."""
    sentences = {
        "gain": "These gains of the paper reproduce, beyond what seeds do: {}.",
        "no more than the seeds": "These do not show at this scale, where the seeds do as much: {}.",
        "loss": "These are losses here: {}.",
        "not measured yet": "Not measured yet: {}.",
    }
    said = {kind: [] for kind in sentences}
    rows = []
    for statement, name, on, off in COMPARISONS:
        experiment = EXPERIMENTS[name]
        scores, paper = experiment.scores(RECORDS), experiment.paper
        found = difference(scores[on], scores[off])
        published = f"{paper[on] - paper[off]:+.2f}" if paper else ""
        rows.append([statement, _points(found), verdict(found), published])
        if paper:  # in the paper, all of these are gains
            said[verdict(found)].append(statement)
    text = " ".join(sentences[kind].format("; ".join(found)) for kind, found in said.items() if found)
    header = ["what is added", "here (points)", "verdict", "paper, ImageNet (points)"]
    return f"{fill(text, 120, break_on_hyphens=False)}\n\n{_table(header, *rows)}"


def decay_table() -> str:
    """Table of the claims with and without the fault, below a sentence on what the fault changed."""
    earlier, now = (EXPERIMENTS["claims"].scores(folder) for folder in (DECAYED, RECORDS))
    rows, changed = [], []
    for name, top1 in earlier.items():
        found = difference(now[name], top1)
        rows.append([name, *_scores(top1), *_scores(now[name]), _points(found), verdict(found)])
        if verdict(found) in ("gain", "loss"):
            changed.append(name)
    header = ["trained with", "with the fault (%)", "std", "without (%)", "std", "difference (points)", "verdict"]
    said = "The fault changed none of these accuracies by more than the seeds do."
    if changed:
        said = f"The fault changed these accuracies by more than the seeds do: {', '.join(changed)}."
    elif any(len(top1) < SEEDS for top1 in now.values()):
        said = "Of some of these trainings, seeds are not measured yet."
    return f"{said}\n\n{_table(header, *rows)}"


def write_page(text: str) -> str:
    """Return the page with every part between its marks replaced by a new one.

    Raises:
        ValueError: the marks of a part are missing.
    """
    parts = {name: scores_table(experiment) for name, experiment in EXPERIMENTS.items()}
    parts |= {"peers": peers_table(), "comparisons": comparisons(), "decay": decay_table()}
    for name, part in parts.items():
        before, mark, rest = text.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"{PAGE.name} has no place for the part {name}: put the marks around it back")
        text = f"{before}{mark}\n{part}\n\n{end}{after}"
    return text


def report() -> None:
    from pictures import style
    from pictures.seeds import seeds_figure

    panels = {}
    for name, experiment in EXPERIMENTS.items():
        complete = {variant: top1 for variant, top1 in experiment.scores(RECORDS).items() if len(top1) == SEEDS}
        if len(complete) > 1:  # otherwise there is nothing to compare
            panels[name] = experiment.title, experiment.varied, complete
    if not panels:  # do not overwrite the results on the page
        raise ValueError(f"no two rows to compare have their {SEEDS} seeds in {RECORDS}: run without --report")
    PAGE.write_text(write_page(PAGE.read_text()))
    rows = [
        [panels[name] for name in row if name in panels]
        for row in (("claims", "long"), ("photographs",), ("act_num", "depth"), ("peers",))
    ]
    figure = seeds_figure(
        [row for row in rows if row],
        title="The series activation adds most; deep training and depth add little here",
        conditions="Fashion-MNIST unless a panel says otherwise. Top-1 of the 10,000 test images after the last epoch. "
        "A dot is a run, a bar the mean of three.",
        ylabel="top-1 (%)",
    )
    style.save(figure, FIGURE)


# -- the command line


def build_parser() -> Parser:
    parser = Parser(prog="ablation.py", description=__doc__.splitlines()[0], check=_check)
    add, names = parser.add_argument, list(EXPERIMENTS)
    add("--data_path", type=file_path, help="folder with Fashion-MNIST's four idx files, or to download them to")
    what = (
        "folder of CIFAR-10, which is downloaded if it is missing, or that has its images in train/CLASS and test/CLASS"
    )
    add("--cifar10", type=path, default=Path("outputs/cifar10"), help=what)
    add("--only", nargs="+", choices=names, default=names, metavar="NAME", help="experiments to run")
    add("--jobs", type=COUNT, default=os.cpu_count() or 1, help="runs at a time [one a core]")
    add("--output_dir", type=path, default=Path("outputs/ablation"), help="folder of the runs")
    add("--report", type=boolean, default=False, help="run nothing; write docs/RESULTS.md and the figure")
    return parser


def _check(args: Arguments) -> None:
    if args.report:
        for flag in sorted({*args.given} - {"report"}):
            args.pass_over(flag, f"--report runs nothing: leave --{flag} out")
    elif not args.data_path and args.only != ["photographs"]:
        raise ValueError("--data_path is missing; --report and --only photographs do without")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    try:
        if not args.report:
            # Make paths absolute, because the runs start in the project's folder.
            folders = (folder and Path(folder).absolute() for folder in (args.data_path, args.cifar10, args.output_dir))
            run_all(args.only, *folders, jobs=args.jobs)
        report()
    except (RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"ablation.py: error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
