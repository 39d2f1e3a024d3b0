"""A network as it is deployed: fused, with its class names and the preprocessing of its images."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.data import ImageNetInfo, resolve_model_data_config
from timm.utils import reparameterize_model
from torch import nn

import datasets
import models  # noqa: F401  registers the variants
import networks
from loading import transforms
from loading.images import list_images, read_image
from runtimes import Metadata

__all__ = ["class_names", "describe", "load", "real_images", "sample_folder", "spread", "transform"]

EMBEDDED = Path(__file__).parent / "data" / "fashion-mnist"


def class_names(checkpoint: Mapping[str, Any], num_classes: int) -> tuple[str, ...]:
    """The names of a network's classes: as its checkpoint records them, or as those of the data set it was trained on.

    Names of ImageNet's folders (n01440764) are spelled out. Where nothing is known of them, classes are numbered.
    """
    names = checkpoint.get("classes")
    data_set = networks.recorded_args(checkpoint).get("data_set")
    if names is None and data_set == "FMNIST":
        names = torchvision.datasets.FashionMNIST.classes
    imagenet = ImageNetInfo()
    if names is None and num_classes == imagenet.num_classes():
        names = imagenet.label_names()
    if names is None or len(names) != num_classes:
        return tuple(f"class {index}" for index in range(num_classes))
    known = set(imagenet.label_names())
    return tuple(imagenet.label_name_to_description(name) if name in known else str(name) for name in names)


def describe(
    name: str,
    network: nn.Module,
    checkpoint: Mapping[str, Any],
    *,
    digest: str = "",
    input_size: int | None = None,
    crop_pct: float | None = None,
) -> Metadata:
    """What belongs to a network: its classes, and how images become its input, as the run did it, else as timm has it.

    Args:
        name: of the model in timm.
        checkpoint: that it is from; empty if it is from none.
        digest: the file's SHA-256.
        input_size: px; None is what the checkpoint, or else timm, says.
        crop_pct: likewise.
    """
    recorded, config = networks.recorded_args(checkpoint), resolve_model_data_config(network)
    mean, std = networks.mean_and_std(network, checkpoint)
    size = input_size or recorded.get("input_size") or config["input_size"][-1]
    if transforms.keeps_native_size(recorded.get("data_set", ""), size):
        if crop_pct is not None:
            raise ValueError(f"--crop_pct has no effect on images that are not resized (up to {size} px)")
    else:
        recorded_crop = recorded["crop_pct"] if "crop_pct" in recorded else config["crop_pct"]
        crop_pct = crop_pct or recorded_crop or transforms.default_crop_pct(size)
    return Metadata(
        model=name,
        classes=class_names(checkpoint, network.num_classes),
        mean=mean,
        std=std,
        input_size=size,
        crop_pct=crop_pct,
        checkpoint=digest,
    )


def load(
    source: str | Path,
    *,
    name: str | None = None,
    key: str = "model_ema|model|module",
    input_size: int | None = None,
    crop_pct: float | None = None,
    random_weights: bool = False,
) -> tuple[nn.Module, Metadata]:
    """A network on the CPU in deploy form and eval mode, and what belongs to it.

    Args:
        source: a checkpoint, or the name of a model in timm, which is loaded with its pretrained weights.
        name: of the model, for a checkpoint that does not record it.
        key: of the weights in the checkpoint; | separates alternatives.
        input_size: px; None is what the checkpoint, or else timm, says.
        crop_pct: likewise.
        random_weights: do without the pretrained weights of a name.

    Raises:
        ValueError: there is no such file or model, it does not fit, or lambda is below 1, so it cannot be fused.
    """
    checkpoint: dict[str, Any] = {}
    digest = ""
    if os.path.isfile(source) or os.sep in str(source) or str(source).endswith((".pth", ".pt", ".tar", ".safetensors")):
        if random_weights:
            raise ValueError(f"--random_weights is for a model's name, and {source} is a file of weights")
        name, network, checkpoint = networks.create_trained(source, name=name, key=key)
        with open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        if name is not None:
            raise ValueError(f"--model {name} is for a checkpoint that does not name its model; {source} is a name")
        name = str(source)
        networks.check_name(name, "MODEL", family="vanillanet*")
        if random_weights:
            network = timm.create_model(name).eval()
        else:
            mend = "give a checkpoint, or add --random_weights true to measure speed alone"
            network = networks.create_pretrained(name, "MODEL", mend=mend)
    network = reparameterize_model(network)
    metadata = describe(name, network, checkpoint, digest=digest, input_size=input_size, crop_pct=crop_pct)
    networks.check_input_size(network, metadata.input_size, str(source))
    return network, metadata


# -- images


def transform(metadata: Metadata) -> transforms.Transform:
    """From an RGB image to the network's input, (3, input_size, input_size)."""
    return transforms.build_eval_transform(
        transforms.Preprocessing(
            metadata.input_size,
            mean=metadata.mean,
            std=metadata.std,
            crop_pct=metadata.crop_pct,
            native=metadata.crop_pct is None,
        )
    )


def spread(length: int, count: int) -> Sequence[int]:
    """`count` places evenly spread over `length`, or all of them."""
    return [i * length // count for i in range(count)] if length > count else range(length)


def sample_folder(folder: str | Path, metadata: Metadata, count: int) -> torch.Tensor:
    """Images from anywhere under a folder, evenly spread in their order, (n, 3, H, W) with n up to `count`.

    Raises:
        ValueError: the folder cannot be read or has no image, or one is broken.
    """
    paths, prepare = list_images([os.fspath(folder)]), transform(metadata)
    images = [prepare(read_image(paths[place])) for place in spread(len(paths), count)]
    return torch.stack(images)


def real_images(metadata: Metadata, count: int, *, path: str | Path | None, data_set: str) -> torch.Tensor:
    """Preprocessed images to calibrate or compare on, (n, 3, H, W) with n up to `count`.

    Args:
        path: of the data set; None takes the embedded test images of Fashion-MNIST.
        data_set: as `datasets.build_dataset` knows them, of which the training split is taken; `image_folder` is any
            folder with images somewhere in it.
    """
    if path is not None and data_set in ("IMNET", "image_folder"):
        return sample_folder(path, metadata, count)
    kind, root = (data_set, path) if path is not None else ("FMNIST", EMBEDDED)
    dataset = datasets.build_dataset(kind, root, train=path is not None, transform=transform(metadata))
    return torch.stack([dataset[place][0] for place in spread(len(dataset), count)])
