"""Loader processes: how they start, answer signals and end, and what they send."""

import atexit
import os
import signal
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

# What a loader process sends for each image: (image or None, class, index, notes), the notes for the main process.
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
    seed: int = 0  # of training's order and transforms; not negative
    num_workers: int = 0  # loader processes; 0 loads in this process
    pin_memory: bool = False  # put batches in page-locked memory, for a GPU
    collate: Collate = default_collate
    device: torch.device = CPU  # where training's views are finished, and so where its images are
    skip_broken: bool = False  # leave broken validation images out and count them, instead of raising ValueError
    # What the network calls each class of the validation data, from `datasets.match_classes`; None: the same.
    class_indices: Sequence[int] | None = None


def _collate(samples: list[Sample], batch: Collate) -> tuple[Any, Any, Any, list]:
    """Batch the samples that have an image, and the notes of all."""
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


def _start_worker(exiting: Any, worker_id: int) -> None:
    """Leave signals to the main process, which needs its loader processes to end the step that is running.

    A terminal, `timeout` and SLURM send them to the whole group. But when the main process exits, Python ends the
    loader processes that are left by SIGTERM and waits for them.
    """

    def terminate(number: int, frame: Any) -> None:
        if exiting.value:
            os._exit(0)

    keep_freed_memory()
    for number in StopRequest.signals:
        signal.signal(number, terminate if number == signal.SIGTERM else signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, StopRequest.signals)


def make_loader(dataset: Dataset, loading: Loading, *, seed: int = 0, **options) -> DataLoader:
    """A DataLoader that draws from a generator of its own: iterating must not move the global one."""
    return DataLoader(
        dataset,
        num_workers=loading.num_workers,
        pin_memory=loading.pin_memory,
        collate_fn=partial(_collate, batch=loading.collate),
        worker_init_fn=partial(_start_worker, _exiting()),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def iterate(loader: DataLoader) -> Iterator[tuple]:
    """The batches of the loader. Raises RuntimeError, by torch's handler of SIGCHLD, if a loader process dies."""
    # Signals are held back, here and in the loader processes that this starts, until the latter are ready for them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, StopRequest.signals)
    try:
        iterator = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield from iterator
    except (ConnectionError, EOFError) as error:
        # It died while it was sending. The signal that names it is on its way, and its handler raises here.
        time.sleep(5)
        raise RuntimeError("DataLoader worker (pid unknown) has ended while it was sending a batch") from error


def mapped(targets: Any, class_indices: Sequence[int] | None) -> Any:
    """A batch's classes (B,) by the network's indices; as they are where these are None."""
    return targets if class_indices is None else torch.tensor(class_indices)[targets]
