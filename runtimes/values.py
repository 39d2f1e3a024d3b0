"""The values that engines are given and give. Without torch, so that commands read their flags at once."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# `default` is float32 as PyTorch computes it on a GPU when nothing is set: TensorFloat-32 in convolutions, IEEE in
# products of matrices. fp32 is IEEE in both, tf32 TensorFloat-32 in both.
PRECISIONS = ("default", "fp32", "tf32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Metadata:
    """What a program needs to know besides the network; kept inside each exported file, as JSON by field."""

    model: str  # the network's name in timm
    classes: tuple[str, ...]  # the names of the logits, in order
    mean: tuple[float, ...]  # of each channel, of pixels in [0, 1], subtracted before the network,
    std: tuple[float, ...]  # which is then divided by
    input_size: int  # height and width, px
    crop_pct: float | None  # share of the resized shorter side that the crop keeps; None: images are not resized
    checkpoint: str = ""  # SHA-256 of the file that the weights came from; empty for weights without one
    precision: str = "fp32"  # that the file computes in
    interpolation: str = "bicubic"  # of the resizing, by timm's names
    crop_mode: str = "center"
    loss: str = "cross_entropy"  # that it was trained with; after `binary_cross_entropy` chances are sigmoids

    def to_strings(self) -> dict[str, str]:
        """Each field as JSON."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path) -> "Metadata":
        """The inverse of `to_strings`; further entries are passed over.

        Raises:
            ValueError: a field without a default is missing. Those with one are younger than some files.
        """
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in strings]
        if missing:
            raise ValueError(f"{path} was not written by export.py: its metadata lack {', '.join(missing)}")
        values = {field.name: json.loads(strings[field.name]) for field in fields(cls) if field.name in strings}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class Calibration:
    """What int8 is made with."""

    batches: "Sequence[torch.Tensor]"  # preprocessed images, (N, C, H, W) each
    depthwise: bool = False  # quantize the series activations' convolutions, where an engine leaves them in bfloat16

    def images(self) -> "Iterator[torch.Tensor]":
        """Each image as a batch of its own, (1, C, H, W)."""
        return (image[None] for batch in self.batches for image in batch)


@dataclass(frozen=True)
class Target:
    """What a network is to run in."""

    engine: str | None = None  # by name; None is what a file's suffix says, and `compile` for a network
    precision: str | None = None  # one of `PRECISIONS`; None is a file's own, and fp32 for a network
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int | None = None  # on the CPU, for the whole process; None leaves torch's setting as it is
    calibration: Calibration | None = None  # for int8
    profile: bool = False  # make `Runtime.profile` work, at some cost in speed

    @property
    def kind(self) -> str:
        """The device's type. ValueError for what is no device."""
        return device_type(self.device)


def device_type(device: str) -> str:
    """cpu, cuda or mps. ValueError for anything else, such as `gpu`."""
    match = re.fullmatch(r"(cpu|cuda|mps)(:\d+)?", device)
    if match is None:
        raise ValueError(f"--device {device} is not a device: use cpu, cuda or cuda:N")
    return match[1]


@dataclass(frozen=True)
class Layer:
    """One line of an engine's own profile: an operator as the engine names it, its kind, and its time in ms."""

    name: str
    kind: str
    ms: float
