"""Process and disk: distributed set-up, seeding, logging, checkpoints."""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

logger = logging.getLogger(__name__)
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST_KEPT = 1 << 30  # bytes


# -- processes


@dataclass(frozen=True)
class World:
    """This process among the others: its rank in 0..size-1, the device it computes on."""

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
        """Whether `flag` holds on any rank. A host-side collective: it does not wait for the device."""
        if not self.distributed:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks, on the device of `values`."""
        if self.distributed:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The plain Python `value` of every rank, in the order of ranks."""
        values = [value]
        if self.distributed:
            values = [None] * self.size
            dist.all_gather_object(values, value)
        return values

    def from_main(self, function: Callable[[], Any]) -> Any:
        """The plain Python value that `function` returns on rank 0. A ValueError or OSError of it is raised on all
        ranks, so that none waits for one that has given up."""
        value = failure = None
        if self.is_main:
            try:
                value = function()
            except (ValueError, OSError) as error:
                failure = error
        value, failure = self.gather((value, failure))[0]
        if failure is not None:
            raise failure
        return value

    def barrier(self) -> None:
        if self.distributed:
            self.any(False)  # gloo, so that it neither waits for the device nor needs one

    def sync_buffers(self, *modules: nn.Module) -> None:
        """Copy every buffer (BatchNorm statistics) of rank 0 to the other ranks."""
        if self.distributed:
            for module in modules:
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)


def _first_slurm_host(nodelist: str) -> str:
    """The first host of SLURM's compact notation: `node[003-010,12],other` -> `node003`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodelist)
    return match.group(1) + (match.group(2) or "")


def _launched_as(env: Mapping[str, str], on_itp: bool) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as torchrun, SLURM's srun or, with `on_itp`, OpenMPI tell it; None if alone."""
    if on_itp:
        if "OMPI_COMM_WORLD_RANK" not in env:
            raise ValueError("--dist_on_itp true needs to be started by OpenMPI's mpirun")
        names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
    elif "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun only, not in a batch script's own shell
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return None
    rank, size, local_rank = (int(env.get(name, 0)) for name in names)
    return rank, size, local_rank


def init_world(
    device: str,
    *,
    dist_url: str = "env://",
    on_itp: bool = False,
    world_size: int | None = None,
    local_rank: int | None = None,
    timeout: timedelta = timedelta(minutes=30),
) -> World:
    """Join the other processes, if there are any: gloo for the CPU, and NCCL besides on GPUs.

    Args:
        device: `cuda` (the local rank picks the card), `cuda:1`, `cpu`, ...
        dist_url: `env://` or `tcp://host:port`; under SLURM without MASTER_ADDR, the job's first node.
        on_itp: take the ranks from OpenMPI.
        world_size, local_rank: what the user asked for; checked against, or completing, what the launcher says.
        timeout: how long a collective waits for a rank that does not come.

    Raises:
        ValueError: no such device, or a world size that the launcher does not know of.
    """
    launch = _launched_as(os.environ, on_itp)
    rank, size, launched_local_rank = launch or (0, 1, 0)
    if world_size is not None and world_size > 1 and world_size != size:
        raise ValueError(
            f"--world_size {world_size} but {size} process(es) were started; "
            f"use torchrun --nproc_per_node={world_size}, which sets it"
        )
    if local_rank is None or local_rank < 0 or "LOCAL_RANK" in os.environ:
        local_rank = launched_local_rank
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cuda", "cpu"):
        raise ValueError(f"--device {device} is not known; it is cuda, cuda:N or cpu")
    if target.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {device}: no CUDA device is available here; use --device cpu")
        target = torch.device("cuda", local_rank if target.index is None else target.index)
        if target.index >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU of its own: {torch.cuda.device_count()} are visible")
        torch.cuda.set_device(target)
    if size > 1:
        if "SLURM_STEP_NODELIST" in os.environ or "SLURM_JOB_NODELIST" in os.environ:
            hosts = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_JOB_NODELIST"]
            os.environ.setdefault("MASTER_ADDR", _first_slurm_host(hosts))
            os.environ.setdefault("MASTER_PORT", str(10000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000))
        store, rank, size = next(dist.rendezvous(dist_url, rank, size, timeout=timeout))
        store.set_timeout(timeout)
        # torchrun with a --master_port keeps one store through its restarts, in which a rank may still find the address
        # of a process that was killed. On one node the number of restarts is the same for all ranks.
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    return World(rank, size, target)


def close_world(world: World) -> None:
    """Leave the other processes. What was distributed is freed first: gloo's threads live as long as it does, and they
    should not outlive the interpreter."""
    if world.distributed:
        gc.collect()
        dist.destroy_process_group()


def lost_contact(error: BaseException) -> bool:
    """Whether the error says that another process has gone, or did not come in time."""
    signs = r"gloo|nccl|pair closure|connection (?:reset|closed|refused)|timed out waiting|broken pipe"
    return isinstance(error, dist.DistError) or re.search(signs, str(error), re.IGNORECASE) is not None


class FolderLock:
    """Keeps other runs out of an output folder until `release`, or the end of this process.

    It is the kernel's lock on the file `run.lock`, which names its holder. The kernel frees it when the process ends in
    whatever way, so what a killed run leaves behind does not block; the file stays.

    Raises:
        ValueError: another process holds the folder, or it cannot be written.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        path = folder / "run.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise ValueError(cannot_write(path, error)) from error
        self._lock(folder, path)
        # A loader process has the same lock and may outlive a killed run for some seconds.
        inherited = weakref.ref(self._file)
        os.register_at_fork(after_in_child=lambda: (file := inherited()) and file.close())
        with contextlib.suppress(OSError):  # on a full disk it has no name, and the first save says why
            os.ftruncate(self._file.fileno(), 0)
            os.write(self._file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _lock(self, folder: Path, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ValueError(
                f"{folder} is in use by {holder}: stop that run or wait for its end, or choose another --output_dir"
            ) from None
        except OSError as error:  # not every network file system has locks
            logger.warning("cannot lock %s (%s): take care that no other run uses it", path, _first_line(error))

    def release(self) -> None:
        self._file.close()


class StopRequest:
    """Remembers SIGTERM, SIGINT and SIGUSR1 (SLURM's warning before the time limit) instead of dying of them.

    The training loop asks `received` after each step. Further signals change nothing, so that a second one during the
    save does no harm. The exit code of a run stopped so is 128 + the signal's number, as a shell reports it.
    """

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        for number in self.signals:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame) -> None:
        if self.received is None:
            self.received = number

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or signal.SIGTERM)


def one_line(message: str) -> str:
    """The message with line ends and whatever else cannot be printed spelled out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in message.strip())


@contextlib.contextmanager
def mistakes_end(prog: str) -> Iterator[None]:
    """End the process with exit code 2 and one line on standard error if what is done in it raises a user's mistake."""
    try:
        yield
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{prog}: error: {one_line(str(error))}\n")
        raise SystemExit(2) from None


def setup_logging(rank: int) -> None:
    """Messages of rank 0, and warnings of the others with their rank, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


def keep_freed_memory() -> bool:
    """Tell glibc to serve blocks of up to 1 GiB from its heap, and to give none of that back to the system.

    By default glibc maps large blocks on their own and unmaps them when they are freed, or trims the heap. An
    activation of 6 MB then costs 1500 page faults in each call, which in PyTorch is up to half of the time of a forward
    pass on the CPU. The price is that the process keeps its largest size. It holds for the whole process, from now on.

    Returns:
        Whether it was done; False where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # mallopt takes an int for the value and returns 1 on success.
    return bool(library.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and library.mallopt(M_TRIM_THRESHOLD, LARGEST_KEPT))


# -- random numbers


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the device's generators, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


# -- checkpoints

SAFE_GLOBALS = [argparse.Namespace]  # the one class in published checkpoints beside tensors and plain data
TEMPORARY = ("writing-", ".tmp")


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read, or used for this network; the message is one line."""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cannot_write(path: str | Path, error: OSError) -> str:
    """One line for the user: the file, the cause, what to do."""
    cause = error.strerror or _first_line(error)
    return (
        f"cannot write {path}: {cause}; what was there before is kept. Make room or make it writable and start again, "
        "a training run with --auto_resume true"
    )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path beside `path`; what was written there is flushed and renamed over `path`, or removed."""
    descriptor, name = tempfile.mkstemp(prefix=TEMPORARY[0], suffix=TEMPORARY[1], dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes it private
        temporary.replace(path)
        _fsync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _cause_of_failed_save():
    """torch reports that its writer is out of step, and the system's error is only what that came from."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def save_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write atomically: whoever reads `path` finds the old file or the whole new one, also after a kill.

    Raises:
        CheckpointError: names the path and the cause; the previous file is untouched and nothing stray is left.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, _cause_of_failed_save(), temporary.open("wb") as file:
            torch.save(dict(checkpoint), file)
    except OSError as error:
        raise CheckpointError(cannot_write(path, error)) from error


def link_checkpoint(source: Path, path: Path) -> None:
    """Give the file `source` a second name, atomically; a copy where the file system has no hard links."""
    try:
        with replacing(path) as temporary:
            temporary.unlink()
            try:
                os.link(source, temporary)
            except OSError:
                shutil.copyfile(source, temporary)
    except OSError as error:
        raise CheckpointError(cannot_write(path, error)) from error


FOLDER_ATTRIBUTE = 0x10  # of a record in a zip file's directory


def is_intact(path: str | Path) -> bool:
    """Whether the file is whole: every record of torch's zip format matches its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing from a record that is marked as a folder: its tensor stays as it was allocated.
            folders = [info for info in archive.infolist() if info.external_attr & FOLDER_ATTRIBUTE and info.file_size]
            return not folders and archive.testzip() is None
    except Exception:  # of damaged bytes: BadZipFile, zlib.error, struct.error, ...
        return False


def _is_zip(path: Path) -> bool:
    """Whether it has the end record of a zip file, be it a damaged one, of which `is_zipfile` may raise."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:
        return True


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it.

    Raises:
        CheckpointError: missing, truncated, damaged, or holding anything but tensors, plain data and the
            `argparse.Namespace` of published checkpoints.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if _is_zip(path) and not is_intact(path):
        raise CheckpointError(f"{path} is damaged (a checksum does not match): take another copy or an earlier one")
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        refused = re.search(r"unsupported (?:global|class|operand)[^\n]*", str(error), re.IGNORECASE)
        cause = "it is truncated or no PyTorch checkpoint: take another copy or an earlier one"
        if refused:
            cause = f"refused: {refused.group(0)}; it would run code, so take one from where you trust it"
        raise CheckpointError(f"cannot load {path}: {cause}") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"cannot load {path}: it holds a {type(checkpoint).__name__}, not a dict")
    return checkpoint


def checkpoint_weights(
    checkpoint: Mapping[str, Any],
    *,
    key: str = "model|module",
    whole_file: bool = False,
    prefix: str = "",
    path: str | Path = "the checkpoint",
) -> dict[str, torch.Tensor]:
    """The state dict in a checkpoint.

    Args:
        key: alternatives separated by `|`, the first one there is taken.
        whole_file: without the key, take the whole file if that is itself a state dict.
        prefix: what the names are prefixed with; names without it are left out.

    Raises:
        CheckpointError: no such key, or no tensors under it.
    """
    for name in key.split("|"):
        if name in checkpoint:
            weights = checkpoint[name]
            break
    else:
        if not (whole_file and all(isinstance(value, torch.Tensor) for value in checkpoint.values())):
            keys = ", ".join(map(str, list(checkpoint)[:12]))
            raise CheckpointError(f"{path} has no key {key}; choose one by --model_key: {keys}")
        name, weights = "no key", checkpoint
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise CheckpointError(f"what {path} holds under {name} is no state dict")
    if prefix:
        weights = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        if not weights:
            raise CheckpointError(f"no name in {path} begins with --model_prefix {prefix}")
    return dict(weights)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, torch.Tensor],
    *,
    path: str | Path = "the checkpoint",
    allow_other_classes: bool = False,
) -> list[str]:
    """Load strictly, and all or nothing: on an error the model is as it was.

    Args:
        allow_other_classes: leave out the classifier, as the model initialized it, where its shapes differ.

    Returns:
        The names left out.

    Raises:
        CheckpointError: one line that counts the mismatches and shows the first of each kind.
    """
    own = model.state_dict()
    shapes = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    skipped: list[str] = []
    classifier = [name for name in own if name.startswith("cls")]
    if allow_other_classes and shapes and set(shapes) <= set(classifier) and set(classifier) <= set(weights):
        skipped = classifier
        shapes = []
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({missing[0]})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({unexpected[0]})")
    if shapes:
        theirs, ours = (tuple(state[shapes[0]].shape) for state in (weights, own))
        problems.append(f"{len(shapes)} of another shape ({shapes[0]}: {theirs}, the network's {ours})")
    if problems:
        hint = "is it of another variant, form (--deploy) or class count?"
        raise CheckpointError(f"{path} does not fit this network: {'; '.join(problems)}; {hint}")
    model.load_state_dict({name: own[name] if name in skipped else weights[name] for name in own}, strict=True)
    return skipped


class CheckpointFolder:
    """The checkpoints of a run: the newest `keep` by number, and `last`, `best` and, of averages, `best-ema...`.

    `checkpoint-7.pth` was written after epoch 7, `checkpoint-7-120.pth` after 120 optimizer steps of epoch 7. `last`
    and `best` are further names of such files, so they cost no space while both exist.

    Args:
        folder: the run's output folder.
        keep: how many numbered files stay, at least 1.
    """

    pattern = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.pth")

    def __init__(self, folder: str | Path, keep: int = 10):
        self.folder = Path(folder)
        self.keep = keep

    def places(self) -> list[tuple[tuple[int, int], Path]]:
        """Where in the run each numbered file was written, newest first: (epochs done, steps after them)."""
        found = []
        for path in self.folder.glob("checkpoint-*.pth"):
            match = self.pattern.fullmatch(path.name)
            if match:
                epoch, step = int(match.group(1)), match.group(2)
                found.append(((epoch, int(step)) if step else (epoch + 1, 0), path))
        return sorted(found, reverse=True)

    def numbered(self) -> list[Path]:
        """The numbered files, newest first."""
        return [path for _, path in self.places()]

    def save(self, checkpoint: Mapping[str, Any], *, epoch: int, step: int, names: Sequence[str] = ()) -> Path:
        """Write the state after `step` optimizer steps of `epoch` (step 0: after the epoch `epoch` - 1 as a whole).

        Args:
            names: further names, such as `best` and `best-ema`; `last` is always given.
        """
        path = self.folder / (f"checkpoint-{epoch}-{step}.pth" if step else f"checkpoint-{epoch - 1}.pth")
        save_checkpoint(checkpoint, path)
        for name in ("last", *names):
            link_checkpoint(path, self.folder / f"checkpoint-{name}.pth")
        self.delete_old()
        return path

    def delete_old(self) -> None:
        """Delete all but the newest `keep` numbered files, unless none of these can be read."""
        numbered = self.numbered()
        kept, old = numbered[: self.keep], numbered[self.keep :]
        if old and not any(map(is_intact, kept)):
            logger.warning("%s cannot be read back: older checkpoints are kept", kept[0])
            return
        for path in old:
            try:
                path.unlink()
            except OSError as error:
                logger.warning("cannot delete the old checkpoint %s: %s", path, _first_line(error))

    def newest_valid(self) -> Path | None:
        """The newest checkpoint that can be read, to resume from; damaged ones are named in a warning and left where
        they are. Where no numbered one can be read, one of the best, of an earlier epoch, is better than none.

        Returns:
            None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are some, and none can be read.
        """
        best = self.folder.glob("checkpoint-best*.pth")
        candidates = [*self.numbered(), *sorted(best, key=lambda path: path.stat().st_mtime_ns, reverse=True)]
        for path in candidates:
            try:
                load_checkpoint(path)  # besides the checksums, for the parts of the file that they do not cover
            except CheckpointError as error:
                logger.warning("%s; it is not used, trying the one before it", error)
            else:
                return path
        if candidates:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read: put an intact one there, or move them away to begin anew"
            )
        return None

    def remove_leftovers(self) -> None:
        """Delete temporary files of a save that was killed."""
        for path in self.folder.glob("*".join(TEMPORARY)):
            path.unlink(missing_ok=True)
