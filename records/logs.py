"""Meters, which sum numbers on the device, and sinks, which write the metrics passed to `log(metrics, step)`."""

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
    """Named sums in one tensor on the device, in float64 except on MPS. Adding does not wait for the device."""

    def __init__(self, names: Iterable[str], device: torch.device):
        self.names = tuple(names)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), dtype=dtype, device=device)

    def add(self, **values: torch.Tensor | float) -> None:
        for position, name in enumerate(self.names):
            self.sums[position] += values[name]  # numbers are kernel arguments, tensors are read on the device


def table(rows: Iterable[Iterable[object]], title: str | None = None, text_columns: int = 1) -> str:
    """Format rows, the first of which is the header, as text. All but the first `text_columns` are right-aligned."""
    from terminaltables import AsciiTable  # imported late, because `make gpu` works without it

    drawn = AsciiTable([[str(cell) for cell in row] for row in rows], title=title)
    for column in range(text_columns, len(drawn.table_data[0])):
        drawn.justify_columns[column] = "right"
    return drawn.table


def progress(batches: Iterable, *, description: str, total: int, initial: int = 0, enabled: bool = True) -> Iterator:
    """Iterate over `batches` with a progress bar (rate, remaining time) if standard error is a terminal."""
    if not (enabled and sys.stderr.isatty()):
        return iter(batches)
    return iter(tqdm(batches, desc=description, total=total, initial=initial, leave=False, dynamic_ncols=True))


class Sink:
    """Destination of a step's or epoch's metrics. Raises ValueError, with one line for the user, if writing fails."""

    log: Callable[[Metrics, int], None]

    def close(self) -> None:
        """Close the sink; most sinks have nothing to close."""


class ConsoleSink(Sink):
    """One line per call through `logging`, above a progress bar if there is one."""

    def __init__(self, label: str):
        self.label = label

    def log(self, metrics: Metrics, step: int) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            values = (f"{k} {v}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in metrics.items())
            logger.info("%s %d: %s", self.label, step, "  ".join(values))


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, all cells as text."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Mapping[str, object]], columns: Iterable[str] | None = None) -> None:
    """Write a CSV file with a header, by default with all columns that occur in the rows. A row may lack cells."""
    columns = list(columns or dict.fromkeys(name for row in rows for name in row))
    with writing(path), replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(rows)


def write_json(path: Path, content: object) -> None:
    with writing(path), replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


class CsvSink(Sink):
    """`summary.csv`, one row per epoch. A column may be empty in an epoch that was not evaluated.

    Existing rows from epoch `start` on are dropped, because the resumed run repeats these epochs.
    """

    def __init__(self, path: Path, start: int):
        self.path = path
        rows = read_rows(path) if path.exists() else []
        try:
            self.rows: list[dict[str, object]] = [row for row in rows if int(row["epoch"]) < start]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} is no table of epochs, and this run would overwrite it: move it away") from None

    def log(self, metrics: Metrics, step: int) -> None:
        self.rows.append({"epoch": step, **metrics})
        write_rows(self.path, self.rows)  # the whole file, because a later row may add a column to the header


def _is_before(line: str, epoch: int, step: int) -> bool:
    """Whether a line is of an earlier epoch than `epoch`, or of that one and up to `step`."""
    try:
        values = json.loads(line)
        return values.get("epoch", epoch) < epoch or (values.get("epoch", epoch) == epoch and values["step"] <= step)
    except (ValueError, KeyError, AttributeError):  # the last line of a killed run may be cut off
        return False


class JsonLinesSink(Sink):
    """`log.jsonl`, one object per call. What an earlier run logged after step `step` in epoch `epoch` is dropped."""

    def __init__(self, path: Path, epoch: int, step: int):
        self.path = path
        with writing(path):
            if path.exists():
                lines = path.read_text().splitlines(keepends=True)
                with replacing(path) as temporary:
                    temporary.write_text("".join(line for line in lines if _is_before(line, epoch, step)))
            self.file = path.open("ab", buffering=0)  # a buffer would repeat the data of a failed write

    def log(self, metrics: Metrics, step: int) -> None:
        with writing(self.path):
            self.file.write(f"{json.dumps({'step': step, **metrics})}\n".encode())

    def close(self) -> None:
        self.file.close()


class TensorBoardSink(Sink):
    """TensorBoard events; every metric is a scalar under `prefix`.

    This does not use the SummaryWriter of tensorboardX 2.6: on a full disk its thread dies, its queue fills up, and the
    run hangs, as with tensorboard's own writer (https://github.com/tensorflow/tensorboard/issues/6167). Switch to it
    when `tests/faults/test_saves.py` passes with it.
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
    """Weights & Biases. The caller opens `run`, so this file does not import wandb, which most runs do not need."""

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
    """Passes a step's metrics to `write`, with the step's number in the epoch, counted from 1, and the images per
    second since the last call. The training loop calls it every `every` steps and at the end of the epoch.
    """

    def __init__(self, every: int, write: Callable[[int, Metrics], None]):
        self.every, self.write = every, write
        self.images, self.start = 0, time.perf_counter()  # images since `start`, on all ranks; the caller adds them

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
