"""Import Hugging Face's package `datasets`, which has the same name as this project's datasets.py."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

_hugging_face_package: dict[str, ModuleType] = {}  # the package, once it has been imported


@contextmanager
def hugging_face() -> Iterator[None]:
    """Let `import datasets` mean Hugging Face's package inside the block, instead of this project's datasets.py.

    timm's readers import the package by that name, and the package imports its own submodules by it when it first needs
    them. Raises ValueError if the package is not installed.
    """
    name = "datasets"
    here = Path(__file__).resolve().parent.parent
    ours = sys.modules.pop(name, None)
    try:
        if not _hugging_face_package:
            spec = PathFinder.find_spec(name, [path for path in sys.path if Path(path).resolve() != here])
            if spec is None or spec.submodule_search_locations is None:
                raise ValueError("hfds/ and hfids/ data sets need Hugging Face's package: pip install datasets")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            _hugging_face_package[name] = module
        sys.modules.update(_hugging_face_package)
        yield
    finally:
        sys.modules.pop(name, None)
        if ours is not None:
            sys.modules[name] = ours
