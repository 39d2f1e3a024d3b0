"""Real images to calibrate, compare or predict on, prepared as a network wants them."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch

import datasets
from loading.images import list_images, read_image
from loading.transforms import Preprocessing, Transform, build_eval_transform
from runtimes import Metadata

EMBEDDED = Path(__file__).parents[1] / "data" / "fashion-mnist"


# What an exported file records of `Preprocessing`, by the same names.
RECORDED = ("input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode")


def transform(metadata: Metadata) -> Transform:
    """From an RGB image to the input of the network that the metadata belong to, (3, input_size, input_size)."""
    fields = {name: getattr(metadata, name) for name in RECORDED}
    return build_eval_transform(Preprocessing(**fields, native=metadata.crop_pct is None))


def spread(length: int, count: int) -> Sequence[int]:
    """`count` places evenly spread over `length`, or all of them."""
    return [i * length // count for i in range(count)] if length > count else range(length)


def real_images(prepare: Transform, count: int, *, path: str | Path | None, data_set: str) -> torch.Tensor:
    """Preprocessed images to calibrate or compare on, evenly spread, (n, 3, H, W) with n up to `count`.

    Args:
        path: of the data set; None takes the embedded test images of Fashion-MNIST.
        data_set: as `datasets.build_dataset` knows them, of which the training split is taken; `image_folder` is any
            folder with images somewhere in it.

    Raises:
        ValueError: the folder cannot be read or has no image, or one is broken.
    """
    if path is not None and data_set in ("IMNET", "image_folder"):
        paths = list_images([os.fspath(path)])
        return torch.stack([prepare(read_image(paths[place])) for place in spread(len(paths), count)])
    kind, root = (data_set, path) if path is not None else ("FMNIST", EMBEDDED)
    dataset = datasets.build_dataset(kind, root, train=path is not None, transform=prepare)
    return torch.stack([dataset[place][0] for place in spread(len(dataset), count)])
