"""Batches of a data set that is read by index, or of a stream.

When reading by index, a training sample's randomness depends only on (seed, epoch, index), and an epoch's order only on
(seed, epoch). An interrupted run therefore resumes bit for bit with any number of loader processes, and an epoch's
first n samples are the same set for any number of ranks.
"""

import logging
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset

from loading.images import BrokenImageError
from loading.order import EpochSampler, kept_random_states, seed_all
from loading.processes import Loading, Sample, iterate, known_classes, make_loader
from loading.streams import StreamDataset, StreamEvalLoader, StreamTrainLoader
from loading.views import finished

logger = logging.getLogger(__name__)

MAX_TRIES = 100  # different training images to try for one place in a batch


class _TrainSamples(Dataset):
    """Training samples by (epoch, index). Another image replaces a broken one, which is reported in a note."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.view = getattr(getattr(dataset, "transform", None), "view", None)
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Sample]:
        # Once per batch, because saving numpy's state takes a quarter as long as the work on a small image.
        with kept_random_states():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> Sample:
        seed_all(self.seed, epoch, index)
        notes = []
        for candidate in islice(self._candidates(index), MAX_TRIES):
            try:
                image, target = self.dataset.load(candidate)
            except BrokenImageError as error:
                notes.append((candidate, str(error)))
                continue
            if self.view is None:
                image, target = self.dataset.apply(image, target)
            else:
                image = self.view(image)
            return image, target, candidate, notes
        return None, -1, index, notes

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        length = len(self.dataset)
        for other in random.sample(range(length), min(length, MAX_TRIES)):
            if other != index:
                yield other


class _EvalSamples(Dataset):
    """Validation samples by index. A broken image gives a note instead of pixels."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> Sample:
        try:
            image, target = self.dataset.load(index)
        except BrokenImageError as error:
            return None, -1, index, [(index, str(error))]
        return *self.dataset.apply(image, target), index, ()


class TrainLoader:
    """Training batches of one rank, all of the same size: images (B, 3, H, W), float32, and classes (B,), int64.

    The images are on `loading.device` if the transform has two halves, as the one from `build_train_transform` has.
    """

    resumable = True  # an epoch can begin at any sample

    def __init__(self, dataset: Dataset, loading: Loading):
        self.broken: set[int] = set()  # indices of the images that this rank found broken; each is logged once
        self._dataset, self._loading = dataset, loading
        self._sampler = EpochSampler(len(dataset), loading)
        self._loader = make_loader(
            _TrainSamples(dataset, loading.seed),
            loading,
            batch_sampler=self._sampler,
            persistent_workers=loading.num_workers > 0,
        )

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose where the next iteration begins; see `EpochSampler.set_epoch`."""
        self._sampler.set_epoch(epoch, start_sample)

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return self._sampler.num_batches

    @property
    def remaining_batches(self) -> int:
        """Number of batches in the next iteration."""
        return self._sampler.remaining_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Raises ValueError if no readable image is found for a place in a batch."""
        return finished(self._batches(), getattr(self._dataset, "transform", None), self._loading.device)

    def _batches(self) -> Iterator[tuple[Any, torch.Tensor]]:
        for images, targets, _, notes in iterate(self._loader):
            _note_broken(notes, self.broken, self._dataset)
            if targets is None or len(targets) < self._loading.batch_size:
                index, reason = notes[-1]
                raise ValueError(
                    f"no readable training image in {min(len(self._dataset), MAX_TRIES)} tries, the last was "
                    f"{self._dataset.describe(index)}: {reason}; replace such files"
                )
            yield images, known_classes(targets, self._loading)


def _note_broken(notes: list[tuple[int, str]], broken: set[int], dataset: Dataset) -> None:
    for index, reason in notes:
        if index not in broken:
            broken.add(index)
            logger.warning("left out a broken image, %s: %s (%d so far)", dataset.describe(index), reason, len(broken))


class EvalLoader:
    """Validation batches of one rank: images (B, 3, H, W), float32, classes (B,) and indices (B,), int64.

    Over all ranks, each image comes exactly once. The last batch and batches with broken images can be smaller.
    """

    def __init__(self, dataset: Dataset, loading: Loading):
        self.broken: set[int] = set()  # indices of the images that this rank left out; each is logged once
        self._dataset, self._loading = dataset, loading
        # The loader processes end after each evaluation, to leave their memory to training.
        self._loader = make_loader(
            _EvalSamples(dataset),
            loading,
            sampler=range(loading.rank, len(dataset), loading.world_size),
            batch_size=loading.batch_size,
        )

    def __len__(self) -> int:
        """Number of batches, including batches that are skipped because all their images are broken."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raises ValueError for a broken image, unless `loading.skip_broken` is set."""
        for images, targets, indices, notes in iterate(self._loader):
            if notes and not self._loading.skip_broken:
                index, reason = notes[0]
                raise ValueError(
                    f"cannot read the validation image {self._dataset.describe(index)}: {reason}; replace it, or leave "
                    "such images out by --skip_broken_eval true"
                )
            _note_broken(notes, self.broken, self._dataset)
            if images is not None:
                yield images, known_classes(targets, self._loading), indices


def build_train_loader(dataset: Dataset | StreamDataset, loading: Loading) -> TrainLoader | StreamTrainLoader:
    """Build one rank's training loader. Except for a stream, its loader processes live as long as the loader."""
    return (StreamTrainLoader if isinstance(dataset, StreamDataset) else TrainLoader)(dataset, loading)


def build_eval_loader(dataset: Dataset | StreamDataset, loading: Loading) -> EvalLoader | StreamEvalLoader:
    """Build one rank's validation loader: images rank, rank + world_size, ...

    Its loader processes live for one iteration.
    """
    return (StreamEvalLoader if isinstance(dataset, StreamDataset) else EvalLoader)(dataset, loading)
