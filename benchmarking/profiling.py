"""The cost of a network: layers, parameters, multiply-accumulates, memory for training, images per second."""

import copy
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from models.vanillanet import SeriesActivation


def count_layers(model: nn.Module) -> int:
    """Count convolutions and linear layers, as the paper counts depth: VanillaNet-N in deploy form has N.

    The depthwise convolution of a series activation belongs to the activation and is left out. Projections on
    shortcuts are counted, so ResNet-18 has 21.
    """
    layers = (nn.Conv2d, nn.Linear)
    return sum(isinstance(m, layers) and not isinstance(m, SeriesActivation) for m in model.modules())


def count_params(model: nn.Module) -> int:
    """Count the elements of all parameters; buffers such as BatchNorm statistics are left out."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: int | tuple[int, int, int]) -> int:
    """Count the multiply-accumulates of convolutions and matrix products for one image; the paper calls them FLOPs.

    They are counted on a copy without storage, so nothing is computed.

    Args:
        model: its `in_chans` is the number of input channels, 3 if it has no such attribute.
        input_size: height and width of a square image, or (channels, height, width).
    """
    if isinstance(input_size, int):
        input_size = (getattr(model, "in_chans", 3), input_size, input_size)
    model = copy.deepcopy(model).to("meta").eval()
    return macs_of(model, torch.empty(1, *input_size, device="meta"))[0]


def macs_of(model: nn.Module, *inputs: Any) -> tuple[int, Any]:
    """Return (multiply-accumulates of a call, its outputs)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = model(*inputs)
    return counter.get_total_flops() // 2, outputs


def _saved(model: Callable, images: torch.Tensor, precision: AbstractContextManager) -> int:
    """Return the bytes that a forward pass keeps for the backward pass; each storage is counted once."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        outputs = model(images)  # the outputs keep the saved tensors alive until the end
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


class _Alive(TorchDispatchMode):
    """Counts the bytes of all live tensors that operators have created.

    Attributes:
        most: the largest number of bytes so far.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self.storages = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.storages:
                self.storages.add(storage._cdata)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.bytes)
        return result

    def _gone(self, storage: int, size: int) -> None:
        self.storages.remove(storage)
        self.bytes -= size


def _alive(model: Callable, images: torch.Tensor, precision: AbstractContextManager) -> int:
    """Return the largest number of bytes in use at once during a forward and a backward pass."""
    with _Alive() as alive:
        with precision:
            outputs = model(images.clone())
        outputs.float().sum().backward()
    return alive.most


def _per_image(
    count: Callable[..., int], batches: tuple[int, int], model: nn.Module, resolution: int, dtype: torch.dtype | None
) -> float:
    """Return the growth of a count of bytes per image, from its values at two batch sizes.

    The tensors are fake: only their shapes are computed, so the device and its memory do not matter.
    """
    device, model = next(model.parameters()).device, copy.deepcopy(model)
    with FakeTensorMode() as mode:
        model._apply(mode.from_tensor)
        small, large = (
            count(
                model,
                torch.empty(batch, 3, resolution, resolution, device=device).to(memory_format=torch.channels_last),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            )
            for batch in batches
        )
    return (large - small) / (batches[1] - batches[0])


def saved_per_image(model: nn.Module, resolution: int, *, dtype: torch.dtype | None = None) -> float:
    """Return the bytes per image that the forward pass of `model`, as it is, keeps for the backward pass.

    Parameters and their copies in a lower precision do not count, because they do not grow with the batch.

    Args:
        model: in train mode, in any memory format.
        resolution: height and width of the images, px.
        dtype: of autocast; None computes in the dtype of the parameters.
    """
    return _per_image(_saved, (2, 4), model, resolution, dtype)


def alive_per_image(model: nn.Module, resolution: int, *, dtype: torch.dtype | None = None) -> float:
    """Return the bytes of tensors per image at the peak of a forward and a backward pass.

    They exceed `saved_per_image` by what the current layer reads and writes and, with gradient checkpointing, by all
    that the current part recomputes. The batches are large, so that the gradients of the parameters do not determine
    when the peak occurs. Memory that an operator uses internally does not count.

    Args:
        model, resolution, dtype: as for `saved_per_image`.
    """
    return _per_image(_alive, (512, 1024), model, resolution, dtype)


def profile(model: nn.Module, input_size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """Return (layers, parameters, multiply-accumulates) of `model`; `input_size` as for `count_macs`."""
    return count_layers(model), count_params(model), count_macs(model, input_size)


def interleave(takes: Sequence[Callable[[], Sequence[float]]], *, rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Measure several things by turns, so that other load on the machine affects all of them alike.

    Args:
        takes: functions that each measure one thing, once or a few times, and return the measurements.
        rounds: rounds that count. In each, every function has one turn, in a new random order.
        warm_up: earlier rounds that do not count.

    Returns:
        The measurements of each function.
    """
    order, generator = list(range(len(takes))), random.Random(0)
    measured: list[list[float]] = [[] for _ in takes]
    for number in range(warm_up + rounds):
        generator.shuffle(order)
        for index in order:
            found = takes[index]()
            if number >= warm_up:
                measured[index].extend(found)
    return measured


@torch.inference_mode()
def throughput(
    models: Sequence[nn.Module],
    images: torch.Tensor | Sequence[torch.Tensor],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rounds: int = 10,
) -> list[float]:
    """Images per second of each network, from the median over interleaved rounds.

    Args:
        models: networks in eval mode on the device of `images`.
        images: one batch, (N, in_chans, H, W), or another input of N images that the networks accept.
        autocast: returns the context to compute in.
        rounds: timed forward passes of each network.

    Raises:
        ValueError: a network is in train mode.
    """
    if any(model.training for model in models):
        raise ValueError("throughput is measured in eval mode, and one of the networks is in train mode")
    device = images[0].device

    def take(model: nn.Module) -> list[float]:
        start = time.perf_counter()
        with autocast():
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [time.perf_counter() - start]

    seconds = interleave([partial(take, model) for model in models], rounds=rounds)
    return [len(images) / median(times) for times in seconds]
