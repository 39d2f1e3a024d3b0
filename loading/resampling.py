"""Resize and shear 8-bit images faster than Pillow, with nearly the same pixels.

Pillow transforms each pixel in double precision over 4 x 4 neighbours. torch resizes bytes with vector instructions.
A shear or a translation moves whole rows (or columns), so that 4 neighbours are enough.
"""

import random
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode

RESIZED_BY_TORCH = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)
ROUNDING = 1e-3  # added before truncation, because float32 rounding can leave a value just below an integer


class RandomResizedCrop(RandomResizedCropAndInterpolation):
    """timm's random-resized crop with the same random draws; torch resizes where it can."""

    def __call__(self, img: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        mode = self.interpolation
        if isinstance(mode, tuple | list):
            mode = random.choice(mode)
        if mode not in RESIZED_BY_TORCH or not (width and height):  # a crop of a tiny image can be empty
            return F.resized_crop(img, top, left, height, width, self.size, interpolation=mode)
        if hasattr(img, "pixels"):  # (3, H, W), from `decode_for_training`
            pixels = img.pixels[:, top : top + height, left : left + width].permute(1, 2, 0)
        else:
            pixels = torch.from_numpy(np.array(img.crop((left, top, left + width, top + height))))
        pixels = pixels.contiguous()[None].permute(0, 3, 1, 2)  # (1, 3, h, w), in memory (1, h, w, 3)
        pixels = torch.nn.functional.interpolate(pixels, size=self.size, mode=mode.value, antialias=True)
        return Image.fromarray(pixels[0].permute(1, 2, 0).numpy())


def move_rows(pixels: np.ndarray, *, slope: float, shift: float, fill: Any, cubic: bool) -> np.ndarray:
    """Move each row of an image: out[y, x] = in[y, x + slope * (y + 0.5) + shift], as Pillow's affine transform does.

    Args:
        pixels: (H, W, 3), uint8.
        fill: value of each channel for pixels from outside the image.
        cubic: interpolate between four neighbours (Keys's kernel with a = -1) instead of linearly between two.
    """
    # Split each row's movement into whole pixels and a fraction.
    height, width, _ = pixels.shape
    moved = slope * (np.arange(height) + 0.5) + shift  # (H,), px
    whole = np.floor(moved)
    part = (moved - whole).astype(np.float32)[:, None]
    whole = whole.clip(-width - 1, width).astype(np.int64)  # beyond this, the row has left the image
    margin = int(np.abs(whole).max()) + 2
    padded = np.pad(pixels, ((0, 0), (margin, margin + 1), (0, 0)), mode="edge").reshape(height, -1)

    # For every x of a row, take the pixels x - 1 to x + 2 and weight them by the fraction.
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3 * (width + 3), axis=1)
    taps = windows[np.arange(height), 3 * (whole + margin - 1)].astype(np.float32)
    before, left, right, after = (taps[:, 3 * i : 3 * (i + width)] for i in range(4))
    if cubic:
        found = before * (part * (-1 + part * (2 - part)))
        found += left * (1 + part * part * (-2 + part))
        found += right * (part * (1 + part * (1 - part)))
        found += after * (part * part * (-1 + part))
    else:
        found = left * (1 - part) + right * part

    # Convert to bytes, and fill where the source is outside the image.
    found += ROUNDING
    moved_pixels = found.clip(0, 255, out=found).astype(np.uint8).reshape(height, width, 3)
    places = np.arange(width) + 0.5 + moved[:, None]
    moved_pixels[(places < 0) | (places >= width)] = fill
    return moved_pixels


class _Movable:
    """The part of an image that timm's affine operations use: its size and `transform`."""

    def __init__(self, image: Image.Image):
        self.image = image
        self.size = image.size

    def transform(
        self, size: tuple[int, int], method: int, data: tuple[float, ...], *, resample: int, fillcolor: Any
    ) -> Image.Image:
        a, b, c, d, e, f = data
        cubic = resample == Image.Resampling.BICUBIC
        if self.image.mode == "RGB" and (cubic or resample == Image.Resampling.BILINEAR):
            if (a, d, e, f) == (1, 0, 1, 0):
                return Image.fromarray(move_rows(np.asarray(self.image), slope=b, shift=c, fill=fillcolor, cubic=cubic))
            if (a, b, c, e) == (1, 0, 0, 1):
                columns = np.asarray(self.image.transpose(Image.Transpose.TRANSPOSE))
                turned = Image.fromarray(move_rows(columns, slope=d, shift=f, fill=fillcolor, cubic=cubic))
                return turned.transpose(Image.Transpose.TRANSPOSE)
        return self.image.transform(size, method, data, resample=resample, fillcolor=fillcolor)


def move(operation: Any, image: Image.Image, *args: Any, **kwargs: Any) -> Image.Image:
    """Apply one of timm's shears or translations to an image."""
    return operation(_Movable(image), *args, **kwargs)
