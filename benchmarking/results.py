"""The table of results: a row for each network, engine, precision, resolution and batch, with its conditions."""

import contextlib
import csv
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

import runtimes
from records.files import replacing

__all__ = ["COLUMNS", "conditions", "read", "statistics", "write"]

# What a row says, in order. Times are of one call, for `batch` images.
COLUMNS = (
    "kind", "network", "engine", "precision", "device", "resolution", "batch", "layers", "params_m", "macs_g",
    "calls", "median_ms", "p5_ms", "p95_ms", "mean_ms", "images_per_s", "ratio", "gflops", "limit_gflops", "share",
    "peak_mb", "saved_mib", "first_s", "anchor_ms", "anchor",
    "processor", "threads", "torch", "library", "date",
)  # fmt: skip


def statistics(seconds: Sequence[float], batch: int) -> dict[str, float]:
    """Median, 5th and 95th percentile, mean, and images per second of the median."""
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
    if info.exists():
        fields = dict(line.split("\t", 1) for line in info.read_text().splitlines() if "\t" in line)
        name = fields.get("model name", "").lstrip("\t: ")
        if name:
            family = ", ".join(
                f"{key} {fields[key].lstrip(chr(9) + ': ')}" for key in ("cpu family", "model") if key in fields
            )
            return f"{name} ({family}; {torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _library(engine: str) -> str:
    for package in runtimes.find(engine).libraries if engine in runtimes.ENGINES else ("torch",):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{package} {importlib.metadata.version(package)}"
    return engine


def conditions(engine: str, *, device: str, threads: int) -> dict[str, str | int]:
    """Where and with what a row is measured, today."""
    return {
        "processor": _processor(device),
        "threads": threads,
        "torch": torch.__version__,
        "library": _library(engine),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cell(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def write(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = COLUMNS) -> None:
    """Write all rows, atomically; a column that a row lacks is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


NUMBERS = frozenset(COLUMNS[5:24]) | {"threads"}
ADDED = {"saved_mib"}  # columns that older files lack


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, object]]:
    """The rows of a file that `write` wrote, with numbers as floats and None for empty cells.

    Raises:
        ValueError: it cannot be read or has other columns.
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
