"""Whole runs of main.py for the tests: small data, flags of a small network, and the comparison of what runs leave."""

import csv
import gzip
import json
import os
import shlex
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import datasets
import utils
from records.checkpoints import load_checkpoint

ROOT = Path(utils.__file__).parent
EMBEDDED = ROOT / "data" / "fashion-mnist"
FREE_FLAGS = (
    "output_dir", "auto_resume", "resume", "early_stop_epochs", "num_workers", "save_ckpt_steps", "dist_timeout",
    "grad_checkpointing",
)  # fmt: skip
TIMINGS = {"images_per_second"}  # what differs between two runs of the same thing

BASE = shlex.split(
    "--model vanillanet_6 --width_mult 0.015625 --input_size 32 --data_set FMNIST --device cpu --num_workers 0 "
    "--batch_size 4 --update_freq 2 --lr 1e-2 --warmup_epochs 1 --epochs 4 --decay_epochs 5 --drop 0.1 --clip_grad 5 "
    "--model_ema true --model_ema_decay 0.9 0.5 --model_ema_eval true --weight_decay_end 0.2 --test_freq 1 --log_freq 2"
)


def cut_fmnist(folder: Path, *, train: int, test: int) -> Path:
    """The first images of the embedded data, in the same format. Returns `folder`."""
    for split, count in (("train", train), ("t10k", test)):
        for kind in ("images-idx3", "labels-idx1"):
            name = f"{split}-{kind}-ubyte.gz"
            values = datasets.read_idx(EMBEDDED / name)[:count]
            header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
            with gzip.open(folder / name, "wb") as file:
                file.write(header + np.ascontiguousarray(values).tobytes())
    return folder


def environment(threads: int = 1) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}


def torchrun_command(*options: object) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *map(str, options), "main.py"]


def torchrun(processes: int, data: Path, *arguments: object, base=BASE) -> subprocess.CompletedProcess:
    launcher = torchrun_command(f"--nproc_per_node={processes}", "--standalone")
    command = [*launcher, *base, "--data_path", str(data), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)


def rows(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, float]]]:
    """The rows of the epochs and the lines of the steps that a run logged, without timings."""
    with (folder / "summary.csv").open(newline="") as file:
        summary = [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return summary, [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested structures of tensors and plain data differ."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = [path] if set(a) != set(b) else []
        return keys + [d for key in a if key in b for d in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b or (a != a and b != b) else [path]  # nan, the gradient's norm of a step that was skipped


def count_values(state: Any) -> int:
    """The numbers in a nested structure of tensors and plain data."""
    if isinstance(state, torch.Tensor):
        return state.numel()
    if isinstance(state, dict):
        return sum(map(count_values, state.values()))
    return sum(map(count_values, state)) if isinstance(state, (list, tuple)) else 1


def final_state(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run, without the flags in which a run and its repetition differ."""
    state = load_checkpoint(folder / "checkpoint-last.pth")
    for flag in FREE_FLAGS:
        state["args"].pop(flag)
    return state


def assert_same_run(straight: Path, resumed: Path) -> int:
    """Bit by bit: weights, BN, EMAs, optimizer, scaler, schedules, lambda, random numbers, metrics, log rows.

    Returns how many values were compared.
    """
    found = [(final_state(folder), rows(folder)) for folder in (straight, resumed)]
    assert differences(*found) == []
    return count_values(found[0])
