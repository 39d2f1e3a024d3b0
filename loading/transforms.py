"""Transforms of a training and of a validation image."""

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

NATIVE_SIZE = 32  # px; up to here the images of CIFAR and FMNIST are not resized
MAX_ASPECT = 4  # of an image to be resized for evaluation
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


def mean_and_std(imagenet: bool) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """What images are normalized with, (mean, std) of each channel in [0, 1]: ImageNet's, or else 0.5 for all."""
    if imagenet:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD


def keeps_native_size(data_set: str, input_size: int) -> bool:
    """Whether images are so small that they are padded and cropped instead of resized: `Preprocessing.native`."""
    return data_set in ("CIFAR", "FMNIST") and input_size <= NATIVE_SIZE


def default_crop_pct(input_size: int) -> float:
    """The part of the resized shorter side that is kept: 0.875 below 384 px and 1 from there on."""
    return 0.875 if input_size < 384 else 1.0


@dataclass(frozen=True)
class Preprocessing:
    """How images become a network's input, float32, (3, input_size, input_size).

    For evaluation, the shorter side is resized to int(input_size / crop_pct) and the centre cropped.

    Raises:
        ValueError: crop_pct is out of range, or given with `native`, or interpolation or crop_mode are unknown.
    """

    input_size: int  # px
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN  # of each channel of pixels in [0, 1], subtracted
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD  # likewise, divided by
    crop_pct: float | None = None  # in (0, 1]; None becomes `default_crop_pct`, but stays None for native images
    interpolation: str = "bicubic"  # of evaluation's resizing, by timm's name
    crop_mode: str = "center"  # timm's; "squash" resizes both sides, "border" the longer one and fills the rest
    native: bool = False  # not resized: evaluation crops or pads images, training crops from 4 px of padding
    exif_transpose: bool = False  # turn images upright by their EXIF orientation first

    def __post_init__(self):
        if self.native and self.crop_pct is not None:
            raise ValueError("--crop_pct has no effect on images that are not resized: add --resize true")
        if not self.native and self.crop_pct is None:
            object.__setattr__(self, "crop_pct", default_crop_pct(self.input_size))
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"--crop_pct must be above 0 and at most 1, not {self.crop_pct}")
        for name, known in (("interpolation", INTERPOLATIONS), ("crop_mode", CROP_MODES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)}")


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """As timm's, for 0 bits too: its policies come to that at their largest magnitude, and newer Pillow refuses it."""
    return auto_augment.posterize(image, bits_to_keep) if bits_to_keep else Image.new(image.mode, image.size)


AXES = ("shear_x", "shear_y", "translate_x_abs", "translate_x_rel", "translate_y_abs", "translate_y_rel")
MOVES = tuple(getattr(auto_augment, name) for name in AXES)


def _mend(policy: Any) -> None:
    """Put `_posterize`, `move` and a filter that Pillow can rotate with into a policy of timm's, in place."""
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
    """From an RGB image to a random view of it, float32, (3, input_size, input_size), as timm's `create_transform`.

    Args:
        preprocessing: of which crop_pct, interpolation and crop_mode do not count.
        color_jitter: strength; timm leaves it out where `aa` is on, unless that is a "3a" policy.
        aa: timm's auto-augment policy; None, "" and "none" are off.
        interpolation: "random" (bilinear or bicubic), or one of Pillow's by name.
        reprob, remode, recount: random erasing: probability, what fills the area, the largest number of areas.
        scale, ratio: range of the random-resized crop's share of the area, and of its width / height.
        hflip, vflip: probability of a flip to the other side, and upside down.

    Raises:
        ValueError: timm does not know the policy, the interpolation or the mode.
    """
    # timm's own transform, whose errors are of many kinds.
    policy = None if aa in (None, "", "none") else aa
    try:
        unknown = [part for part in (policy or "").split("-")[1:] if not re.search(r"\d|^t", part)]
        if unknown:  # timm passes over them
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
    # timm's steps: crop and flips, the policy, then tensors, which `TrainTransform` makes of whole batches.
    steps = [*first.transforms, *second.transforms]
    for step in steps:
        if isinstance(step, auto_augment.RandAugment | auto_augment.AutoAugment | auto_augment.AugMixAugment):
            _mend(step)
    if preprocessing.native:
        steps[0] = transforms.RandomCrop(preprocessing.input_size, padding=4)
    else:
        steps[0] = RandomResizedCrop(preprocessing.input_size, scale=scale, ratio=ratio, interpolation=interpolation)
    if preprocessing.exif_transpose:
        steps.insert(0, upright)
    erase = next((step for step in last.transforms if isinstance(step, RandomErasing)), None)
    return TrainTransform(steps, erase=erase, mean=preprocessing.mean, std=preprocessing.std)


def _limit_aspect(image: Image.Image) -> Image.Image:
    """Crop the middle of an image that is more than `MAX_ASPECT` times as long as wide.

    The centre crop that follows sees less than that, and to resize the shorter side of 20,000 x 1 px to 256 px would
    take 4 GB.
    """
    limit = MAX_ASPECT * min(image.size)
    if max(image.size) <= limit:
        return image
    width, height = (min(side, limit) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def build_eval_transform(preprocessing: Preprocessing) -> Transform:
    """From an RGB image to its middle, float32, (3, input_size, input_size), as timm's validate.py makes it."""
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
