"""Processes that start fast, to run several ranks and to inject faults into, and what can be seen of them."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from records.checkpoints import CheckpointFolder, load_checkpoint
from records.files import TEMPORARY
from runs import BASE, ROOT, environment

# Fewer epochs and lines than the tests of main.py have, since the faults are many.
FLAGS = [*BASE, "--epochs", "2", "--log_freq", "1"]

PRELOADED = (
    "main",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tensorboardX.event_file_writer",
    "tensorboardX.summary",
)


def permitted(*unshare: str) -> bool:
    """Whether this process may have namespaces of its own, which root may, but not in every container."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(["unshare", *unshare, "true"], capture_output=True, check=False).returncode
    )


needs_mounts = pytest.mark.skipif(not permitted("--mount"), reason="needs root with the right to mount")


def until(condition: Callable[[], object], *, seconds: float = 120, what: str = "it") -> None:
    """Wait for a condition. The limit is for what never comes; a busy machine must not reach it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.005)


def status(pid: int) -> tuple[str, int]:
    """The state of a process, a letter as in `ps`, and its session. Raises OSError if there is none."""
    state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    return state, int(session)


def environ(pid: int) -> list[str]:
    """The environment that a process began with, as `NAME=value`."""
    return Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")


class Process:
    """A process with a session of its own, and a file with what it wrote.

    Args:
        log: what it writes; its name also marks those processes that it starts with sessions of their own.
        poll: gives its exit code as `subprocess` does, None while it runs.
    """

    MARK = "FAULT_SUITE_LOG"

    def __init__(self, pid: int, log: Path, poll: Callable[[], int | None]):
        self.pid, self.log = pid, log
        self._poll, self._code = poll, None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._poll()
        return self._code

    def wait(self, seconds: float = 240) -> int:
        """The exit code."""
        try:
            until(lambda: self.poll() is not None, seconds=seconds, what=f"the end of the process ({self.log})")
        except AssertionError:
            self.destroy()
            raise
        return self._code

    def kill(self, number: int) -> None:
        os.kill(self.pid, number)

    def freeze(self) -> None:
        """Stop it in whatever it does, until SIGCONT."""
        self.kill(signal.SIGSTOP)
        until(lambda: status(self.pid)[0] in "TZ", what="the stop")

    def alive(self) -> list[int]:
        """It and what it has started, as far as it runs."""
        found = []
        for pid in (int(folder.name) for folder in Path("/proc").glob("[0-9]*")):
            with contextlib.suppress(OSError):  # it has ended since
                state, session = status(pid)
                if state not in "ZX" and (session == self.pid or f"{self.MARK}={self.log}" in environ(pid)):
                    found.append(pid)
        return found

    def destroy(self) -> None:
        """End what is left of it."""
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def output(self) -> str:
        # What torch's handler in a loader process says of a segmentation fault ends with a zero byte.
        return self.log.read_text(errors="replace").replace("\0", "")

    def line(self, pattern: str) -> str:
        """The last line of the output that matches, without the time in front of it."""
        found = [line for line in self.output.splitlines() if re.search(pattern, line)]
        assert found, f"no line with {pattern}:\n{self.output}"
        return re.sub(r"^\d\d:\d\d:\d\d ", "", found[-1])

    def error(self) -> str:
        """The one line on what went wrong; asserts that it is one, and that no traceback is with it."""
        assert "Traceback" not in self.output, self.output
        found = [line for line in self.output.splitlines() if re.match(r"[\w/]+\.py: error: ", line)]
        assert len(found) == 1, self.output
        return found[0]


class Server:
    """Starts processes from `server.py`; a context manager, which leaves none behind."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.started: list[Process] = []

    def __enter__(self) -> "Server":
        paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "faults")]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), *PRELOADED],
            env={**environment(), "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert json.loads(self._process.stdout.readline()) == "ready"
        return self

    def __exit__(self, *_) -> None:
        for process in self.started:
            process.destroy()
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _ask(self, request: dict):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        *arguments: object,
        target: str = "main:main",
        env: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,
        network: str | None = None,
        cwd: Path = ROOT,
    ) -> Process:
        """Start main.py with these arguments, or another function `target` that takes a list of strings."""
        log = self.folder / f"process-{len(self.started)}.log"
        log.touch()
        request = {"target": target, "arguments": [list(map(str, arguments))], "env": env or {}, "cwd": str(cwd)}
        pid = self._ask({**request, "limits": limits or {}, "network": network, "log": str(log)})
        process = Process(pid, log, lambda: self._ask({"poll": pid}))
        self.started.append(process)
        return process

    def ranks(self, size: int, *arguments: object, env: dict[str, str] | None = None, **options) -> list[Process]:
        """Start the processes of one run as a launcher does, with their ranks in the environment."""
        if size == 1:
            return [self.start(*arguments, env=env, **options)]
        launch = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        return [
            self.start(*arguments, env={**launch, "RANK": str(r), "LOCAL_RANK": str(r), **(env or {})}, **options)
            for r in range(size)
        ]

    def finish(self, size: int, *arguments: object, **options) -> list[Process]:
        """Run to the end, which has to be a good one."""
        processes = self.ranks(size, *arguments, **options)
        for process in processes:
            assert process.wait() == 0, process.output
        return processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def command(line: Sequence[object], log: Path, *, env: dict[str, str] | None = None) -> Iterator[Process]:
    """A command from its very beginning, interpreter and imports included; what is left of it is ended."""
    with log.open("w") as file:
        env = {**environment(), **(env or {}), Process.MARK: str(log)}
        started = subprocess.Popen(
            list(map(str, line)), cwd=ROOT, env=env, stdout=file, stderr=file, start_new_session=True
        )
    process = Process(started.pid, log, started.poll)
    try:
        yield process
    finally:
        process.destroy()
        started.wait(timeout=60)


def flags(data: Path, folder: Path | None, *arguments: object, base: Sequence[str] = FLAGS) -> list[str]:
    """The arguments of a run on `data`, into `folder`."""
    into = ["--output_dir", folder] if folder is not None else []
    return list(map(str, [*base, "--data_path", data, *into, *arguments]))


def logged(folder: Path) -> int:
    """The steps of a run whose lines are in its log."""
    log = folder / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith(b"\n")), default=0)


def saved(folder: Path) -> int:
    """The steps of a run that its newest valid checkpoint holds."""
    path = CheckpointFolder(folder).newest_valid()
    return steps_in(path) if path else 0


def steps_in(path: Path) -> int:
    """The steps that a checkpoint holds, counted from the beginning of its run."""
    state = load_checkpoint(path)
    return (state["epoch"] + (state["step"] == 0)) * state["steps_per_epoch"] + state["step"]


def temporary_files(folder: Path) -> list[Path]:
    return list(folder.glob("*".join(TEMPORARY)))


def mount(kind: Sequence[str], source: object, target: Path) -> contextlib.ExitStack:
    """Mount something until the stack is closed. Needs root."""
    stack = contextlib.ExitStack()
    subprocess.run(["mount", *kind, str(source), str(target)], check=True, capture_output=True)
    stack.callback(subprocess.run, ["umount", "--lazy", str(target)], check=True, capture_output=True)
    return stack
