"""Image data sets: opening them by name, matching their classes with a network's, and ImageNet-ReaL's labels."""

import gzip
import json
import logging
import os
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from timm.data import ImageDataset as TimmImageDataset
from timm.data import ImageNetInfo
from torch.utils.data import Dataset

from loading.images import (
    EXTENSIONS,
    LeftOut,
    decode_for_training,
    decode_image,
    find_images,
    folder_identity,
    reading,
    some,
    to_rgb,
)
from loading.streams import TIMM_PACKAGES, StreamDataset, TimmSource, timm_classes
from loading.transforms import Transform
from loading.views import TrainTransform
from records.files import first_line

logger = logging.getLogger("data_sets")  # Hugging Face's package sets the level of the logger "datasets"

# Common names for the folders of the two splits, in lower case.
TRAIN_FOLDERS = ("train", "training", "train_images", "trainset")
VAL_FOLDERS = ("val", "validation", "valid", "test", "testing", "eval", "dev", "val_images", "valset", "testset")

STREAMS = ("hfids", "tfds", "wds")


class ImageDataset(Dataset, ABC):
    """Images with one class each; an item is (transformed image, class)."""

    classes: tuple[str, ...] | None  # class names by index; None if the data set does not record them
    transform: Transform  # from an RGB image to (3, H, W)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> tuple[Image.Image, int]:
        """Return the RGB image and its class, before the transform. Raises BrokenImageError."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Return a name for the image, for messages."""

    def apply(self, image: Image.Image, target: Any) -> tuple[torch.Tensor, Any]:
        """Transform an image and its target. A class is returned unchanged."""
        return self.transform(image), target

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.apply(*self.load(index))


class FolderDataset(ImageDataset):
    """A folder with one subfolder of image files per class; the classes are the subfolders' names in sorted order.

    Hidden files, leftovers of archives and file systems, and files without a known image extension are left out. The
    log counts them, except files that are clearly not images. A file is opened only when its image is loaded.

    Raises:
        ValueError: the folder or a part of it is missing, unreadable or empty.
    """

    def __init__(self, root: str | os.PathLike, transform: Transform):
        self.root = os.fspath(root)
        self.transform = transform
        real = Path(os.path.realpath(root))
        left_out, groups, prefix = LeftOut(), {}, len(os.path.join(root, ""))

        # Find each class folder's images. A link to a parent folder would be a class with the images of all classes.
        try:
            above = {folder_identity(folder) for folder in (real, *real.parents)}
            for name in left_out.visible(os.listdir(root)):
                folder = os.path.join(root, name)
                if not os.path.isdir(folder):
                    continue
                if folder_identity(folder) in above:
                    logger.warning("%s is a link to a folder above it and no class", folder)
                    continue
                groups[name] = [path[prefix:] for path in find_images(folder, left_out, above)]
        except OSError as error:
            raise ValueError(f"cannot read the folder {error.filename}: {error.strerror}") from error
        left_out.report(self.root)

        # Check that there are classes, and that each class has images.
        if not groups:
            raise ValueError(f"{self.root} has no class folders: it must hold one folder of images for each class")
        empty = [name for name, paths in groups.items() if not paths]
        if empty:
            raise ValueError(f"no image ({', '.join(EXTENSIONS)}) in these class folders of {self.root}: {some(empty)}")

        self.classes = tuple(groups)
        self.targets = np.repeat(np.arange(len(groups)), [len(paths) for paths in groups.values()])  # (N,)
        # An array instead of a list: reading a Python object updates its reference count, which would give every loader
        # process its own copy of the list.
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
        decode = decode_for_training if isinstance(self.transform, TrainTransform) else decode_image
        return decode(self.describe(index)), int(self.targets[index])


class ArrayDataset(ImageDataset):
    """Images in memory, uint8, (N, H, W) or (N, H, W, 3), and their classes, (N,). Messages refer to them as `name`."""

    def __init__(
        self, images: np.ndarray, targets: Sequence[int], *, classes: Sequence[str], transform: Transform, name: str
    ):
        self.images, self.targets = images, np.asarray(targets, np.int64)
        self.classes, self.transform, self.name = tuple(classes), transform, name

    def __len__(self) -> int:
        return len(self.targets)

    def describe(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]).convert("RGB"), int(self.targets[index])


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Read an idx file of bytes (MNIST's format), gzipped or plain, as uint8.

    Raises ValueError if the file cannot be read, is incomplete, or is not an idx file of bytes.
    """
    try:
        content = Path(path).read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}") from error
    dims = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or len(content) < 4 + 4 * dims:  # two zeros, 8 for bytes, the number of dimensions
        raise ValueError(f"{path} is not an idx file of bytes")
    shape = np.frombuffer(content, ">u4", count=dims, offset=4).tolist()
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * dims)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path} holds {values.size} values where its header says {shape}: it is damaged")
    return values.reshape(shape)


def _fashion_mnist(root: Path, *, train: bool, transform: Transform, download: bool) -> ArrayDataset:
    """Open Fashion-MNIST from a folder with its idx files, or from torchvision's root."""
    split = "train" if train else "t10k"
    names = f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"
    raw = root / "FashionMNIST" / "raw"

    def find() -> list[Path] | None:
        for folder in (root, raw):
            files = [next(filter(Path.is_file, (folder / name, folder / f"{name}.gz")), None) for name in names]
            if all(files):
                return files
        return None

    if find() is None and download:
        try:
            torchvision.datasets.FashionMNIST(root, train=train, download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"cannot download Fashion-MNIST to {root}: {first_line(error)}") from error
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
        raise ValueError(f"no CIFAR-100 in {root}: {first_line(error)}") from error
    return ArrayDataset(source.data, source.targets, classes=source.classes, transform=transform, name="CIFAR")


class TimmDataset(ImageDataset):
    """A timm data set that can be read by index: hfds/ and torch/."""

    def __init__(self, source: TimmSource, transform: Transform, *, download: bool = False):
        self.source, self.transform = source, transform
        self._images = source.open(download=download)
        self.classes = timm_classes(self._images)

    def __reduce__(self):
        # A loader process that is not a fork opens the data set again. It cannot unpickle Hugging Face's objects,
        # because `datasets` is this file there.
        return TimmDataset, (self.source, self.transform)

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> str:
        return f"{self.source.name}[{index}]"

    def load(self, index: int) -> tuple[Image.Image, int]:
        with self.source.importable(), reading():
            if not isinstance(self._images, TimmImageDataset):
                image, target = self._images[index]
                return to_rgb(image), int(target)
            # Bypass timm's __getitem__, which replaces an image that it cannot read with the next one.
            file, target, *_ = self._images.reader[index]
            with file:
                return decode_image(file), int(target)


def build_dataset(
    data_set: str,
    data_path: str | os.PathLike | None,
    *,
    train: bool,
    transform: Transform,
    eval_data_path: str | os.PathLike | None = None,
    split: str | None = None,
    download: bool = False,
) -> ImageDataset | StreamDataset:
    """Open one split of a data set.

    Args:
        data_set: one of
            IMNET, image_folder: folders of images, `data_path/train/<class>/*` and `data_path/val/<class>/*`;
            CIFAR: CIFAR-100 as torchvision stores it;
            FMNIST: Fashion-MNIST, a folder with its four idx files, or torchvision's root;
            hfds/NAME, hfids/NAME, tfds/NAME, wds/, torch/NAME: timm's data sets, see its `create_dataset`.
        data_path: the folder of the data set. May be None if no folder is read.
        transform: from an RGB image to (3, H, W).
        eval_data_path: the folder of the validation split, instead of data_path. For folders of images, it directly
            holds the class folders, and data_path may then directly hold those of the training split.
        split: the name of the split's folder in data_path, or timm's name for the split. None means "train" or "val";
            for validation on timm's data sets, it means the first of `EVAL_SPLITS` that exists.
        download: let torchvision or timm download what is missing.

    Raises:
        ValueError: the data set is unknown, missing, empty or damaged, or needs a package that is not installed.
    """
    path = data_path if train or eval_data_path is None else eval_data_path
    root = None if path is None else Path(path)
    prefix, slash, _ = data_set.partition("/")

    # Check that the name is known, and that the folder is given if it is needed.
    ours = ("IMNET", "image_folder", "CIFAR", "FMNIST")
    if data_set not in ours and not (slash and prefix.lower() in TIMM_PACKAGES):
        known = ", ".join([*ours, *(f"{name}/..." for name in TIMM_PACKAGES)])
        raise ValueError(f"unknown --data_set {data_set}; known are {known}")
    if root is None and (data_set in ours or prefix.lower() in ("wds", "torch")):
        raise ValueError(f"--data_set {data_set} needs --data_path, the folder that holds it")

    # Open timm's data sets, those held in memory, or folders of images.
    if data_set not in ours:
        kind = StreamDataset if prefix.lower() in STREAMS else TimmDataset
        return kind(TimmSource(data_set, root, train, split), transform, download=download)
    if data_set in ("FMNIST", "CIFAR"):
        if split is not None:
            raise ValueError(f"--{'train' if train else 'val'}_split has no effect on --data_set {data_set}")
        build = _fashion_mnist if data_set == "FMNIST" else _cifar100
        return build(root, train=train, transform=transform, download=download)
    dataset = FolderDataset(_class_folders(root, split, train=train, own_path=eval_data_path is not None), transform)
    if train and len(dataset.classes) == 1:
        single = f"{dataset.root} holds a single class folder, {dataset.classes[0]}"
        logger.warning(f"{single}, and with one class there is nothing to learn: is --data_path a level too high?")
    return dataset


def _class_folders(root: Path, split: str | None, *, train: bool, own_path: bool) -> Path:
    """Find the folder of class folders; `own_path` says that the validation split has its own path."""
    if own_path and not train:
        if split is not None:
            raise ValueError(f"--eval_data_path names the folder of classes itself: leave out --val_split {split}")
        return root
    folder = root / (split or ("train" if train else "val"))
    if not root.is_dir():
        return folder
    # With a path of its own for validation, a folder "train" without folders in it is a class of that name.
    if folder.is_dir() and (split or not own_path or any(entry.is_dir() for entry in folder.iterdir())):
        return folder
    # If validation has its own path, the published script takes --data_path itself as the folder of training classes.
    if own_path and split is None:
        return root
    flag, known = ("--train_split", TRAIN_FOLDERS) if train else ("--val_split", VAL_FOLDERS)
    there = [entry.name for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in known]
    if there:
        raise ValueError(f"{root} has no folder {folder.name}, but {some(there)}: add {flag} {there[0]}")
    return folder


def match_classes(
    dataset: ImageDataset | StreamDataset, names: Sequence[str] | None, *, of: str = "the network"
) -> tuple[int, ...] | None:
    """Find the index of each validation class in `names`, the classes of the network or the training data.

    The order of the classes may differ. The log reports missing classes. `of` says in messages whose `names` they are.

    Returns:
        `class_indices` of `Loading`. None if the classes are the same, or if either side does not record its names.

    Raises:
        ValueError: the data set has a class that is not among `names`, or appears in them twice.
    """
    if names is None or dataset.classes is None or tuple(names) == dataset.classes:
        return None
    unknown = sorted(set(dataset.classes) - set(names))
    if unknown:
        raise ValueError(f"validation classes that are unknown to {of}: {some(unknown)} (known: {some(names)})")
    twice = sorted(name for name, count in Counter(names).items() if count > 1 and name in dataset.classes)
    if twice:
        raise ValueError(f"classes cannot be matched by name: {of} has two of the name {twice[0]}")
    missing = [name for name in names if name not in dataset.classes]
    if missing:
        count = f"{len(missing)} of the {len(names)} classes of {of}"
        logger.warning(f"the validation data lack {count}: {some(missing)}")
    else:
        logger.info("the validation data have the classes of %s in another order: they are matched by name", of)
    indices = {name: index for index, name in enumerate(names)}
    return tuple(indices[name] for name in dataset.classes)


def load_real_labels(path: str | os.PathLike) -> dict[str, list[int]]:
    """Read ImageNet-ReaL's labels (Beyer et al., arXiv 2006.07159): file name -> the classes that count as correct.

    The file is `real.json` as published, a list of label lists, the first for ILSVRC2012_val_00000001.JPEG, or a dict
    of label lists by file name. An image may have no label. "timm" stands for the file in timm's package.

    Raises ValueError if the file cannot be read or is neither.
    """
    file = resources.files("timm.data") / "_info" / "imagenet_real_labels.json" if path == "timm" else Path(path)
    try:
        content = json.loads(file.read_bytes())  # UTF-8, 16 or 32, with or without a byte-order mark
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the ReaL labels {path}: {first_line(error)}") from error
    if isinstance(content, list):
        content = {f"ILSVRC2012_val_{number:08d}.JPEG": labels for number, labels in enumerate(content, 1)}
    if not isinstance(content, dict) or not all(
        isinstance(labels, list) and all(type(label) is int for label in labels) for labels in content.values()
    ):
        raise ValueError(f"{path} holds no ReaL labels: neither a list of label lists nor a dict of them by file name")
    return content


def real_targets(
    real: Mapping[str, Sequence[int]],
    dataset: ImageDataset | StreamDataset,
    num_classes: int,
    classes: Sequence[str] | None = None,
) -> list[list[int]]:
    """Return ReaL's labels by index in the data set, matched by file name; [] for an image without labels.

    Raises:
        ValueError: the data set has no file names, two images share a name, an image has no entry, a label is not
            one of the network's `num_classes`, or its `classes`, if they are known, are 1000 others than ImageNet's.
    """
    imagenet = ImageNetInfo()
    if classes and len(classes) == imagenet.num_classes() and list(classes) != imagenet.label_names():
        raise ValueError(
            "--real_labels are in the order of ImageNet's folders (n01440764, ...), and the classes are others"
        )
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
    foreign = next((label for labels in targets for label in labels if not 0 <= label < num_classes), None)
    if foreign is not None:
        raise ValueError(f"--real_labels names class {foreign}, but there are only {num_classes} classes")
    return targets
