"""1x1 convolutions over many channels as sums of narrower ones, where oneDNN is slow at them.

oneDNN is behind both PyTorch and OpenVINO. On a processor with AVX2 and no AVX-512 its float32 kernel for 1x1
convolutions takes 16 or 32 output channels at a time, but only 8 on maps larger than 12x12 with more than about 2300
input channels, and then runs at a third of its speed. Among the variants, at 224 px, those are the 1.5x ones' layers at
14x14. The sum is the same up to rounding.
"""

import copy

import torch
from torch import nn

from .running import input_sizes

WIDEST = 2048  # input channels that are fast on any map
LARGEST = 12 * 12  # places of a map that is fast with any number of channels


class SplitConv(nn.Module):
    """A 1x1 convolution as the sum of convolutions of the parts of its input: (N, C, H, W) -> (N, out, H, W).

    Args:
        conv: ungrouped; its bias goes to the first part.
    """

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        weights = conv.weight.detach().tensor_split(-(-conv.in_channels // WIDEST), dim=1)
        self.sizes = [weight.shape[1] for weight in weights]
        self.parts = nn.ModuleList()
        for i, weight in enumerate(weights):
            bias = conv.bias if i == 0 else None
            part = nn.Conv2d(weight.shape[1], conv.out_channels, 1, conv.stride, bias=bias is not None, device="meta")
            part.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
            if bias is not None:
                part.bias = bias
            self.parts.append(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = (part(piece) for part, piece in zip(self.parts, x.split(self.sizes, dim=1), strict=True))
        for other in others:
            first = first + other
        return first


def _is_wide(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels > WIDEST
        and module.kernel_size == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def split_wide(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """`network` with its wide 1x1 convolutions split, for images of this size; itself where it has none.

    Args:
        network: in eval mode; not changed.
        images: (N, C, H, W).
    """
    wide = [name for name, module in network.named_modules() if _is_wide(module)]
    sizes = input_sizes(network, wide, images) if wide else {}
    slow = [name for name, (height, width) in sizes.items() if height * width > LARGEST]
    if not slow:
        return network
    network = copy.deepcopy(network)
    for name in slow:
        network.set_submodule(name, SplitConv(network.get_submodule(name)))
    return network
