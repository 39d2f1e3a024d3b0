"""What pictures are drawn of: networks with their names and answers in words, and images."""

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
    """The class that a folder is named for, by its own name or one like ImageNet's n01440764; None for no class."""
    imagenet = ImageNetInfo()
    name = imagenet.label_name_to_description(folder) if folder in imagenet.label_names() else folder
    labels = network.labels
    matching = [index for index, words in enumerate(labels) if name in (words, words.partition(",")[0])]
    return matching[0] if len(matching) == 1 else None


def short_name(network: Network, index: int) -> str:
    """A class in words: the first name of it, where it has several."""
    return network.labels[index].partition(",")[0]


def label(network: Network) -> str:
    """The model's name and form, and the file it is from."""
    form = ", deployed" if getattr(network.module, "deploy", False) else ""
    return f"{network.name}{form}\n{Path(network.weights.path).name}" if network.weights else network.name


def open_network(spec: str, *, key: str | None = None) -> Network:
    """A network as a user names it, by `networks.open`: a checkpoint, MODEL=CHECKPOINT, or MODEL."""
    return networks.open(spec, key=key, flag="--network", mend=f"add its checkpoint, --network {spec}=FILE")


@dataclass(frozen=True)
class Photo:
    """An image to look at."""

    name: str  # of its file, with as many folders as tell it from others
    folder: str  # that it lies in, which may be its true class; empty for an image of an idx file
    image: Image.Image  # RGB


def read_images(paths: Sequence[str], limit: int) -> tuple[list[Photo], int, list[str]]:
    """The first `limit` images of files, folders (with what is under them), and idx files as those of Fashion-MNIST.

    Returns:
        The images, how many files there are without the limit, and what is wrong with those that cannot be read.

    Raises:
        ValueError: nothing there, no image in a folder, or none that can be read.
    """
    # An idx file holds many images, which have no names and no folders.
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
        raise ValueError(broken[0])
    names = _short_names([photo.name for photo in photos])
    return [replace(photo, name=name) for photo, name in zip(photos, names, strict=True)], len(sources), broken


def _short_names(paths: Sequence[str]) -> list[str]:
    """Each file's name, with as many folders in front of it as tell it from the others."""
    parts = [Path(path).parts for path in paths]

    def unlike_others(own: tuple[str, ...]) -> int:
        alone = (count for count in range(1, len(own)) if [other[-count:] for other in parts].count(own[-count:]) == 1)
        return next(alone, len(own))

    return [str(Path(*own[-unlike_others(own) :])) for own in parts]
