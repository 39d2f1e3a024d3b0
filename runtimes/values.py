"""Values that engines take and return. Importing them does not import torch, so commands parse their flags quickly."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# `default` is float32 with PyTorch's default settings on a GPU: TensorFloat-32 in convolutions, IEEE arithmetic in
# matrix products. `fp32` is IEEE arithmetic in both, and `tf32` is TensorFloat-32 in both.
PRECISIONS = ("default", "fp32", "tf32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Metadata:
    """What a program needs to know besides the network. Each exported file holds these fields as JSON."""

    model: str  # the network's name in timm
    classes: tuple[str, ...]  # name of each logit, in order
    mean: tuple[float, ...]  # of each channel, subtracted from pixels in [0, 1]
    std: tuple[float, ...]  # of each channel, by which the result is divided
    input_size: int  # height and width, px
    crop_pct: float | None  # share of the resized shorter side that the crop keeps; None: images are not resized
    checkpoint: str = ""  # SHA-256 of the file that held the weights; empty for weights without a file
    precision: str = "fp32"  # in which the file computes
    interpolation: str = "bicubic"  # of the resizing, by timm's name
    crop_mode: str = "center"
    exif_transpose: bool = False  # images are turned upright by their EXIF orientation first
    loss: str = "cross_entropy"  # of training; after `binary_cross_entropy`, probabilities are sigmoids

    def to_strings(self) -> dict[str, str]:
        """Return each field as JSON."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path) -> "Metadata":
        """Read what `to_strings` returned; other entries are ignored.

        Raises:
            ValueError: a field without a default is missing. Older files may lack the fields with a default.
        """
        missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in strings]
        if missing:
            raise ValueError(f"{path} was not written by export.py: its metadata lack {', '.join(missing)}")
        values = {field.name: json.loads(strings[field.name]) for field in fields(cls) if field.name in strings}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


@dataclass(frozen=True)
class Calibration:
    """Images and options for quantization to int8."""

    batches: "Sequence[torch.Tensor]"  # preprocessed images, (N, C, H, W) each
    # Also quantize the series activations' convolutions, in engines that can leave them out; None: only with AMX.
    depthwise: bool | None = None

    @property
    def leaves_depthwise(self) -> bool:
        """Whether the series activations' convolutions stay unquantized. With AMX, 8 bits pay (docs/int8.md)."""
        from .processor import has_amx

        return not (has_amx() if self.depthwise is None else self.depthwise)

    def images(self) -> "Iterator[torch.Tensor]":
        """Iterate over the images as batches of one, (1, C, H, W)."""
        return (image[None] for batch in self.batches for image in batch)


@dataclass(frozen=True)
class Target:
    """Engine, precision, device and settings to run a network with."""

    engine: str | None = None  # None: by the file's suffix, or `compile` for a network from memory
    precision: str | None = None  # one of `PRECISIONS`; None: the file's, or fp32 for a network from memory
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int | None = None  # on the CPU, for the whole process; None keeps torch's setting
    calibration: Calibration | None = None  # for int8
    profile: bool = False  # enable `Runtime.profile`, at some cost in speed

    @property
    def kind(self) -> str:
        """Type of the device. Raises ValueError if `device` is invalid."""
        return device_type(self.device)


def device_type(device: str) -> str:
    """Return cpu, cuda or mps. Raises ValueError for anything else, such as `gpu`."""
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
