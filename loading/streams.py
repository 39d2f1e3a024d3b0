"""Data sets that can only be read from their beginning, by timm's readers, and their batches."""

import importlib.util
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset, get_worker_info

from loading.hugging_face import hugging_face
from loading.images import to_rgb
from loading.order import kept_random_states, seed_all
from loading.processes import Loading, Sample, iterate, make_loader, mapped
from loading.transforms import Transform
from loading.views import Views
from records.files import first_line

# The prefixes of timm's data set names, with the package that each needs.
TIMM_PACKAGES = {
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "wds": "webdataset",
    "torch": "",
}
EVAL_SPLITS = ("validation", "val", "test")  # by the first name that a data set of timm's has


def names_of(data_set: str):
    """The block in which a data set of timm's may be opened and read."""
    return hugging_face() if data_set.lower().startswith(("hfds/", "hfids/")) else nullcontext()


def open_timm(
    data_set: str, root: Path | None, *, train: bool, split: str | None = None, download: bool = False, **options
) -> Any:
    """Open a data set by timm's `create_dataset`. Raises ValueError, also for a package that is missing."""
    prefix = data_set.partition("/")[0].lower()
    package = TIMM_PACKAGES[prefix]
    if package not in ("", "datasets") and importlib.util.find_spec(package) is None:
        raise ValueError(f"--data_set {data_set} needs the package {package}: pip install {package}")
    if root is None and prefix in ("wds", "torch"):
        raise ValueError(f"--data_set {data_set} needs --data_path, the folder that holds it")
    splits = (split,) if split else ("train",) if train else EVAL_SPLITS
    for split in splits:
        try:
            with names_of(data_set):
                return create_dataset(
                    data_set,
                    root=None if root is None else str(root),
                    split=split,
                    is_training=train,
                    download=download and prefix != "hfids",  # which would store what is meant to be streamed
                    **options,
                )
        except Exception as error:  # the libraries behind it raise anything, for a wrong name as for a missing network
            if split == splits[-1] or not re.search("split|length is unknown", str(error), re.IGNORECASE):
                raise ValueError(f"cannot open --data_set {data_set}: {first_line(error)}") from error


def timm_classes(source: Any) -> tuple[str, ...] | None:
    class_to_idx = getattr(getattr(source, "reader", source), "class_to_idx", None)
    return tuple(sorted(class_to_idx, key=class_to_idx.get)) if class_to_idx else None


class StreamDataset:
    """A data set of timm's that can only be read from its beginning: wds/, tfds/ and hfids/.

    It has no index: there are no file names, and training cannot be resumed in the middle of an epoch. For the
    arguments see `build_dataset`.

    Attributes:
        classes: names by class index; None where the data set does not say.
        transform: from an RGB image to (3, H, W).
        train: which of the two splits it is.
    """

    def __init__(
        self,
        data_set: str,
        root: Path | None,
        *,
        train: bool,
        transform: Transform,
        split: str | None = None,
        download: bool = False,
    ):
        self.name = data_set
        self.train = train
        self.transform = transform
        self._root = root
        self._split = split
        source = open_timm(data_set, root, train=train, split=split, download=download)
        self.classes = timm_classes(source)
        self._length = int(source.reader.num_samples)

    def __len__(self) -> int:
        """The number of images that the data set's description promises; 0 where it does not say."""
        return self._length

    def open(self, loading: Loading) -> IterableDataset:
        """A stream of (image, class) of this rank; for training each loader process gives whole batches of it."""
        # Only tfds needs to be told the mode, to give images at all; elsewhere `to_rgb` knows better.
        mode = "RGB" if self.name.lower().startswith("tfds") else ""
        source = open_timm(
            self.name,
            self._root,
            train=self.train,
            split=self._split,
            batch_size=loading.batch_size,
            seed=loading.seed,
            input_img_mode=mode,
        )
        source.reader.dist_rank, source.reader.dist_num_replicas = loading.rank, loading.world_size
        source.set_loader_cfg(num_workers=loading.num_workers)
        return source


def _stream(name: str, source: IterableDataset) -> Iterator[tuple[Image.Image, int]]:
    """The RGB images and classes of a stream of timm's."""
    iterator = iter(source)
    while True:
        with names_of(name):  # not around the loop: it must not hold while the consumer works
            try:
                image, target = next(iterator)
            except StopIteration:
                return
            image = to_rgb(image)
        yield image, int(target)


class _TrainStream(IterableDataset):
    """One rank's and epoch's training samples of a stream; all randomness is a function of `key` and the position."""

    def __init__(self, name: str, source: IterableDataset, *, transform: Transform, key: tuple[int, ...]):
        self.name = name
        self.source = source
        self.transform = transform
        self.key = key

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for position, (image, target) in enumerate(_stream(self.name, self.source)):
            with kept_random_states():
                seed_all(*self.key, worker, position)
                view = getattr(self.transform, "view", self.transform)(image)
            yield view, target, position, ()


class _EvalStream(IterableDataset):
    """One rank's part of a validation stream; its last sample is a note of how many images all ranks' parts had.

    Every rank reads the whole stream and keeps each `world_size`-th image. The readers' own split over ranks repeats
    images or leaves some out.
    """

    def __init__(self, name: str, source: IterableDataset, *, transform: Transform, rank: int, world_size: int):
        self.name = name
        self.source = source
        self.transform = transform
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        count = 0
        for image, target in _stream(self.name, self.source):
            if count % self.world_size == self.rank:
                yield self.transform(image), target, count * workers + number, ()
            count += 1
        yield None, -1, -1, [count]


class StreamTrainLoader:
    """As `TrainLoader`, from a stream. Its order is a function of (seed, epoch), of rank, ranks and loader processes.

    timm reads ahead of us: it logs and leaves out what is broken in wds/, without a count, and other streams stop.
    """

    resumable = False

    def __init__(self, dataset: StreamDataset, loading: Loading):
        self.broken: set[int] = set()
        self._dataset = dataset
        self._loading = loading
        self._epoch = 0
        self._length = len(dataset.open(loading)) // loading.batch_size

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the epoch. Raises ValueError if it is to begin elsewhere than at its start."""
        if start_sample:
            raise ValueError(
                f"--data_set {self._dataset.name} is a stream and cannot be resumed in the middle of an epoch: resume "
                "from a checkpoint of an epoch's end"
            )
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on all ranks."""
        return self._length

    @property
    def remaining_batches(self) -> int:
        """Batches that the next iteration gives."""
        return self._length

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Raises ValueError if the stream ends before the epoch."""
        # A new reader for each epoch, because readers carry the state of their shuffling from one to the next.
        loading = self._loading
        words = np.random.SeedSequence((loading.seed, self._epoch)).generate_state(2, np.uint32).tolist()
        samples = _TrainStream(
            self._dataset.name,
            self._dataset.open(replace(loading, seed=words[0] >> 1)),
            transform=self._dataset.transform,
            key=(loading.seed, self._epoch, loading.rank),
        )
        loader = make_loader(samples, loading, batch_size=loading.batch_size, seed=words[1] + loading.rank)
        count = 0
        for images, targets, _, _ in iterate(loader):
            count += 1
            if isinstance(images, Views):
                images = self._dataset.transform.finish(images, loading.device)
            yield images, targets
        if count < self._length:
            raise ValueError(
                f"--data_set {self._dataset.name} ended after {count} of {self._length} batches: it needs a shard for "
                f"each of {loading.world_size} x {max(1, loading.num_workers)} loader processes, lower --num_workers"
            )


class StreamEvalLoader:
    """As `EvalLoader`, from a stream. Indices are unique over all ranks, but tell nothing else.

    Attributes:
        broken: an index for each image that is missing from the stream, the same on all ranks: which they are is not
            known, since timm leaves them out (and logs them) before we see them.
    """

    def __init__(
        self,
        dataset: StreamDataset,
        loading: Loading,
        *,
        skip_broken: bool = False,
        class_indices: Sequence[int] | None = None,
    ):
        self.broken: set[int] = set()
        self._class_indices = class_indices
        self._dataset = dataset
        self._loading = loading
        self._skip_broken = skip_broken

    def __len__(self) -> int:
        """Batches, if the data set's description is right and each loader process has as many images."""
        return -(-len(self._dataset) // (self._loading.batch_size * self._loading.world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raises ValueError at the end if there were less images than the description says, unless that may be."""
        loading = self._loading
        samples = _EvalStream(
            self._dataset.name,
            self._dataset.open(replace(loading, seed=0, rank=0, world_size=1)),  # each rank reads all
            transform=self._dataset.transform,
            rank=loading.rank,
            world_size=loading.world_size,
        )
        count = 0
        for images, targets, indices, notes in iterate(make_loader(samples, loading, batch_size=loading.batch_size)):
            count += sum(notes)
            if images is not None:
                yield images, mapped(targets, self._class_indices), indices
        promised = len(self._dataset)
        if count < promised and not self._skip_broken:
            raise ValueError(
                f"{promised - count} of the {promised} validation images of --data_set {self._dataset.name} are broken "
                "or missing; replace them, or leave such images out by --skip_broken_eval true"
            )
        self.broken = set(range(count, promised))
