"""What is given to inductor, the compiler behind `torch.compile` and AOTInductor, and how it is set."""

from contextlib import AbstractContextManager

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
    """The module that inductor is given, float32 in and out: channels-last, in the target's precision, pools fixed."""
    network = plain(network, images)
    if target.precision == "int8":
        return pt2e.quantize(network, images, target.calibration)
    if target.precision == "fp32" and target.kind == "cpu" and slow_at_wide_convolutions():
        network = split_wide(network, images)
    return Form(network, precision=target.precision, layout=torch.channels_last, device=target.device)


def inductor_settings(profile: bool) -> AbstractContextManager:
    """Freezing makes the weights constants, which oneDNN then lays out once for its kernels instead of in each call."""
    return inductor.patch({"freezing": True, "cpp.enable_kernel_profile": profile})
