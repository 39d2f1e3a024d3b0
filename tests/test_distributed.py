"""Several processes: SLURM's variables suffice to begin. What befalls them is in tests/faults/."""

import os
import shlex
import subprocess
import sys

from runs import ROOT, environment


def test_slurm_variables_suffice(tmp_path):
    """Two tasks as srun starts them, without a launcher of PyTorch's: one run of two ranks."""
    flags = shlex.split(
        "@recipes/demo.args --num_workers 0 --batch_size 2500 --width_mult 0.015625 --epochs 2 --early_stop_epochs 1 "
        "--decay_epochs 1"
    )
    command = [sys.executable, "main.py", *flags, "--output_dir", str(tmp_path)]
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**environment(), **job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [task.communicate(timeout=150)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert "2 steps an epoch of 5000 images" in errors[0]
    assert "epoch 0:" in errors[0]
    assert "epoch 0:" not in errors[1]  # rank 0 alone reports
