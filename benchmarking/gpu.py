"""Measure everything that needs a GPU, the most important first: latency, then training steps.

python -m benchmarking.gpu                # `make gpu`; writes each row to results/gpu-NAME.csv at once
python -m benchmarking.gpu --dry true     # `make gpu DRY=1`; the same run on the CPU, with toy networks

A second call continues where the first one stopped. All networks are measured one after the other in this process,
because starting a process for each would take most of the time. The exit code is 1 if a check fails.
"""

from collections.abc import Sequence

from options import Arguments, Parser, boolean, path


def build_parser() -> Parser:
    parser = Parser(prog="benchmarking.gpu", description="Measure a GPU: latency, then training steps.", check=_check)
    add = parser.add_argument
    add("--device", default="cuda", help="the GPU: cuda or cuda:N")
    add("--dry", type=boolean, default=False, help="walk through it on the CPU, with toy networks")
    place = "results [results/gpu-NAME.csv; outputs/gpu-dry.csv of --dry]"
    add("--output", type=path, metavar="FILE.csv", help=place)
    return parser


def _check(args: Arguments) -> None:
    if args.dry:
        args.moot("device", "--dry computes on the CPU: leave --device out")


if __name__ == "__main__":
    ARGS = build_parser().parse_args()  # report a wrong flag before the slow imports below

import copy
import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler (2.14) prints two lines per use

import torch
from torch import nn

import runtimes
from benchmarking import results
from benchmarking.limit import best_product, wait
from benchmarking.spec import Spec
from benchmarking.subjects import build_network, costs, size, training_step
from benchmarking.worker import device_mb
from networks import is_vanillanet
from records.files import first_line, mistakes_end

ROOT = Path(__file__).parents[1]
OPTIONAL = ("terminaltables", "tensorboardX", "pycocotools", "pytest", "hypothesis", "tensorrt", "onnxruntime")
ENGINES = ("eager", "channels_last", "cuda_graphs", "compile", "compile_cuda_graphs", "triton")
COMPILED = ("compile", "compile_cuda_graphs", "aotinductor")
TOLERANCES = {"fp32": 1e-4, "default": 1e-2, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}  # relative to the largest logit
IDENTITY = ("kind", "network", "engine", "precision", "resolution", "batch")  # columns that identify a row
TEST_SECONDS = 180
GUARD_STEPS = 300
GUARD_MB = 20
DRIFT = 0.10
GRAPHS_MARGIN = 1.02  # a difference within the noise does not count


# -- what is measured, in order


@dataclass(frozen=True)
class Plan:
    """What a run measures, and how often; the defaults are for a GPU."""

    device: str = "cuda"
    # Networks that are measured in the first ten minutes, and those that follow after training.
    first: tuple[str, ...] = (
        "vanillanet_5", "vanillanet_9", "vanillanet_13", "resnet50", "swin_tiny_patch4_window7_224",
    )  # fmt: skip
    rest: tuple[str, ...] = (
        "vanillanet_11", "vanillanet_6", "vanillanet_7", "vanillanet_8", "vanillanet_10", "vanillanet_12",
        "vanillanet_13_x1_5", "resnet18", "convnextv2_tiny", "swin_small_patch4_window7_224",
    )  # fmt: skip
    compiled: tuple[str, ...] = first  # the first part also measures these in the engines that compile, which are slow
    packaged: tuple[str, ...] = first[:3]  # measured in AOTInductor
    trained: tuple[str, ...] = first[:3]
    precisions: tuple[str, ...] = ("default", "tf32", "bf16", "fp16")
    urgent: tuple[str, ...] = ("tf32", "bf16")  # precisions that the first part measures in the engines that compile
    recipe: str = "fp16"  # precision of the published recipes, which train with autocast and a scaler
    resolution: int = 224
    width_mult: float | None = None  # factor on VanillaNets' channels; None for their own
    batch: int = 128  # images in a training step
    calls: int = 200  # timed calls of inference
    steps: int = 20  # timed training steps

    def _spec(self, network: str, engine: str, precision: str, **how: Any) -> Spec:
        width_mult = self.width_mult if is_vanillanet(network) else None
        return Spec(network, engine, precision, self.resolution, device=self.device, width_mult=width_mult, **how)

    def latency(self, names: Sequence[str], compiled: Sequence[str], urgent: Sequence[str]) -> Iterator[Spec]:
        """Yield each network in the engines and precisions of this device; only `compiled` in engines that compile."""
        kind = runtimes.device_type(self.device)
        for name in names:
            for engine in ENGINES if name in compiled else [one for one in ENGINES if one not in COMPILED]:
                for precision in urgent if engine in COMPILED else self.precisions:
                    if precision in runtimes.find(engine).computes.get(kind, ()):
                        yield self._spec(name, engine, precision)

    def training(self) -> Iterator[Spec]:
        """Yield training steps: torch's defaults, as in the recipes, guarded, in bfloat16, checkpointed, compiled."""
        for name in self.trained:
            shared = {"kind": "training", "batch": self.batch}
            for precision in dict.fromkeys((self.precisions[0], self.recipe)):
                yield self._spec(name, "plain", precision, **shared)
            yield self._spec(name, "plain", self.recipe, guard=True, **shared)
            for mode in ("none", "activations", "full"):
                yield self._spec(name, "channels_last", "bf16", grad_checkpointing=mode, **shared)
            yield self._spec(name, "channels_last", "bf16", guard=True, **shared)
            if name in self.compiled:
                yield self._spec(name, "compile", "bf16", **shared)

    def specs(self) -> Iterator[Spec]:
        yield from self.latency(self.first, self.compiled, self.urgent)
        for name in self.packaged:
            yield self._spec(name, "aotinductor", "bf16")
        yield from self.training()
        yield from self.latency((*self.first, *self.rest), (*self.compiled, *self.rest), self.precisions)


DRY = Plan(
    device="cpu", first=("vanillanet_5", "vanillanet_9", "resnet10t"), rest=(), compiled=("vanillanet_5",),
    packaged=("vanillanet_5",), trained=("vanillanet_5",), precisions=("fp32", "bf16"), urgent=("bf16",),
    recipe="bf16", resolution=64, width_mult=0.03125, batch=2, calls=5, steps=2,
)  # fmt: skip


# -- the device


class Device:
    """Clocks and counters of a GPU; for a dry run, their closest counterparts on the CPU."""

    def __init__(self, name: str):
        self.name, self.cuda = name, torch.device(name).type == "cuda"

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.name))
        return event

    def times(self, call: Callable[[], Any], calls: int) -> tuple[list[float], list[float]]:
        """Return (seconds by the host's clock, ms by the device's) of each of `calls` calls after a warm-up call."""
        seconds, events = [], []
        for number in range(calls + 1):
            start, before = time.perf_counter(), self._mark()
            call()
            after = self._mark()
            wait(self.name)
            if number:
                seconds.append(time.perf_counter() - start)
                events.append(before.elapsed_time(after) if self.cuda else (after - before) * 1e3)
        return seconds, events

    def profile(self, call: Callable[[], Any], calls: int = 1) -> torch.profiler.profile:
        """Profile `calls` calls with torch's profiler, on the host and on the device."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU, activity.CUDA] if self.cuda else [activity.CPU]
        with torch.profiler.profile(activities=activities) as profiler:
            for _ in range(calls):
                call()
            wait(self.name)
        return profiler

    def kernels(self, call: Callable[[], Any]) -> int:
        """Count the launches of one call, including each one in a CUDA graph; on the CPU, count the operators."""
        profiler = self.profile(call)
        kind = "CUDA" if self.cuda else "CPU"
        return sum(one.device_type.name == kind and not one.is_user_annotation for one in profiler.events())

    def clock_mhz(self) -> float | None:
        """Return the current clock rate of the multiprocessors, or of the first CPU core; None if it is unknown."""
        if self.cuda:
            card = f"GPU-{torch.cuda.get_device_properties(self.name).uuid}"
            command = ["nvidia-smi", "--id", card, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
            try:
                return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            except (OSError, subprocess.CalledProcessError, ValueError):
                return None
        found = re.search(r"cpu MHz\s*: ([\d.]+)", Path("/proc/cpuinfo").read_text())
        return float(found[1]) if found else None

    def used_mb(self) -> float:
        """Return the memory in use on the device by its driver's count; on the CPU, the process's resident size."""
        return device_mb(self.name) if self.cuda else resident_mb()

    def copy_rate(self, megabytes: int) -> float:
        """Return the bytes per second, read and written, of a copy within the device's memory."""
        source = torch.empty(megabytes * 10**6, dtype=torch.uint8, device=self.name)
        target = torch.empty_like(source)
        seconds, _ = self.times(lambda: target.copy_(source), 10)
        return 2 * len(source) / min(seconds)

    def cache_bytes(self) -> int:
        """Return the size of the last-level cache, from which weights may come instead of from memory."""
        if self.cuda:
            return torch.cuda.get_device_properties(self.name).L2_cache_size
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        return int(size.read_text().rstrip("K\n")) * 1024 if size.exists() else 2**28

    def clear(self) -> None:
        """Free the last network and the code that was compiled for it."""
        torch._dynamo.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def allocated_mb(self) -> float:
        """Return what torch's tensors take on a GPU now."""
        return torch.cuda.memory_allocated(self.name) / 1e6 if self.cuda else 0.0

    def reset_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.name)


def resident_mb() -> float:
    """Return the current resident size of the process on the host."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


# -- measuring


@lru_cache(maxsize=2)  # the rows of a network follow each other
def subject(name: str, resolution: int, width_mult: float | None) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return (network in deploy form, images, logits in float64) on the CPU; VanillaNets are built in that form."""
    spec = Spec(name, "eager", "fp32", resolution, width_mult=width_mult, twin=is_vanillanet(name))
    network, images, _ = build_network(spec)
    with torch.inference_mode():
        return network, images, copy.deepcopy(network).double()(images.double())


class WrongLogits(ValueError):
    """A network in an engine answers otherwise than in float64, so that its time says nothing."""


class Walk:
    """A run through a plan. It writes each row as soon as it is measured, and collects failed checks in `problems`."""

    def __init__(self, plan: Plan, output: Path):
        self.plan, self.output, self.device = plan, output, Device(plan.device)
        self.rows: list[dict[str, Any]] = results.read(output) if output.exists() else []
        self.problems: list[str] = []

    def has(self, spec: Spec) -> bool:
        own = results.row(spec, [1.0], threads=0)
        return any(all(row.get(name) == own[name] for name in IDENTITY) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        results.complete(self.rows, self.limits())
        results.write(self.output, self.rows)
        if row["kind"] != "machine":
            print(f"{row['network']}, {row['engine']}, {row['precision']}: {row['median_ms']:.3f} ms", flush=True)

    def machine(self, name: str) -> dict[str, float]:
        """Return a rate of the machine by precision, as it was measured once and kept in the table."""
        return {
            row["precision"]: row["gflops"] for row in self.rows if (row["kind"], row["network"]) == ("machine", name)
        }

    def limits(self) -> dict[str, float]:
        return self.machine("matrix product (GFLOP/s)")

    def facts(self) -> None:
        """Measure the rates of the machine, which bound all other rows, unless they are in the table."""
        mhz = self.device.clock_mhz()
        shared = {"kind": "machine", "engine": "torch", "device": self.plan.device, "sm_clock_mhz": mhz}
        shared |= results.conditions("torch", device=self.plan.device, threads=torch.get_num_threads())
        if not self.machine("copy (GB/s)"):
            rate = self.device.copy_rate(2000 if self.device.cuda else 20) / 1e9
            self.add({**shared, "network": "copy (GB/s)", "precision": "", "gflops": rate})
        for precision in {*self.plan.precisions, self.plan.recipe} - self.limits().keys():
            rate = best_product(precision, self.plan.device)
            self.add({**shared, "network": "matrix product (GFLOP/s)", "precision": precision, "gflops": rate})
        print(f"{shared['processor']}: copies {self.machine('copy (GB/s)')['']:.0f} GB/s, products {self.limits()}")

    def tests(self) -> None:
        """Run the tests that are marked for a GPU; without a GPU, pytest skips them."""
        if importlib.util.find_spec("pytest") is None:
            return
        files = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text()]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *files]
        try:
            done = subprocess.run(command, cwd=ROOT, timeout=TEST_SECONDS)
        except subprocess.TimeoutExpired:
            self.problems.append(f"the GPU tests did not end within {TEST_SECONDS} s")
        else:
            if done.returncode:
                self.problems.append(f"the GPU tests failed with exit code {done.returncode}")

    def measure(self, spec: Spec, anchor: Callable[[], Any]) -> dict[str, Any]:
        """Measure one network in one engine, or its training step, and return the row.

        Raises:
            ValueError: the network cannot be built here.
        """
        trains = spec.kind == "training"
        if not trains:
            network, _, exact = subject(spec.network, spec.resolution, spec.width_mult)
        # From loading to the first answer.
        before, held, start = self.device.used_mb(), self.device.allocated_mb(), time.perf_counter()
        call, calls = (training_step(spec), self.plan.steps) if trains else (self._load(spec), self.plan.calls)
        logits = call()
        wait(self.plan.device)
        first = time.perf_counter() - start
        if not trains:
            error = float((logits.double().cpu() - exact).abs().max() / exact.abs().max())
            if not error <= TOLERANCES[spec.precision]:
                raise WrongLogits(f"{spec}: the logits differ from float64 by {error:.1e} of the largest")
        anchor_seconds, _ = self.device.times(anchor, self.plan.calls)
        self.device.reset_peak()
        seconds, events = self.device.times(call, calls)
        row = results.row(spec, seconds, threads=torch.get_num_threads())
        row |= {"first_s": first, "event_ms": median(events), "kernels": self.device.kernels(call)}
        row |= {"sm_clock_mhz": self.device.clock_mhz(), "device_mb": self.device.used_mb() - before}
        row |= {"anchor_ms": 1e3 * median(anchor_seconds), "anchor": "the first network, eager"}
        if self.device.cuda:
            row["peak_mb"] = torch.cuda.max_memory_allocated(self.plan.device) / 1e6 - held
        return row | (costs(spec) if trains else size(network, spec.resolution))

    def _load(self, spec: Spec) -> Callable[[], torch.Tensor]:
        """Return a function that runs the network in its engine."""
        network, images, _ = subject(spec.network, spec.resolution, spec.width_mult)
        target = runtimes.Target(spec.engine, spec.precision, self.plan.device)
        runtime = runtimes.load(network, target, images=images)  # still on the CPU, as the network is
        images = images.to(self.plan.device)
        return lambda: runtime(images)

    def profile(self, spec: Spec) -> str:
        """Return a table of the kernels that take the most time in three training steps."""
        step = training_step(spec)
        step()
        profiler = self.device.profile(step, calls=3)
        order = "self_device_time_total" if self.device.cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
        return f"three training steps of {spec}\n{table}\n"

    def guarded(self, spec: Spec) -> None:
        """Check that host memory does not grow over guarded steps; the guard once kept the graph of every step."""
        step = training_step(spec)
        for _ in range(GUARD_STEPS // 10):
            step()
        before = resident_mb()
        for _ in range(GUARD_STEPS):
            step()
        wait(self.plan.device)
        grown = resident_mb() - before
        print(f"host memory grew by {grown:.1f} MB over {GUARD_STEPS} training steps")
        if grown > GUARD_MB:
            self.problems.append(f"host memory grew by {grown:.0f} MB over {GUARD_STEPS} training steps")

    def run(self) -> None:
        missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
        if missing:
            print(f"not installed, and left out with what needs it: {', '.join(missing)}")
        self.facts()
        self.device.clear()  # of what the rates were measured with
        self.tests()
        anchor = self._load(next(self.plan.specs()))
        for spec in self.plan.specs():
            if self.has(spec):
                continue
            try:
                self.add(self.measure(spec, anchor))
            except WrongLogits as error:  # without a row, so that another walk looks at it again
                self.problems.append(str(error))
            except (ValueError, RuntimeError) as error:  # RuntimeError: from a compiler, or out of memory
                print(f"left out: {spec}: {first_line(error)}", flush=True)
            self.device.clear()
        trained = [spec for spec in self.plan.training() if spec.engine == "channels_last"]
        try:
            profile = self.output.with_name(f"{self.output.stem}-profile.txt")
            profile.write_text("".join(map(self.profile, [one for one in trained if one.grad_checkpointing == "none"])))
            self.guarded(next(spec for spec in trained if spec.guard))
        except RuntimeError as error:
            self.problems.append(f"training steps could not be profiled and guarded: {first_line(error)}")
        impossible = check(self.rows, cache_bytes=self.device.cache_bytes())
        if self.device.cuda:
            self.problems += impossible
        else:  # on a CPU that does other work as well, microseconds prove nothing
            print("\n".join(f"would not hold on a GPU: {line}" for line in impossible))


# -- what must hold


def check(rows: Sequence[dict[str, Any]], *, cache_bytes: int) -> list[str]:
    """Return a line for each number in the rows of a table that cannot be right.

    Args:
        cache_bytes: bytes of the weights that need not come from memory.
    """
    problems = []
    copies = next((row["gflops"] * 1e9 for row in rows if row["network"] == "copy (GB/s)"), None)
    inference = [row for row in rows if row["kind"] == "inference"]
    for row in rows:
        if row.get("share") is not None and row["share"] > 1:
            problems.append(f"{_name(row)}: {row['share']:.2f} of the limit, which is more than there is")
    for row in inference:
        weights = row["params_m"] * 1e6 * (2 if row["precision"] in ("bf16", "fp16") else 4)
        bound = max(0, weights - cache_bytes) / copies * 1e3 if copies else 0
        if row["median_ms"] < bound:
            problems.append(f"{_name(row)}: {row['median_ms']:.3f} ms, and reading the weights takes {bound:.3f} ms")
    times = {(row["network"], row["precision"], row["engine"]): row["median_ms"] for row in inference}
    for (network, precision, engine), ms in times.items():
        eager = times.get((network, precision, "channels_last"))
        if engine == "cuda_graphs" and eager and ms > GRAPHS_MARGIN * eager:
            problems.append(f"{network}, {precision}: {ms:.3f} ms as a CUDA graph, and {eager:.3f} ms launch by launch")
    anchors = [row["anchor_ms"] for row in rows if row.get("anchor_ms")]
    if anchors and max(anchors) > (1 + DRIFT) * min(anchors):
        problems.append(f"the anchor moved from {min(anchors):.3f} to {max(anchors):.3f} ms: the clock is not steady")
    return problems


def _name(row: dict[str, Any]) -> str:
    return f"{row['network']}, {row['engine']}, {row['precision']}"


def main(argv: Sequence[str] | None = None, *, args: Arguments | None = None) -> None:
    args = args or build_parser().parse_args(argv)
    with mistakes_end("benchmarking.gpu"):
        if not args.dry and not torch.cuda.is_available():
            raise ValueError("torch finds no GPU here: --dry true (make gpu DRY=1) walks through it on the CPU")
        plan = DRY if args.dry else Plan(device=args.device)
        name = "dry" if args.dry else re.sub(r"\W+", "-", torch.cuda.get_device_name(args.device)).lower()
        output = args.output or ROOT / ("outputs" if args.dry else "results") / f"gpu-{name}.csv"
        if args.dry and not args.output:  # a dry run measures everything anew
            output.unlink(missing_ok=True)
        walk = Walk(plan, output)
        try:
            walk.run()
        finally:
            sys.stderr.writelines(f"does not hold: {problem}\n" for problem in walk.problems)
        print(f"{len(walk.rows)} rows in {output}; tables and figures: python benchmark.py --report {output}")
    if walk.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main(args=ARGS)
