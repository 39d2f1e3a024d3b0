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
    """What a program needs to know besides the network; kept inside each exported file, as JSON by field.

    Attributes:
        model: the network's name in timm.
        classes: the names of the logits, in order.
        mean, std: of each channel, of pixels in [0, 1]; subtracted and divided by before the network.
        input_size: height and width, px.
        crop_pct: the part of the resized shorter side that the centre crop keeps; None where images are not resized.
        interpolation, crop_mode: of that resizing, by timm's names.
        loss: that it was trained with: `cross_entropy`, or `binary_cross_entropy`, after which the chance of a class is
            the sigmoid of its logit.
        checkpoint: SHA-256 of the file that the weights came from; empty for weights without one.
        precision: that the file computes in.
    """

    model: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    crop_pct: float | None
    checkpoint: str = ""
    precision: str = "fp32"
    interpolation: str = "bicubic"
    crop_mode: str = "center"
    loss: str = "cross_entropy"

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
    """What int8 is made with.

    Attributes:
        batches: preprocessed images, (N, C, H, W) each.
        depthwise: quantize the depthwise convolutions of the series activations, too, in an engine that leaves them in
            bfloat16 by default.
    """

    batches: "Sequence[torch.Tensor]"
    depthwise: bool = False

    def images(self) -> "Iterator[torch.Tensor]":
        """Each image as a batch of its own, (1, C, H, W)."""
        return (image[None] for batch in self.batches for image in batch)


@dataclass(frozen=True)
class Target:
    """What a network is to run in.

    Attributes:
        engine: by name; None is what a file's suffix says, and `compile` for a network.
        precision: one of `PRECISIONS`; None is a file's own, and fp32 for a network.
        device: cpu, cuda or cuda:N.
        threads: of the arithmetic on the CPU, for the whole process; None leaves torch's setting as it is.
        calibration: for int8.
        profile: make `Runtime.profile` work, at some cost in speed.
    """

    engine: str | None = None
    precision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    calibration: Calibration | None = None
    profile: bool = False

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
