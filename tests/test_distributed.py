"""Several processes: what one rank finds stops all, and SLURM's variables suffice to begin."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Run by every rank: three steps of two batches each; rank 1 meets what `fault` says in its third step.
WORKER = """
import json, math, sys
import torch
from torch import nn
import engine, models, utils
from engine import Classification, FiniteGuard, NonFiniteError, Precision, Progress, train_one_epoch

fault, out = sys.argv[1:]
world = utils.init_world("cpu")
torch.manual_seed(0)
model = models.VanillaNet(num_classes=10, dims=(8, 8, 16), strides=(1, 2))
generator = torch.Generator().manual_seed(world.rank)
draw = lambda: (torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator))
data = [draw() for _ in range(6)]
if world.rank == 1 and fault == "loss":
    data[4][0][0] = math.nan
if world.rank == 1 and fault == "gradient":
    seen = []
    def poison(grad):
        seen.append(1)
        return grad * math.inf if len(seen) == 5 else grad
    model.cls2[0].weight.register_hook(poison)
guard = FiniteGuard(model, rank=world.rank, world_size=world.size)
ddp = nn.parallel.DistributedDataParallel(model)
flat = lambda: torch.cat([p.detach().flatten() for p in model.parameters()])
states = [flat()]
error = None
try:
    train_one_epoch(
        ddp, data, objective=Classification(nn.CrossEntropyLoss(), Precision(world.device)),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1), precision=Precision(world.device),
        scaler=Precision(world.device).scaler(), guard=guard, progress=Progress(),
        meter=engine.train_meter(world.device), num_batches=6, set_schedules=lambda updates: None, update_freq=2,
        world_size=world.size, after_step=lambda: bool(states.append(flat())),
    )
except NonFiniteError as found:
    error = str(found)
result = {"error": error, "steps": len(states) - 1, "unchanged": torch.equal(states[-1], flat()),
          "sum": flat().double().sum().item()}
with open(f"{out}/{world.rank}.json", "w") as file:
    json.dump(result, file)
utils.close_world(world)
"""


def environment(**extra):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}


@pytest.mark.parametrize("fault", ["none", "loss", "gradient"])
def test_what_one_rank_finds_stops_all(tmp_path, fault):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    start = time.monotonic()
    done = subprocess.run(
        [*launcher, str(script), fault, str(tmp_path)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 90  # far below the 30 minutes after which a lost rank would be noticed
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # the parameters' sum among it: the ranks did not part
    if fault == "none":
        assert (first["error"], first["steps"]) == (None, 3)
    else:
        assert first["error"].startswith(f"step 2: non-finite {fault} on rank 1; ")
        assert (first["steps"], first["unchanged"]) == (2, True)


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
            env=environment(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **job),
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [task.communicate(timeout=150)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert "2 steps an epoch of 5000 images" in errors[0]
    assert "epoch 0:" in errors[0]
    assert "epoch 0:" not in errors[1]  # rank 0 alone reports
