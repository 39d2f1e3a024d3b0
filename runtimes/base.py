"""Base classes of the engines. Importing them does not import torch, so that commands parse their flags quickly."""

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
    """Import an optional package. If it is missing, raise a ValueError that says in one line what to install."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ValueError(f"{needed_by} needs the package {package}: pip install {package}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress messages and warnings of exporters and quantizers out of the output of the commands."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class Engine(ABC):
    """A way to run a network. Commands and tables call the engine by the name of its file."""

    on_cpu: ClassVar[tuple[str, ...]] = ()  # supported precisions there; empty if the engine does not run there
    on_cuda: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()  # required for every use of the engine
    libraries: ClassVar[tuple[str, ...]] = ("torch",)  # do the arithmetic; timings name the first one installed
    keeps_freed_memory: ClassVar[bool] = False  # on the CPU; see `utils.keep_freed_memory`
    leaves_depthwise: ClassVar[bool] = False  # can be left unquantized in int8, see `Calibration.depthwise`

    @property
    def name(self) -> str:
        return type(self).__module__.rpartition(".")[2]

    @property
    def computes(self) -> dict[str, tuple[str, ...]]:
        """Supported precisions by kind of device."""
        return {kind: names for kind, names in (("cpu", self.on_cpu), ("cuda", self.on_cuda)) if names}

    def check_place(self, target: Target) -> None:
        """Raise ValueError if the engine does not run on the device, or if a package or the device is missing."""
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
        """Raise ValueError if the engine does not support the precision on the device."""
        precisions = self.computes[target.kind]
        if target.precision not in precisions:
            hint = " (a way of NVIDIA's GPUs)" if target.precision in ("default", "tf32") else ""
            names = ", ".join(precisions)
            raise ValueError(f"{self.name} computes in {names} on {target.kind}, not in {target.precision}{hint}")

    def check(self, target: Target) -> None:
        """Raise ValueError if the engine cannot build a network for this target here."""
        self.check_place(target)
        self.check_precision(target)
        if target.precision == "int8" and not (target.calibration and target.calibration.batches):
            raise ValueError(f"int8 in {self.name} needs images to calibrate on")

    def build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        """Make a network from memory ready to run. The network itself is not changed.

        Args:
            network: in eval mode on the CPU, in the form to deploy.
            images: a batch of the size to optimize for, (N, C, H, W).
            target: what to build for; its `engine` is replaced by this engine.

        Raises:
            ValueError: the precision is not supported, or the device, a package or the calibration is missing.
        """
        return self._build(network, images, self._prepare(target))

    @abstractmethod
    def _build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        """Implement `build` for a checked target."""

    def _prepare(self, target: Target) -> Target:
        """Return `target` with its defaults filled in, after checking it and applying its process-wide settings."""
        target = replace(target, engine=self.name, precision=target.precision or "fp32")
        self.check(target)
        self._settle(target)
        return target

    def _settle(self, target: Target) -> None:
        """Apply the settings of the target that hold for the whole process."""
        import torch

        from utils import keep_freed_memory

        from .running import set_tf32

        if target.threads:
            torch.set_num_threads(target.threads)
        if self.keeps_freed_memory and target.kind == "cpu":
            keep_freed_memory()
        set_tf32(target.precision, target.device)


class FileEngine(Engine):
    """An engine that reads networks from files in its own format."""

    format: ClassVar[str]  # its name in commands
    suffix: ClassVar[str]  # of its files
    converts: ClassVar[tuple[str, ...]] = ()  # a file in one of these precisions may run in the others
    fixes_batch: ClassVar[bool] = False  # a file has one batch size; other batches are split and padded

    def export(
        self, network: "nn.Module", images: "torch.Tensor", path: str | Path, target: Target, metadata: Metadata
    ) -> list[Path]:
        """Write `network` to `path`, for batches of any size and images of the size of `images`.

        The arguments are those of `build`. The file stores `metadata`, with the target's precision filled in.

        Returns:
            The files written, `path` first.
        """
        target = self._prepare(target)
        return self._export(network, images, Path(path), target, replace(metadata, precision=target.precision))

    @abstractmethod
    def _export(
        self, network: "nn.Module", images: "torch.Tensor", path: Path, target: Target, metadata: Metadata
    ) -> list[Path]:
        """Implement `export` for a checked target."""

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
        """Return (the content of the file for `_open`, its metadata)."""

    @abstractmethod
    def _open(
        self, content: Any, strings: Mapping[str, str], path: Path, target: Target
    ) -> "tuple[Run, Profile | None]":
        """Return the `run` and `profile` arguments of `Runtime`."""

    def _build(self, network: "nn.Module", images: "torch.Tensor", target: Target) -> "Runtime":
        metadata = Metadata("", (), (), (), images.shape[-1], None)  # placeholders: nobody else reads this file
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"network{self.suffix}"
            self.export(network, images, path, target, metadata)
            runtime = self.open(path, target)
        runtime.metadata, runtime.size = None, tuple(images.shape[-2:])
        return runtime
