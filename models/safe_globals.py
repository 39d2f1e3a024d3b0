"""Classes and functions that a checkpoint may use besides tensors and plain data; none runs code from the file.

This is the project's only such list. It lives beside the network, because the network can be installed alone and then
reads released weights by itself; `records.checkpoints` uses the list for every other file.
"""

import argparse
import pathlib
from typing import Any

import numpy as np


def _plain_dict(*_factory: Any) -> dict:
    """Load a defaultdict as a plain dict, because torch 2.14 cannot fill other kinds; no reader needs the default."""
    return {}


_FUNCTIONS = {
    "collections.defaultdict": _plain_dict,
    # These have other names in other versions of NumPy and Python.
    **{f"numpy.{core}.multiarray.scalar": np.float64(0).__reduce__()[0] for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": np.empty(0).__reduce__()[0] for core in ("core", "_core")},
    # A path of one operating system cannot be created on another, but its pure form can.
    **{f"pathlib{part}.{name}": pathlib.PurePosixPath for part in ("", "._local") for name in ("Path", "PosixPath")},
    **{f"pathlib{part}.WindowsPath": pathlib.PureWindowsPath for part in ("", "._local")},
}
SAFE_GLOBALS = [
    argparse.Namespace,  # in the released checkpoints
    *(bool, int, float, str, list, dict, tuple),  # default factories of a defaultdict
    *(pathlib.PurePath, pathlib.PurePosixPath, pathlib.PureWindowsPath),
    *(np.dtype, np.ndarray, *(getattr(np.dtypes, name) for name in np.dtypes.__all__)),
    *((function, name) for name, function in _FUNCTIONS.items()),
]
