"""Processes: distributed set-up, locks, signals, seeding, logging."""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import random
import re
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from records.files import first_line, one_line, writing

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT, LARGEST_KEPT_BEFORE_2_35 = 1 << 30, 32 << 20  # bytes; the second is the bound of older malloc.c


# -- processes


class RunError(RuntimeError):
    """Ends a run with exit code 1; the message is one line that tells the user what to do."""


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run: its rank in 0..size-1, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def distributed(self) -> bool:
        return self.size > 1

    def any(self, flag: bool) -> bool:
        """Return whether `flag` holds on any rank. This host-side collective does not wait for the device."""
        if not self.distributed:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks, in place and on the device of `values`."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the plain Python `value` of every rank, in the order of the ranks."""
        values = [value] * self.size
        if self.distributed:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 and return its plain Python value on all ranks. Its ValueError or OSError is also
        raised on all ranks, so that no rank waits for one that has given up."""
        value = failure = None
        try:
            value = function() if self.is_main else None
        except (ValueError, OSError) as error:
            failure = error
        value, failure = self.gather((value, failure))[0]
        if failure is not None:
            raise failure
        return value

    def barrier(self) -> None:
        self.any(False)  # over gloo, which neither waits for a device nor needs one

    def sync_buffers(self, *modules: nn.Module) -> None:
        """Copy every buffer (BatchNorm statistics) from rank 0 to the other ranks."""
        if self.distributed:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


def _first_slurm_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `node[003-010,12],other` -> `node003`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodelist)
    return match.group(1) + (match.group(2) or "")


def _launched_as(env: Mapping[str, str], on_itp: bool) -> tuple[int, int, int] | None:
    """Return (rank, world size, local rank) from torchrun, SLURM's srun or, with `on_itp`, OpenMPI; None if alone."""
    if on_itp and "OMPI_COMM_WORLD_RANK" not in env:
        raise ValueError("--dist_on_itp true needs to be started by OpenMPI's mpirun")
    if on_itp:
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set only by srun, not in a batch script's own shell
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return None
    return tuple(int(env.get(name, 0)) for name in names)


def init_world(
    device: str,
    *,
    dist_url: str = "env://",
    dist_on_itp: bool = False,
    dist_timeout: float = 1800,
    world_size: int | None = None,
    local_rank: int | None = None,
) -> World:
    """Join the other processes, if there are any. Uses gloo for the CPU and, on GPUs, NCCL as well.

    Args:
        device: `cuda` (the local rank selects the GPU), `cuda:1`, `mps` or `cpu`.
        dist_url: `env://` or `tcp://host:port`. Under SLURM, `env://` defaults to the first node of the step or job.
        dist_on_itp: take the ranks from OpenMPI.
        dist_timeout: time that a collective waits for a missing rank, in seconds.
        world_size, local_rank: a world size above 1 must match the launcher's; LOCAL_RANK overrides the local rank.

    Raises:
        ValueError: the device is not available, or the launcher does not match `world_size` or `dist_on_itp`.
    """
    # Ranks and world size.
    launch = _launched_as(os.environ, dist_on_itp)
    rank, size, launched_local_rank = launch or (0, 1, 0)
    if world_size is not None and world_size > 1 and world_size != size:
        started = f"--world_size {world_size}, but {size} process(es) were started"
        raise ValueError(f"{started}: use torchrun --nproc_per_node={world_size}")
    if local_rank is None or local_rank < 0 or "LOCAL_RANK" in os.environ:
        local_rank = launched_local_rank

    # The device of this process.
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device must be cuda, cuda:N, mps or cpu, not {device}")
    if target.type == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError(f"--device {device}: Metal is not available here; use --device cpu")
        if size > 1:
            raise ValueError(f"--device {device} computes in one process, and {size} were started")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device}: no CUDA device is available here; use --device cpu")
        target = torch.device("cuda", local_rank if target.index is None else target.index)
        if target.index >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(target)

    # The process group.
    if size > 1:
        hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
        if hosts:
            os.environ.setdefault("MASTER_ADDR", _first_slurm_host(hosts))
            os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        if not dist_url.startswith(("env://", "tcp://", "file://")):
            raise ValueError(f"--dist_url {dist_url} must be env:// or tcp://HOST:PORT")
        timeout = timedelta(seconds=dist_timeout)
        store, rank, size = next(dist.rendezvous(dist_url, rank=rank, world_size=size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun with --master_port keeps one store across restarts, where a rank may still find the address of a
        # process that was killed. On a single node, the number of restarts is the same for all ranks.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    return World(rank, size, target)


def close_world(world: World) -> None:
    """Leave the process group. Distributed objects are freed first, because gloo's threads live as long as they do
    and should not outlive the interpreter."""
    if world.distributed:
        gc.collect()
        dist.destroy_process_group()


def lock_folder(folder: str | Path) -> TextIO:
    """Lock an output folder against other runs until the returned file is closed or this process ends.

    This is a kernel lock on the file `run.lock`, which names the process that holds it. However that process ends, the
    kernel releases the lock, so the file that a killed run leaves behind does not block the folder.

    Raises:
        ValueError: another process holds the lock, or the folder cannot be written.
    """
    path = Path(folder) / "run.lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        mend = "stop that run or wait for its end, or choose another --output_dir"
        raise ValueError(f"{path.parent} is in use by {holder}: {mend}") from None
    except OSError as error:  # not every network file system supports locks
        logger.warning("cannot lock %s (%s): take care that no other run uses it", path, first_line(error))
    # Loader processes inherit the lock and may outlive a killed run by some seconds, so they close the file.
    inherited = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: (file := inherited()) and file.close())
    with contextlib.suppress(OSError):  # on a full disk the file stays empty, and the first save reports why
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


class StopRequest:
    """Remembers SIGTERM, SIGINT or SIGUSR1 (SLURM's warning before the time limit) instead of ending the process.

    The training loop checks `received` after each step. Further signals are ignored, so a second one during the save
    does no harm. A run stopped this way exits with 128 + the signal's number, as shells report it.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        for number in self.signals:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if self.received is None:
            self.received = number


def setup_logging(rank: int) -> None:
    """Log to standard error: all messages of rank 0, and the other ranks' warnings, prefixed with the rank."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


def keep_freed_memory() -> bool:
    """Make glibc serve blocks of up to 1 GiB from its heap, and trim the heap only where more than 1 GiB is free.

    By default, glibc maps each large block separately and unmaps it when it is freed, or trims the heap. An activation
    of 6 MB then costs 1500 page faults in each call, which takes up to half the time of a PyTorch forward pass on the
    CPU. The price is that the process holds on to freed memory. The setting lasts until the process ends.

    Returns whether glibc accepted the setting; False for any other C library.
    """
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # mallopt takes an int for the value and returns 1 on success. Before glibc 2.35 the first value has an upper bound.
    kept = any(library.mallopt(M_MMAP_THRESHOLD, size) for size in (LARGEST_KEPT, LARGEST_KEPT_BEFORE_2_35))
    return bool(library.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT) and kept)


# -- random numbers


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of Python's, NumPy's, torch's and the device's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        **({"mps": torch.mps.get_rng_state()} if device.type == "mps" else {}),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device=device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# -- starting


def _explained(error: BaseException) -> str | None:
    """Return one line that tells the user what failed and what to do, or None for an error that is a bug."""
    if isinstance(error, RunError):
        return str(error)
    if re.search(r"DataLoader worker \(pid", str(error)):
        worker = first_line(error).rstrip(" .")
        return (
            f"{worker}. Most often the memory is full: lower --num_workers and start again, a training run with "
            "--auto_resume true"
        )
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory: lower --batch_size (and raise --update_freq by as much), the image size or --num_workers"
    # Words in error messages about another process that is lost or too late.
    lost = r"gloo|nccl|pair closure|connection (?:reset|closed|refused)|timed out waiting|broken pipe"
    if isinstance(error, dist.DistError) or re.search(lost, str(error), re.IGNORECASE):
        first = first_line(error).split(". ")[0]
        cause = re.sub(r"^\[\S+:\d+\] ", "", first)  # without the location in gloo's source
        return (
            f"another process of the run has ended or cannot be reached ({cause}). Look at what it wrote last, then "
            "start all of them again, a training run with --auto_resume true"
        )
    return None


def _last_line(error: BaseException) -> str:
    """Return the error's message or, if it contains the traceback of a loader process, its last line."""
    lines = str(error).strip().splitlines()
    return lines[-1] if any("Original Traceback" in line for line in lines) else str(error)


def launch(
    prog: str, args: argparse.Namespace, body: Callable[[World], None], *, output_dir: str | None = None
) -> None:
    """Run `body` in each process of the command, and turn errors that the user can fix into one line and an exit code.

    Exit codes: 2 for a wrong argument or a file that cannot be read or written, 130 for SIGINT where no checkpoint can
    be saved, and 1 for a loss or gradient that is not finite, too little memory, or a lost process.

    Args:
        output_dir: a folder to lock for `body`.
    """
    world, failure = World(0, 1, torch.device("cpu")), None
    held = contextlib.ExitStack()

    def lock() -> None:
        held.enter_context(lock_folder(output_dir))

    # Join the other processes, lock the folder, run.
    try:
        world = init_world(**args.pick("device", "dist_url", "dist_on_itp", "dist_timeout", "world_size", "local_rank"))
        setup_logging(world.rank)
        for note in args.notes:
            logger.info("%s", note)
        if world.device.type == "mps":
            logger.info("on Metal, in one process: float32, or bfloat16 with --use_amp; sums are kept in float32")
        if output_dir:
            world.from_main(lock)
        body(world)

    # Errors that the user can fix become one line; any other is a bug and keeps its traceback.
    except (ValueError, OSError) as error:
        failure = 2, _last_line(error)
    except (RuntimeError, MemoryError) as error:
        failure = 1, _explained(error)
        if failure[1] is None:
            raise
    except KeyboardInterrupt:
        failure = 128 + signal.SIGINT, "interrupted"
    finally:
        # After the except clauses, so that no traceback keeps the networks of a distributed run alive any longer.
        close_world(world)
        held.close()
    if failure:
        code, message = failure
        sys.stderr.write(f"{prog}: error: {one_line(message)}\n")
        raise SystemExit(code)
