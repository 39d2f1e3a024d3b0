"""Work-arounds for limits of libraries. Each names the library, and says when the work-around can be removed.

`tests/test_workarounds.py` tests the libraries themselves: a test fails once its work-around is no longer needed.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RootFusion(nn.Module):
    """A child of the network that passes `switch_to_deploy` on to the network.

    Up to timm 1.0.31, `timm.utils.reparameterize_model` fuses the children of its argument, but never the argument
    itself. No timm issue reports this, because timm's own networks fuse only in their blocks. VanillaNet also fuses its
    stem and classifier, so timm reaches the network through this child, which has no parameters. The child is the
    identity, because timm's feature list runs all children of a network in order.

    Can be removed when `reparameterize_model` calls `switch_to_deploy` of its argument.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self._network = (network,)  # a tuple hides the network from submodule registration

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def switch_to_deploy(self) -> None:
        self._network[0].switch_to_deploy()


# A map of at most this multiple of the padding is too small for oneDNN, see `depthwise_conv2d`.
_REACH = 1 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 2


@torch.fx.wrap  # as one node, because a symbolic trace does not know the map's size
def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, padding: int, reach: int = _REACH) -> torch.Tensor:
    """A faster `F.conv2d(x, weight, padding=padding, groups=C)` for x (N, C, H, W) and weight (C, 1, 2p+1, 2p+1).

    Up to oneDNN 3.12 (PyTorch 2.14), `jit:avx2` does not compute the gradient of the weight where the kernel is larger
    than the map. `gemm:jit` then multiplies small matrices image by image, which takes half of a training step at 48 px
    on a processor without AVX-512. The registers limit the padding that `jit:avx2` supports, as
    https://github.com/uxlfoundation/oneDNN/issues/742 explains for dense convolutions; the issue was closed as a
    question. This function therefore leaves out taps that meet only zero padding, and pads the map explicitly until it
    is as large as the kernel. All terms of the sum from within the map remain. With AVX-512 that is faster on maps up
    to the padding's size (0.6 instead of 55 ms for 128 images of 512 channels and one pixel), and slower on larger
    ones.

    Can be removed when ONEDNN_VERBOSE=all names `jit:avx2` for the plain convolution's `backward_weights`, and no
    `gemm:jit` with AVX-512 on maps of one pixel.
    """
    height, width = x.shape[-2:]
    if not x.is_cpu or min(height, width) > reach * padding:
        return F.conv2d(x, weight, padding=padding, groups=x.shape[1])
    rows, columns = min(padding, height - 1), min(padding, width - 1)  # how far a tap reaches within the map
    weight = weight[:, :, padding - rows : padding + rows + 1, padding - columns : padding + columns + 1]
    inner = min(rows, (height - 1) // 2), min(columns, (width - 1) // 2)
    top, left = rows - inner[0], columns - inner[1]
    return F.conv2d(F.pad(x, (left, left, top, top)), weight, padding=inner, groups=x.shape[1])


@torch.fx.wrap  # as one node, because a symbolic trace does not know the map's size
def pointwise_conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A faster `F.conv2d(x, weight, bias)` for x (N, C, H, W) and weight (D, C, 1, 1).

    For maps of a few pixels, oneDNN 3.12 (PyTorch 2.14) rearranges the weight in each pass, and computes the
    convolution at a fraction of a matrix product's speed: forward and backward with (128, 1536, 1, 1) and 1536 outputs
    take 74 ms as a convolution and 13 ms as a product, with one thread that has AVX-512.

    Can be removed when ONEDNN_VERBOSE=1 shows no `reorder` of the plain convolution's weight.
    """
    if not x.is_cpu or x.shape[-2] * x.shape[-1] > 4:
        return F.conv2d(x, weight, bias=bias)
    return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias=bias).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 convolution with a bias, (N, C, H, W) -> (N, D, H, W), trained by `pointwise_conv2d`."""

    def __init__(self, dim: int, dim_out: int, **dd):
        super().__init__(dim, dim_out, 1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return pointwise_conv2d(x, self.weight, self.bias)
        return self._conv_forward(x, self.weight, self.bias)
