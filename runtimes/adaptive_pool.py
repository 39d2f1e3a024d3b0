"""Adaptive max-pooling as plain pooling, for graphs of a fixed image size.

ONNX has no adaptive pooling for output sizes that do not divide the input size. With both sizes known, the pool is an
ordinary max-pool or a maximum over a few gathered positions. Neither rounds, so the result is the same bit for bit.
"""

import torch
from torch import nn

from .running import rebuilt


def windows(size: int, out: int) -> list[tuple[int, int]]:
    """Return the half-open windows of adaptive pooling from `size` to `out` positions along one axis."""
    return [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]


def _as_strided_pool(size: int, out: int) -> tuple[int, int, int] | None:
    """Return (kernel, stride, padding) of a max-pool with the same windows; None if none is found.

    For example, 75 -> 38 is (3, 2, 1): the windows [2i - 1, 2i + 2), clipped at the borders.
    """
    if not 3 <= out <= size:
        return None
    wanted = windows(size, out)
    (start, end), (after, _) = wanted[1:3]  # a window that no border clips, and the start of the next
    kernel, stride = end - start, after - start
    padding = stride - start
    found = [(max(0, i * stride - padding), min(size, i * stride - padding + kernel)) for i in range(out)]
    fits = 0 <= padding <= kernel // 2 and (size + 2 * padding - kernel) // stride + 1 == out
    return (kernel, stride, padding) if fits and found == wanted else None


class AxisMaxPool(nn.Module):
    """Adaptive max-pooling by gathering, one axis at a time, for maps of one size: (N, C, *size) -> (N, C, *out).

    Windows shorter than the longest one repeat their last position, which does not change the maximum.
    """

    def __init__(self, size: tuple[int, int], out: tuple[int, int]):
        super().__init__()
        for axis, (length, places) in enumerate(zip(size, out, strict=True)):
            spans = windows(length, places)
            longest = max(end - start for start, end in spans)
            index = [[min(start + k, end - 1) for k in range(longest)] for start, end in spans]  # (places, longest)
            self.register_buffer(f"index_{axis}", torch.tensor(index), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for axis, index in ((2, self.index_0), (3, self.index_1)):
            x = x.index_select(axis, index.flatten()).unflatten(axis, index.shape).amax(axis + 1)
        return x


def _plain_pool(pool: nn.AdaptiveMaxPool2d, size: tuple[int, int]) -> nn.Module:
    out = pool.output_size
    out = (out, out) if isinstance(out, int) else tuple(out)
    rows, columns = map(_as_strided_pool, size, out)
    return nn.MaxPool2d(*zip(rows, columns, strict=True)) if rows and columns else AxisMaxPool(size, out)


def fix_adaptive_pools(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return `network` with its adaptive max-pools replaced for images of this size; see `running.rebuilt`."""
    return rebuilt(network, images, lambda module: isinstance(module, nn.AdaptiveMaxPool2d), _plain_pool)
