"""docs/RELIABILITY.md, written from the rows that the thorough form of the suite observed."""

import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision

PAGE = """\
# Reliability

This page says what a run loses when something goes wrong. `make faults` injects each of these faults, checks the
claims, and writes the page from what it observed. Do not edit the page by hand: its text is in
[tests/faults/page.py](../tests/faults/page.py). `make test` runs a short form of most faults.

```sh
make faults
```

The faults are real: signals of the kernel, full file systems, truncated files, flipped bits, links taken down. The runs
are `main.py` with a network of 24,000 weights on a few images, on the CPU, and with gloo where there are several
processes (ranks). Except where `python` or `torchrun` is named, they start in a process that has imported everything
already, because importing takes longer than such a run.

"The same end" means that the run ended bit by bit like a run without the fault. That holds for weights, BatchNorm
statistics, averages, optimizer, scaler, schedules, lambda, random numbers, metrics and log lines, except for timings.

{conditions}

{table}

## What to know

- **Resume** with the same command and `--auto_resume true`. At most what came after the last checkpoint is done again:
  an epoch, or `--save_ckpt_steps` steps.
- **A lost process** ends the others at once if its machine is alive. If the machine or the network is gone, they end
  after `--dist_timeout` seconds (1800 by default). Only a launcher can restart all of them: `torchrun --max-restarts=N`
  does so, and needs `--auto_resume true`.
- **`torchrun`** passes SIGTERM and SIGINT on. The processes save and exit with 143 or 130, and torchrun's own code is
  1. It kills what has not ended after 30 s. It does not pass SIGUSR1 on, which ends torchrun itself. Under SLURM let
  `srun` start the processes.
- **Several networks** between two machines: gloo uses the one that the host's name leads to. `GLOO_SOCKET_IFNAME` names
  another one, as `NCCL_SOCKET_IFNAME` does for GPUs.
- **The lock** `run.lock` belongs to the kernel and disappears with the process. If a network file system has no locks,
  a warning says so.
- **Not covered** are GPUs and NCCL, a machine that loses power, and network file systems.
"""


@dataclass(frozen=True)
class Row:
    """What was observed of a fault.

    Attributes:
        injected: how often, and into what if that needs saying.
        lost: what was.
        reads: what the user reads.
    """

    fault: str
    injected: str
    lost: str
    reads: str


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1).strip() if found else platform.machine()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def render(rows: Sequence[Row], skipped: Sequence[tuple[str, str]]) -> str:
    """The page.

    Args:
        skipped: tests that could not be run here, with the reason.
    """
    cores = len(os.sched_getaffinity(0))
    conditions = (
        f"Observed on {time.strftime('%Y-%m-%d')}, {cores} cores of an {_processor()}, Linux {platform.release()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, timm "
        f"{timm.__version__}:"
    )
    lines = ["| fault | injected | what was lost | what the user reads |", "|---|---|---|---|"]
    for row in rows:
        reads = f"`{_cell(row.reads)}`" if row.reads else "nothing"
        lines.append(f"| {_cell(row.fault)} | {row.injected} | {_cell(row.lost)} | {reads} |")
    for test, reason in skipped:
        lines.append(f"| {test.rpartition('::')[2]} | 0 | not tried here: {_cell(reason)} | |")
    return PAGE.format(conditions=conditions, table="\n".join(lines))
