"""NaN and infinity: all ranks stop together and nothing has changed; a step that float16 skips changes nothing."""

import json
import math
import re

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from engine import Classification, Precision, TrainState, train_one_epoch
from harness import flags
from records.checkpoints import load_checkpoint
from records.logs import StepLog, SumMeter
from runs import differences
from workers import small_network


@pytest.mark.parametrize("fault", ["none", "loss", "gradient"])
def test_what_one_rank_finds_stops_all(server, tmp_path, thorough, report, fault):
    times = 5 if thorough and fault != "none" else 1
    slowest = 0.0
    for i in range(times):
        folder = tmp_path / str(i)
        folder.mkdir()
        server.finish(2, fault, folder, target="workers:train_badly")
        first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
        slowest = max(slowest, first.pop("seconds"), second.pop("seconds"))
        assert first == second  # the parameters' sum among it: the ranks did not part
        if fault == "none":
            assert (first["error"], first["steps"]) == (None, 3)
            return
        assert first["error"].startswith(f"step 2: non-finite {fault} on rank 1; ")
        assert (first["steps"], first["unchanged"]) == (2, True)
    assert slowest < 10
    report(
        f"{'NaN in the loss' if fault == 'loss' else 'infinity in the gradients'} of one of 2 ranks",
        injected=times,
        lost=f"nothing: both stop within {slowest:.2f} s, no parameter and no average has changed",
        reads=first["error"],
    )


def test_a_diverging_run(server, data, tmp_path, report):
    arguments = ["--opt", "sgd", "--lr", "1e30", "--warmup_epochs", 0, "--save_ckpt_steps", 1]
    process = server.start(*flags(data, tmp_path, *arguments))
    assert process.wait() == 1
    assert re.search(r"step \d+: non-finite (loss|gradient) on rank 0", process.error())
    for path in tmp_path.glob("*.pth"):
        assert all(torch.isfinite(value).all() for value in load_checkpoint(path)["model"].values())
    report(
        "a learning rate of 1e30",
        injected=1,
        lost="nothing: exit code 1, and every checkpoint is from before it",
        reads=process.error(),
    )


def test_a_step_that_float16_skips(thorough, report):
    """The loss scale is too high in every other step."""
    steps = 40 if thorough else 6
    model = small_network()
    average = ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    precision = Precision(torch.device("cpu"), torch.float16)
    scaler = precision.scaler()
    scaler.scale(torch.ones(()))  # it begins with its first use
    objective, updates = Classification(nn.CrossEntropyLoss(), precision), []
    state = TrainState(
        model,
        optimizer,
        meter=SumMeter(objective.sums, precision.device),
        scaler=scaler,
        averages={"model_ema": average},
    )
    generator = torch.Generator().manual_seed(0)
    skipped = 0

    def snapshot():
        return {
            "model": [p.detach().clone() for p in model.parameters()],
            "ema": {name: value.clone() for name, value in average.module.state_dict().items()},
            "optimizer": json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist()),
            "updates": state.progress.updates,
        }

    for step in range(steps):
        scaler.update(2.0**40 if step % 2 else 2.0**8)
        before = snapshot()
        images = torch.randn(4, 3, 16, 16, generator=generator)
        train_one_epoch(
            state,
            [(images, torch.randint(10, (4,), generator=generator))],
            objective=objective,
            schedule=lambda taken: updates.append(taken) or (1e-3, 0.0),
            num_batches=1,
            log=StepLog(10, lambda step, values: None),
        )
        assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
        changed = differences(before, snapshot())
        if step % 2:
            skipped += 1
            assert changed == []
            assert scaler.get_scale() == 2.0**39
        else:
            assert {"/model", "/ema", "/optimizer", "/updates"} <= {"/" + name.split("/")[1] for name in changed}
    assert updates == [(step + 1) // 2 for step in range(steps)]  # the place in the schedules
    report(
        "a step that float16's scaler skips",
        injected=skipped,
        lost="nothing: parameters, averages, optimizer and schedules are as they were",
        reads="",
    )
