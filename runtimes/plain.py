"""A deployed VanillaNet as a plain sequence of layers, for engines that compile graphs.

Two things make it more than a copy. A ReLU and a max-pool commute exactly, and with the ReLU first it becomes the end
of the convolution before it: the pool then works on what an 8-bit format without a sign can hold at full resolution.
And adaptive pools become plain ones, since the size of the images is known.
"""

from collections import OrderedDict

import torch
from torch import nn

from models.vanillanet import SeriesActivation, VanillaNet

from .adaptive_pool import fix_adaptive_pools

DEPTHWISE = "series"  # the last part of the names of the series activations' convolutions


def _depthwise(activation: SeriesActivation) -> nn.Conv2d:
    """The convolution of a series activation without the ReLU before it, with the same parameters."""
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
    """`network` for images of this size, made of plain layers; it shares parameters with the one given.

    Another network than a deployed VanillaNet gets its adaptive max-pools replaced and nothing else.
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
