"""Random views of training images, made in two halves: bytes in a loader process, floats in the training process.

Loader processes send uint8, a quarter of the memory of float32; a whole batch is normalized and erased on the device.
All random numbers are drawn in the first half, so the second half is deterministic.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing

SINGLE_THREADED = 32_767  # largest number of values for which torch's elementwise operations use one thread


class Views(NamedTuple):
    """Views of one or several images before normalizing."""

    pixels: torch.Tensor  # uint8, (B, H, W, 3)
    areas: list[tuple[int, int, int, int, int, int]]  # to erase: (image, top, left, height, width, number of values)
    values: torch.Tensor  # float32, fill of one area after another: (3, height, width) or (3, 1, 1), flattened


def stack_views(pixels: torch.Tensor, views: Sequence[Views]) -> Views:
    """Combine the views of single images, whose pixels are already stacked, into the views of a batch."""
    areas = [(number, *area[1:]) for number, view in enumerate(views) for area in view.areas]
    return Views(pixels, areas, torch.cat([view.values for view in views]))


class _Areas(list):
    """Stand-in for an image (3, H, W) in timm's random erasing, which records the values and where they would go."""

    dtype = torch.float32

    def __init__(self, height: int, width: int):
        super().__init__()
        self._size = (3, height, width)

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, place: tuple[slice, slice, slice], values: torch.Tensor) -> None:
        _, rows, columns = place
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if height and width:  # timm rounds the sizes of many small areas, some of them to 0
            self.append((rows.start, columns.start, height, width, values))


@cache
def _row(channels: tuple[float, ...], width: int, device: torch.device) -> torch.Tensor:
    """Repeat the channels' values for each pixel of a row, (W * 3,)."""
    return torch.tensor(channels, device=device).repeat(width)


class TrainTransform:
    """Turn an RGB image into a random view, float32, (3, H, W), which is normalized and has areas erased.

    Args:
        transforms: functions from image to image; the last one returns the final size.
        erase: timm's random erasing, or None.
        mean, std: per channel of pixels in [0, 1].
    """

    def __init__(
        self,
        transforms: Sequence[Callable[[Image.Image], Image.Image]],
        *,
        erase: RandomErasing | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        self.transforms = list(transforms)
        self.erase = erase
        self.mean, self.std = tuple(mean), tuple(std)

    def view(self, image: Image.Image) -> Views:
        """Make the first half, of one image; all random numbers are drawn here."""
        for transform in self.transforms:
            image = transform(image)

        # Let timm's random erasing write into `_Areas` instead of the pixels.
        pixels = torch.from_numpy(np.array(image))
        areas = _Areas(*pixels.shape[:2])
        if self.erase is not None:
            self.erase(areas)
        values = [area[4].flatten() for area in areas]
        noted = [(0, *area[:4], value.numel()) for area, value in zip(areas, values, strict=True)]
        return Views(pixels[None], noted, torch.cat(values) if values else torch.empty(0))

    def finish(self, views: Views, device: torch.device) -> torch.Tensor:
        """Make the second half, of a batch: images (B, 3, H, W), float32, on the device, in memory (B, H, W, 3)."""
        pixels, values = views.pixels.to(device, non_blocking=True), views.values.to(device, non_blocking=True)
        width = pixels.shape[2]
        mean, std = _row(self.mean, width, device), _row(self.std, width, device)
        images = torch.empty(pixels.shape, device=device)  # (B, H, W, 3)

        # Normalize. On a CPU, a few rows at a time: they stay in its cache, and torch starts no threads, which would
        # wait for each other while loader processes occupy the cores.
        limit = SINGLE_THREADED if device.type == "cpu" else images.numel()
        flat = (tensor.view(-1, 3 * width).split(max(1, limit // (3 * width))) for tensor in (images, pixels))
        for floats, whole in zip(*flat, strict=True):
            floats.copy_(whole).div_(255).sub_(mean).div_(std)

        # Erase.
        begin = 0
        for number, top, left, h, w, count in views.areas:
            fill = values[begin : begin + count].view(3, *((h, w) if count > 3 else (1, 1))).expand(3, h, w)
            area, rows = images[number, top : top + h, left : left + w], max(1, limit // (3 * w))
            for floats, filling in zip(area.split(rows), fill.permute(1, 2, 0).split(rows), strict=True):
                floats.copy_(filling)
            begin += count
        return images.permute(0, 3, 1, 2)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.finish(self.view(image), torch.device("cpu"))[0]


def finished(batches: Iterator[tuple[Any, Any]], transform: Any, device: torch.device) -> Iterator[tuple[Any, Any]]:
    """Finish the views of batches (images, targets) on the device; batches of other transforms stay as they are.

    A GPU copies, normalizes and erases the next batch in a separate stream while the network computes with this one.
    """
    if not hasattr(transform, "finish"):
        yield from batches
        return
    done = ((transform.finish(views, device), targets) for views, targets in batches)
    if device.type != "cuda":
        yield from done
        return
    side = torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        batch = next(done, None)
    while batch is not None:
        main = torch.cuda.current_stream(device)
        main.wait_stream(side)  # for this batch only: the next one has not begun yet
        batch[0].record_stream(main)  # or the other stream could reuse its memory too early
        with torch.cuda.stream(side):
            following = next(done, None)
        yield batch
        batch = following
