"""Two runs in comparison, bit by bit."""

import csv
import json

import torch

import utils

TIMINGS = {"images_per_second"}  # what differs between two runs of the same thing


def rows(folder):
    with (folder / "summary.csv").open(newline="") as file:
        summary = [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return summary, [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def differences(a, b, path=""):
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
    return [] if a == b else [path]


def assert_same_run(straight, resumed):
    """Bit by bit: weights, BN, EMAs, optimizer, scaler, schedules, lambda, random numbers, metrics, log rows."""
    states = []
    for folder in (straight, resumed):
        state = utils.load_checkpoint(folder / "checkpoint-last.pth")
        for flag in ("output_dir", "auto_resume", "resume", "early_stop_epochs", "num_workers", "save_ckpt_steps"):
            state["args"].pop(flag)
        states.append(state)
    assert differences(*states) == []
    assert rows(straight) == rows(resumed)
