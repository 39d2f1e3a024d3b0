"""The paper's claims, measured anew: many runs of `main.py`, and the tables and figure of docs/RESULTS.md from them.

python ablation.py --data_path DIR            # runs what is missing, experiment by experiment, then reports
python ablation.py --report                   # reports from the CSV files in results/ablation/ alone

An interrupted run goes on where it was; one whose CSV file is in results/ablation/ is not run again.
"""

import argparse
import csv
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import datasets

ROOT = Path(__file__).resolve().parent
RECORDS = ROOT / "results" / "ablation"
PAGE = ROOT / "docs" / "RESULTS.md"
FIGURE = ROOT / "docs" / "ablation.png"


@dataclass(frozen=True)
class Trial:
    """One run: what it changes in recipes/`recipe`.args.

    Attributes:
        depth: layers of the deployed network.
        act_num: n of the series activation; 0 is none.
        decay_epochs: length of lambda's ramp; 0 is no deep training.
        epochs: None leaves the recipe's.
    """

    recipe: str = "ablation"
    depth: int = 6
    act_num: int = 3
    decay_epochs: int = 4
    seed: int = 0
    epochs: int | None = None

    @property
    def name(self) -> str:
        epochs = f"-epochs{self.epochs}" if self.epochs else ""
        return f"{self.recipe}-depth{self.depth}-n{self.act_num}-ramp{self.decay_epochs}{epochs}-seed{self.seed}"

    @property
    def flags(self) -> list[str]:
        return (
            f"@recipes/{self.recipe}.args --model vanillanet_{self.depth} --act_num {self.act_num} "
            f"--decay_epochs {self.decay_epochs} --seed {self.seed}"
        ).split() + (["--epochs", str(self.epochs)] if self.epochs else [])

    @property
    def record(self) -> Path:
        return RECORDS / f"{self.name}.csv"

    @property
    def top1(self) -> float:
        """Of the last epoch, in percent: nothing is selected on the test images."""
        with self.record.open(newline="") as file:
            return float(list(csv.DictReader(file))[-1]["test_acc1"])


@dataclass(frozen=True)
class Experiment:
    """One thing varied, all else equal.

    Attributes:
        varied: heading of the table's first column.
        variants: by name, the trial of seed 0.
        seeds: how many runs of each.
        paper: the paper's ImageNet top-1 by variant, in percent, where it has the comparison.
    """

    varied: str
    variants: dict[str, Trial]
    seeds: int = 3
    paper: dict[str, float] | None = None

    def trials(self) -> list[Trial]:
        """All runs: every variant with one seed before any with the next."""
        return [replace(trial, seed=seed) for seed in range(self.seeds) for trial in self.variants.values()]

    def results(self) -> dict[str, list[float]]:
        """Top-1 of the finished runs, by variant."""
        found = {
            name: [trial.top1 for seed in range(self.seeds) if (trial := replace(first, seed=seed)).record.exists()]
            for name, first in self.variants.items()
        }
        return {name: top1 for name, top1 in found.items() if top1}


SHORT = Trial(recipe="ablation_short", decay_epochs=2)
LONG = Trial(epochs=20, decay_epochs=8)

# In the order of their worth, since a measurement may end early. The paper's numbers are those of its ablation table
# (VanillaNet-6) and of its main table.
EXPERIMENTS = {
    "claims": Experiment(
        "trained with",
        {
            "neither": Trial(decay_epochs=0, act_num=0),
            "deep training": Trial(act_num=0),
            "series activation": Trial(decay_epochs=0),
            "both": Trial(),
        },
        paper={"neither": 59.58, "deep training": 60.53, "series activation": 75.23, "both": 76.36},
    ),
    "act_num": Experiment("n", {str(n): replace(SHORT, act_num=n) for n in range(5)}),
    "depth": Experiment(
        "layers",
        {str(depth): replace(SHORT, depth=depth) for depth in (5, 6, 9, 13)},
        paper={"5": 72.49, "6": 76.36, "9": 79.87, "13": 82.05},
    ),
    "long": Experiment("trained with", {"series activation": replace(LONG, decay_epochs=0), "both": LONG}),
}


def run(trial: Trial, data_path: str, output_dir: Path, threads: int) -> None:
    """Train, or finish, one trial, and keep its CSV file.

    Raises:
        RuntimeError: main.py ended with an error; its last line is in the message.
    """
    folder = output_dir / trial.name
    command = [
        sys.executable,
        "main.py",
        *trial.flags,
        "--auto_resume",
        "true",
        "--save_ckpt_num",
        "1",
        "--output_dir",
        str(folder),
        "--data_path",
        data_path,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{trial.name}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    RECORDS.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / "summary.csv", trial.record)
    print(f"{trial.name}: top-1 {trial.top1:.2f}", flush=True)


def markdown(experiment: Experiment) -> str:
    """The table of what is finished; the paper's numbers have a column of their own."""
    results = experiment.results()
    paper = experiment.paper
    rows = [[experiment.varied, "top-1 (%)", "std", "runs", *(["paper: ImageNet top-1 (%)"] if paper else [])]]
    rows.append(["---", *["---:"] * (len(rows[0]) - 1)])
    for name, top1 in results.items():
        spread = f"{stdev(top1):.2f}" if len(top1) > 1 else ""
        rows.append([name, f"{mean(top1):.2f}", spread, str(len(top1)), *([f"{paper[name]:.2f}"] if paper else [])])
    missing = [name for name in experiment.variants if name not in results]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([*lines, *(["", f"Not run yet: {'; '.join(missing)}."] if missing else [])])


def write_page(text: str) -> str:
    """The page with each table between its marks made anew.

    Raises:
        ValueError: the page lacks the marks of an experiment.
    """
    for name, experiment in EXPERIMENTS.items():
        before, mark, rest = text.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not (mark and end):
            raise ValueError(f"{PAGE.name} has no place for the table {name}: put the marks around it back")
        text = f"{before}{mark}\n{markdown(experiment)}\n\n{end}{after}"
    return text


def draw(path: Path) -> None:
    """One panel an experiment: top-1 by variant, mean and standard deviation over the seeds."""
    experiments = {name: experiment for name, experiment in EXPERIMENTS.items() if experiment.results()}
    columns = min(3, len(experiments))
    rows = math.ceil(len(experiments) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for (name, experiment), axes in zip(experiments.items(), panels, strict=False):
        results = experiment.results()
        spread = [stdev(top1) if len(top1) > 1 else 0 for top1 in results.values()]
        axes.errorbar(list(results), [mean(top1) for top1 in results.values()], spread, fmt="o", capsize=4)
        axes.set(title=name, xlabel=experiment.varied, ylabel="top-1 (%), Fashion-MNIST")
        if any(len(variant) > 4 for variant in results):
            axes.tick_params(axis="x", rotation=30)
            for label in axes.get_xticklabels():
                label.set(horizontalalignment="right", rotation_mode="anchor")
        axes.margins(x=0.15)
        axes.grid(alpha=0.3)
    for axes in panels:  # the last row need not be full
        axes.remove()
    figure.savefig(path, dpi=90)


def report() -> None:
    if not any(experiment.results() for experiment in EXPERIMENTS.values()):  # the page would lose what it has
        raise ValueError(f"there are no runs in {RECORDS}: start some without --report")
    PAGE.write_text(write_page(PAGE.read_text()))
    draw(FIGURE)


def run_all(names: Iterable[str], data_path: str, output_dir: Path, jobs: int) -> None:
    wanted = dict.fromkeys(trial for name in names for trial in EXPERIMENTS[name].trials())
    missing = [trial for trial in wanted if not trial.record.exists()]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    if missing:
        for train in (True, False):  # runs beside each other would all download them, into the same files
            datasets.build_dataset("FMNIST", data_path, train=train, transform=None, download=True)
    print(f"{len(missing)} of {len(wanted)} runs to do, {jobs} at a time, {threads} thread(s) each", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, trial, data_path, output_dir, threads) for trial in missing]
        try:
            for future in as_completed(futures):
                future.result()
        finally:  # after an error the runs that have begun are finished, and no other is begun
            pool.shutdown(cancel_futures=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="ablation.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", help="folder with Fashion-MNIST's four idx files, or to download them to")
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time [one a core]")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/ablation"), help="folder of the runs")
    parser.add_argument("--report", action="store_true", help="run nothing, write docs/RESULTS.md and the figure")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    if not args.report and not args.data_path:
        parser.error("--data_path is missing; --report does without")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        if not args.report:
            # The runs are started in the project's folder, whatever this one is.
            run_all(args.only, os.path.abspath(args.data_path), args.output_dir.absolute(), args.jobs)
        report()
    except (RuntimeError, ValueError, OSError) as error:
        sys.stderr.write(f"ablation.py: error: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
