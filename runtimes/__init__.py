"""Engines that run a deployed network, behind one interface.

    runtime = runtimes.load("vanillanet_9.pt2")
    runtime = runtimes.load(network, engine="openvino", precision="bf16", images=images)
    logits = runtime(images)  # (N, 3, H, W) -> (N, classes)

An engine is a file of `engines/`, whose name is the engine's. It is a thin layer over a well-kept library, which it
imports inside its functions. So importing this package takes milliseconds: torch is imported once something is run.
"""

import pkgutil
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import engines
from .base import Engine, FileEngine
from .values import PRECISIONS, Calibration, Layer, Metadata, Target, device_type  # noqa: F401  for the users of all

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .running import Runtime

ENGINES = tuple(module.name for module in pkgutil.iter_modules(engines.__path__))


def find(name: str) -> Engine:
    """The engine of a name. ValueError where there is none."""
    if name not in ENGINES:
        raise ValueError(f"there is no engine {name}; there are {', '.join(ENGINES)}")
    return import_module(f"{engines.__name__}.{name}").Engine()


_FILE_ENGINES = [engine for engine in map(find, ENGINES) if isinstance(engine, FileEngine)]
FORMATS = {engine.format: engine.name for engine in _FILE_ENGINES}
SUFFIXES = {engine.suffix: engine.name for engine in _FILE_ENGINES}


def __getattr__(name: str) -> Any:
    """What needs torch."""
    if name in ("Runtime", "set_tf32"):
        return getattr(import_module(".running", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name}")


def of_file(path: str | Path) -> str | None:
    """The engine that reads a file, by its suffix; None for any other suffix."""
    return SUFFIXES.get(Path(path).suffix)


def load(
    source: "str | Path | nn.Module",
    target: Target | None = None,
    *,
    images: "torch.Tensor | None" = None,
    **fields: Any,
) -> "Runtime":
    """A file that `export.py` wrote, or a network from memory, ready to run.

    Args:
        source: the file, or a network in eval mode on the CPU, which is left as it is.
        target: what it is to run in; None is `Target()`.
        images: for a network, a batch of the size that the engine is to be fast at, (N, C, H, W).
        fields: of `Target`, in place of those of `target`.

    Raises:
        ValueError: one line that says what does not fit, is missing or not installed.
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
