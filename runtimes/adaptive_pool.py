"""Adaptive max-pooling as plain pooling, for graphs of a fixed image size.

ONNX has no adaptive pooling whose output size does not divide the input's. With both sizes known it is a max-pool with
other numbers, or a maximum of a few slices; neither rounds, so the result is the same bit by bit.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .running import input_sizes


def windows(size: int, out: int) -> list[tuple[int, int]]:
    """The half-open windows of adaptive pooling from `size` to `out` places along one axis."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _as_strided_pool(size: int, out: int) -> tuple[int, int, int] | None:
    """(kernel, stride, padding) of the max-pool with the same windows, if there is one.

    75 -> 38 is (3, 2, 1): the windows [2i - 1, 2i + 2), cut off at the borders.
    """
    wanted = windows(size, out)
    for kernel in range(1, size + 1):
        for padding in range(kernel // 2 + 1):
            for stride in {max(1, size // out), -(-size // out)}:
                if (size + 2 * padding - kernel) // stride + 1 != out:
                    continue
                starts = [i * stride - padding for i in range(out)]
                if wanted == [(max(0, start), min(size, start + kernel)) for start in starts]:
                    return kernel, stride, padding
    return None


class AxisMaxPool(nn.Module):
    """Adaptive max-pooling of maps of one size, (N, C, h, w) -> (N, C, out, out), by gathering; one axis at a time.

    A window shorter than the longest repeats its last place, which leaves the maximum as it is.
    """

    def __init__(self, size: tuple[int, int], out: tuple[int, int]):
        super().__init__()
        for axis, (length, places) in enumerate(zip(size, out, strict=True)):
            spans = windows(length, places)
            longest = max(end - start for start, end in spans)
            for k in range(longest):
                index = torch.tensor([min(start + k, end - 1) for start, end in spans])
                self.register_buffer(f"index_{axis}_{k}", index, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for axis in range(2):
            indices = [buffer for name, buffer in self.named_buffers() if name.startswith(f"index_{axis}_")]
            parts = [x.index_select(axis + 2, index) for index in indices]
            x = parts[0]
            for part in parts[1:]:
                x = torch.maximum(x, part)
        return x


class _StridedMaxPool(nn.Module):
    def __init__(self, rows: tuple[int, int, int], columns: tuple[int, int, int]):
        super().__init__()
        self.kernel, self.stride, self.padding = zip(rows, columns, strict=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding)


def _replacement(size: tuple[int, int], out: tuple[int, int]) -> nn.Module:
    rows, columns = (_as_strided_pool(*pair) for pair in zip(size, out, strict=True))
    return _StridedMaxPool(rows, columns) if rows and columns else AxisMaxPool(size, out)


def fix_adaptive_pools(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """`network` with its adaptive max-pools replaced for images of this size; itself where it has none.

    Args:
        network: in eval mode; not changed.
        images: (N, C, H, W).
    """
    pools = [name for name, module in network.named_modules() if isinstance(module, nn.AdaptiveMaxPool2d)]
    if not pools:
        return network
    sizes = input_sizes(network, pools, images)
    network = copy.deepcopy(network)
    for name in pools:
        out = network.get_submodule(name).output_size
        out = (out, out) if isinstance(out, int) else tuple(out)
        network.set_submodule(name, _replacement(sizes[name], out))
    return network
