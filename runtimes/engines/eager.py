"""PyTorch, operator by operator."""

import torch
from torch import nn

from utils import keep_freed_memory

from ..base import DTYPES, Engine, Form, Layer, Runtime, device_type, set_tf32


def operator_times(run, images: torch.Tensor) -> list[Layer]:
    """The operators of one call and their own times, from torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if images.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run(images)
    with torch.profiler.profile(activities=activities) as profiler:
        run(images)
    layers = []
    for event in profiler.events():
        us = event.self_device_time_total if images.is_cuda else event.self_cpu_time_total
        if us > 0:
            layers.append(Layer(event.name, event.name, us / 1e3))
    return layers


class Eager(Engine):
    """As published: contiguous memory format, nothing tuned. The way that all others are compared with."""

    name = "eager"
    precisions = ("fp32", "tf32", "bf16", "fp16")
    devices = ("cpu", "cuda")
    layout = torch.contiguous_format

    def build(self, network: nn.Module, images, *, precision="fp32", calibration=None, device="cpu", profile=False):
        self.check(precision, device, calibration)
        form = Form(network, dtype=DTYPES[precision], layout=self.layout, device=device)

        def run(batch: torch.Tensor) -> torch.Tensor:
            set_tf32(precision, device)
            return form(batch)

        return Runtime(self.name, precision, run, device=device, profile=lambda batch: operator_times(run, batch))


class ChannelsLast(Eager):
    """Eager as fast as it gets without a compiler: channels-last, and on the CPU freed memory is kept."""

    name = "channels_last"
    layout = torch.channels_last

    def build(self, network: nn.Module, images, *, precision="fp32", calibration=None, device="cpu", profile=False):
        if device_type(device) == "cpu":
            keep_freed_memory()
        return super().build(
            network, images, precision=precision, calibration=calibration, device=device, profile=profile
        )
