"""Data sets, transforms, loaders, mixup and ImageNet-ReaL's labels.

All randomness of a training sample is a function of (seed, epoch, index), and the order of an epoch one of (seed,
epoch). So a run that was interrupted goes on bit by bit, whatever the number of loader processes, and an epoch's first
n samples are the same set for any number of ranks.
"""

import atexit
import errno
import gzip
import importlib.util
import json
import logging
import os
import random
import re
import signal
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from ctypes import c_bool
from functools import cache, partial
from importlib.machinery import PathFinder
from itertools import chain
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    Mixup,
    auto_augment,
    create_dataset,
    create_transform,
)
from timm.data import ImageDataset as TimmImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision import transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode

logger = logging.getLogger(__name__)

Transform = Callable[[Image.Image], torch.Tensor]

# Pillow reads more, but some of that runs other programs (EPS calls Ghostscript), which no file named .jpg may do.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MACHINE_ERRORS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the file that was being read
MAX_TRIES = 100  # distinct training images tried for one place in a batch
NATIVE_SIZE = 32  # px; up to here the images of CIFAR and FMNIST are not resized
MAX_ASPECT = 4  # of an image to be resized for evaluation
# The prefixes of timm's data set names, with the package that each needs.
TIMM_PACKAGES = {
    "hfds": "datasets",
    "hfids": "datasets",
    "tfds": "tensorflow_datasets",
    "wds": "webdataset",
    "torch": "",
}
STREAMS = ("hfids", "tfds", "wds")
EVAL_SPLITS = ("validation", "val", "test")  # by the first name that a data set of timm's has
# Signals that reach a whole group of processes, and that the main process answers.
GROUP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


# -- reading images


class BrokenImageError(ValueError):
    """An image cannot be read. The message is the reason, without the name of the file."""


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def _reading() -> Iterator[None]:
    """Turn whatever an unreadable image raises into BrokenImageError."""
    try:
        yield
    except Exception as error:  # OSError, SyntaxError, ValueError, EOFError, zlib.error, ...: each format has its own
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE_ERRORS:
            raise
        if isinstance(error, UnidentifiedImageError):
            reason = "not an image, or of an unknown format"
        elif isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        else:
            reason = _first_line(error)
        raise BrokenImageError(reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB. 16-bit grey is scaled to 8 bits; an alpha channel is dropped, as torchvision does.

    Raises ValueError for pixels whose range is not known: floating point, and integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: convert the image to 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)  # (H, W); Pillow itself would clip at 255
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("integer pixels beyond 16 bits have no known range: convert the image to 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def decode_image(source: str | os.PathLike | BinaryIO) -> Image.Image:
    """Read a file of one of `FORMATS`, told by its content, as RGB. Raises BrokenImageError."""
    with _reading(), Image.open(source, formats=FORMATS) as image:
        return to_rgb(image)


# -- data sets


class ImageDataset(Dataset, ABC):
    """Images with a class each; an item is (transformed image, class).

    Attributes:
        classes: names by class index; None where the data set does not say.
        transform: from an RGB image to (3, H, W).
    """

    classes: tuple[str, ...] | None
    transform: Transform

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """The RGB image and its class, without the transform. Raises BrokenImageError."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Name the image in a message."""

    def apply(self, image: Image.Image, target: Any) -> tuple[torch.Tensor, Any]:
        """The transform of an image and its target; a class is not changed by it."""
        return self.transform(image), target

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.apply(*self.load(index))


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _raise(error: OSError) -> None:
    raise error


def find_images(folder: str, above: Collection[tuple[int, int]] = ()) -> list[str]:
    """Paths of the images under a (class) folder by their extensions, in the order of torchvision's ImageFolder.

    Links are followed, but each folder is read once, and none of those `above` the class folder: a link upwards would
    go on for ever, and give the class the images of all others. Raises OSError where a folder cannot be read.
    """
    seen = set(above)
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        identity = _identity(parent)
        if identity in seen:
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        found.append((parent, sorted(files)))
    return [
        os.path.join(parent, name)
        for parent, files in sorted(found)
        for name in files
        if name.lower().endswith(IMG_EXTENSIONS)
    ]


def list_images(paths: Sequence[str]) -> list[str]:
    """Image files that are named, and those anywhere under folders that are named, in order.

    Raises:
        ValueError: a path is not there or cannot be read, or a folder has no image.
    """
    found = []
    for path in paths:
        if not os.path.isdir(path):
            if not os.path.exists(path):
                raise ValueError(f"{path} does not exist")
            found.append(os.fspath(path))
            continue
        try:
            inside = find_images(path)
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        if not inside:
            raise ValueError(f"no image is in the folder {path}")
        found += inside
    return found


def read_image(path: str | os.PathLike) -> Image.Image:
    """An RGB image; ValueError, which names the file, where there is none."""
    try:
        return decode_image(path)
    except BrokenImageError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


class FolderDataset(ImageDataset):
    """A folder of class folders of image files; the classes are the folders' names in sorted order.

    Files that are no images by their extension are left out, others are only opened when they are loaded.

    Raises:
        ValueError: the folder or a part of it is missing, unreadable or empty.
    """

    def __init__(self, root: str | os.PathLike, transform: Transform):
        self.root = os.fspath(root)
        self.transform = transform
        try:
            real = Path(os.path.realpath(root))
            above = {_identity(folder) for folder in (real, *real.parents)}
            groups = {}
            prefix = len(os.path.join(root, ""))
            for name in sorted(os.listdir(root)):
                folder = os.path.join(root, name)
                if not os.path.isdir(folder):
                    continue
                if _identity(folder) in above:
                    logger.warning("%s is a link to a folder above it and no class", folder)
                    continue
                groups[name] = [path[prefix:] for path in find_images(folder, above)]
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        if not groups:
            raise ValueError(f"{self.root} has no class folders: it must hold one folder of images for each class")
        empty = [name for name, paths in groups.items() if not paths]
        if empty:
            extensions = ", ".join(IMG_EXTENSIONS)
            raise ValueError(f"no image ({extensions}) in these class folders of {self.root}: {_some(empty)}")
        self.classes = tuple(groups)
        self.targets = np.repeat(np.arange(len(groups)), [len(paths) for paths in groups.values()])  # (N,)
        # An array instead of a list: reading a Python object writes its reference count, and with that every loader
        # process would come to own a copy of the list.
        self._paths = np.array([os.fsencode(path) for paths in groups.values() for path in paths])

    def __len__(self) -> int:
        return len(self.targets)

    def describe(self, index: int) -> str:
        """The path of the image."""
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def filename(self, index: int) -> str:
        """The name of the image's file without its folder."""
        return os.path.basename(self.describe(index))

    def load(self, index: int) -> tuple[Image.Image, int]:
        return decode_image(self.describe(index)), int(self.targets[index])


class ArrayDataset(ImageDataset):
    """Images held in memory.

    Args:
        images: uint8, (N, H, W) or (N, H, W, 3).
        targets: (N,), classes.
        classes: their names.
        name: of the data set, for messages.
    """

    def __init__(
        self, images: np.ndarray, targets: Sequence[int], *, classes: Sequence[str], transform: Transform, name: str
    ):
        self.images = images
        self.targets = np.asarray(targets, np.int64)
        self.classes = tuple(classes)
        self.transform = transform
        self.name = name

    def __len__(self) -> int:
        return len(self.targets)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read an idx file of bytes (the format of MNIST), gzipped or plain, as uint8.

    Raises ValueError where it is none, or incomplete.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {_first_line(error)}") from error
    dims = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * dims:  # two zeros, 8 for bytes, the number of dimensions
        raise ValueError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(content, ">u4", count=dims, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {values.size} values where its header says {shape}: it is damaged")
    return values.reshape(shape)


def _fashion_mnist(root: Path, *, train: bool, transform: Transform, download: bool) -> ArrayDataset:
    """Fashion-MNIST from a folder with its idx files, or from torchvision's root."""
    split = "train" if train else "t10k"
    names = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
    raw = root / "FashionMNIST" / "raw"

    def find() -> list[Path] | None:
        for folder in (root, raw):
            candidates = [[folder / name, folder / f"{name}.gz"] for name in names]
            files = [next(filter(os.path.isfile, pair), None) for pair in candidates]
            if all(files):
                return files
        return None

    if find() is None and download:
        try:
            torchvision.datasets.FashionMNIST(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"cannot download Fashion-MNIST to {root}: {_first_line(error)}") from error
    files = find()
    if files is None:
        raise ValueError(f"{names[0]} and {names[1]}, plain or as .gz, are neither in {root} nor in {raw}")
    images, targets = map(read_idx, files)
    if images.ndim != 3 or targets.shape != images.shape[:1] or not len(images):
        raise ValueError(f"{files[0]} and {files[1]} do not fit together: {images.shape} and {targets.shape}")
    classes = torchvision.datasets.FashionMNIST.classes
    if targets.max() >= len(classes):
        raise ValueError(f"{files[1]} holds class {targets.max()}, Fashion-MNIST has 0 to {len(classes) - 1}")
    return ArrayDataset(images, targets, classes=classes, transform=transform, name="FMNIST")


def _cifar100(root: Path, *, train: bool, transform: Transform, download: bool) -> ArrayDataset:
    try:
        source = torchvision.datasets.CIFAR100(root, train=train, download=download)
    except (RuntimeError, OSError) as error:
        raise ValueError(f"no CIFAR-100 in {root}: {_first_line(error)}") from error
    return ArrayDataset(source.data, source.targets, classes=source.classes, transform=transform, name="CIFAR")


_hugging_face_package: dict[str, ModuleType] = {}  # the package, once it was imported


@contextmanager
def _hugging_face() -> Iterator[None]:
    """Let `import datasets` mean Hugging Face's package inside the block: it and this file have one name.

    timm's readers import it by that name, and so does the package itself when it comes to need one of its parts.
    Raises ValueError where it is not installed.
    """
    name = "datasets"
    here = Path(__file__).resolve().parent
    ours = sys.modules.pop(name, None)
    try:
        if not _hugging_face_package:
            spec = PathFinder.find_spec(name, [path for path in sys.path if Path(path).resolve() != here])
            if spec is None or spec.submodule_search_locations is None:
                raise ValueError("hfds/ and hfids/ data sets need Hugging Face's package: pip install datasets")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            _hugging_face_package[name] = module
        sys.modules.update(_hugging_face_package)
        yield
    finally:
        sys.modules.pop(name, None)
        if ours is not None:
            sys.modules[name] = ours


def _names_of(data_set: str):
    """The block in which a data set of timm's may be opened and read."""
    return _hugging_face() if data_set.lower().startswith(("hfds/", "hfids/")) else nullcontext()


def _open_timm(data_set: str, root: Path | None, *, train: bool, download: bool = False, **options) -> Any:
    """Open a data set by timm's `create_dataset`. Raises ValueError, also for a package that is missing."""
    prefix = data_set.partition("/")[0].lower()
    package = TIMM_PACKAGES[prefix]
    if package not in ("", "datasets") and importlib.util.find_spec(package) is None:
        raise ValueError(f"--data_set {data_set} needs the package {package}: pip install {package}")
    if root is None and prefix in ("wds", "torch"):
        raise ValueError(f"--data_set {data_set} needs --data_path, the folder that holds it")
    splits = ("train",) if train else EVAL_SPLITS
    for split in splits:
        try:
            with _names_of(data_set):
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
                raise ValueError(f"cannot open --data_set {data_set}: {_first_line(error)}") from error


def _timm_classes(source: Any) -> tuple[str, ...] | None:
    class_to_idx = getattr(getattr(source, "reader", source), "class_to_idx", None)
    return tuple(sorted(class_to_idx, key=class_to_idx.get)) if class_to_idx else None


class TimmDataset(ImageDataset):
    """A data set of timm's that can be read by index: hfds/ and torch/. For the arguments see `build_dataset`."""

    def __init__(self, data_set: str, root: Path | None, *, train: bool, transform: Transform, download: bool = False):
        self.name = data_set
        self.transform = transform
        self._source = _open_timm(data_set, root, train=train, download=download)
        self._arguments = data_set, root, train, transform
        self.classes = _timm_classes(self._source)

    def __reduce__(self):
        # Opened anew by a loader process that is not a fork: Hugging Face's objects cannot be unpickled there, because
        # `datasets` is this file.
        data_set, root, train, transform = self._arguments
        return partial(TimmDataset, train=train, transform=transform), (data_set, root)

    def __len__(self) -> int:
        return len(self._source)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        with _names_of(self.name), _reading():
            if not isinstance(self._source, TimmImageDataset):
                image, target = self._source[index]
                return to_rgb(image), int(target)
            # Past timm's own __getitem__, which puts the next image in the place of one that it cannot read.
            file, target, *_ = self._source.reader[index]
            with file:
                return decode_image(file), int(target)


class StreamDataset:
    """A data set of timm's that can only be read from its beginning: wds/, tfds/ and hfids/.

    It has no index: there are no file names, and training cannot be resumed in the middle of an epoch. For the
    arguments see `build_dataset`.

    Attributes:
        classes: names by class index; None where the data set does not say.
        transform: from an RGB image to (3, H, W).
        train: which of the two splits it is.
    """

    def __init__(self, data_set: str, root: Path | None, *, train: bool, transform: Transform, download: bool = False):
        self.name = data_set
        self.train = train
        self.transform = transform
        self._root = root
        source = _open_timm(data_set, root, train=train, download=download)
        self.classes = _timm_classes(source)
        self._length = int(source.reader.num_samples)

    def __len__(self) -> int:
        """The number of images that the data set's description promises; 0 where it does not say."""
        return self._length

    def open(self, *, batch_size: int, seed: int, rank: int, world_size: int, num_workers: int) -> IterableDataset:
        """A stream of (image, class) of this rank; for training each loader process gives whole batches of it."""
        # Only tfds needs to be told the mode, to give images at all; elsewhere `to_rgb` knows better.
        mode = "RGB" if self.name.lower().startswith("tfds") else ""
        source = _open_timm(
            self.name, self._root, train=self.train, batch_size=batch_size, seed=seed, input_img_mode=mode
        )
        source.reader.dist_rank, source.reader.dist_num_replicas = rank, world_size
        source.set_loader_cfg(num_workers=num_workers)
        return source


def build_dataset(
    data_set: str,
    data_path: str | os.PathLike | None,
    *,
    train: bool,
    transform: Transform,
    eval_data_path: str | os.PathLike | None = None,
    download: bool = False,
) -> ImageDataset | StreamDataset:
    """Open one split of a data set.

    Args:
        data_set: one of
            IMNET, image_folder: folders of images, `data_path/train/<class>/*` and `data_path/val/<class>/*`;
            CIFAR: CIFAR-100 as torchvision stores it;
            FMNIST: Fashion-MNIST, a folder with its four idx files, or torchvision's root;
            hfds/NAME, hfids/NAME, tfds/NAME, wds/, torch/NAME: as timm's `create_dataset` knows them.
        data_path: its folder. May be None where it is not read.
        train: the training split, or else the validation split.
        transform: from an RGB image to (3, H, W).
        eval_data_path: for the validation split, instead of data_path. For folders of images it is the folder of class
            folders itself, and data_path may then be the one of the training split.
        download: let torchvision or timm download what is missing.

    Raises:
        ValueError: unknown, missing, empty or damaged, or a package is not installed.
    """
    path = data_path if train or eval_data_path is None else eval_data_path
    root = None if path is None else Path(path)
    if data_set in ("IMNET", "image_folder"):
        if root is None:
            raise ValueError(f"--data_set {data_set} needs --data_path, a folder with train/ and val/ in it")
        return FolderDataset(_class_folders(root, train=train, is_split=eval_data_path is not None), transform)
    if data_set in ("FMNIST", "CIFAR"):
        if root is None:
            raise ValueError(f"--data_set {data_set} needs --data_path, the folder that holds it")
        build = _fashion_mnist if data_set == "FMNIST" else _cifar100
        return build(root, train=train, transform=transform, download=download)
    prefix, slash, _ = data_set.partition("/")
    if not slash or prefix.lower() not in TIMM_PACKAGES:
        known = ", ".join(["IMNET", "image_folder", "CIFAR", "FMNIST", *(f"{name}/..." for name in TIMM_PACKAGES)])
        raise ValueError(f"unknown --data_set {data_set}; known are {known}")
    kind = StreamDataset if prefix.lower() in STREAMS else TimmDataset
    return kind(data_set, root, train=train, transform=transform, download=download)


def _class_folders(root: Path, *, train: bool, is_split: bool) -> Path:
    """The folder of class folders; `is_split` says that the validation split has a path of its own."""
    if is_split and not train:
        return root
    folder = root / ("train" if train else "val")
    # The published script takes the folder of training classes itself where validation has its own path.
    if is_split and os.path.isdir(root) and not os.path.isdir(folder):
        return root
    return folder


def check_same_classes(train: ImageDataset | StreamDataset, val: ImageDataset | StreamDataset) -> None:
    """Raise ValueError if the splits' classes differ. Where one does not say its classes, there is nothing to check."""
    if train.classes is None or val.classes is None or train.classes == val.classes:
        return
    only_train = sorted(set(train.classes) - set(val.classes))
    only_val = sorted(set(val.classes) - set(train.classes))
    parts = [f"only in {split}: {_some(names)}" for split, names in (("train", only_train), ("val", only_val)) if names]
    raise ValueError(f"training and validation have different classes; {'; '.join(parts) or 'their order differs'}")


def _some(names: Sequence[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


# -- transforms


def mean_and_std(imagenet: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """What images are normalized with, (mean, std) of each channel in [0, 1]: ImageNet's, or else 0.5 for all."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def keeps_native_size(data_set: str, input_size: int) -> bool:
    """Whether images are so small that they are padded and cropped instead of resized: `small` of the transforms."""
    return data_set in ("CIFAR", "FMNIST") and input_size <= NATIVE_SIZE


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's, for 0 bits too: its policies come to that at their largest magnitude, and newer Pillow refuses it."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


def _mend_posterize(policy: Any) -> None:
    """Put `_posterize` into a policy of timm's, in place."""
    for op in getattr(policy, "ops", None) or chain.from_iterable(policy.policy):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize


def build_train_transform(
    input_size: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    small: bool = False,
    color_jitter: float = 0.4,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    hflip: float = 0.5,
) -> Transform:
    """From an RGB image to a random view of it, float32, (3, input_size, input_size), by timm's `create_transform`.

    Args:
        input_size: px.
        mean, std: of each channel, in [0, 1].
        small: crop from the image padded by 4 px, instead of resizing a random part of it.
        color_jitter: strength; timm leaves it out where `aa` is on, unless that is a "3a" policy.
        aa: timm's auto-augment policy; None, "" and "none" are off.
        interpolation: "random" (bilinear or bicubic), or one of Pillow's by name.
        reprob, remode, recount: random erasing: probability, what fills the area, the largest number of areas.
        hflip: probability of a horizontal flip.

    Raises:
        ValueError: timm does not know the policy, the interpolation or the mode.
    """
    policy = None if aa in (None, "", "none") else aa
    try:
        unknown = [part for part in (policy or "").split("-")[1:] if not re.search(r"\d|^t", part)]
        if unknown:  # timm passes over them
            raise ValueError(f"unknown section {unknown[0]}")
        transform = create_transform(
            input_size,
            is_training=True,
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=policy,
            interpolation=interpolation,
            mean=mean,
            std=std,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"timm cannot augment by --aa {aa} --train_interpolation {interpolation} --remode {remode}: "
            f"{_first_line(error)}"
        ) from error
    for step in transform.transforms:
        if isinstance(step, auto_augment.RandAugment | auto_augment.AutoAugment | auto_augment.AugMixAugment):
            _mend_posterize(step)
    if small:
        transform.transforms[0] = transforms.RandomCrop(input_size, padding=4)
    return transform


class _LimitAspect:
    """Crop the middle of an image that is more than `MAX_ASPECT` times as long as wide.

    The centre crop that follows sees less than that, and to resize the shorter side of 20,000 x 1 px to 256 px would
    take 4 GB.
    """

    def __call__(self, image: Image.Image) -> Image.Image:
        limit = MAX_ASPECT * min(image.size)
        if max(image.size) <= limit:
            return image
        width, height = (min(side, limit) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def default_crop_pct(input_size: int) -> float:
    """The part of the resized shorter side that is kept: 0.875 below 384 px and 1 from there on."""
    return 0.875 if input_size < 384 else 1.0


def build_eval_transform(
    input_size: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    small: bool = False,
    crop_pct: float | None = None,
) -> Transform:
    """From an RGB image to its middle, float32, (3, input_size, input_size). The aspect ratio is kept.

    The shorter side is resized (bicubic) to int(input_size / crop_pct), then the centre is cropped.

    Args:
        input_size: px.
        mean, std: of each channel, in [0, 1].
        small: do not resize; an image smaller than input_size gets a black border.
        crop_pct: in (0, 1]; None is `default_crop_pct`.

    Raises:
        ValueError: crop_pct is out of range, or given with `small`, where it has no effect.
    """
    resize = []
    if small:
        if crop_pct is not None:
            raise ValueError(f"--crop_pct has no effect on images that are not resized (up to {NATIVE_SIZE} px)")
    else:
        if crop_pct is None:
            crop_pct = default_crop_pct(input_size)
        if not 0 < crop_pct <= 1:
            raise ValueError(f"--crop_pct must be above 0 and at most 1, not {crop_pct}")
        resize = [_LimitAspect(), transforms.Resize(int(input_size / crop_pct), InterpolationMode.BICUBIC)]
    return transforms.Compose(
        [*resize, transforms.CenterCrop(input_size), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )


# -- order and randomness


@contextmanager
def kept_random_states() -> Iterator[None]:
    """Put the states of `random`, numpy and torch's CPU generator back after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def seed_all(*key: int) -> None:
    """Seed `random`, numpy and torch's CPU generator from non-negative integers of any size."""
    words = np.random.SeedSequence(key).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(words[1:2].view(np.uint32))
    torch.default_generator.manual_seed(int(words[2]))  # torch.manual_seed would seed the GPUs as well


class EpochSampler:
    """The batches of one rank: each an epoch's part of a permutation of all samples, as pairs (epoch, index).

    The order is a function of (seed, epoch) and the same on all ranks. A global batch is the next `batch_size *
    world_size` samples of it, and rank r takes its r-th part, so that the samples up to any position are one set for
    any number of ranks. The last global batch is filled up from the start of the same order, several times if need be.

    Args:
        length: samples in the data set.
        batch_size: of one rank.
        rank, world_size: 0 <= rank < world_size.
        seed: not negative.
        shuffle: False keeps the data set's order in every epoch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(self, length: int, *, batch_size: int, rank: int, world_size: int, seed: int, shuffle: bool = True):
        if length < 1 or batch_size < 1:
            raise ValueError(f"there must be samples and a batch size of 1 or more, not {length} and {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among {world_size} processes")
        if seed < 0:
            raise ValueError(f"--seed must not be negative, it is {seed}")
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose the epoch, and how many samples of its order, over all ranks, to leave out at its beginning."""
        if epoch < 0 or start_sample < 0:
            raise ValueError(f"epoch and start_sample must not be negative, they are {epoch} and {start_sample}")
        self.epoch = epoch
        self.start_sample = start_sample

    @property
    def num_batches(self) -> int:
        """Batches of a whole epoch."""
        return self._batches(self.length)

    @property
    def remaining_batches(self) -> int:
        """Batches from `start_sample` to the end of the epoch."""
        return self._batches(max(0, self.length - self.start_sample))

    def _batches(self, samples: int) -> int:
        return -(-samples // (self.batch_size * self.world_size))

    def _order(self) -> np.ndarray:
        """(length,), the indices in this epoch's order."""
        if not self.shuffle:
            return np.arange(self.length)
        # RandomState because its stream, unlike that of numpy's and torch's generators, is promised never to change.
        bits = np.random.MT19937(np.random.SeedSequence((self.seed, self.epoch)))
        return np.random.RandomState(bits).permutation(self.length)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = self.epoch, self._order()
        first = self.start_sample + self.rank * self.batch_size
        for batch in range(self.remaining_batches):
            start = first + batch * self.batch_size * self.world_size
            indices = order[np.arange(start, start + self.batch_size) % self.length]
            yield [(epoch, index) for index in indices.tolist()]


# -- loaders

# What a loader process sends for each image: (image or None, class, index, notes), the notes for the main process.
_Sample = tuple[torch.Tensor | None, Any, int, Sequence]
# Batches (image, target, index): by default (B, 3, H, W), (B,), (B,).
Collate = Callable[[list[tuple]], Sequence]


def _collate(samples: list[_Sample], batch: Collate) -> tuple[Any, Any, Any, list]:
    """Batch the samples that have an image, and the notes of all."""
    notes = [note for sample in samples for note in sample[3]]
    kept = [sample[:3] for sample in samples if sample[0] is not None]
    images, targets, indices = batch(kept) if kept else (None, None, None)
    return images, targets, indices, notes


class _TrainSamples(Dataset):
    """Training samples by (epoch, index). A broken image's place is taken by another one, and a note tells of it."""

    def __init__(self, dataset: ImageDataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[_Sample]:
        # By the batch, because keeping numpy's state takes as long as a quarter of the work on a small image.
        with kept_random_states():
            return [self._sample(*key) for key in keys]

    def _sample(self, epoch: int, index: int) -> _Sample:
        seed_all(self.seed, epoch, index)
        notes = []
        for candidate in self._candidates(index):
            try:
                image, target = self.dataset.load(candidate)
            except BrokenImageError as error:
                notes.append((candidate, str(error)))
                continue
            return *self.dataset.apply(image, target), candidate, notes
        return None, -1, index, notes

    def _candidates(self, index: int) -> Iterator[int]:
        yield index
        length = len(self.dataset)
        for other in random.sample(range(length), min(length, MAX_TRIES)):
            if other != index:
                yield other


class _EvalSamples(Dataset):
    """Validation samples by index. A broken image has a note instead of pixels."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, index: int) -> _Sample:
        try:
            image, target = self.dataset.load(index)
        except BrokenImageError as error:
            return None, -1, index, [(index, str(error))]
        return *self.dataset.apply(image, target), index, ()


def _stream(name: str, source: IterableDataset) -> Iterator[tuple[Image.Image, int]]:
    """The RGB images and classes of a stream of timm's."""
    iterator = iter(source)
    while True:
        with _names_of(name):  # not around the loop: it must not hold while the consumer works
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

    def __iter__(self) -> Iterator[_Sample]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        for position, (image, target) in enumerate(_stream(self.name, self.source)):
            with kept_random_states():
                seed_all(*self.key, worker, position)
                view = self.transform(image)
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

    def __iter__(self) -> Iterator[_Sample]:
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        count = 0
        for image, target in _stream(self.name, self.source):
            if count % self.world_size == self.rank:
                yield self.transform(image), target, count * workers + number, ()
            count += 1
        yield None, -1, -1, [count]


@cache
def _exiting() -> Any:
    """A flag, shared with the loader processes, that is set when this process begins to exit."""
    flag = RawValue(c_bool, False)
    atexit.register(setattr, flag, "value", True)
    return flag


@contextmanager
def _held_signals() -> Iterator[None]:
    """Hold signals back, here and in processes that are started in the block, until the latter are ready for them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where no signal goes to a group
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(exiting: Any, worker_id: int) -> None:
    """Leave signals to the main process, which needs its loader processes to end the step that is running.

    A terminal, `timeout` and SLURM send them to the whole group. But when the main process exits, Python ends the
    loader processes that are left by SIGTERM and waits for them.
    """

    def terminate(number: int, frame: Any) -> None:
        if exiting.value:
            os._exit(0)

    for number in GROUP_SIGNALS:
        signal.signal(number, terminate if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def _make_loader(
    dataset: Dataset,
    *,
    num_workers: int,
    pin_memory: bool,
    seed: int = 0,
    collate: Collate = default_collate,
    **options,
) -> DataLoader:
    """A DataLoader that draws from a generator of its own: iterating must not move the global one."""
    return DataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=partial(_collate, batch=collate),
        worker_init_fn=partial(_start_worker, _exiting()),
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def _iterate(loader: DataLoader) -> Iterator[tuple]:
    """The batches of the loader. Raises RuntimeError, by torch's handler of SIGCHLD, if a loader process dies."""
    with _held_signals():
        iterator = iter(loader)  # starts the loader processes
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            # It died while it was sending. The signal that names it is on its way, and its handler raises here.
            time.sleep(5)
            raise RuntimeError("DataLoader worker (pid unknown) has ended while it was sending a batch") from error
        yield batch


class TrainLoader:
    """Batches of one rank: images (B, 3, H, W), float32, and classes (B,), int64; all of the same size.

    Attributes:
        broken: indices of the images that this rank found broken so far. Each is logged once.
        resumable: whether an epoch can begin elsewhere than at its start.
    """

    resumable = True

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        sampler: EpochSampler,
        seed: int,
        num_workers: int,
        pin_memory: bool,
        collate: Collate = default_collate,
    ):
        self.broken: set[int] = set()
        self._dataset = dataset
        self._sampler = sampler
        self._loader = _make_loader(
            _TrainSamples(dataset, seed),
            batch_sampler=sampler,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate=collate,
            persistent_workers=num_workers > 0,
        )

    def set_epoch(self, epoch: int, start_sample: int = 0) -> None:
        """Choose what the next iteration gives; see `EpochSampler.set_epoch`."""
        self._sampler.set_epoch(epoch, start_sample)

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._sampler.num_batches

    @property
    def remaining_batches(self) -> int:
        """Batches that the next iteration gives."""
        return self._sampler.remaining_batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Raises ValueError if no readable image is found for a place in a batch."""
        for images, targets, _, notes in _iterate(self._loader):
            _note_broken(notes, self.broken, self._dataset)
            if images is None or len(images) < self._sampler.batch_size:
                index, reason = notes[-1]
                raise ValueError(
                    f"no readable training image in {min(len(self._dataset), MAX_TRIES)} tries, the last was "
                    f"{self._dataset.describe(index)}: {reason}; replace such files"
                )
            yield images, targets


def _note_broken(notes: list[tuple[int, str]], broken: set[int], dataset: ImageDataset) -> None:
    for index, reason in notes:
        if index not in broken:
            broken.add(index)
            logger.warning("left out a broken image, %s: %s (%d so far)", dataset.describe(index), reason, len(broken))


class _StreamLoader:
    """What the loaders of a stream share; for the arguments see `build_train_loader`."""

    def __init__(
        self,
        dataset: StreamDataset,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
    ):
        self.broken: set[int] = set()
        self._dataset = dataset
        self._batch_size = batch_size
        self._rank = rank
        self._world_size = world_size
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def _batches(self, samples: IterableDataset, *, seed: int = 0) -> Iterator[tuple]:
        loader = _make_loader(
            samples,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
            seed=seed,
        )
        return _iterate(loader)


class StreamTrainLoader(_StreamLoader):
    """As `TrainLoader`, from a stream. Its order is a function of (seed, epoch), of rank, ranks and loader processes.

    timm reads ahead of us: it logs and leaves out what is broken in wds/, without a count, and other streams stop.
    """

    resumable = False

    def __init__(self, dataset: StreamDataset, *, seed: int, **shared: Any):
        super().__init__(dataset, **shared)
        self._seed = seed
        self._epoch = 0
        self._length = len(self._open(seed)) // self._batch_size

    def _open(self, seed: int) -> IterableDataset:
        return self._dataset.open(
            batch_size=self._batch_size,
            seed=seed,
            rank=self._rank,
            world_size=self._world_size,
            num_workers=self._num_workers,
        )

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
        words = np.random.SeedSequence((self._seed, self._epoch)).generate_state(2, np.uint32).tolist()
        samples = _TrainStream(
            self._dataset.name,
            self._open(words[0] >> 1),
            transform=self._dataset.transform,
            key=(self._seed, self._epoch, self._rank),
        )
        count = 0
        for images, targets, _, _ in self._batches(samples, seed=words[1] + self._rank):
            count += 1
            yield images, targets
        if count < self._length:
            raise ValueError(
                f"--data_set {self._dataset.name} ended after {count} of {self._length} batches: it needs a shard for "
                f"each of {self._world_size} x {max(1, self._num_workers)} loader processes, lower --num_workers"
            )


def build_train_loader(
    dataset: ImageDataset | StreamDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    num_workers: int,
    pin_memory: bool,
    collate: Collate = default_collate,
) -> TrainLoader | StreamTrainLoader:
    """The training batches of one rank.

    Args:
        batch_size: of one rank.
        num_workers: loader processes; they live as long as the loader. 0 loads in this process.
        pin_memory: put batches in page-locked memory, for a GPU.
        collate: batches (image, target, index), not those of a stream.

    Raises:
        ValueError: an argument is out of range.
    """
    if isinstance(dataset, StreamDataset):
        return StreamTrainLoader(
            dataset,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
    sampler = EpochSampler(len(dataset), batch_size=batch_size, rank=rank, world_size=world_size, seed=seed)
    return TrainLoader(
        dataset, sampler=sampler, seed=seed, num_workers=num_workers, pin_memory=pin_memory, collate=collate
    )


class EvalLoader:
    """Validation batches of one rank: images (B, 3, H, W), float32, classes (B,) and indices (B,), int64.

    Over all ranks each image comes exactly once; the last batch may be smaller, and so is one with broken images.

    Attributes:
        broken: indices of the images that this rank found broken and left out. Each is logged once.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        skip_broken: bool,
        collate: Collate = default_collate,
    ):
        self.broken: set[int] = set()
        self._dataset = dataset
        self._skip_broken = skip_broken
        # The loader processes end with each evaluation, to leave their memory to training.
        self._loader = _make_loader(
            _EvalSamples(dataset),
            sampler=range(rank, len(dataset), world_size),
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate=collate,
        )

    def __len__(self) -> int:
        """Batches, with those that come to nothing because all of their images are broken."""
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raises ValueError for a broken image, unless it may be left out."""
        for images, targets, indices, notes in _iterate(self._loader):
            if notes and not self._skip_broken:
                index, reason = notes[0]
                raise ValueError(
                    f"cannot read the validation image {self._dataset.describe(index)}: {reason}; replace it, or leave "
                    "such images out by --skip_broken_eval true"
                )
            _note_broken(notes, self.broken, self._dataset)
            if images is not None:
                yield images, targets, indices


class StreamEvalLoader(_StreamLoader):
    """As `EvalLoader`, from a stream. Indices are unique over all ranks, but tell nothing else.

    Attributes:
        broken: an index for each image that is missing from the stream, the same on all ranks: which they are is not
            known, since timm leaves them out (and logs them) before we see them.
    """

    def __init__(self, dataset: StreamDataset, *, skip_broken: bool, **shared: Any):
        super().__init__(dataset, **shared)
        self._skip_broken = skip_broken

    def __len__(self) -> int:
        """Batches, if the data set's description is right and each loader process has as many images."""
        return -(-len(self._dataset) // (self._batch_size * self._world_size))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Raises ValueError at the end if there were less images than the description says, unless that may be."""
        source = self._dataset.open(
            batch_size=self._batch_size, seed=0, rank=0, world_size=1, num_workers=self._num_workers
        )
        samples = _EvalStream(
            self._dataset.name,
            source,
            transform=self._dataset.transform,
            rank=self._rank,
            world_size=self._world_size,
        )
        count = 0
        for images, targets, indices, notes in self._batches(samples):
            count += sum(notes)
            if images is not None:
                yield images, targets, indices
        promised = len(self._dataset)
        if count < promised and not self._skip_broken:
            raise ValueError(
                f"{promised - count} of the {promised} validation images of --data_set {self._dataset.name} are broken "
                "or missing; replace them, or leave such images out by --skip_broken_eval true"
            )
        self.broken = set(range(count, promised))


def build_eval_loader(
    dataset: ImageDataset | StreamDataset,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
    skip_broken: bool = False,
    collate: Collate = default_collate,
) -> EvalLoader | StreamEvalLoader:
    """The validation batches of one rank: images rank, rank + world_size, ...

    Args:
        batch_size: of one rank.
        num_workers: loader processes, for the time of an iteration. 0 loads in this process.
        pin_memory: put batches in page-locked memory, for a GPU.
        skip_broken: leave broken images out and count them, instead of raising ValueError.
        collate: batches (image, target, index), not those of a stream.
    """
    if isinstance(dataset, StreamDataset):
        kind = StreamEvalLoader
    else:
        kind = partial(EvalLoader, collate=collate)
    return kind(
        dataset,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        skip_broken=skip_broken,
    )


# -- mixup and ReaL


def build_mixup(
    batch_size: int,
    num_classes: int,
    *,
    mixup: float = 0.8,
    cutmix: float = 1.0,
    cutmix_minmax: tuple[float, float] | None = None,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
    mixup_mode: str = "batch",
    smoothing: float = 0.1,
) -> Mixup | None:
    """timm's mixup and cutmix of a batch: (B, 3, H, W) and classes (B,) -> mixed images and soft targets (B, classes).

    Args:
        batch_size: of one rank; every batch must have it.
        mixup, cutmix: alpha of either one's beta distribution; 0 is off.
        cutmix_minmax: least and largest side of the cut, as a share of the image's; turns cutmix on.
        mixup_prob: of mixing at all.
        mixup_switch_prob: of cutmix instead of mixup where both are on.
        mixup_mode: draw for each "batch", "pair" or "elem".
        smoothing: of the labels.

    Returns:
        None if both are off.

    Raises:
        ValueError: the batch size is odd, or the bounds are out of order.
    """
    if mixup <= 0 and cutmix <= 0 and cutmix_minmax is None:
        return None
    if batch_size % 2:
        raise ValueError(
            f"mixup and cutmix mix pairs and need an even --batch_size, not {batch_size}; or set --mixup 0 --cutmix 0"
        )
    if cutmix_minmax is not None and not 0 <= cutmix_minmax[0] < cutmix_minmax[1] <= 1:
        raise ValueError(f"--cutmix_minmax must be two ascending shares of 1, not {cutmix_minmax}")
    if mixup_mode not in ("batch", "pair", "elem"):
        raise ValueError(f"--mixup_mode must be batch, pair or elem, not {mixup_mode}")
    return Mixup(
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_minmax=cutmix_minmax,
        prob=mixup_prob,
        switch_prob=mixup_switch_prob,
        mode=mixup_mode,
        label_smoothing=smoothing,
        num_classes=num_classes,
    )


def load_real_labels(path: str | os.PathLike) -> dict[str, list[int]]:
    """Read ImageNet-ReaL's labels (Beyer et al., arXiv 2006.07159): file name -> the classes that count as right.

    The file is `real.json` as published, a list of lists in the order of ILSVRC2012_val_00000001.JPEG and on, or a dict
    by file name. An image may have no label at all.

    Raises ValueError where it is neither.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the ReaL labels {path}: {_first_line(error)}") from error
    if isinstance(content, list):
        content = {f"ILSVRC2012_val_{number:08d}.JPEG": labels for number, labels in enumerate(content, 1)}
    if not isinstance(content, dict) or not all(
        isinstance(labels, list) and all(type(label) is int for label in labels) for labels in content.values()
    ):
        raise ValueError(f"{path} holds no ReaL labels: neither a list of label lists nor a dict of them by file name")
    return content


def real_targets(real: Mapping[str, Sequence[int]], dataset: ImageDataset | StreamDataset) -> list[list[int]]:
    """ReaL's labels by the index of the data set, matched by file name; [] for an image that has none.

    Raises:
        ValueError: the data set has no file names or two alike, one has no entry, or a label is no class of it.
    """
    if not isinstance(dataset, FolderDataset):
        raise ValueError("--real_labels needs image files, it goes with --data_set IMNET or image_folder")
    names = [dataset.filename(index) for index in range(len(dataset))]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--real_labels are matched by file name, but {count} validation images are called {name}")
    missing = next((name for name in names if name not in real), None)
    if missing is not None:
        raise ValueError(f"--real_labels has no entry for the validation image {missing}")
    targets = [list(real[name]) for name in names]
    foreign = next((label for labels in targets for label in labels if not 0 <= label < len(dataset.classes)), None)
    if foreign is not None:
        raise ValueError(f"--real_labels names class {foreign}, but there are only {len(dataset.classes)} classes")
    return targets
