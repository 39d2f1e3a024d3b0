"""Loader processes that are killed, and a long run that must not use up what it runs on."""

import os
import signal
import statistics
import time
from pathlib import Path

import pytest

from harness import flags, logged, until
from runs import assert_same_run

SAVING = ("--save_ckpt_steps", 5, "--num_workers", 2)


def test_a_loader_process_killed(server, data, undisturbed, tmp_path, thorough, report):
    times = 10 if thorough else 2
    straight = undisturbed(1)
    slowest = 0.0
    for i in range(times):
        folder = tmp_path / str(i)
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        process = server.start(*run)
        until(lambda: logged(folder) >= 2 + i % 10, what="a step")  # noqa: B023  called at once
        loader = sorted(set(process.alive()) - {process.pid})[i % 2]
        os.kill(loader, (signal.SIGKILL, signal.SIGSEGV)[i // 2 % 2])
        start = time.monotonic()
        assert process.wait() == 1
        slowest = max(slowest, time.monotonic() - start)
        message = process.error()
        assert f"DataLoader worker (pid {loader})" in message or f"DataLoader worker (pid(s) {loader})" in message
        assert "lower --num_workers" in message
        until(lambda: process.alive() == [], seconds=30, what="the end of the other one")  # noqa: B023
        server.finish(1, *run)
        assert_same_run(straight, folder)
    assert slowest < 10
    report(
        "one of 2 loader processes killed",
        injected=times,
        lost=f"the run ended within {slowest:.1f} s, exit code 1, no process left; started again, the same end",
        reads=message,
    )


def memory(pid: int) -> int:
    """Resident memory in KiB."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1])


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()} if Path("/dev/shm").is_dir() else set()


def test_a_long_run(server, data, tmp_path, thorough, report):
    """Steps with 2 loader processes, an evaluation with 2 more and a checkpoint every 30 steps."""
    if not thorough:
        pytest.skip("what grows shows in a long run only; by `make faults`")
    steps = 2000
    epochs = -(-steps // 30)
    folder = tmp_path / "run"
    before = shared_memory()
    run = flags(data, folder, "--update_freq", 1, "--epochs", epochs, "--num_workers", 2, "--save_ckpt_num", 2)
    process = server.start(*run)
    seen: set[int] = set()
    samples = []  # step, memory of the main process, memory of all, open files of the main process, processes
    while process.poll() is None:
        try:
            alive = process.alive()
            sample = logged(folder), memory(process.pid), sum(map(memory, alive)), open_files(process.pid), len(alive)
        except (OSError, StopIteration):  # one has ended in between
            continue
        seen |= set(alive)
        samples.append(sample)
        time.sleep(0.05)
    assert process.wait() == 0, process.output
    assert logged(folder) == 30 * epochs >= steps
    # While it trains there are the two loader processes; an evaluation has two more.
    training = [sample for sample in samples if sample[4] == 3]
    early = [sample for sample in training if 120 <= sample[0] < 120 + steps * 0.2]  # from the fifth epoch on
    late = [sample for sample in training if sample[0] >= steps * 0.8]
    assert len(early) >= 3
    assert len(late) >= 3

    def growth(column):
        first, last = (statistics.median(sample[column] for sample in part) for part in (early, late))
        return last / first - 1

    # Batches in flight are open files too, three each: what stays open shows in the fewest.
    files = [min(sample[3] for sample in part) for part in (early, late)]

    assert growth(1) < 0.03
    assert growth(2) < 0.03
    assert files[1] <= files[0]
    assert max(sample[4] for sample in samples) <= 5
    left = {name for name in shared_memory() - before if any(f"_{pid}_" in name for pid in seen)}
    assert left == set()
    until(lambda: process.alive() == [], seconds=30, what="the end of the loader processes")
    report(
        f"a run of {30 * epochs} steps and {epochs} evaluations with loader processes",
        injected=1,
        lost=f"memory grew by {100 * growth(1):.1f} % ({100 * growth(2):.1f} % with the loader processes), open files "
        f"from {files[0]} to {files[1]}; no process and no shared memory was left",
        reads="",
    )
