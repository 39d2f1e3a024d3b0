"""Subjects of pictures: networks with readable names of their classes, and images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from timm.data import ImageNetInfo

import datasets
import networks
from loading.images import list_images, read_image
from networks import Network


def true_class(network: Network, folder: str) -> int | None:
    """Index of the one class that a folder is named after, by its name or by ImageNet's, such as n01440764; or None."""
    imagenet = ImageNetInfo()
    name = imagenet.label_name_to_description(folder) if folder in imagenet.label_names() else folder
    labels = network.labels
    matching = [index for index, words in enumerate(labels) if name in (words, words.partition(",")[0])]
    return matching[0] if len(matching) == 1 else None


def short_name(network: Network, index: int) -> str:
    """The first of the class's names."""
    return network.labels[index].partition(",")[0]


def label(network: Network) -> str:
    """The model's name and form, and the file that it was opened from."""
    form = ", deployed" if getattr(network.module, "deploy", False) else ""
    return f"{network.name}{form}\n{Path(network.weights.path).name}" if network.weights else network.name


def open_network(spec: str, *, key: str | None = None) -> Network:
    """Open a network that a user names as CHECKPOINT, MODEL=CHECKPOINT or MODEL; see `networks.open`."""
    network = networks.open(spec, key=key, flag="--network", mend=f"add its checkpoint, --network {spec}=FILE")
    if not network.module.num_classes:
        raise ValueError(f"--network {spec} has no classes, only features: there is no answer to explain")
    return network


@dataclass(frozen=True)
class Photo:
    """An image to draw, and where it comes from."""

    name: str  # the file's name, with as many folders as make it unique
    folder: str  # name of the file's folder, which may be the true class; empty for an image of an idx file
    image: Image.Image  # RGB


def read_images(paths: Sequence[str], limit: int) -> tuple[list[Photo], int, list[str]]:
    """Read the first `limit` images from files, folders with their subfolders, and idx files like Fashion-MNIST's.

    Returns:
        The images, the number of images without the limit, and the errors of files that cannot be read.

    Raises:
        ValueError: a path does not exist, a folder has no image, or no image can be read.
    """
    # An idx file holds many images, without names and folders.
    sources = []
    for path in paths:
        if path.removesuffix(".gz").endswith("idx3-ubyte"):
            sources += [(f"image {index}", "", array) for index, array in enumerate(datasets.read_idx(path))]
        else:
            sources += [(name, Path(name).absolute().parent.name, None) for name in list_images([path])]
    photos, broken = [], []
    for name, folder, array in sources:
        if len(photos) == limit:
            break
        try:
            image = read_image(name) if array is None else Image.fromarray(array).convert("RGB")
            photos.append(Photo(name, folder, image))
        except ValueError as error:
            broken.append(str(error))
    if not photos:
        raise ValueError(broken[0] if broken else f"{', '.join(paths)}: there is no image in it")
    names = _short_names([photo.name for photo in photos])
    return [replace(photo, name=name) for photo, name in zip(photos, names, strict=True)], len(sources), broken


def _short_names(paths: Sequence[str]) -> list[str]:
    """Each file's name, preceded by as many folders as make it unique."""
    parts = [Path(path).parts for path in paths]

    def unlike_others(own: tuple[str, ...]) -> int:
        alone = (count for count in range(1, len(own)) if [other[-count:] for other in parts].count(own[-count:]) == 1)
        return next(alone, len(own))

    return [str(Path(*own[-unlike_others(own) :])) for own in parts]
