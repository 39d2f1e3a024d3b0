"""SIGKILL, which no program can answer: of a whole run, of one rank, and under a launcher that starts all anew."""

import os
import random
import signal
import time

import pytest

from harness import command, environ, flags, free_port, logged, saved, temporary_files, until
from runs import assert_same_run, torchrun_command

SAVE_STEPS = 2
SAVING = ("--save_ckpt_steps", SAVE_STEPS)


def test_killed_at_any_moment(server, data, undisturbed, tmp_path, thorough, report):
    """At moments from the start of the process on: in the set-up, a step, a save, an evaluation."""
    kills = 50 if thorough else 3
    start = time.monotonic()
    straight = undisturbed(1, *SAVING)
    duration = time.monotonic() - start
    moments = random.Random(0)
    done = within_a_file = most_lost = runs = 0
    resumed, killed = "", []
    while done < kills or runs == 0:
        runs += 1
        folder = tmp_path / f"run{runs}"
        while True:
            expected = saved(folder)
            workers = 2 * (done % 2)
            run = flags(data, folder, *SAVING, "--auto_resume", "true", "--num_workers", workers)
            process = server.start(*run)
            if done < kills:
                time.sleep(moments.uniform(0, 0.6 * duration))
            if done == kills or process.poll() is not None:
                assert process.wait() == 0, process.output
                break
            process.kill(signal.SIGKILL)
            if process.wait() == 0:  # it has just ended by itself
                break
            assert process.wait() == -signal.SIGKILL
            killed.append(process)
            done += 1
            if expected and "resumed" in process.output:  # what the last kill left was found again
                resumed = process.line("resumed")
                assert steps_of(resumed) == expected
            within_a_file += bool(temporary_files(folder))
            most_lost = max(most_lost, logged(folder) - saved(folder))
        assert_same_run(straight, folder)
        assert temporary_files(folder) == []
    assert done == kills
    assert most_lost <= SAVE_STEPS
    until(lambda: not any(process.alive() for process in killed), seconds=60, what="the end of the loader processes")
    report(
        f"SIGKILL at a random moment, saving every {SAVE_STEPS} steps",
        injected=f"{done}, {within_a_file} of them while a file was being written",
        lost=f"at most {most_lost} steps, which were done again; {done} of {done} went on to the same end",
        reads=resumed,
    )


def steps_of(line: str) -> int:
    """The steps of a run, 15 an epoch, from the line with which it goes on."""
    epoch, step = (int(part.split()[-1]) for part in line.rsplit(":", 1)[1].split(","))
    return 15 * epoch + step


def test_a_rank_killed(server, data, undisturbed, tmp_path, thorough, report):
    times = 10 if thorough else 1
    straight = undisturbed(2)
    slowest, message = 0.0, ""
    for i in range(times):
        folder = tmp_path / str(i)
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        ranks = server.ranks(2, *run)
        until(lambda: logged(folder) >= 3 + i % 10, what="a step")  # noqa: B023  called at once
        ranks[(i + 1) % 2].kill(signal.SIGKILL)
        start = time.monotonic()
        assert ranks[i % 2].wait() == 1
        slowest = max(slowest, time.monotonic() - start)
        message = ranks[i % 2].error()
        assert "another process of the run has ended" in message
        server.finish(2, *run)
        assert_same_run(straight, folder)
    assert slowest < 60
    report(
        "one of 2 ranks killed",
        injected=times,
        lost=f"the other one ended within {slowest:.1f} s, exit code 1; both started again: the same end",
        reads=message,
    )


def test_a_rank_killed_under_a_launcher_that_restarts(data, undisturbed, tmp_path, thorough, report):
    if not thorough:
        pytest.skip("as above with torchrun, which takes longer; by `make faults`")
    times = 3
    straight = undisturbed(2)
    for i in range(times):
        folder = tmp_path / str(i)
        launcher = torchrun_command("--nproc_per_node=2", "--max-restarts=1", f"--master_port={free_port()}")
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        with command([*launcher, *run], tmp_path / f"log{i}") as process:
            until(lambda: logged(folder) >= 5 or process.poll() is not None, what="a step")  # noqa: B023
            os.kill(next(pid for pid in process.alive() if f"RANK={(i + 1) % 2}" in environ(pid)), signal.SIGKILL)
            assert process.wait() == 0, process.output
            assert "resumed" in process.output
        assert_same_run(straight, folder)
    report(
        "one of 2 ranks killed under `torchrun --max-restarts 1` with `--auto_resume true`",
        injected=times,
        lost="the steps since the last save, which were done again; the same end, exit code 0",
        reads=process.line("resumed"),
    )
