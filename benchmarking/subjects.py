"""The networks to measure, with random weights unless they come from a checkpoint, and a step of their training."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.utils import reparameterize_model
from torch import nn

import networks
import runtimes
from benchmarking import profiling
from benchmarking.spec import Spec
from deployment.fusing import open_deployed
from engine import FiniteGuard
from models.checkpointing import set_grad_checkpointing
from networks import is_vanillanet
from runtimes.running import DTYPES
from utils import World, keep_freed_memory

CALIBRATION_IMAGES = 8
TRAINING_SLOPE = 0.5  # lambda, in the middle of the ramp


@torch.no_grad()
def _keep_activations_near_one(network: nn.Module) -> None:
    """Redraw a VanillaNet's weights: its initial ones let activations shrink to where 8 bits cannot resolve them."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.normal_(std=(2 / module.weight[0].numel()) ** 0.5)


def create(spec: Spec) -> nn.Module:
    """Return the network of `spec` in eval mode with random weights; a twin is built in deploy form."""
    arguments = {}
    if is_vanillanet(spec.network):
        arguments["deploy"] = spec.twin
        if spec.width_mult is not None:
            arguments["width_mult"] = spec.width_mult
    elif spec.network.startswith("swin"):  # its windows are laid out for one image size
        arguments["img_size"] = spec.resolution
    torch.manual_seed(0)
    network = networks.open(spec.network, pretrained=False, flag="--models", **arguments).module
    if is_vanillanet(spec.network):
        _keep_activations_near_one(network)
    return network


def deployed(spec: Spec) -> nn.Module:
    """Return the network of `spec` in deploy form, from a checkpoint or with random weights."""
    if Path(spec.network).is_file():
        return open_deployed(spec.network).module
    return reparameterize_model(create(spec))


def build_network(spec: Spec) -> tuple[nn.Module, torch.Tensor, runtimes.Target]:
    """Return (deployed network, batch of random images, target with calibration images for int8)."""
    network = deployed(spec)
    generator = torch.Generator().manual_seed(0)
    shape = (3, spec.resolution, spec.resolution)
    images = torch.randn(spec.batch, *shape, generator=generator)
    calibration = None
    if spec.precision == "int8":
        count = -(-CALIBRATION_IMAGES // spec.batch)
        batches = [torch.randn(spec.batch, *shape, generator=generator) for _ in range(count)]
        calibration = runtimes.Calibration(batches, spec.int8_depthwise)
    return network, images, runtimes.Target(spec.engine, spec.precision, spec.device, calibration=calibration)


def training_step(spec: Spec) -> Callable[[], None]:
    """Return a training step as in main.py: forward pass, loss, backward pass, AdamW, and a scaler for float16.

    The engine is `plain` (contiguous memory format), `channels_last`, or `compile`, which is also channels-last.
    """
    # Set up the process and the network. In the middle of lambda's ramp, both layers of a pair are computed.
    if torch.device(spec.device).type == "cpu":
        keep_freed_memory()
    runtimes.set_tf32(spec.precision, spec.device)
    network = create(spec)
    layout = torch.contiguous_format if spec.engine == "plain" else torch.channels_last
    network = network.to(spec.device, memory_format=layout).train()
    networks.set_slope(TRAINING_SLOPE, network)
    set_grad_checkpointing(network, spec.grad_checkpointing)
    if spec.engine == "compile":
        network.compile()
    # Set up what a step needs. Every step takes the same batch.
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    images = torch.randn(spec.batch, 3, spec.resolution, spec.resolution, device=spec.device)
    images = images.to(memory_format=layout)
    targets = torch.randint(network.num_classes, (spec.batch,), device=spec.device)
    kind, dtype = images.device.type, DTYPES.get(spec.precision)
    scaler = torch.amp.GradScaler(kind, enabled=spec.precision == "fp16")
    guard = FiniteGuard(network, World(0, 1, images.device), deferred=True) if spec.guard else None
    numbers = count()

    def step() -> None:
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), targets)
        scaler.scale(loss).backward()
        if guard:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in guard.parameters])
            guard.examine(loss.detach(), norm, step=next(numbers), scaled=scaler.is_enabled())
        scaler.step(optimizer)
        if guard:
            guard.undo_if_bad()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def size(network: nn.Module, resolution: int) -> dict[str, float]:
    """Return the columns with a network's layers, parameters and multiply-accumulates."""
    layers, params, macs = profiling.profile(network, resolution)
    return {"layers": layers, "params_m": params / 1e6, "macs_g": macs / 1e9}


def costs(spec: Spec) -> dict[str, float]:
    """Return the `size` of a network as it is measured and, for a training step, also its memory per image.

    What differs only in what costs do not depend on, such as the batch, is counted once.
    """
    trains = spec.kind == "training"
    engine = "compile" if trains and spec.engine == "compile" else "plain"
    alike = {"engine": engine, "batch": 1, "device": "cpu", "int8_depthwise": False, "guard": False}
    return _costs(replace(spec, precision=spec.precision if trains else "fp32", **alike))


@cache
def _costs(spec: Spec) -> dict[str, float]:
    network = create(spec) if spec.kind == "training" else deployed(spec)
    found = size(network, spec.resolution)
    if spec.kind == "training" and spec.engine != "compile":  # the compiler plans memory itself
        networks.set_slope(TRAINING_SLOPE, network.train())
        set_grad_checkpointing(network, spec.grad_checkpointing)
        for column, counted in (("saved_mib", profiling.saved_per_image), ("step_mib", profiling.alive_per_image)):
            found[column] = counted(network, spec.resolution, dtype=DTYPES.get(spec.precision)) / 2**20
    return found
