"""Engines that run a deployed network, behind one interface.

    runtime = runtimes.load("vanillanet_9.pt2")
    runtime = runtimes.load(network, engine="openvino", precision="bf16", images=images)
    logits = runtime(images)  # (N, 3, H, W) -> (N, classes)

Each engine is a file of this folder and a thin layer over a well-kept library, which is imported when it is used.
"""

from importlib import import_module
from pathlib import Path

import torch
from torch import nn

from .base import Calibration, Engine, FileEngine, Layer, Metadata, Runtime, device_type, set_tf32

__all__ = [
    "ENGINES",
    "FORMATS",
    "Calibration",
    "Engine",
    "FileEngine",
    "Layer",
    "Metadata",
    "Runtime",
    "device_type",
    "find",
    "load",
    "of_file",
    "set_tf32",
]

# By name, where each is defined.
ENGINES = {
    "eager": ("eager", "Eager"),
    "channels_last": ("eager", "ChannelsLast"),
    "compile": ("compile", "Compiled"),
    "cuda_graphs": ("cuda_graphs", "CudaGraphs"),
    "aotinductor": ("aotinductor", "AOTInductor"),
    "onnxruntime": ("onnxruntime", "OnnxRuntime"),
    "openvino": ("openvino", "OpenVINO"),
    "tensorrt": ("tensorrt", "TensorRT"),
}
FORMATS = {"pt2": "aotinductor", "onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
SUFFIXES = {".pt2": "aotinductor", ".onnx": "onnxruntime", ".xml": "openvino", ".engine": "tensorrt"}
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "int8")


def find(name: str) -> Engine:
    """The engine of a name. ValueError where there is none."""
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name}; there are {', '.join(ENGINES)}")
    module, kind = ENGINES[name]
    return getattr(import_module(f".engines.{module}", __name__), kind)()


def of_file(path: str | Path) -> str | None:
    """The engine that reads a file, by its suffix; None for a suffix of none."""
    return SUFFIXES.get(Path(path).suffix)


def load(
    source: str | Path | nn.Module,
    *,
    engine: str | None = None,
    precision: str | None = None,
    images: torch.Tensor | None = None,
    calibration: Calibration | None = None,
    device: str = "cpu",
    profile: bool = False,
) -> Runtime:
    """A file that `export.py` wrote, or a network from memory, ready to run.

    Args:
        source: the file, or a network in eval mode on the CPU, which is left as it is.
        engine: by name; None is what the file's suffix says, and `compile` for a network.
        precision: one of `PRECISIONS`; None is the file's own, and fp32 for a network.
        images: for a network, a batch of the size that the engine is to be fast at, (N, C, H, W).
        calibration: for a network in int8.
        profile: make `Runtime.profile` work, at some cost in speed.

    Raises:
        ValueError: one line that says what does not fit, is missing or not installed.
    """
    if isinstance(source, nn.Module):
        if images is None:
            raise ValueError("a network from memory needs a batch of images, to know their size")
        return find(engine or "compile").build(
            source, images, precision=precision or "fp32", calibration=calibration, device=device, profile=profile
        )
    path = Path(source)
    own = of_file(path)
    if own is None:
        raise ValueError(f"{path} is of no format that an engine reads ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if engine not in (None, own):
        raise ValueError(f"{path} is a file of {own}, not of {engine}")
    return find(own).open(path, precision=precision, device=device, profile=profile)
