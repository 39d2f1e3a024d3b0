"""What the network does only because a library does not. Each says which one, and how to find out that it may go.

`tests/test_workarounds.py` asks the libraries themselves: a test of it fails once its work-around is not needed.
"""

import torch
import torch.nn.functional as F
from torch import nn


class RootFusion(nn.Module):
    """Passes `switch_to_deploy` on to the network that holds it.

    timm 1.0.31 and before: `timm.utils.reparameterize_model` calls the children of the module that it is given, never
    that module itself. No issue of timm's reports it, since its own networks fuse in their blocks alone; VanillaNet
    fuses its stem and classifier, too, so it keeps this parameterless child to be reached through. The child is the
    identity, because timm's feature list runs all children of a network in their order.

    May go when `reparameterize_model` calls `switch_to_deploy` of its argument.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self._network = (network,)  # in a tuple, where it is not registered as a submodule

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def switch_to_deploy(self) -> None:
        self._network[0].switch_to_deploy()


@torch.fx.wrap  # a symbolic trace does not know the map's size
def depthwise_conv2d(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """`F.conv2d(x, weight, padding=padding, groups=C)` of (N, C, H, W) with (C, 1, 2p+1, 2p+1), in a quicker form.

    oneDNN 3.12, in PyTorch 2.14, and before: where the kernel is larger than the map, `jit:avx2` does not take the
    gradient of the weight, and `gemm:jit` multiplies small matrices image by image: half of a training step at 48 px on
    a processor without AVX-512. The padding that `jit:avx2` takes is limited by its registers, as
    https://github.com/uxlfoundation/oneDNN/issues/742 explains for dense convolutions; it was closed as a question.
    So taps that meet nothing but the zero padding are left out, and the padding that the map needs to be as large as
    the kernel is written out. The sum keeps its terms.

    May go when ONEDNN_VERBOSE=all names `jit:avx2` for the plain convolution's `backward_weights`.
    """
    height, width = x.shape[-2:]
    if not x.is_cpu or min(height, width) > 2 * padding:
        return F.conv2d(x, weight, padding=padding, groups=x.shape[1])
    rows, columns = min(padding, height - 1), min(padding, width - 1)  # how far a tap reaches within the map
    weight = weight[:, :, padding - rows : padding + rows + 1, padding - columns : padding + columns + 1]
    inner = min(rows, (height - 1) // 2), min(columns, (width - 1) // 2)
    top, left = rows - inner[0], columns - inner[1]
    return F.conv2d(F.pad(x, (left, left, top, top)), weight, padding=inner, groups=x.shape[1])
