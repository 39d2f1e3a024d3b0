"""The preprocessing that a network needs, and real images to calibrate and compare on."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

import datasets
from loading.images import list_images, read_image
from loading.streams import StreamDataset
from loading.transforms import Preprocessing, Transform, build_eval_transform
from runtimes import Metadata

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion-mnist"


# The fields of `Preprocessing` that an exported file records, under the same names.
RECORDED = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "exif_transpose")


def transform(metadata: Metadata) -> Transform:
    """Build the transform from an RGB image to the input of the metadata's network, (3, input_size, input_size)."""
    fields = {name: getattr(metadata, name) for name in RECORDED}
    return build_eval_transform(Preprocessing(**fields, native=metadata.crop_pct is None))


def spread(length: int, count: int) -> Sequence[int]:
    """Indices of `count` items spread evenly over `length` items, or of all items if there are fewer."""
    return [i * length // count for i in range(count)] if length > count else range(length)


def real_images(prepare: Transform, count: int, *, path: str | Path | None, data_set: str) -> torch.Tensor:
    """Load preprocessed images to calibrate or compare on, spread evenly over the data, (n, 3, H, W) with n <= `count`.

    Args:
        path: the path of the data set; None takes the embedded test images of Fashion-MNIST.
        data_set: as for `datasets.build_dataset`, whose training split is used. For IMNET and image_folder, `path` may
            be any folder with images somewhere in it.

    Raises:
        ValueError: the folder cannot be read or has no images, or an image is broken.
    """
    if path is not None and data_set in ("IMNET", "image_folder"):
        paths = list_images([os.fspath(path)])
        return torch.stack([prepare(read_image(paths[place])) for place in spread(len(paths), count)])
    kind, root = (data_set, path) if path is not None else ("FMNIST", EMBEDDED)
    dataset = datasets.build_dataset(kind, root, train=path is not None, transform=prepare)
    if isinstance(dataset, StreamDataset):
        raise ValueError(f"--data_set {kind} is a stream, which cannot be read by index: name a folder of images")
    return torch.stack([dataset[place][0] for place in spread(len(dataset), count)])
