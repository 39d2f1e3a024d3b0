"""Meters, which gather numbers on the device, and sinks, which take `log(metrics, step)` and put it somewhere."""

import csv
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from records.files import replacing, writing

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | int]


class SumMeter:
    """Named sums in one tensor on the device, float64 where it has that; adding to it does not wait for the device."""

    def __init__(self, names: Iterable[str], device: torch.device):
        self.names = tuple(names)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), dtype=dtype, device=device)

    def add(self, **values: torch.Tensor | float) -> None:
        for position, name in enumerate(self.names):
            self.sums[position] += values[name]  # a Python number is passed to the kernel, a tensor read on the device


def table(rows: Iterable[Iterable[object]], title: str | None = None, text_columns: int = 1) -> str:
    """Rows, the first being the header, as text; columns after the first `text_columns` are right-aligned."""
    from terminaltables import AsciiTable  # not everywhere that trains: a machine of `make gpu` may lack it

    drawn = AsciiTable([[str(cell) for cell in row] for row in rows], title=title)
    for column in range(text_columns, len(drawn.table_data[0])):
        drawn.justify_columns[column] = "right"
    return drawn.table


def progress(batches: Iterable, *, description: str, total: int, initial: int = 0, enabled: bool = True) -> Iterator:
    """`batches` behind a progress bar with rate and remaining time, where standard error is a terminal."""
    if not (enabled and sys.stderr.isatty()):
        return iter(batches)
    return iter(tqdm(batches, desc=description, total=total, initial=initial, leave=False, dynamic_ncols=True))


class Sink:
    """Where the numbers of a step or epoch go. ValueError, a line for the user, if they cannot be written."""

    log: Callable[[Metrics, int], None]

    def close(self) -> None:
        """Finish; most sinks leave nothing open."""


def _format(value: float | int) -> str:
    return f"{value:d}" if isinstance(value, int) else f"{value:.4g}"


class ConsoleSink(Sink):
    """One line a call through `logging`, above a progress bar if there is one."""

    def __init__(self, label: str):
        self.label = label

    def log(self, metrics: Metrics, step: int) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            logger.info("%s %d: %s", self.label, step, "  ".join(f"{k} {_format(v)}" for k, v in metrics.items()))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, all cells as text."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], columns: Iterable[str] | None = None) -> None:
    """Write a CSV file with a header, by default of the columns that the rows have; a row may lack cells."""
    columns = list(columns or dict.fromkeys(name for row in rows for name in row))
    with writing(path), replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


def write_json(path: Path, content: object) -> None:
    with writing(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


class CsvSink(Sink):
    """`summary.csv`, a row an epoch. A column may be empty in an epoch that was not evaluated.

    Rows from the step `start` on are of a part of the run that is being repeated, and are dropped.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = read_rows(path) if path.exists() else []
        self.rows: list[dict[str, object]] = [row for row in rows if int(row["epoch"]) < start]

    def log(self, metrics: Metrics, step: int) -> None:
        self.rows.append({"epoch": step, **metrics})
        write_rows(self.path, self.rows)  # as a whole, because a later row may bring a column that the header lacks


def _is_before(line: str, start: int) -> bool:
    try:
        return json.loads(line)["step"] < start
    except (ValueError, KeyError):  # the last line of a killed run may be cut
        return False


class JsonLinesSink(Sink):
    """`log.jsonl`, an object a call; `start` as in `CsvSink`."""

    def __init__(self, path: Path, start: int):
        self.path = path
        with writing(path):
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                with replacing(path) as temporary:
                    temporary.write_text("".join(line for line in lines if _is_before(line, start)))
            self.file = path.open("ab", buffering=0)  # what a failed write leaves in a buffer would be written again

    def log(self, metrics: Metrics, step: int) -> None:
        with writing(self.path):
            self.file.write(f"{json.dumps({'step': step, **metrics})}\n".encode())

    def close(self) -> None:
        self.file.close()


class TensorBoardSink(Sink):
    """TensorBoard events; every metric is a scalar under `prefix`.

    Not by the SummaryWriter of tensorboardX 2.6: its thread dies of a full disk, its queue fills up, and the run hangs,
    as tensorboard's own did (https://github.com/tensorflow/tensorboard/issues/6167). May be that when
    `tests/faults/test_saves.py` passes with it.
    """

    def __init__(self, folder: Path, prefix: str):
        from tensorboardX.event_file_writer import EventsWriter

        self.path, self.prefix = folder, prefix
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = EventsWriter(str(folder / "events"), filename_suffix=f".{prefix}")

    def log(self, metrics: Metrics, step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        with writing(self.path):
            for name, value in metrics.items():
                summary = scalar(f"{self.prefix}/{name}", value)
                self.writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self.writer.flush()

    def close(self) -> None:
        with writing(self.path):
            self.writer.close()


class WandbSink(Sink):
    """Weights & Biases; wandb is imported only here, as most runs do without it."""

    def __init__(self, run, prefix: str):
        self.run, self.prefix = run, prefix
        self.run.define_metric(f"{prefix}_step")
        self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}_step")

    def log(self, metrics: Metrics, step: int) -> None:
        values = {f"{self.prefix}/{name}": value for name, value in metrics.items()}
        self.run.log({f"{self.prefix}_step": step, **values})

    def close(self) -> None:
        self.run.finish()


class StepLog:
    """Gives the numbers of every `every`th step to `write`, with the step in its epoch, counted from 1, and adds the
    images a second since the last time.
    """

    def __init__(self, every: int, write: Callable[[int, Metrics], None]):
        self.every, self.write = every, write
        self.images, self.start = 0, time.perf_counter()  # images since then, on all ranks: the caller adds them

    def __call__(self, step: int, **numbers: float) -> None:
        now = time.perf_counter()
        rate = self.images / (now - self.start)
        self.images, self.start = 0, now
        self.write(step, {**numbers, "images_per_second": rate})


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, *sinks: Sink):
        self.sinks = sinks

    def log(self, metrics: Metrics, step: int) -> None:
        for sink in self.sinks:
            sink.log(metrics, step)

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()
