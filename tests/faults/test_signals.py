"""SIGTERM, SIGINT and SIGUSR1: the state is saved within a step, and the exit code names the signal."""

import os
import signal
import sys

import pytest

from harness import command, environ, flags, free_port, logged, saved, steps_in, until
from records.checkpoints import CheckpointFolder
from runs import assert_same_run, cut_fmnist, torchrun_command

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def stop(processes, folder, number, step):
    """Send a signal to all processes after a step, while none of them moves, and go on sending it until they end.

    Returns the steps that were logged when the first one came.
    """
    until(lambda: logged(folder) >= step or processes[0].poll() is not None, what=f"step {step}")
    for process in processes:
        process.freeze()
    before = logged(folder)
    for process in processes:
        process.kill(number)
        process.kill(signal.SIGCONT)
    while any(process.poll() is None for process in processes):
        for process in processes:
            if process.poll() is None:
                process.kill(number)
    return before


@pytest.mark.parametrize("size", [1, 2])
def test_a_signal(server, data, undisturbed, tmp_path, thorough, report, size):
    times = 5 if thorough else 1
    straight = undisturbed(size)
    most = 0
    for number in SIGNALS if thorough or size == 1 else SIGNALS[:1]:
        for i in range(times):
            folder = tmp_path / f"{number}-{i}"
            run = flags(data, folder, "--auto_resume", "true", "--num_workers", 2 * (i % 2))
            processes = server.ranks(size, *run)
            before = stop(processes, folder, number, step=3 + 2 * i)
            for process in processes:
                # The interpreter's last moments are no longer ours: there a further signal ends it by itself, which a
                # shell reports as the same code.
                assert process.wait() in (128 + number, -number), process.output
                assert "Traceback" not in process.output, process.output
            most = max(most, saved(folder) - before)
            message = processes[0].line("stopped by a signal")
            server.finish(size, *run)
            assert_same_run(straight, folder)
    assert most in (0, 1)
    report(
        f"SIGTERM, SIGINT or SIGUSR1 to {'a run' if size == 1 else 'both of 2 ranks'}, again and again until it ends",
        injected=times * len(SIGNALS),
        lost=f"nothing: saved after at most {most} more step, exit codes 143, 130 and 138; then the same end",
        reads=message,
    )


def test_a_signal_to_python(data, undisturbed, server, tmp_path, thorough, report):
    if not thorough:
        pytest.skip("as above, with the interpreter's beginning; by `make faults`")
    straight = undisturbed(1)
    for number in SIGNALS:
        folder = tmp_path / str(number)
        run = flags(data, folder, "--auto_resume", "true")
        with command([sys.executable, "main.py", *run], tmp_path / f"log{number}") as process:
            stop([process], folder, number, step=5)
            assert process.wait() in (128 + number, -number), process.output
            message = process.line("stopped by a signal")
        server.finish(1, *run)
        assert_same_run(straight, folder)
    report(
        "SIGTERM, SIGINT or SIGUSR1 to `python main.py`",
        injected=len(SIGNALS),
        lost="nothing, exit codes 143, 130 and 138; then the same end",
        reads=message,
    )


def test_a_signal_to_torchrun(data, undisturbed, server, tmp_path, thorough, report):
    straight = undisturbed(2)
    for number in SIGNALS[:2] if thorough else SIGNALS[:1]:
        folder = tmp_path / str(number)
        run = flags(data, folder, "--auto_resume", "true")
        launcher = torchrun_command("--nproc_per_node=2", f"--master_port={free_port()}")
        with command([*launcher, *run], tmp_path / f"log{number}") as process:
            until(lambda: logged(folder) >= 5, what="a step")  # noqa: B023  called at once
            process.kill(number)
            code = process.wait()
            assert code == 1, process.output
            message = process.line("stopped by a signal")
            assert process.alive() == []
        assert 5 <= saved(folder) < 16
        server.finish(2, *run)
        assert_same_run(straight, folder)
    report(
        "SIGTERM or SIGINT to `torchrun` with 2 ranks",
        injected=2,
        lost=f"nothing; torchrun's own exit code is {code}; then the same end",
        reads=message,
    )


def test_sigusr1_to_torchrun(data, tmp_path, thorough, report):
    """It does not know the signal and dies. Its processes are told to save by hand."""
    if not thorough:
        pytest.skip("of torchrun more than of this repository; by `make faults`")
    folder = tmp_path / "run"
    launcher = torchrun_command("--nproc_per_node=2", f"--master_port={free_port()}")
    with command([*launcher, *flags(data, folder, "--epochs", 500)], tmp_path / "log") as process:
        until(lambda: logged(folder) >= 5, what="a step")
        process.kill(signal.SIGUSR1)
        assert process.wait() == -signal.SIGUSR1
        before = logged(folder)
        until(lambda: logged(folder) > before + 5, what="a step without torchrun")
        ranks = [pid for pid in process.alive() if any(name.startswith("RANK=") for name in environ(pid))]
        assert len(ranks) == 2
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        until(lambda: process.alive() == [], what="the end of the ranks")
        assert saved(folder) > before
    report(
        "SIGUSR1 to `torchrun`, which does not know it",
        injected=1,
        lost="nothing, but torchrun ends and its processes go on without it; a signal to them is answered as above",
        reads=process.line("stopped by a signal"),
    )


def test_a_signal_during_evaluation(server, data, tmp_path, report):
    """The evaluation is the longer part of these runs, and they do not wait for its end: SIGKILL soon follows."""
    (tmp_path / "long").mkdir()
    validation = cut_fmnist(tmp_path / "long", train=1, test=800)
    arguments = ["--eval_data_path", validation, "--epochs", 1, "--warmup_epochs", 0, "--auto_resume", "true"]
    straight = tmp_path / "straight"
    server.finish(2, *flags(data, straight, *arguments))
    folder = tmp_path / "stopped"
    run = flags(data, folder, *arguments)
    ranks = server.ranks(2, *run)
    stop(ranks, folder, signal.SIGTERM, step=8)
    for process in ranks:
        assert process.wait() in (143, -15), process.output
    assert not (folder / "summary.csv").exists()  # where the result of the evaluation would be
    newest = CheckpointFolder(folder).newest_valid()
    # The first is there where the evaluation had begun, the second where the signal came between it and the last step.
    assert newest.name in ("checkpoint-0.pth", "checkpoint-0-8.pth")
    assert steps_in(newest) == 8
    server.finish(2, *run)
    assert_same_run(straight, folder)
    report(
        "SIGTERM during an evaluation, 2 ranks",
        injected=1,
        lost="the evaluation, which begins again; then the same end",
        reads=ranks[0].line("stopped by a signal"),
    )
