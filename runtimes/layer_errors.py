"""What int8 costs, layer by layer: the error of the logits with one convolution quantized and all others in float32."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from models.vanillanet import SeriesActivation


@dataclass(frozen=True)
class LayerError:
    """The error of the logits, root mean square, relative to that of the logits, when `layer` is in int8."""

    layer: str
    kind: str
    error: float


def _input(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """What the convolution proper is given: a series activation begins with a ReLU."""
    return F.relu(x) if isinstance(layer, SeriesActivation) else x


def _ranges(network: nn.Module, layers: dict[str, nn.Conv2d], batches: Sequence[torch.Tensor]):
    """The extremes of each layer's input, zero included."""
    ranges = dict.fromkeys(layers, (0.0, 0.0))

    def note(name: str):
        def hook(layer: nn.Conv2d, inputs: tuple[torch.Tensor]) -> None:
            x = _input(layer, inputs[0])
            low, high = ranges[name]
            ranges[name] = min(low, x.min().item()), max(high, x.max().item())

        return hook

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    for batch in batches:
        network(batch)
    for hook in hooks:
        hook.remove()
    return ranges


def _quantize(layer: nn.Conv2d, low: float, high: float) -> None:
    """Round the weight per output channel to int8, symmetrically, and the input to uint8 between the extremes."""
    scale = (layer.weight.abs().amax((1, 2, 3)) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    zero = torch.zeros(len(scale), dtype=torch.int32)
    layer.weight.copy_(torch.fake_quantize_per_channel_affine(layer.weight, scale, zero, 0, -127, 127))
    step = max((high - low) / 255, torch.finfo(torch.float32).tiny)
    zero_point = round(-low / step)
    layer.register_forward_pre_hook(
        lambda module, inputs: torch.fake_quantize_per_tensor_affine(
            _input(module, inputs[0]), step, zero_point, 0, 255
        )
    )


@torch.no_grad()
def layer_errors(network: nn.Module, batches: Sequence[torch.Tensor]) -> list[LayerError]:
    """One line for each convolution alone, and one each for all dense, all depthwise and all together.

    Simulated in float32, as every engine's quantizer does it: weights per output channel, activations per tensor with
    the extremes of `batches`, on which the error is measured, too.

    Args:
        network: in deploy form and eval mode; not changed.
        batches: preprocessed images, (N, C, H, W).
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
    kinds = {name: "depthwise" if layer.groups > 1 else "dense" for name, layer in layers.items()}
    ranges = _ranges(network, layers, batches)
    expected = torch.cat([network(batch) for batch in batches])

    def error(chosen: Collection[str]) -> float:
        quantized = copy.deepcopy(network)
        for name in chosen:
            _quantize(quantized.get_submodule(name), *ranges[name])
        difference = torch.cat([quantized(batch) for batch in batches]) - expected
        return (difference.square().mean() / expected.square().mean()).sqrt().item()

    found = [LayerError(name, kinds[name], error([name])) for name in layers]
    for kind in ("dense", "depthwise"):
        if kind in kinds.values():
            found.append(LayerError(f"all {kind}", kind, error([name for name in layers if kinds[name] == kind])))
    return [*found, LayerError("all", "", error(layers))]
