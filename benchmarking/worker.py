"""A process that holds one network in one engine and runs it on request.

Separate processes keep engines apart: their threads, their memory, their process-wide settings, and their crashes.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch

import runtimes
from benchmarking.limit import best_product, wait
from benchmarking.spec import Spec
from records.files import first_line

START_TIMEOUT = 900  # seconds; compiling a network for training takes minutes


# -- inside the process


def _file(spec: Spec, folder: Path) -> Path | None:
    """Return the path of the file that the engine of `spec` opens; None for training and engines without files."""
    if spec.kind == "training":
        return None
    engine = runtimes.find(spec.engine)
    if not isinstance(engine, runtimes.FileEngine):
        return None
    batch = spec.batch if engine.fixes_batch else 1
    name = f"{Path(spec.network).stem}-{spec.twin}-{spec.int8_depthwise}-{spec.precision}-{spec.resolution}-{batch}"
    return folder / f"{name}{engine.suffix}"


def _prepare(spec: Spec, folder: Path) -> str | None:
    """Write the file of `spec` unless it exists. Return one line on what went wrong, or None."""
    path = _file(spec, folder)
    if path.exists():
        return None
    try:
        from benchmarking.subjects import build_network

        network, images, target = build_network(spec)
        metadata = runtimes.Metadata(spec.network, (), (), (), spec.resolution, None)
        runtimes.find(spec.engine).export(network, images, path, target, metadata)
    except Exception as error:
        traceback.print_exc()
        return _one_line(error)
    return None


def _open(spec: Spec, folder: Path, *, profile: bool) -> tuple[Callable[[], Any], float, Callable[[], list]]:
    """Return (function that runs the network, seconds from loading to the first answer, function that profiles it)."""
    if spec.kind == "training":
        from benchmarking.subjects import training_step

        start = time.perf_counter()
        step = training_step(spec)
        step()
        wait(spec.device)
        return step, time.perf_counter() - start, list
    path = None if profile else _file(spec, folder)
    if path is None:
        from benchmarking.subjects import build_network  # timm takes seconds to import, and a file does not need it

        source, images, target = build_network(spec)
        target = replace(target, profile=profile)
    else:
        source, images = path, torch.randn(spec.batch, 3, spec.resolution, spec.resolution)
        target = runtimes.Target(device=spec.device)
    start = time.perf_counter()
    runtime = runtimes.load(source, target, images=images)  # still on the CPU, as the network is
    images = images.to(spec.device)
    runtime(images)
    wait(spec.device)
    return lambda: runtime(images), time.perf_counter() - start, lambda: runtime.profile(images)


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # not every container allows it
        Path("/proc/self/clear_refs").write_text("5")


def _resident_mb() -> float:
    """Return the largest resident size of the process since the reset."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def device_mb(device: str) -> float:
    """Return the memory in use on a GPU by its driver's count; torch does not know what other libraries hold."""
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e6


def _times(call: Callable[[], Any], calls: int, device: str) -> list[float]:
    """Return the seconds that each of `calls` calls takes until its work is finished, after a warm-up call."""
    seconds = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _one_line(error: BaseException) -> str:
    line = first_line(error)
    return line if isinstance(error, ValueError) else f"{type(error).__name__}: {line}"


def _begin(spec: Spec, folder: Path, *, threads: int, profile: bool) -> tuple[dict[str, float], Callable[[Any], Any]]:
    """Return (what `Worker.ready` returns, function that answers a request)."""
    torch.set_num_threads(threads)
    if spec.engine == "prepare":  # writes files for other processes; a request is the fields of a `Spec`
        return {}, lambda request: _prepare(Spec(**request), folder)
    if spec.engine == "limit":  # measures the machine's limit; a request names a precision
        return {}, lambda request: best_product(request, spec.device)
    # A network in its engine. Its peak memory leaves out the first calls, which may have compiled.
    before = device_mb(spec.device) if spec.device != "cpu" else 0.0
    call, first, layers = _open(spec, folder, profile=profile)
    _times(call, 1, spec.device)
    held = device_mb(spec.device) - before if spec.device != "cpu" else 0.0  # now: other networks come after this one
    _reset_peak()

    def respond(request: str | int) -> Any:
        if request == "profile":
            return [asdict(layer) for layer in layers()]
        if request == "peak_mb":
            return _resident_mb() if spec.device == "cpu" else held
        return _times(call, request, spec.device)

    return {"first_s": first}, respond


def serve() -> None:
    """Answer requests from standard input on standard output, a line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries' output goes where errors go, into the log
    spec, folder, how = json.loads(sys.argv[1])
    try:
        answer, respond = _begin(Spec(**spec), Path(folder), **how)
        while True:
            answers.write(json.dumps({"answer": answer}) + "\n")
            line = sys.stdin.readline()
            if not line:
                return
            answer = respond(json.loads(line))
    except KeyboardInterrupt:
        return
    except Exception as error:
        traceback.print_exc()
        answers.write(json.dumps({"error": _one_line(error)}) + "\n")


# -- outside


class WorkerError(ValueError):
    """A process could not do what it was asked to; the message is one line."""


class Worker:
    """A process that runs one `Spec` on request.

    The constructor does not wait for the process, so that several can start at the same time; `ready` waits.

    Args:
        spec: what the process runs; with the engine `prepare` or `limit` it holds no network, see `_begin`.
        folder: where `prepare` wrote the files for file engines.
        threads: threads to compute with.
        profile: make `layers` work, at some cost in speed.
    """

    def __init__(self, spec: Spec, folder: Path, *, threads: int, profile: bool = False):
        self.spec = spec
        job = json.dumps([asdict(spec), str(folder), {"threads": threads, "profile": profile}])
        with (folder / "log.txt").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from benchmarking.worker import serve; serve()", job],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=Path(__file__).parents[1],
            )

    def ready(self) -> dict[str, float]:
        """Wait for the network's first answer; return `first_s`, the seconds from before loading to that answer.

        Raises:
            WorkerError: the network cannot be built.
        """
        return self._receive()

    def ask(self, request: Any) -> Any:
        pipe: IO[str] = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # `_receive` reports that the process died
            pipe.write(json.dumps(request) + "\n")
            pipe.flush()
        return self._receive()

    def times(self, calls: int) -> list[float]:
        """Return the seconds of each of `calls` calls."""
        return self.ask(calls)

    def peak_mb(self) -> float:
        return self.ask("peak_mb")

    def layers(self) -> list[dict[str, Any]]:
        """Return the `runtimes.Layer`s of one call as dicts."""
        return self.ask("profile")

    def _receive(self) -> Any:
        pipe: IO[str] = self._process.stdout
        if not select.select([pipe], [], [], START_TIMEOUT)[0]:
            self._process.kill()
            raise WorkerError(f"no answer within {START_TIMEOUT} s")
        line = pipe.readline()
        if not line:
            raise WorkerError(f"the process died with code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["answer"]

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def prepare(specs: Sequence[Spec], folder: Path, *, threads: int) -> dict[Spec, str]:
    """Write the files that engines of `specs` will open, in a process of its own, whose memory is freed at its end.

    Returns:
        The specs whose files could not be written, each with the reason in one line.
    """
    with_file = [spec for spec in dict.fromkeys(specs) if _file(spec, folder)]
    if not with_file:
        return {}
    answers: dict[Spec, str | None] = {}
    while len(answers) < len(with_file):
        with contextlib.closing(Worker(Spec("", "prepare", "fp32"), folder, threads=threads)) as worker:
            worker.ready()
            for spec in with_file[len(answers) :]:
                try:
                    answers[spec] = worker.ask(asdict(spec))
                except WorkerError as error:  # this network ended the process; another one writes the rest
                    answers[spec] = str(error)
                    break
    return {spec: reason for spec, reason in answers.items() if reason}
