"""Data sets that timm's readers can only read from the beginning, and their batches."""

import importlib.util
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
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
from loading.processes import Loading, Sample, iterate, known_classes, make_loader
from loading.transforms import Transform
from loading.views import finished
from records.files import first_line

# Prefixes of timm's data set names, and the package that each prefix needs.
TIMM_PACKAGES = {
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "wds": "webdataset",
    "torch": "",
}
EVAL_SPLITS = ("validation", "val", "test")  # the first that exists is used


@dataclass(frozen=True)
class TimmSource:
    """One split of a timm data set, and how to open it."""

    name: str  # for timm's `create_dataset`
    root: Path | None  # the data set's folder; None if the name is enough
    train: bool
    split: str | None = None  # timm's name of the split; None takes "train" or the first existing of `EVAL_SPLITS`

    @property
    def prefix(self) -> str:
        return self.name.partition("/")[0].lower()

    def importable(self):
        """Return the context in which the data set can be opened and read."""
        return hugging_face() if self.prefix in ("hfds", "hfids") else nullcontext()

    def open(self, *, download: bool = False, **options: Any) -> Any:
        """Open the data set with `options` for `create_dataset`. Raises ValueError, also if a package is missing."""
        package = TIMM_PACKAGES[self.prefix]
        if package not in ("", "datasets") and importlib.util.find_spec(package) is None:
            raise ValueError(f"--data_set {self.name} needs the package {package}: pip install {package}")
        splits = (self.split,) if self.split else ("train",) if self.train else EVAL_SPLITS
        for split in splits:
            try:
                with self.importable():
                    return create_dataset(
                        self.name,
                        root=None if self.root is None else str(self.root),
                        split=split,
                        is_training=self.train,
                        download=download and self.prefix != "hfids",  # hfids would store what it should stream
                        **options,
                    )
            except Exception as error:  # the libraries raise many kinds, such as for a wrong name or no network
                if split == splits[-1] or not re.search("split|length is unknown", str(error), re.IGNORECASE):
                    raise ValueError(f"cannot open --data_set {self.name}: {first_line(error)}") from error


def timm_classes(source: Any) -> tuple[str, ...] | None:
    """Return the names of a timm data set's classes by index, or None if it has not exactly one for each."""
    if wnids := getattr(source, "wnids", None):  # torchvision's ImageNet: its `class_to_idx` has every synonym
        return tuple(wnids)
    class_to_idx = getattr(getattr(source, "reader", source), "class_to_idx", None) or {}
    names = sorted(class_to_idx, key=class_to_idx.get)
    return tuple(names) if names and [class_to_idx[name] for name in names] == list(range(len(names))) else None


class StreamDataset:
    """A timm data set that can only be read from the beginning: wds/, tfds/ and hfids/.

    It has no index, so there are no file names, and training cannot be resumed in the middle of an epoch. `classes` and
    `transform` are the same as in `datasets.ImageDataset`.
    """

    def __init__(self, source: TimmSource, transform: Transform, *, download: bool = False):
        self.source, self.name, self.transform = source, source.name, transform
        images = source.open(download=download)
        self.classes = timm_classes(images)
        self._length = int(images.reader.num_samples)

    def __len__(self) -> int:
        """Number of images according to the data set's description; 0 if the description does not say."""
        return self._length

    def open(self, loading: Loading) -> IterableDataset:
        """Open timm's stream of one rank's images for `read`. In training, each loader process gets whole batches."""
        if self.source.prefix == "tfds" and self.source.train and loading.world_size > 1 and not loading.num_workers:
            # timm's reader (1.0.31) would give every process the first one's share.
            raise ValueError(f"--data_set {self.name} in several processes needs loader processes: add --num_workers 1")
        # tfds returns images only if it is given a mode. For the others, `to_rgb` converts better than timm.
        mode = "RGB" if self.source.prefix == "tfds" else ""
        images = self.source.open(batch_size=loading.batch_size, seed=loading.seed, input_img_mode=mode)
        images.reader.dist_rank, images.reader.dist_num_replicas = loading.rank, loading.world_size
        images.set_loader_cfg(num_workers=loading.num_workers)
        return images

    def read(self, images: IterableDataset) -> Iterator[tuple[Image.Image, int]]:
        """Yield the RGB images and classes of an open stream."""
        iterator = iter(images)
        while True:
            with self.source.importable():  # inside the loop: it must not be active while the caller works
                try:
                    image, target = next(iterator)
                except StopIteration:
                    return
                image = to_rgb(image)
            yield image, int(target)


@dataclass(eq=False)
class _Stream(IterableDataset):
    """Samples of an open stream.

    A loader process that is not a fork opens the stream again: it cannot unpickle Hugging Face's objects, because
    `datasets` is a file of this project there.
    """

    dataset: StreamDataset
    loading: Loading  # that `images` were opened with
    images: IterableDataset | None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": None}

    def read(self) -> Iterator[tuple[Image.Image, int]]:
        return self.dataset.read(self.dataset.open(self.loading) if self.images is None else self.images)


@dataclass(eq=False)
class _TrainStream(_Stream):
    """One rank's training samples of an epoch; `key`, loader process and position fix a sample's random numbers."""

    key: tuple[int, ...]

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        transform = self.dataset.transform
        for position, (image, target) in enumerate(self.read()):
            with kept_random_states():
                seed_all(*self.key, worker, position)
                view = getattr(transform, "view", transform)(image)
            yield view, target, position, ()


@dataclass(eq=False)
class _EvalStream(_Stream):
    """One rank's share of a validation stream. The last sample is a note with the number of images over all ranks.

    Every rank reads the whole stream and keeps every `world_size`-th image, because the readers' own split over ranks
    repeats some images or leaves some out.
    """

    rank: int
    world_size: int

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        count = 0
        for image, target in self.read():
            if count % self.world_size == self.rank:
                yield self.dataset.transform(image), target, count * workers + number, ()
            count += 1
        yield None, -1, -1, [count]


class StreamTrainLoader:
    """`TrainLoader` for a stream. Its order depends on (seed, epoch), rank, and number of ranks and loader processes.

    timm's readers handle broken images: wds/ logs and skips them without a count, and other streams stop.
    """

    resumable = False

    def __init__(self, dataset: StreamDataset, loading: Loading):
        self.broken: set[int] = set()
        self._dataset, self._loading, self._epoch = dataset, loading, 0
        # Number of batches in the next iteration, which is always a whole epoch; the same on all ranks.
        self.remaining_batches = len(dataset.open(loading)) // loading.batch_size

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the epoch. Raises ValueError if `start_sample` is not 0."""
        if start_sample:
            stream = f"--data_set {self._dataset.name} is a stream and cannot be resumed in the middle of an epoch"
            raise ValueError(f"{stream}: resume from a checkpoint of an epoch's end")
        self._epoch = epoch

    def __len__(self) -> int:
        return self.remaining_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Raises ValueError if the stream ends before the epoch does."""
        # Each epoch gets a new reader, because readers carry their shuffling state from one epoch to the next.
        loading = self._loading
        words = np.random.SeedSequence((loading.seed, self._epoch)).generate_state(2, np.uint32).tolist()
        own = replace(loading, seed=words[0] >> 1)
        samples = _TrainStream(
            self._dataset, own, self._dataset.open(own), key=(loading.seed, self._epoch, loading.rank)
        )
        loader = make_loader(samples, loading, batch_size=loading.batch_size, seed=words[1] + loading.rank)
        count = 0
        batches = ((images, known_classes(targets, loading)) for images, targets, _, _ in iterate(loader))
        for batch in finished(batches, self._dataset.transform, loading.device):
            count += 1
            yield batch
        if count < len(self):
            ended = f"--data_set {self._dataset.name} ended after {count} of {len(self)} batches"
            raise ValueError(f"{ended}: it needs a shard for each loader process of each rank, lower --num_workers")


class StreamEvalLoader:
    """`EvalLoader` for a stream. Indices are unique over all ranks, but have no other meaning.

    Attributes:
        broken: one index per image missing from the stream, the same on all ranks. The indices only count: it is not
            known which images they are, because timm's reader logs and skips them.
    """

    def __init__(self, dataset: StreamDataset, loading: Loading):
        self.broken: set[int] = set()
        self._dataset, self._loading = dataset, loading

    def __len__(self) -> int:
        """Number of batches, if the description is right and all loader processes get equally many images."""
        return -(-len(self._dataset) // (self._loading.batch_size * self._loading.world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raises ValueError at the end if there were too few images, unless `loading.skip_broken` is set."""
        loading = self._loading
        whole = replace(loading, seed=0, rank=0, world_size=1)  # each rank reads all images
        samples = _EvalStream(self._dataset, whole, self._dataset.open(whole), loading.rank, loading.world_size)
        count = 0
        for images, targets, indices, notes in iterate(make_loader(samples, loading, batch_size=loading.batch_size)):
            count += sum(notes)
            if images is not None:
                yield images, known_classes(targets, loading), indices
        promised = len(self._dataset)
        if count < promised and not loading.skip_broken:
            lost = f"{promised - count} of the {promised} validation images of --data_set {self._dataset.name}"
            raise ValueError(f"{lost} are broken or missing; replace them, or add --skip_broken_eval true")
        self.broken = set(range(count, promised))
