"""Several processes: SLURM's variables suffice to begin. What befalls them is in tests/faults/."""

import os
import shlex
import socket
import subprocess
import sys

from runs import ROOT, environment


def test_slurm_variables_suffice(server, tmp_path):
    """Two tasks as srun starts them, without a launcher of PyTorch's: one run of two ranks."""
    flags = shlex.split(
        "@recipes/demo.args --num_workers 0 --batch_size 2500 --width_mult 0.015625 --epochs 2 --early_stop_epochs 1 "
        "--decay_epochs 1"
    )
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = [
        server.start(
            *flags, "--output_dir", tmp_path, env={**job, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        )
        for rank in range(2)
    ]
    assert [task.wait() for task in tasks] == [0, 0], [task.output for task in tasks]
    first, second = (task.output for task in tasks)
    assert "2 steps an epoch of 5000 images" in first
    assert "epoch 0:" in first
    assert "epoch 0:" not in second  # rank 0 alone reports


RESTARTED = """
import os, time
import torch
import utils
restarted = os.environ["TORCHELASTIC_RESTART_COUNT"] == "1"
if restarted and os.environ["RANK"] == "1":
    time.sleep(3)  # rank 0 meanwhile looks for its address
world = utils.init_world("cpu")
assert world.sum(torch.ones(1)).item() == 2
if not restarted and world.rank == 1:
    os._exit(1)
world.barrier()
utils.close_world(world)
"""


def test_a_restarted_run_does_not_look_for_the_process_that_ended(tmp_path):
    """torchrun with a port keeps the addresses of its first processes."""
    script = tmp_path / "worker.py"
    script.write_text(RESTARTED)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--nproc_per_node=2", "--max-restarts=1", f"--master_port={port}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, str(script)]
    env = {**environment(), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
