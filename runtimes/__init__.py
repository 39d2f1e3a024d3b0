"""Engines that run a deployed network, behind one interface.

    runtime = runtimes.load("vanillanet_9.pt2")
    runtime = runtimes.load(network, engine="openvino", precision="bf16", images=images)
    logits = runtime(images)  # (N, 3, H, W) -> (N, classes)

Each file in `engines/` defines one engine, named after the file. An engine is a thin layer over a maintained library.
It imports that library and torch inside its functions, so importing this package takes milliseconds.
"""

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engines
from .base import Engine, FileEngine
from .values import PRECISIONS, Calibration, Layer, Metadata, Target, device_type  # noqa: F401  re-exported

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .running import Runtime

ENGINES = tuple(module.name for module in pkgutil.iter_modules(engines.__path__))


def find(name: str) -> Engine:
    """Return the engine with this name. Raises ValueError if there is none."""
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name}; there are {', '.join(ENGINES)}")
    return import_module(f"{engines.__name__}.{name}").Engine()


_FILE_ENGINES = [engine for engine in map(find, ENGINES) if isinstance(engine, FileEngine)]
FORMATS = {engine.format: engine.name for engine in _FILE_ENGINES}
SUFFIXES = {engine.suffix: engine.name for engine in _FILE_ENGINES}


def __getattr__(name: str) -> Any:
    """Import the names that need torch on first use."""
    if name in ("Runtime", "set_tf32"):
        return getattr(import_module(".running", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def of_file(path: str | Path) -> str | None:
    """Return the name of the engine that reads this file, by its suffix; None for an unknown suffix."""
    return SUFFIXES.get(Path(path).suffix)


def load(
    source: "str | Path | nn.Module",
    target: Target | None = None,
    *,
    images: "torch.Tensor | None" = None,
    **fields: Any,
) -> "Runtime":
    """Open a file that `export.py` wrote, or build a network from memory, ready to run.

    Args:
        source: the file, or a network in eval mode on the CPU, which is not changed.
        target: the engine, precision, device and settings to run with; None means `Target()`.
        images: for a network, a batch of the size to optimize for, (N, C, H, W).
        fields: fields of `Target` that override those of `target`.

    Raises:
        ValueError: in one line, what does not fit, is missing or is not installed.
    """
    target = replace(target or Target(), **fields)
    if not isinstance(source, str | Path):
        if images is None:
            raise ValueError("a network from memory needs a batch of images, to know their size")
        return find(target.engine or "compile").build(source, images, target)
    path = Path(source)
    own = of_file(path)
    if own is None:
        raise ValueError(f"{path} is of no format that an engine reads ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if target.engine not in (None, own):
        raise ValueError(f"{path} is a file of {own}, not of {target.engine}")
    return find(own).open(path, target)
