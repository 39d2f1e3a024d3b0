"""What all engines share: the interface, the metadata that travels in a file, the treatment of batches."""

import copy
import importlib
import io
import json
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

Run = Callable[[torch.Tensor], torch.Tensor]


def require(module: str, package: str, needed_by: str) -> ModuleType:
    """Import an optional module. Raises ValueError, one line that says what to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{needed_by} needs the package {package}: pip install {package}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress and warnings of exporters and quantizers off the output, which belongs to the commands."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# -- metadata


@dataclass(frozen=True)
class Metadata:
    """What a program needs to know besides the network; kept inside each exported file, as JSON by field.

    Attributes:
        model: the network's name in timm.
        classes: the names of the logits, in order.
        mean, std: of each channel, of pixels in [0, 1]; subtracted and divided by before the network.
        input_size: height and width, px.
        crop_pct: the part of the resized shorter side that the centre crop keeps; None where images are not resized.
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

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def to_strings(self) -> dict[str, str]:
        """Each field as JSON."""
        return {name: json.dumps(value) for name, value in asdict(self).items()}

    @classmethod
    def from_strings(cls, strings: Mapping[str, str], path: str | Path) -> "Metadata":
        """The inverse of `to_strings`; further entries are passed over. Raises ValueError where one is missing."""
        missing = [name for name in cls.names() if name not in strings]
        if missing:
            raise ValueError(f"{path} was not written by export.py: its metadata lack {', '.join(missing)}")
        values = {name: json.loads(strings[name]) for name in cls.names()}
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


# -- running


@dataclass(frozen=True)
class Layer:
    """One line of an engine's own profile: an operator as the engine names it, its kind, and its time in ms."""

    name: str
    kind: str
    ms: float


class Runtime:
    """A network that is ready to run: images (N, C, H, W), float32, in, logits (N, classes), float32, out.

    Attributes:
        name: of the engine.
        precision: that it computes in.
        metadata: of the file that it was read from, None for a network from memory.
        device: where the logits come out; images may lie on any device.
        size: height and width of the images that it was made for, as its file says; None takes any.
    """

    def __init__(
        self,
        name: str,
        precision: str,
        run: Run,
        *,
        metadata: Metadata | None = None,
        device: str = "cpu",
        profile: Callable[[torch.Tensor], list[Layer]] | None = None,
    ):
        self.name, self.precision, self.metadata, self.device = name, precision, metadata, torch.device(device)
        self.size = (metadata.input_size,) * 2 if metadata else None
        self._run, self._profile = run, profile

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self._run(self._prepare(images))

    def _prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Raises ValueError for another size, at which some engines would compute something else and not say so."""
        if self.size not in (None, tuple(images.shape[-2:])):
            found, own = ("x".join(map(str, size)) for size in (images.shape[-2:], self.size))
            raise ValueError(f"the images have {found} px, this {self.name} network takes {own}: export one for them")
        return images.to(self.device, torch.float32)

    def profile(self, images: torch.Tensor) -> list[Layer]:
        """The time of each layer in one call, by the engine's own clock. ValueError where it has none."""
        if self._profile is None:
            raise ValueError(f"{self.name} was not built to be profiled")
        with torch.inference_mode():
            return self._profile(self._prepare(images))

    def __repr__(self) -> str:
        return f"Runtime({self.name}, {self.precision})"


def input_sizes(network: nn.Module, names: Sequence[str], images: torch.Tensor) -> dict[str, tuple[int, int]]:
    """Height and width of what the submodules of these names are given, for images (N, C, H, W)."""
    sizes: dict[str, tuple[int, int]] = {}
    hooks = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: sizes.__setitem__(name, tuple(inputs[0].shape[-2:]))
        )
        for name in names
    ]
    try:
        with torch.no_grad():
            network(images[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return sizes


class FixedBatch:
    """Batches of any size through a function that was compiled for one size.

    A larger batch is split, and the last part filled up with zeros. Compiled for a free size instead, oneDNN would not
    know how to lay out the weights beforehand, and would do that anew in each call: twice the time at batch 1.

    Args:
        run: (size, C, H, W) -> (size, classes).
        size: the batch that it takes.
    """

    def __init__(self, run: Run, size: int):
        self.run, self.size = run, size

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) == self.size:
            return self.run(images)
        logits = []
        for part in images.split(self.size):
            padding = part.new_zeros(self.size - len(part), *part.shape[1:])
            logits.append(self.run(torch.cat([part, padding]) if len(padding) else part)[: len(part)].clone())
        return torch.cat(logits)


# -- engines


def device_type(device: str) -> str:
    """cpu or cuda. Raises ValueError for what is no device of torch."""
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device {device} is none; say cpu, cuda or cuda:1") from error


@dataclass(frozen=True)
class Calibration:
    """What int8 is made with.

    Attributes:
        batches: preprocessed images, (N, C, H, W) each.
        depthwise: quantize the depthwise convolutions of the series activations, too, in an engine that leaves them in
            bfloat16 by default.
    """

    batches: Sequence[torch.Tensor]
    depthwise: bool = False

    def images(self) -> Iterator[torch.Tensor]:
        """Each image as a batch of its own, (1, C, H, W)."""
        return (image[None] for batch in self.batches for image in batch)


class Engine(ABC):
    """A way to run a network. One instance a module; it imports its library only when it is used.

    Attributes:
        name: in commands and tables.
        precisions: that it can compute in, on `devices`. `int8` needs calibration images.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[str, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)

    def check_place(self, precision: str, device: str) -> None:
        """Raise ValueError for a precision or device that this engine has not."""
        if precision not in self.precisions:
            raise ValueError(f"{self.name} computes in {', '.join(self.precisions)}, not in {precision}")
        kind = device_type(device)
        if kind not in self.devices:
            raise ValueError(f"{self.name} runs on {', '.join(self.devices)}, not on {kind}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"{self.name} on {device}: no CUDA device is available here")
        if precision == "tf32" and kind != "cuda":
            raise ValueError("tf32 is a format of NVIDIA's GPUs; on the CPU use fp32 or bf16")

    def check(self, precision: str, device: str, calibration: Calibration | None) -> None:
        """Raise ValueError for what this engine cannot do."""
        self.check_place(precision, device)
        if precision == "int8" and not (calibration and calibration.batches):
            raise ValueError(f"int8 in {self.name} needs images to calibrate on")

    @abstractmethod
    def build(
        self,
        network: nn.Module,
        images: torch.Tensor,
        *,
        precision: str = "fp32",
        calibration: Calibration | None = None,
        device: str = "cpu",
        profile: bool = False,
    ) -> Runtime:
        """Make a network from memory ready to run. The network itself is left as it is.

        Args:
            network: in eval mode on the CPU, in the form that is to be deployed.
            images: a batch of the size that the engine is to be fast at, (N, C, H, W).
            calibration: for int8.
            profile: make `Runtime.profile` work, at some cost in speed.

        Raises:
            ValueError: the precision, device or package is not there.
        """


class FileEngine(Engine):
    """An engine that reads its networks from files of its own format."""

    suffix: ClassVar[str]

    @abstractmethod
    def export(
        self,
        network: nn.Module,
        images: torch.Tensor,
        path: Path,
        *,
        precision: str = "fp32",
        calibration: Calibration | None = None,
        metadata: Metadata,
        device: str = "cpu",
        profile: bool = False,
    ) -> list[Path]:
        """Write `network` to `path`, for batches of any size and images of the size of `images`.

        Arguments as for `build`; `metadata` go into the file, with `precision` put in.

        Returns:
            The files written, `path` first.
        """

    @abstractmethod
    def open(self, path: Path, *, precision: str | None = None, device: str = "cpu", profile: bool = False) -> Runtime:
        """Read a file that `export` wrote; `precision` None is that of the file."""

    def build(self, network, images, *, precision="fp32", calibration=None, device="cpu", profile=False) -> Runtime:
        self.check(precision, device, calibration)
        metadata = Metadata("", (), (), (), images.shape[-1], None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{self.suffix}"
            self.export(
                network,
                images,
                path,
                precision=precision,
                calibration=calibration,
                metadata=metadata,
                device=device,
                profile=profile,
            )
            runtime = self.open(path, device=device, profile=profile)
        runtime.metadata, runtime.size = None, tuple(images.shape[-2:])
        return runtime


def in_precision(metadata: Metadata, precision: str) -> Metadata:
    return replace(metadata, precision=precision)


def check_precision(metadata: Metadata, precision: str | None, path: Path) -> str:
    """The precision of a file, which the one that was asked for must be."""
    if precision not in (None, metadata.precision):
        raise ValueError(f"{path} computes in {metadata.precision}, not in {precision}: export it anew")
    return metadata.precision


# -- forms of a network


class Form(nn.Module):
    """A network in another precision and memory format: float32 in, float32 out.

    Args:
        network: (N, C, H, W) -> (N, classes); copied.
        dtype: of weights and activations.
        layout: memory format of weights and activations.
        device: where it goes.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        dtype: torch.dtype = torch.float32,
        layout: torch.memory_format = torch.contiguous_format,
        device: str = "cpu",
    ):
        super().__init__()
        self.dtype, self.layout = dtype, layout
        self.network = copy.deepcopy(network).to(device=device, dtype=dtype, memory_format=layout).eval()
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.to(self.dtype, memory_format=self.layout)).float()


DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def set_tf32(precision: str, device: str) -> None:
    """Let float32 products on a GPU use TensorFloat-32, or not. It holds for the process, as torch has it."""
    if torch.device(device).type == "cuda":
        value = "tf32" if precision == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = value
        torch.backends.cudnn.conv.fp32_precision = value


def exported(network: nn.Module, images: torch.Tensor, *, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """`network` as a graph, for the size of `images`, and with `dynamic_batch` for batches of any size."""
    shapes: Any = None
    if dynamic_batch:
        shapes = ({0: torch.export.Dim("batch")},)
        if len(images) < 2:  # a batch of one would be taken for a constant
            images = images.expand(2, -1, -1, -1).contiguous()
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=shapes)
