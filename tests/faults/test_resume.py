"""An interrupted run ends as an undisturbed one; one that goes on with another number of ranks sees the same data."""

import itertools
import shlex
import shutil
import signal

import pytest

from harness import flags, logged, until
from optim_factory import cosine_schedule
from records.checkpoints import CheckpointFolder, load_checkpoint
from runs import assert_same_run, rows

# Float16, so that there is a scaler with a state.
PRECISION = ("--use_amp", "true", "--amp_dtype", "fp16")


def test_interrupted_and_resumed(server, data, undisturbed, tmp_path, thorough, report):
    """In the middle of lambda's ramp: by SIGTERM in the middle of an epoch, by SIGKILL at the end of one."""
    cases = list(itertools.product((1, 2), (0, 2), ("end", "middle"), (1, 2)))
    compared = 0
    for size, workers, place, accumulation in cases if thorough else [(1, 2, "middle", 1), (2, 0, "end", 2)]:
        arguments = (*PRECISION, "--update_freq", accumulation)
        straight = undisturbed(size, *arguments)
        folder = tmp_path / f"{size}-{workers}-{place}-{accumulation}"
        run = flags(data, folder, *arguments, "--num_workers", workers, "--auto_resume", "true")
        ranks = server.ranks(size, *run)
        if place == "end":
            # The file is there before the evaluation already, with the steps of the epoch still counted.
            first = folder / "checkpoint-0.pth"
            until(lambda: first.exists() and not load_checkpoint(first)["step"], what="the end of epoch 0")  # noqa: B023
            number = signal.SIGKILL
        else:
            steps = 30 // accumulation // size  # in an epoch
            until(lambda: logged(folder) >= steps + 2, what="the middle of epoch 1")  # noqa: B023
            number = signal.SIGTERM
        for process in ranks:
            process.kill(number)
        codes = {process.wait() for process in ranks}
        assert codes == {-number if number == signal.SIGKILL else 128 + number}
        checkpoint = load_checkpoint(CheckpointFolder(folder).newest_valid())
        assert checkpoint["epoch"] == (0 if place == "end" else 1)
        assert (checkpoint["step"] > 0) == (place == "middle")
        server.finish(size, *run)
        state = load_checkpoint(straight / "checkpoint-last.pth")
        assert {"model", "model_ema", "model_ema_0.5", "optimizer", "scaler", "ranks"} <= set(state)
        assert state["scaler"]["scale"] > 0
        assert 0 < state["act_learn"] < 1
        compared += assert_same_run(straight, folder)
    report(
        "interrupted and resumed: {1, 2} ranks x {0, 2} workers x {end, middle} of an epoch x accumulation {1, 2}",
        injected=len(cases),
        lost=f"nothing: the largest difference is 0 over {compared:,} values",
        reads="",
    )


# A network without BatchNorm, whose gradient is the same however a batch is shared out; every image as it is.
SHARED = shlex.split(
    "--model test_convnext --input_size 32 --data_set FMNIST --device cpu --num_workers 0 --lr 1e-3 --epochs 2 "
    "--warmup_epochs 1 --mixup 0 --cutmix 0 --drop 0 --test_freq 1 --log_freq 1 --weight_decay_end 0.2"
)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(server, data, tmp_path, thorough, report, before, after):
    """Eight images a step whatever the ranks: the gradients' norm in each step says that it is the same eight."""
    if after == 2 and not thorough:
        pytest.skip("the other way round; by `make faults`")

    def run(size, folder, *arguments):
        return flags(data, folder, "--batch_size", 8 // size, *arguments, base=SHARED)

    straight, folder = tmp_path / "straight", tmp_path / "changed"
    server.finish(before, *run(before, straight))
    ranks = server.ranks(before, *run(before, folder))
    until(lambda: logged(folder) >= 20, what="step 20")
    for process in ranks:
        process.kill(signal.SIGTERM)
    for process in ranks:
        assert process.wait() == 143, process.output
    checkpoint = load_checkpoint(folder / "checkpoint-last.pth")
    assert checkpoint["samples"] == 8 * checkpoint["step"] > 0
    changed = server.finish(after, *run(after, folder, "--auto_resume", "true"))
    ours, theirs = rows(folder), rows(straight)
    for row, expected in zip(ours[1], theirs[1], strict=True):
        assert (row["step"], row["lr"], row["weight_decay"]) == tuple(
            expected[k] for k in ("step", "lr", "weight_decay")
        )
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    for row, expected in zip(ours[0], theirs[0], strict=True):
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=1e-4)
        assert float(row["test_loss"]) == pytest.approx(float(expected["test_loss"]), rel=1e-3)
    drift = max(
        abs(row["grad_norm"] / expected["grad_norm"] - 1) for row, expected in zip(ours[1], theirs[1], strict=True)
    )
    report(
        f"resumed on {after} rank{'s' * (after > 1)} instead of {before}, in the middle of an epoch",
        injected=1,
        lost=f"nothing: each step has the same images, by its gradient's norm (to {drift:.0e}), and the same schedules",
        reads=changed[0].line("random numbers are seeded anew"),
    )


def test_the_same_batch_size_on_other_ranks(server, data, tmp_path, report):
    """With 4 images on each of more ranks an epoch has fewer steps: the place in the data and the schedules stays."""
    folder = tmp_path / "run"
    arguments = ["--batch_size", 4, "--save_ckpt_steps", 7]
    server.finish(1, *flags(data, folder, *arguments, "--early_stop_epochs", 1, base=SHARED))
    changed = tmp_path / "changed"
    changed.mkdir()
    shutil.copy(folder / "checkpoint-0-21.pth", changed)  # of 30 steps, after 84 of 120 images
    ranks = server.finish(2, *flags(data, changed, *arguments, "--auto_resume", "true", base=SHARED))
    names = {path.name for path in CheckpointFolder(changed).numbered()}
    assert "checkpoint-0-10.pth" in names  # the same file, of 15 steps
    assert "checkpoint-0-21.pth" not in names
    steps = [line["step"] for line in rows(tmp_path / "changed")[1]]
    # 36 images are left, in 5 steps of 8, the last of them filled up; then 15 of the other epoch.
    assert len(steps) == 5 + 15
    state = load_checkpoint(tmp_path / "changed/checkpoint-last.pth")
    assert state["updates"] == 2 * 15
    lr = [line["lr"] for line in rows(tmp_path / "changed")[1]]
    assert lr[4] == pytest.approx(1e-3)  # the end of the warm-up is the end of the epoch
    assert lr[-1] == pytest.approx(cosine_schedule(29, 30, base=1e-3, final=1e-6, warmup_steps=15))
    report(
        "resumed on 2 ranks instead of 1, with the same batch size for each",
        injected=1,
        lost="nothing: the place in the data and in the schedules is kept, with as many steps as that needs",
        reads=ranks[0].line("resumed"),
    )
