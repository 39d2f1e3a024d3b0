"""A deployed VanillaNet as a plain sequence of layers, for engines that compile graphs.

It differs from the network in two ways. Each ReLU moves in front of the max-pool, with which it commutes exactly. The
ReLU can then be fused into the convolution before it, and the pool works on nonnegative numbers, which unsigned 8-bit
formats hold at full resolution. Also, adaptive pools become plain ones, because the image size is known.
"""

from collections import OrderedDict

import torch
from torch import nn

from models.vanillanet import SeriesActivation, VanillaNet

from .adaptive_pool import fix_adaptive_pools

DEPTHWISE = "series"  # last part of the names of the series activations' convolutions


def _depthwise(activation: SeriesActivation) -> nn.Conv2d:
    """Return the convolution of a series activation without its ReLU; the parameters are shared."""
    dim, n = activation.in_channels, activation.act_num
    layer = nn.Conv2d(dim, dim, 2 * n + 1, padding=n, groups=dim, device="meta")
    layer.weight, layer.bias = activation.weight, activation.bias
    return layer


def _layer(conv: nn.Conv2d, pool: nn.Module | None, activation: SeriesActivation) -> nn.Sequential:
    layers = OrderedDict(conv=conv, relu=nn.ReLU())
    if pool is not None and not isinstance(pool, nn.Identity):
        layers["pool"] = pool
    layers[DEPTHWISE] = _depthwise(activation)
    return nn.Sequential(layers)


def plain(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return `network` in plain layers for images of this size. Replacing adaptive max-pools copies the parameters.

    In a network other than a deployed VanillaNet, only the adaptive max-pools are replaced.
    """
    if isinstance(network, VanillaNet) and network.deploy:
        network = nn.Sequential(
            OrderedDict(
                stem=_layer(network.stem[0], None, network.stem[1]),
                stages=nn.Sequential(*(_layer(block.conv, block.pool, block.act) for block in network.stages)),
                cls=network.cls,
                flatten=network.flatten,
            )
        ).eval()
    return fix_adaptive_pools(network, images)
