"""Split 1x1 convolutions over many channels into sums of narrower ones where oneDNN is slow.

PyTorch and OpenVINO both use oneDNN. On processors with AVX2 but without AVX-512, its float32 kernel for 1x1
convolutions takes 16 or 32 output channels at a time, but only 8 on maps larger than 12x12 with more than about 2300
input channels, where it runs at a third of its speed (oneDNN 3.12, in PyTorch 2.14; we found no issue that reports
this). At 224 px, this affects the 14x14 layers of the 1.5x variants. The sum is the same up to rounding.

Can be removed when vanillanet_13_x1_5 in float32 is as fast there without it.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .running import rebuilt

WIDEST = 2048  # input channels up to which maps of any size are fast
LARGEST = 12 * 12  # positions up to which a map is fast with any number of channels


class SplitConv(nn.Module):
    """A 1x1 convolution as a sum of convolutions over parts of its channels: (N, C, H, W) -> (N, out, H, W)."""

    def __init__(self, conv: nn.Conv2d):
        super().__init__()
        parts = conv.weight.detach().tensor_split(-(-conv.in_channels // WIDEST), dim=1)  # (out, size, 1, 1) each
        self.sizes = [part.shape[1] for part in parts]
        self.weights = nn.ParameterList(part.contiguous() for part in parts)
        self.bias, self.stride = conv.bias, conv.stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *others = zip(x.split(self.sizes, dim=1), self.weights, strict=True)
        result = F.conv2d(*first, self.bias, self.stride)
        for other in others:
            result = result + F.conv2d(*other, stride=self.stride)
        return result


def _is_wide(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.in_channels > WIDEST
        and module.kernel_size == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
    )


def _split(conv: nn.Conv2d, size: tuple[int, int]) -> nn.Module | None:
    return SplitConv(conv) if size[0] * size[1] > LARGEST else None


def split_wide(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return `network` with its wide 1x1 convolutions split for images of this size; see `running.rebuilt`."""
    return rebuilt(network, images, _is_wide, _split)
