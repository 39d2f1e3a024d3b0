"""What a network costs: layers, parameters, multiply-accumulates, images per second."""

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
    """Convolutions and linear layers, as the paper counts depth: VanillaNet-N in deploy form has N.

    The depthwise convolution of a series activation belongs to the activation and is left out. Projections on
    shortcuts are counted, so ResNet-18 has 21.
    """
    layers = (nn.Conv2d, nn.Linear)
    return sum(isinstance(m, layers) and not isinstance(m, SeriesActivation) for m in model.modules())


def count_params(model: nn.Module) -> int:
    """Numbers in the parameters; buffers such as BatchNorm statistics are left out."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: int | tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image through convolutions and products of matrices, which the paper calls FLOPs.

    Counted on a copy without storage, so that nothing is computed.

    Args:
        model: its `in_chans` (3 without one) is the input's depth.
        input_size: height and width of a square image, or (channels, height, width).
    """
    if isinstance(input_size, int):
        input_size = (getattr(model, "in_chans", 3), input_size, input_size)
    model = copy.deepcopy(model).to("meta").eval()
    return macs_of(model, torch.empty(1, *input_size, device="meta"))[0]


def macs_of(model: nn.Module, *inputs: Any) -> tuple[int, Any]:
    """(multiply-accumulates of a call, its outputs)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = model(*inputs)
    return counter.get_total_flops() // 2, outputs


def _saved(model: Callable, images: torch.Tensor, precision: AbstractContextManager) -> int:
    """Bytes that a forward pass leaves for the backward pass, each storage counted once."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        outputs = model(images)  # they hold what was saved until the end
    del outputs
    return sum(storage.nbytes() for storage in kept.values())


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have made and that are still there.

    Attributes:
        most: there ever were.
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
    """The most bytes that are in use at once in a forward and a backward pass."""
    with _Alive() as alive:
        with precision:
            outputs = model(images.clone())
        outputs.float().sum().backward()
    return alive.most


def _per_image(
    count: Callable[..., int], batches: tuple[int, int], model: nn.Module, resolution: int, dtype: torch.dtype | None
) -> float:
    """What a count of bytes grows by for an image more, between two sizes of the batch.

    The tensors are fake: their shapes are computed and nothing else, so the device and its memory do not matter.
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
    """Bytes that the forward pass of `model`, as it is, leaves for the backward pass, for each image of a batch.

    Parameters and their copies in a lower precision do not count, since they do not grow with the batch.

    Args:
        model: in train mode, in any memory format.
        resolution: height and width of the images, px.
        dtype: of autocast; None computes in the parameters' own.
    """
    return _per_image(_saved, (2, 4), model, resolution, dtype)


def alive_per_image(model: nn.Module, resolution: int, *, dtype: torch.dtype | None = None) -> float:
    """Bytes of tensors, for each image of a batch, at the moment of a forward and backward pass that has the most.

    It is more than `saved_per_image`: what the layer at work reads and writes, and with gradient checkpointing all that
    the part at work computes again. The batches are large, so that it is not the gradients of the parameters that
    decide on the moment. What an operator needs within itself does not count.

    Args:
        model, resolution, dtype: as of `saved_per_image`.
    """
    return _per_image(_alive, (512, 1024), model, resolution, dtype)


def profile(model: nn.Module, input_size: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """(layers, parameters, multiply-accumulates) of `model`; `input_size` as for `count_macs`."""
    return count_layers(model), count_params(model), count_macs(model, input_size)


def interleave(takes: Sequence[Callable[[], Sequence[float]]], *, rounds: int, warm_up: int = 2) -> list[list[float]]:
    """Measure several things by turns, so that whatever else the machine does meets all alike.

    Args:
        takes: each measures its thing once or a few times, and returns the measurements.
        rounds: in which each has one turn, in an order drawn anew.
        warm_up: rounds before those, that do not count.

    Returns:
        The measurements of each.
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
        images: one batch, (N, in_chans, H, W), or what else the networks take that holds N images.
        autocast: makes the context to compute in.
        rounds: forward passes that count, of each network.

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
