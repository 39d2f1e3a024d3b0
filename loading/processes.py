"""Loader processes: how they start, answer signals and end, and what they send."""

import atexit
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_bool
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.sharedctypes import RawValue
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from loading.views import Views, stack_views
from utils import StopRequest, keep_freed_memory

# A loader process sends this for each image: (image or None, class, index, notes for the main process).
Sample = tuple[torch.Tensor | Views | None, Any, int, Sequence]
# Batches (image, target, index): by default (B, 3, H, W), (B,), (B,).
Collate = Callable[[list[tuple]], Sequence]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Loading:
    """How the batches of one rank are loaded."""

    batch_size: int  # of one rank
    rank: int = 0  # 0 <= rank < world_size
    world_size: int = 1
    seed: int = 0  # for training's order and transforms; not negative
    num_workers: int = 0  # loader processes; 0 loads in this process
    pin_memory: bool = False  # put batches in page-locked memory, for a GPU
    collate: Collate = default_collate
    device: torch.device = CPU  # where training's views are finished, and its images returned
    skip_broken: bool = False  # leave broken validation images out and count them, instead of raising ValueError
    num_classes: int | None = None  # of the network or the training data, which labels must keep to; None: unchecked
    # The network's index for each class of the validation data, from `datasets.match_classes`; None: the same index.
    class_indices: Sequence[int] | None = None


def _collate(samples: list[Sample], batch: Collate) -> tuple[Any, Any, Any, list]:
    """Batch the samples that have an image, and collect the notes of all samples."""
    notes = [note for sample in samples for note in sample[3]]
    kept = [sample[:3] for sample in samples if sample[0] is not None]
    if not kept:
        return None, None, None, notes
    if not isinstance(kept[0][0], Views):
        return *batch(kept), notes
    views = [image for image, _, _ in kept]
    pixels, targets, indices = batch([(view.pixels[0], *rest) for view, (_, *rest) in zip(views, kept, strict=True)])
    return stack_views(pixels, views), targets, indices, notes


@cache
def _exiting() -> Any:
    """A flag, shared with the loader processes, that is set when this process begins to exit."""
    flag = RawValue(c_bool, False)
    atexit.register(setattr, flag, "value", True)
    return flag


def _start_worker(exiting: Any, failed: Any, worker_id: int) -> None:
    """Leave signals to the main process, which needs its loader processes to finish the current step.

    A terminal, `timeout` and SLURM send signals to the whole process group. SIGTERM still counts once the main process
    exits, because Python then sends it to the remaining loader processes and waits for them, and once the loader has
    failed, because torch (2.14) then ends its processes with it.

    Args:
        exiting, failed: flags that the main process sets.
    """

    def terminate(number: int, frame: Any) -> None:
        if exiting.value or failed.value:
            os._exit(0)

    def report(kind: type[BaseException], *rest: Any) -> None:
        if not issubclass(kind, ConnectionError | EOFError):
            sys.__excepthook__(kind, *rest)

    # The thread that hands out batches has no other way to report. A main process that learns of another loader
    # process's death hangs up in the middle of a batch, and says itself what happened.
    sys.excepthook = report
    keep_freed_memory()
    for number in StopRequest.signals:
        signal.signal(number, terminate if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.signals)


def make_loader(dataset: Dataset, loading: Loading, *, seed: int = 0, **options) -> DataLoader:
    """Make a DataLoader with its own random generator, because iterating must not advance the global one."""
    failed = RawValue(c_bool, False)
    loader = DataLoader(
        dataset,
        num_workers=loading.num_workers,
        pin_memory=loading.pin_memory,
        collate_fn=partial(_collate, batch=loading.collate),
        worker_init_fn=partial(_start_worker, _exiting(), failed),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    loader.failed = failed
    return loader


def iterate(loader: DataLoader) -> Iterator[tuple]:
    """Yield the loader's batches. Raises RuntimeError, usually in torch's SIGCHLD handler, if a loader process dies."""
    # Block signals here and in the new loader processes, which unblock them when their handlers are in place.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.signals)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from iterator
    except Exception as error:
        loader.failed.value = True
        # An error of the data set itself comes from here or, as torch marks it, from a loader process that lives.
        own = not loader.num_workers or "Original Traceback" in str(error)
        if own or not isinstance(error, ConnectionError | EOFError):
            raise
        # A loader process died while sending. SIGCHLD is on its way, and torch's handler raises here and names it.
        time.sleep(5)
        raise RuntimeError("DataLoader worker (pid unknown) has ended while it was sending a batch") from error


def known_classes(targets: Any, loading: Loading) -> Any:
    """Return a batch's classes (B,) by the network's indices. Raises ValueError for a label that is no class."""
    indices = loading.class_indices
    count = loading.num_classes if indices is None else len(indices)
    if count is not None and not ((targets >= 0) & (targets < count)).all():
        wrong = next(label for label in targets.tolist() if not 0 <= label < count)
        raise ValueError(f"an image has label {wrong}, and there are {count} classes from 0 on: is --nb_classes right?")
    return targets if indices is None else torch.tensor(indices)[targets]
