"""What a checkpoint may hold beside tensors and plain data; nothing of it runs code from the file.

This is the one list of the project. It lives beside the network, which is installed without the rest and reads released
weights by itself; `records.checkpoints` uses it for every other file.
"""

import argparse
import pathlib
from typing import Any

import numpy as np


def _plain_dict(*_factory: Any) -> dict:
    """A defaultdict is read as a dict: torch 2.14 fills no other kind, and nobody asks it for what it lacks."""
    return {}


_FUNCTIONS = {
    "collections.defaultdict": _plain_dict,
    # Another version of numpy, or of Python, calls these otherwise.
    **{f"numpy.{core}.multiarray.scalar": np.float64(0).__reduce__()[0] for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    # A path of one system cannot be made on the other; its pure form can.
    **{f"pathlib{part}.{name}": pathlib.PurePosixPath for part in ("", "._local") for name in ("Path", "PosixPath")},
    **{f"pathlib{part}.WindowsPath": pathlib.PureWindowsPath for part in ("", "._local")},
}
SAFE_GLOBALS = [
    argparse.Namespace,  # in the released checkpoints
    *(bool, int, float, str, list, dict, tuple),  # what a defaultdict would make
    *(pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
    *(np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)),
    *((function, name) for name, function in _FUNCTIONS.items()),
]
