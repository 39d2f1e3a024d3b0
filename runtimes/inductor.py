"""Input and settings of inductor, the compiler behind `torch.compile` and AOTInductor."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config as inductor
from torch import nn

from . import pt2e
from .plain import plain
from .processor import slow_at_wide_convolutions
from .running import Form
from .values import Target
from .wide import split_wide


def inductor_form(network: nn.Module, images: torch.Tensor, target: Target) -> nn.Module:
    """Return the module to compile, float32 in and out: channels-last, plain pools, in the target's precision."""
    network = plain(network, images)
    if target.precision == "int8":
        return pt2e.quantize(network, images, target.calibration)
    if target.precision == "fp32" and target.kind == "cpu" and slow_at_wide_convolutions():
        network = split_wide(network, images)
    return Form(network, precision=target.precision, layout=torch.channels_last, device=target.device)


@contextmanager
def inductor_settings(profile: bool) -> Iterator[None]:
    """Set up inductor to compile. Freezing makes weights constants, so oneDNN lays them out once, not in each call.

    Raises:
        ValueError: there is no C++ compiler.
    """
    try:
        with inductor.patch({"freezing": True, "cpp.enable_kernel_profile": profile}):
            yield
    except RuntimeError as error:
        if "InvalidCxxCompiler" not in str(error):
            raise
        raise ValueError("inductor needs a C++ compiler: install g++, or name another one in CXX") from error
