"""Transforms of training and validation images."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from PIL import Image
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    auto_augment,
    create_transform,
)
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from loading.images import upright
from loading.resampling import RandomResizedCrop, move
from loading.views import TrainTransform
from records.files import first_line

Transform = Callable[[Image.Image], torch.Tensor]

NATIVE_SIZE = 32  # px; up to this input size, images of CIFAR and FMNIST are not resized
MAX_ASPECT = 4  # largest ratio of the sides of an image to be resized for evaluation
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


def mean_and_std(imagenet: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Return (mean, std) to normalize images with, per channel of pixels in [0, 1]: ImageNet's, or else 0.5 for all."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def keeps_native_size(data_set: str, input_size: int) -> bool:
    """Return whether images are small enough to be padded and cropped instead of resized: `Preprocessing.native`."""
    return data_set in ("CIFAR", "FMNIST") and input_size <= NATIVE_SIZE


def default_crop_pct(input_size: int) -> float:
    """Return the share of the resized shorter side to keep: 0.875 below 384 px, and 1 from there on."""
    return 0.875 if input_size < 384 else 1.0


@dataclass(frozen=True)
class Preprocessing:
    """How images become a network's input, float32, (3, input_size, input_size).

    For evaluation, the shorter side is resized to int(input_size / crop_pct) and the centre is cropped.

    Raises:
        ValueError: crop_pct is out of range or given with `native`, or interpolation or crop_mode is unknown.
    """

    input_size: int  # px
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN  # subtracted from each channel of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD  # then divides each channel
    crop_pct: float | None = None  # in (0, 1]; None becomes `default_crop_pct`, but stays None for native images
    interpolation: str = "bicubic"  # timm's name, for resizing in evaluation
    crop_mode: str = "center"  # timm's; "squash" resizes both sides, "border" resizes the longer one and pads
    native: bool = False  # no resizing: evaluation crops or pads images, training pads by 4 px and crops
    exif_transpose: bool = False  # turn images upright by their EXIF orientation first

    def __post_init__(self):
        if self.native and self.crop_pct is not None:
            raise ValueError("--crop_pct has no effect on images that are not resized")
        if not self.native and self.crop_pct is None:
            object.__setattr__(self, "crop_pct", default_crop_pct(self.input_size))
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)}")


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's posterize, also for 0 bits, which some of timm's policies ask for and newer Pillow refuses."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


AXES = ("shear_x", "shear_y", "translate_x_abs", "translate_x_rel", "translate_y_abs", "translate_y_rel")
MOVES = tuple(getattr(auto_augment, name) for name in AXES)


def _mend(policy: Any) -> None:
    """Change a timm policy in place to use `_posterize`, `move` and a filter with which Pillow can rotate."""
    for op in getattr(policy, "ops", None) or chain.from_iterable(policy.policy):
        if op.kwargs.get("resample") == Image.Resampling.LANCZOS:
            op.kwargs["resample"] = Image.Resampling.BICUBIC
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
        elif op.aug_fn in MOVES:
            op.aug_fn = partial(move, op.aug_fn)


def build_train_transform(
    preprocessing: Preprocessing,
    *,
    color_jitter: float = 0.4,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
) -> TrainTransform:
    """Build timm's training transform, from an RGB image to a random view: float32, (3, input_size, input_size).

    Args:
        preprocessing: its crop_pct, interpolation and crop_mode are not used.
        color_jitter: strength; timm skips it if `aa` is on, unless `aa` is a "3a" policy.
        aa: timm's auto-augment policy; None, "" and "none" turn it off.
        interpolation: "random" (bilinear or bicubic), or the name of one of Pillow's filters.
        reprob, remode, recount: probability, fill mode and largest number of areas of random erasing.
        scale, ratio: ranges of the random-resized crop's share of the image area, and of its width / height.
        hflip, vflip: probabilities of a horizontal and of a vertical flip.

    Raises:
        ValueError: timm does not know the policy, the interpolation or the fill mode.
    """
    # Build timm's own transform, which raises errors of many kinds.
    policy = None if (aa or "").lower() in ("", "none") else aa
    try:
        unknown = [part for part in (policy or "").split("-")[1:] if not re.search(r"\d|^t", part)]
        if unknown:  # timm ignores them
            raise ValueError(f"unknown section {unknown[0]}")
        first, second, last = create_transform(
            input_size=preprocessing.input_size,
            is_training=True,
            separate=True,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter or None,
            auto_augment=policy,
            interpolation=interpolation,
            mean=preprocessing.mean,
            std=preprocessing.std,
            re_prob=reprob,
            re_mode=remode,
            re_count=recount,
        )
    except (AssertionError, KeyError, ValueError) as error:
        asked = f"--aa {aa} --train_interpolation {interpolation} --remode {remode}"
        raise ValueError(f"timm cannot augment by {asked}: {first_line(error)}") from error
    # Keep timm's flips and policy, and replace its crop. `TrainTransform` makes tensors of whole batches instead.
    steps = [*first.transforms, *second.transforms]
    for step in steps:
        if isinstance(step, auto_augment.RandAugment | auto_augment.AutoAugment | auto_augment.AugMixAugment):
            _mend(step)
    if preprocessing.native:
        steps[0] = transforms.RandomCrop(preprocessing.input_size, padding=4, pad_if_needed=True)
    else:
        steps[0] = RandomResizedCrop(preprocessing.input_size, scale=scale, ratio=ratio, interpolation=interpolation)
    if preprocessing.exif_transpose:
        steps.insert(0, upright)
    erase = next((step for step in last.transforms if isinstance(step, RandomErasing)), None)
    return TrainTransform(steps, erase=erase, mean=preprocessing.mean, std=preprocessing.std)


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Crop the middle of an image whose longer side is more than `MAX_ASPECT` times the shorter one.

    The centre crop that follows uses less than that, and resizing an image of 20,000 x 1 px to a shorter side of 256 px
    would take 4 GB.
    """
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = (min(side, limit) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def build_eval_transform(preprocessing: Preprocessing) -> Transform:
    """Build the transform from an RGB image to float32, (3, input_size, input_size), as in timm's validate.py."""
    size, mean, std = preprocessing.input_size, preprocessing.mean, preprocessing.std
    first = [upright] if preprocessing.exif_transpose else []
    if preprocessing.native:
        steps = [transforms.CenterCrop(size), transforms.ToTensor(), transforms.Normalize(mean, std)]
        return transforms.Compose([*first, *steps])
    transform = create_transform(
        input_size=size,
        is_training=False,
        interpolation=preprocessing.interpolation,
        mean=mean,
        std=std,
        crop_pct=preprocessing.crop_pct,
        crop_mode=preprocessing.crop_mode,
    )
    if preprocessing.crop_mode == "center":
        first.append(_limit_aspect)
    return transforms.Compose([*first, *transform.transforms])
