"""What an engine is. Without torch, so that commands read their flags at once."""

import importlib.util
import io
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from .values import Metadata, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .running import Profile, Run, Runtime


def require(package: str, needed_by: str) -> ModuleType:
    """Import an optional package. Raises ValueError, one line that says what to install, where it is missing."""
    try:
        return importlib.import_module(package)
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


class Engine(ABC):
    """A way to run a network. The name of its file is the engine's in commands and tables."""

    on_cpu: ClassVar[tuple[str, ...]] = ()  # the precisions that it computes in there; none where it does not run
    on_cuda: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()  # without which it does nothing
    libraries: ClassVar[tuple[str, ...]] = ("torch",)  # of its arithmetic; the first one found is named with a time
    keeps_freed_memory: ClassVar[bool] = False  # on the CPU; see `utils.keep_freed_memory`
    leaves_depthwise: ClassVar[bool] = False  # out of int8, unless `Calibration.depthwise` says so

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def computes(self) -> dict[str, tuple[str, ...]]:
        """By the kind of device, the precisions."""
        return {kind: names for kind, names in (("cpu", self.on_cpu), ("cuda", self.on_cuda)) if names}

    def check_place(self, target: Target) -> None:
        """Raise ValueError where a package or the device is missing."""
        if target.kind not in self.computes:
            raise ValueError(f"{self.name} runs on {', '.join(self.computes)}, not on {target.kind}")
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                raise ValueError(f"{self.name} needs the package {package}: pip install {package}")
        if target.kind == "cuda":
            import torch

            count, index = torch.cuda.device_count(), torch.device(target.device).index or 0
            if index >= count:
                raise ValueError(f"{self.name} on {target.device}: this machine has {count} CUDA devices")

    def check_precision(self, target: Target) -> None:
        """Raise ValueError for a precision that this engine has not on the device."""
        precisions = self.computes[target.kind]
        if target.precision not in precisions:
            hint = " (a way of NVIDIA's GPUs)" if target.precision in ("default", "tf32") else ""
            names = ", ".join(precisions)
            raise ValueError(f"{self.name} computes in {names} on {target.kind}, not in {target.precision}{hint}")

    def check(self, target: Target) -> None:
        """Raise ValueError for what this engine cannot make, here and now."""
        self.check_place(target)
        self.check_precision(target)
        if target.precision == "int8" and not (target.calibration and target.calibration.batches):
            raise ValueError(f"int8 in {self.name} needs images to calibrate on")

    def build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        """Make a network from memory ready to run. The network itself is left as it is.

        Args:
            network: in eval mode on the CPU, in the form that is to be deployed.
            images: a batch of the size that the engine is to be fast at, (N, C, H, W).
            target: its engine is this one.

        Raises:
            ValueError: the precision, device, package or calibration is not there.
        """
        return self._build(network, images, self._prepare(target))

    @abstractmethod
    def _build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        """`build` of a checked target."""

    def _prepare(self, target: Target) -> Target:
        """`target` with nothing left open, checked, and with what it sets for the process set."""
        target = replace(target, engine=self.name, precision=target.precision or "fp32")
        self.check(target)
        self._settle(target)
        return target

    def _settle(self, target: Target) -> None:
        """Set what holds for the whole process."""
        import torch

        from utils import keep_freed_memory

        from .running import set_tf32

        if target.threads:
            torch.set_num_threads(target.threads)
        if self.keeps_freed_memory and target.kind == "cpu":
            keep_freed_memory()
        set_tf32(target.precision, target.device)


class FileEngine(Engine):
    """An engine that reads its networks from files of its own format."""

    format: ClassVar[str]  # its name in commands
    suffix: ClassVar[str]  # of the files
    converts: ClassVar[tuple[str, ...]] = ()  # precisions of which a file in one may run in another
    fixes_batch: ClassVar[bool] = False  # a file is made for one batch size; other batches are split and filled up

    def export(
        self, network: "nn.Module", images: "torch.Tensor", path: str | Path, target: Target, metadata: Metadata
    ) -> list[Path]:
        """Write `network` to `path`, for batches of any size and images of the size of `images`.

        Arguments as for `build`; `metadata` go into the file, with the target's precision put in.

        Returns:
            The files written, `path` first.
        """
        target = self._prepare(target)
        return self._export(network, images, Path(path), target, replace(metadata, precision=target.precision))

    @abstractmethod
    def _export(
        self, network: "nn.Module", images: "torch.Tensor", path: Path, target: Target, metadata: Metadata
    ) -> list[Path]:
        """`export` of a checked target."""

    def open(self, path: str | Path, target: Target = Target()) -> "Runtime":
        """Read a file that `export` wrote."""
        from .running import Runtime

        path = Path(path)
        self.check_place(target)
        self._settle(target)
        content, strings = self._read(path, target)
        metadata = Metadata.from_strings(strings, path)
        target = replace(target, engine=self.name, precision=target.precision or metadata.precision)
        self.check_precision(target)
        if target.precision != metadata.precision and not {target.precision, metadata.precision} <= set(self.converts):
            raise ValueError(f"{path} computes in {metadata.precision}, not in {target.precision}: export it anew")
        run, profile = self._open(content, strings, path, target)
        return Runtime(target, run, metadata=metadata, profile=profile)

    @abstractmethod
    def _read(self, path: Path, target: Target) -> tuple[Any, Mapping[str, str]]:
        """(what `_open` wants of the file, its metadata)."""

    @abstractmethod
    def _open(
        self, content: Any, strings: Mapping[str, str], path: Path, target: Target
    ) -> "tuple[Run, Profile | None]":
        """(images to logits, images to the layers of a profile), as `Runtime` takes them."""

    def _build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        metadata = Metadata("", (), (), (), images.shape[-1], None)  # of a file that nobody else reads
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{self.suffix}"
            self.export(network, images, path, target, metadata)
            runtime = self.open(path, target)
        runtime.metadata, runtime.size = None, tuple(images.shape[-2:])
        return runtime
