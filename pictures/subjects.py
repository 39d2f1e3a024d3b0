"""What class-activation maps are drawn of: networks, ready to be asked about an image file, and images."""

from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from PIL import Image

import datasets
import networks
from loading.images import list_images, read_image
from networks import Network

__all__ = ["label", "open_network", "pixels", "read_images", "short_name"]


def pixels(network: Network, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) as the network is given them -> (N, H, W, 3) in [0, 1], to be looked at."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (network.preprocessing.mean, network.preprocessing.std))
    return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


def short_name(network: Network, index: int) -> str:
    """A class in words: the first name of it, where it has several."""
    return network.labels[index].partition(",")[0]


def label(network: Network) -> str:
    """The model's name and form, and the file it is from."""
    form = ", deployed" if getattr(network.module, "deploy", False) else ""
    return f"{network.name}{form}\n{Path(network.weights.path).name}" if network.weights else network.name


def open_network(spec: str, *, key: str | None = None) -> Network:
    """A network as a user names it, by `networks.open`: a checkpoint, MODEL=CHECKPOINT, or MODEL."""
    known = spec.startswith(networks.HUBS) or timm.models.is_model(spec.split(".")[0])
    if not ("=" in spec or Path(spec).exists() or known):
        raise ValueError(f"--network {spec} is neither a file nor a model that timm knows")
    return networks.open(spec, key=key, flag="--network", mend=f"add its checkpoint, --network {spec}=FILE")


def read_images(
    paths: Sequence[str], limit: int, *, broken: list[str] | None = None
) -> tuple[list[str], list[Image.Image], int]:
    """The first `limit` images of files, folders (with what is under them), and idx files as those of Fashion-MNIST.

    Args:
        broken: takes a line for each image that cannot be read, and that is left out then.

    Returns:
        Their names, the RGB images, and how many there are without the limit.

    Raises:
        ValueError: nothing there, no image in a folder, no image that can be read, or without `broken` one that cannot.
    """
    sources = []
    for path in paths:
        if path.removesuffix(".gz").endswith("idx3-ubyte"):
            sources += [(f"image {index}", array) for index, array in enumerate(datasets.read_idx(path))]
        else:
            sources += [(Path(name).name, name) for name in list_images([path])]
    found: list[tuple[str, Image.Image]] = []
    for name, item in sources[:limit]:
        try:
            image = read_image(item) if isinstance(item, str) else Image.fromarray(item).convert("RGB")
            found.append((name, image))
        except ValueError as error:
            if broken is None:
                raise
            broken.append(str(error))
    if not found:
        raise ValueError("; ".join(broken or ["there is no image"]))
    names, images = map(list, zip(*found, strict=True))
    return names, images, len(sources)
