"""Class-activation maps: where in an image a network finds the evidence for a class.

The paper uses such maps to compare VanillaNet-9 with ResNet-50. The map is Grad-CAM's, ReLU(sum over c of w_c A_c),
where A (C, h, w) is a feature map and w_c is the mean over positions of the gradient of the class's logit with respect
to A_c. With a linear classifier on average-pooled features, as VanillaNet has at lambda 1, this is the original
class-activation map (Zhou et al., "Learning Deep Features for Discriminative Localization", CVPR 2016).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from loading.transforms import build_eval_transform
from networks import Network
from pictures import style
from pictures.subjects import Photo, label, short_name, true_class


class _Split(nn.Module):
    """A timm model whose last feature map, before pooling, passes through `features`, where it can be observed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.features = nn.Identity()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.forward_head(self.features(self.model.forward_features(images)))


def _observed_layer(split: _Split, level: int | None) -> nn.Module:
    """Return the layer whose output is the feature map: the last before pooling, or one in timm's `feature_info`."""
    levels = getattr(split.model, "feature_info", None) or []
    if level is None:
        if getattr(split.model, "global_pool", None) != "token":
            return split.features
        # The logits depend on the class token alone. The last block's other tokens have no influence on them; those of
        # the block before do, through the attention of the last block.
        level = -2
    try:
        return split.model.get_submodule(levels[level]["module"])
    except (IndexError, KeyError, AttributeError):
        known = f"timm names {len(levels)} feature maps of the network"
        raise ValueError(f"--level {level} is not there: {known}") from None


def _as_map(features: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Convert features in the layout of timm's `output_fmt`, or tokens (N, T, C) of a square grid, to (N, C, h, w).

    Raises:
        ValueError: several maps, tokens that form no square, or a single position.
    """
    if not isinstance(features, torch.Tensor):
        raise ValueError("the model has several last feature maps: choose one by --level")
    if features.ndim == 4 and getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = features.permute(0, 3, 1, 2)
    elif features.ndim == 3:
        count = features.shape[1]
        # Some models add their class token only after the blocks, so that these tokens have no prefix yet.
        for prefix in (getattr(model, "num_prefix_tokens", 0), 0):
            side = math.isqrt(count - prefix)
            if side * side == count - prefix:
                features = features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
                break
    if features.ndim != 4:
        raise ValueError(f"the network's features of shape {tuple(features.shape[1:])} are no map")
    if features.shape[2:].numel() == 1:
        raise ValueError("the feature map is a single position at this input size: choose an earlier one by --level")
    return features


def activation_maps(
    model: nn.Module, images: torch.Tensor, *, target: int | None = None, level: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Compute class-activation maps of a timm model. The model is left in eval mode, without in-place activations.

    Args:
        images: network input (N, 3, H, W).
        target: the class to explain; None: the predicted class of each image.
        level: index into timm's `feature_info`, negative from the end; None: the last feature map before pooling.

    Returns:
        The maps (N, H, W), float32, enlarged bilinearly and scaled to [0, 1], or all 0 without evidence for the class;
        and the logits (N, classes).

    Raises:
        ValueError: the package grad-cam is missing, the class or level does not exist, or the features are no map.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        raise ValueError("class-activation maps need the package grad-cam: pip install grad-cam") from None
    if target is not None and not 0 <= target < model.num_classes:
        raise ValueError(f"--target {target} is no class of the network, which has 0 to {model.num_classes - 1}")
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # an in-place activation would overwrite the observed feature map
    # The library calls `observe` with the layer's output, and then with the gradient of the class's logit.
    split = _Split(model)
    targets = None if target is None else [ClassifierOutputTarget(target)] * len(images)
    seen = []  # the feature map, then its gradient

    def observe(features: torch.Tensor) -> torch.Tensor:
        seen.append(_as_map(features, model))
        return seen[-1]

    cam = GradCAM(split, [_observed_layer(split, level)], reshape_transform=observe)
    try:  # not `with cam`, because its exit suppresses an IndexError
        with torch.enable_grad():
            maps = cam(images, targets)
        logits = cam.outputs.detach().cpu().numpy()
    except AttributeError as error:  # raised by the library if it got no gradient
        if len(seen) == 2:
            raise
        raise ValueError("the model does not answer by the feature map that timm names: try --level") from error
    finally:
        cam.activations_and_grads.release()
    model.zero_grad(set_to_none=True)
    return maps, logits


@dataclass(frozen=True)
class View:
    """One network's answer for one image, with the map that explains it."""

    image: np.ndarray  # (H, W, 3) in [0, 1], the part of the image that the network sees
    heat: np.ndarray  # (H, W) in [0, 1], the map
    title: str  # the network's answer in words
    right: bool | None  # whether the answer is the true class; None if this is unknown


def _views(network: Network, photos: Sequence[Photo], target: int | None, level: int | None) -> list[View]:
    """Return a network's view of each image. With `target`, the title also has the probability of that class."""
    prepare = build_eval_transform(network.preprocessing)
    inputs = torch.stack([prepare(photo.image) for photo in photos])  # (N, 3, H, W)
    maps, logits = activation_maps(network.module, inputs, target=target, level=level)  # (N, H, W), (N, classes)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (network.preprocessing.mean, network.preprocessing.std))
    shown = (inputs * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (N, H, W, 3)
    views = []
    for photo, image, heat, chances in zip(
        photos, shown, maps, network.probabilities(torch.from_numpy(logits)), strict=True
    ):
        answer, truth = int(chances.argmax()), true_class(network, photo.folder)
        title = f"{short_name(network, answer)} {chances[answer]:.2f}"
        if target is not None:
            title = f"map of {short_name(network, target)} {chances[target]:.2f}\nanswer {title}"
        views.append(View(image, heat, title, None if truth is None else truth == answer))
    return views


PANEL = 2.1  # inches
WIDTH = 11  # inches, largest width of images side by side
MARKS = {None: ("", style.INK), True: ("\u2713 ", style.RIGHT), False: ("\u2717 ", style.WRONG)}


@style.styled
def cam_figure(
    opened: Sequence[Network], photos: Sequence[Photo], *, target: int | None = None, level: int | None = None
) -> Figure:
    """Draw a group of panels for each image: the first network's input, then each network's map over its own input.

    Groups are placed side by side up to `WIDTH`, and then in further rows.

    Args:
        target, level: see `activation_maps`.

    Raises:
        ValueError: see `activation_maps`; the message names the network.
    """
    columns: dict[str, list[View]] = {}
    for number, network in enumerate(opened, 1):
        column = label(network) if label(network) not in columns else f"{label(network)} ({number})"
        try:
            columns[column] = _views(network, photos, target, level)
        except ValueError as error:
            raise ValueError(f"{' '.join(column.split())}: {error}") from error
    # The true class is named once for all networks, in the words of the first.
    truths = [true_class(opened[0], photo.folder) for photo in photos]
    names = [
        photo.name if truth is None else f"{photo.name}\ntrue: {short_name(opened[0], truth)}"
        for photo, truth in zip(photos, truths, strict=True)
    ]
    # Each row of the grid holds whole groups. Panels without an image are removed.
    group = 1 + len(columns)
    across = min(len(names), max(1, int(WIDTH / (PANEL * group))))
    down = -(-len(names) // across)
    figure = style.new_figure(PANEL * group * across, (PANEL + 0.4) * down + 0.9)
    grid = figure.subplots(down, across * group, squeeze=False)
    for axes, heading in zip(grid[0], across * ("", *columns), strict=True):
        axes.set_title(heading, fontsize=8.5, loc="center")
    groups = grid.reshape(down * across, group)
    for axes in groups[len(names) :].flat:
        axes.remove()
    for panels, name, *views in zip(groups, names, *columns.values(), strict=False):
        panels[0].imshow(views[0].image)
        panels[0].set_xlabel(name, fontsize=8)
        for axes, view in zip(panels[1:], views, strict=True):
            axes.imshow(view.image)
            axes.imshow(view.heat, cmap="inferno", vmin=0, vmax=1, alpha=0.55)
            mark, colour = MARKS[view.right]
            axes.set_xlabel(f"{mark}{view.title}", fontsize=8, color=colour)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    what = "its answer" if target is None else f"the class {short_name(opened[0], target)}"
    known = any(view.right is not None for views in columns.values() for view in views)
    marks = f" {MARKS[True][0]}right, {MARKS[False][0]}wrong." if known else ""
    small = f"Bright: evidence for the class. Each map has a scale of its own.{marks}"
    style.caption(figure, f"Where a network sees evidence for {what}", small)
    return figure
