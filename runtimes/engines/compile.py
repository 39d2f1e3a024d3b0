"""torch.compile with inductor: what a user of plain PyTorch should have."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch._inductor.config as inductor
from torch import nn

from utils import keep_freed_memory

from .. import pt2e
from ..base import DTYPES, Engine, FixedBatch, Form, Runtime, device_type, set_tf32
from ..plain import plain
from ..processor import slow_at_wide_convolutions
from ..wide import split_wide
from .eager import operator_times


def inductor_form(network: nn.Module, images: torch.Tensor, *, precision: str, calibration, device: str) -> nn.Module:
    """The module that inductor is given, float32 in and out: channels-last, in `precision`, pools fixed."""
    network = plain(network, images)
    if precision == "int8":
        return pt2e.quantize(network, images, calibration)
    if precision == "fp32" and device_type(device) == "cpu" and slow_at_wide_convolutions():
        network = split_wide(network, images)
    return Form(network, dtype=DTYPES[precision], layout=torch.channels_last, device=device)


@contextmanager
def inductor_settings(profile: bool) -> Iterator[None]:
    """Freezing makes the weights constants, which oneDNN then lays out once for its kernels instead of in each call."""
    with inductor.patch({"freezing": True, "cpp.enable_kernel_profile": profile}):
        yield


class Compiled(Engine):
    """Channels-last, weights frozen, compiled for one batch size and image size. Building takes up to a minute."""

    name = "compile"
    precisions = ("fp32", "tf32", "bf16", "fp16", "int8")
    devices = ("cpu", "cuda")

    def build(self, network: nn.Module, images, *, precision="fp32", calibration=None, device="cpu", profile=False):
        self.check(precision, device, calibration)
        if precision == "int8" and device_type(device) != "cpu":
            raise ValueError("int8 in PyTorch is for x86 processors; on a GPU use tensorrt")
        set_tf32(precision, device)
        if device_type(device) == "cpu":
            keep_freed_memory()
        form = inductor_form(network, images, precision=precision, calibration=calibration, device=device)
        # A code object can be compiled for a few sets of guards only, so every build has one of its own.
        compiled = torch.compile(form, dynamic=False)
        with inductor_settings(profile), torch.inference_mode():
            compiled(images.to(device, torch.float32))
        run = FixedBatch(compiled, len(images))
        return Runtime(
            self.name,
            precision,
            run,
            device=device,
            profile=(lambda batch: operator_times(run, batch)) if profile else None,
        )
