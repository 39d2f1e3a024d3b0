"""The table of results: a row for each network, engine, precision, resolution and batch size, with its conditions."""

import contextlib
import csv
import importlib.metadata
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import runtimes
from benchmarking.spec import VARIANT, Spec
from records.logs import write_rows

# The precision that rows are compared with: float32 as PyTorch computes it when nothing is set.
PUBLISHED_PRECISION = {"cpu": "fp32", "cuda": "default"}
# The columns of a row, in order. Kinds are `inference`, `training`, and `machine` for a rate of the machine itself.
# Times are those of one call with `batch` images.
COLUMNS = (
    "kind", "network", "engine", "precision", "device", "resolution", "batch", "layers", "params_m", "macs_g",
    "calls", "median_ms", "p5_ms", "p95_ms", "mean_ms", "images_per_s", "ratio", "gflops", "limit_gflops", "share",
    "peak_mb", "saved_mib", "step_mib", "first_s", "event_ms", "sm_clock_mhz", "kernels", "device_mb",
    "anchor_ms", "anchor", "processor", "threads", "torch", "library", "date",
)  # fmt: skip


def statistics(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Return median, 5th and 95th percentile, mean, and images per second at the median."""
    ms = 1e3 * np.asarray(seconds)
    p5, median, p95 = np.percentile(ms, (5, 50, 95))
    return {
        "calls": len(ms),
        "median_ms": median,
        "p5_ms": p5,
        "p95_ms": p95,
        "mean_ms": ms.mean(),
        "images_per_s": 1e3 * batch / median,
    }


def _processor(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    fields = dict(re.findall(r"^(model name|cpu family|model)\t+: (.+)$", text, re.MULTILINE))
    if "model name" in fields:
        family = ", ".join(f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
        return f"{fields['model name']} ({family}; {torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _library(engine: str) -> str:
    for package in runtimes.find(engine).libraries if engine in runtimes.ENGINES else ("torch",):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return engine


def conditions(engine: str, *, device: str, threads: int) -> dict[str, str | int]:
    """Return the columns that say where, with what and when a row is measured."""
    return {
        "processor": _processor(device),
        "threads": threads,
        "torch": torch.__version__,
        "library": _library(engine),
        "date": datetime.now(UTC).date().isoformat(),
    }


def row(spec: Spec, seconds: Sequence[float], *, threads: int) -> dict[str, Any]:
    """Return a row with the times of the calls of one network, and their conditions."""
    return {
        "kind": spec.kind,
        "network": spec.label,
        "engine": spec.engine,
        "precision": spec.precision,
        "device": spec.device,
        "resolution": spec.resolution,
        "batch": spec.batch,
        **statistics(seconds, spec.batch),
        **conditions(spec.engine, device=spec.device, threads=threads),
    }


def is_published(row: Mapping[str, Any]) -> bool:
    """Whether a row is of the published way: PyTorch, contiguous, in float32 as torch computes it by default."""
    default = PUBLISHED_PRECISION.get(runtimes.device_type(row["device"]))
    return row["engine"] in ("eager", "plain") and row["precision"] == default


def complete(rows: Sequence[dict[str, Any]], limits: dict[str, float]) -> None:
    """Add the ratio to the published way, the GFLOP/s, and their share of the machine's limit to each row.

    The published way is eager PyTorch in float32 as torch computes it when nothing is set, contiguous, with the same
    network, resolution and batch size; for training it is `plain`. A training step counts as three forward passes.
    """

    def key(row: dict[str, Any]) -> tuple:
        network = VARIANT.sub("", row["network"])  # variants are compared with the network as published
        return row["kind"], network, row["device"], row["resolution"], row["batch"]

    published = {key(row): row["median_ms"] for row in rows if is_published(row) and not VARIANT.search(row["network"])}
    for row in rows:
        if row["kind"] == "machine":
            continue
        base = published.get(key(row))
        row["ratio"] = base / row["median_ms"] if base else None
        passes = 3 if row["kind"] == "training" else 1
        row["gflops"] = 2 * passes * row["macs_g"] * row["batch"] / row["median_ms"] * 1e3
        row["limit_gflops"] = limits.get(row["precision"])
        row["share"] = row["gflops"] / row["limit_gflops"] if row["limit_gflops"] else None


def write(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    """Write all rows atomically, floats with five significant digits; a column that a row lacks is left empty."""
    cells = [{name: f"{cell:.5g}" if isinstance(cell, float) else cell for name, cell in row.items()} for row in rows]
    write_rows(path, cells, columns)


NUMBERS = frozenset(COLUMNS[COLUMNS.index("resolution") : COLUMNS.index("anchor")]) | {"threads"}
ADDED = {"saved_mib", "step_mib", "event_ms", "sm_clock_mhz", "kernels", "device_mb"}  # columns that older files lack


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, object]]:
    """Return the rows of a file that `write` wrote, with numbers as floats and None for missing numbers.

    Raises:
        ValueError: the file cannot be read, lacks a column, or has text in place of a number.
    """
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is no text'}") from error
    missing = [name for name in columns if name not in (reader.fieldnames or ()) and name not in ADDED]
    if missing:
        raise ValueError(f"{path} is no table of benchmark.py: it has no column {missing[0]}")
    try:
        return [
            {name: (float(row[name]) if row.get(name) else None) if name in NUMBERS else row[name] for name in columns}
            for row in rows
        ]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
