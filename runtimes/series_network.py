"""A deployed VanillaNet as matrix products and the kernel in `series_kernel`, in channels-last."""

import torch
from torch import nn

from models.vanillanet import VanillaNet

from .running import DTYPES
from .series_kernel import series


def _pool(module: nn.Module | None) -> int:
    if module is None or isinstance(module, nn.Identity):
        return 1
    if isinstance(module, nn.MaxPool2d) and module.kernel_size == module.stride and module.padding == 0:
        return module.stride
    raise ValueError("the engine triton takes VanillaNets without adaptive pooling: use compile_cuda_graphs")


class SeriesNetwork(nn.Module):
    """A deployed VanillaNet for the engine `triton`: float32 images (N, C, H, W) in, float32 logits (N, classes) out.

    Args:
        network: a deployed VanillaNet in eval mode; its weights are copied.
        images: a batch with the image size to run on; only its shape matters.
        precision: of weights and activations.
        device: where the network runs.

    Raises:
        ValueError: any other network, no classifier, other pools, or images that the stem's patches do not tile.
    """

    def __init__(self, network: nn.Module, images: torch.Tensor, *, precision: str, device: str):
        super().__init__()
        if not (isinstance(network, VanillaNet) and network.deploy):
            raise ValueError("the engine triton takes deployed VanillaNets alone: use compile_cuda_graphs")
        if network.num_classes == 0:
            raise ValueError("the engine triton takes networks with a classifier")
        if network.global_pool.removeprefix("fast") != "avg":
            raise ValueError("the engine triton takes networks with average pooling: use compile_cuda_graphs")
        self.device, self.dtype = torch.device(device), DTYPES.get(precision, torch.float32)
        stem = network.stem[0]
        self.patch = stem.kernel_size[0]
        if stem.padding != (0, 0) or images.shape[-2] % self.patch or images.shape[-1] % self.patch:
            raise ValueError(f"the engine triton takes images in patches of {self.patch} px, without padding")
        parts = [(stem, None, network.stem[1])]
        parts += [(block.conv, block.pool, block.act) for block in network.stages]
        self.layers = [
            (*self._product(conv), self._cast(act.weight.flatten(1).T), self._cast(act.bias), _pool(pool))
            for conv, pool, act in parts
        ]
        self.head = self._product(network.cls[-1])

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device, self.dtype).contiguous()

    def _product(self, conv: nn.Conv2d) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (bias, weight) of a convolution as a matrix product, with weight (kh * kw * in, out) on the right."""
        return self._cast(conv.bias), self._cast(conv.weight.permute(2, 3, 1, 0).flatten(0, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        # The stem's patches as rows of a matrix, (N * H/4 * W/4, 48).
        x = images.to(self.dtype).view(batch, channels, rows, self.patch, columns, self.patch)
        x = x.permute(0, 2, 4, 3, 5, 1).reshape(-1, self.patch**2 * channels)
        for conv_bias, conv_weight, taps, bias, pool in self.layers:
            x = torch.addmm(conv_bias, x, conv_weight).view(batch, rows, columns, -1)
            x = series(x, taps, bias, pool)  # (N, H, W, C) -> (N, H / pool, W / pool, C)
            rows, columns = x.shape[1:3]
            x = x.flatten(0, 2)
        x = x.view(batch, rows * columns, -1).mean(1)  # (N, C)
        return torch.addmm(self.head[0], x, self.head[1]).float()
