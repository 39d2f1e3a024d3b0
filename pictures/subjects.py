"""What class-activation maps are drawn of: networks, ready to be asked about an image file, and images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

import datasets
import deployment
import networks
from loading import transforms
from loading.images import list_images, read_image
from runtimes import Metadata

__all__ = ["Network", "open_network", "read_images"]


@dataclass(frozen=True)
class Network:
    """A network with what its inputs and answers mean.

    Attributes:
        label: the model's name and form, and the file it is from.
        model: in eval mode.
        metadata: its classes and the preprocessing of its images.
        bce: trained by binary cross-entropy, so that each class has a probability by itself.
    """

    label: str
    model: nn.Module
    metadata: Metadata
    bce: bool

    @property
    def transform(self) -> transforms.Transform:
        """From an RGB image to (3, H, W), normalized."""
        return deployment.transform(self.metadata)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) as the network is given them -> (N, H, W, 3) in [0, 1], to be looked at."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.metadata.mean, self.metadata.std))
        return (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each class, (N, classes): the sigmoid of the logits after binary cross-entropy, or else their softmax."""
        return logits.sigmoid() if self.bce else logits.softmax(1)

    def name(self, index: int) -> str:
        """A class in words: the first name of it, where it has several."""
        return self.metadata.classes[index].partition(",")[0]


def _make_network(label: str, name: str, model: nn.Module, checkpoint: Mapping[str, Any]) -> Network:
    bce = bool(networks.recorded_args(checkpoint).get("bce_loss", False))
    return Network(label, model, deployment.describe(name, model, checkpoint), bce)


def open_network(spec: str, *, key: str | None = None) -> Network:
    """A network as a user names it.

    Args:
        spec: a checkpoint that records its model; MODEL=CHECKPOINT; or MODEL, which takes timm's pretrained weights.
        key: of the weights in checkpoints; None takes `model_ema`, or else `model`, or else the whole file.

    Raises:
        ValueError: no such file or model, or they do not fit together.
    """
    name, equals, path = spec.partition("=")
    if Path(spec).is_file() or not equals:
        name, path = None, spec
    if name is None and not Path(spec).exists():
        if not timm.models.is_model(spec.split(".")[0]):
            raise ValueError(f"--network {spec} is neither a file nor a model that timm knows")
        model = networks.create_pretrained(spec, "--network", mend=f"add its checkpoint, --network {spec}=FILE")
        return _make_network(spec, spec, model, {})
    selection = {} if key is None else {"key": key, "whole_file": False}
    name, model, checkpoint = networks.create_trained(path, name=name, flag="--network MODEL=FILE", **selection)
    form = ", deployed" if getattr(model, "deploy", False) else ""
    return _make_network(f"{name}{form}\n{Path(path).name}", name, model, checkpoint)


def read_images(paths: Sequence[str], limit: int) -> tuple[list[str], list[Image.Image], int]:
    """The first `limit` images of files, folders (with what is under them), and idx files as those of Fashion-MNIST.

    Returns:
        Their names, the RGB images, and how many there are without the limit.

    Raises:
        ValueError: nothing there, no image in a folder, or no image.
    """
    sources = []
    for path in paths:
        if path.removesuffix(".gz").endswith("idx3-ubyte"):
            sources += [(f"image {index}", array) for index, array in enumerate(datasets.read_idx(path))]
        else:
            sources += [(Path(name).name, name) for name in list_images([path])]
    names, chosen = zip(*sources[:limit], strict=True)
    images = [read_image(item) if isinstance(item, str) else Image.fromarray(item).convert("RGB") for item in chosen]
    return list(names), images, len(sources)
