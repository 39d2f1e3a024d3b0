"""Two runs on one output folder."""

import os
import signal
import socket
import time

from harness import flags, logged, until
from runs import assert_same_run

SAVING = ("--save_ckpt_steps", 5, "--num_workers", 2)


def test_a_second_run_is_refused(server, data, undisturbed, tmp_path, thorough, report):
    times = 10 if thorough else 1
    straight = undisturbed(1)
    slowest = 0.0
    for i in range(times):
        folder = tmp_path / str(i)
        run = flags(data, folder, *SAVING, "--auto_resume", "true")
        first = server.start(*run)
        until(lambda: logged(folder) >= 1, what="a step")  # noqa: B023  called at once
        first.freeze()
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        start = time.monotonic()
        ranks = server.ranks(1 + i % 2, *run)
        for process in ranks:
            assert process.wait() == 2
        slowest = max(slowest, time.monotonic() - start)
        message = ranks[0].error()
        assert f"{folder} is in use by process {first.pid} on {socket.gethostname()}" in message
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        # Killed, it lets the next one in at once, also while its loader processes have not noticed yet.
        loaders = set(first.alive()) - {first.pid}
        assert len(loaders) == 2
        for loader in loaders:
            os.kill(loader, signal.SIGSTOP)
        first.kill(signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        server.finish(1, *run)
        assert loaders <= set(first.alive())
        first.destroy()
        assert_same_run(straight, folder)
    report(
        "a second run on the output folder of one that is running",
        injected=times,
        lost=f"nothing: it ends after {slowest:.1f} s, exit code 2, and changes no file",
        reads=message,
    )
    report(
        "a run on the folder of one that was killed and whose loader processes are still there",
        injected=times,
        lost="nothing: it goes on, to the same end",
        reads="",
    )
