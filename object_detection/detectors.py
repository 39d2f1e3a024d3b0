"""torchvision's RetinaNet and Mask R-CNN on the feature maps of a timm network.

RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Mask R-CNN: He et al., ICCV 2017. The
pyramid between network and heads: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.models import detection
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

import models  # noqa: F401  registers the variants
import networks
from models.vanillanet import SeriesActivation
from object_detection import ANCHOR_SIZES, FRAMEWORKS, TRAIN_SIZES
from records.checkpoints import load_weights

HALF = (torch.float16, torch.bfloat16)
ASPECT_RATIOS = (0.5, 1.0, 2.0)
STRIDES = (4, 8, 16, 32)  # of C2 to C5
LAYER_DECAY_GROUPS = 6  # the network's layers are spread over, for layer decay
# What a classifier's checkpoint has beyond the features: its last layers, and in some networks the norm before them.
CLASSIFIERS = ("cls", "fc.", "head.", "classifier.", "norm.")


class Pyramid(nn.Module):
    """Features and a pyramid on them, (N, 3, H, W) -> maps (N, out_channels, H / s, W / s) by level, finest first.

    Args:
        body: timm's features of a network, a list of maps.
        levels: positions in that list to use, finest first.
        fpn: takes these maps by name: 0, 1, ...
    """

    def __init__(self, body: nn.Module, levels: Sequence[int], fpn: FeaturePyramidNetwork, out_channels: int):
        super().__init__()
        self.body, self.levels, self.fpn, self.out_channels = body, tuple(levels), fpn, out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(images)  # (N, 3, H, W) -> (N, C, H / s, W / s) for each stride s of the network
        return self.fpn(OrderedDict((str(i), maps[level]) for i, level in enumerate(self.levels)))


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """The output of a module in float32 where autocast computed it in half precision; a hook.

    torchvision makes anchors and boxes in the precision of the maps and of the heads' outputs. In bfloat16 a coordinate
    beyond 512 px is a multiple of 4.
    """
    return tree_map(lambda value: value.float() if value.dtype in HALF else value, output)


class Detector(nn.Module):
    """What both detectors have beyond torchvision's: the network's form, and its layers for layer decay.

    Images are a list of (3, H, W) in [0, 1]; they are normalized, resized and padded within. In train mode the output
    is a dict of losses, in eval mode a dict for each image: `boxes` (n, 4) as x1, y1, x2, y2 in pixels of that image,
    `labels` (n,), `scores` (n,), best first, and of Mask R-CNN `masks` (n, 1, H, W), probabilities.

    Attributes:
        losses: names of the losses.
        has_masks: whether there are masks.
        heads: the submodules whose outputs become boxes, classes and masks.
    """

    losses: tuple[str, ...]
    has_masks: bool
    heads: tuple[str, ...]
    train_sizes: tuple[int, ...] = TRAIN_SIZES
    test_size: int = 800

    def train(self, mode: bool = True) -> "Detector":
        """torchvision draws one of `min_size` in training and takes the last in evaluation, so it is set by mode."""
        self.transform.min_size = self.train_sizes if mode else (self.test_size,)
        return super().train(mode)

    @property
    def network(self) -> nn.Module:
        """The timm network within."""
        return self.backbone.body.model

    @property
    def selection(self) -> nn.Module:
        """What selects the detections, by its `score_thresh`, `nms_thresh` and `detections_per_img`."""
        return self.roi_heads if self.has_masks else self

    @property
    def deploy(self) -> bool:
        return getattr(self.network, "deploy", False)

    @property
    def normalization(self) -> networks.Normalization:
        """Mean and std that images are normalized with, those of timm's configuration of the network if not set."""
        return tuple(self.transform.image_mean), tuple(self.transform.image_std)

    @normalization.setter
    def normalization(self, value: networks.Normalization) -> None:
        self.transform.image_mean, self.transform.image_std = map(list, value)

    def switch_to_deploy(self) -> None:
        """Fuse the network, in place. ValueError if it has no deploy form, or its lambda is below 1."""
        if not hasattr(self.network, "switch_to_deploy"):
            raise ValueError(f"{type(self.network).__name__} has no deploy form")
        self.network.switch_to_deploy()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int]]:
        """The group of a parameter for layer decay: the network's layers over six groups, all else a seventh."""
        layers = group_parameters(self.network, self.network.group_matcher(coarse=False), reverse=True)
        count = max(layers.values()) + 1
        groups = {f"backbone.body.model.{name}": i * LAYER_DECAY_GROUPS // count for name, i in layers.items()}
        return lambda name: (groups.get(name, LAYER_DECAY_GROUPS),)

    def no_weight_decay(self) -> set[str]:
        spared = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        return {f"backbone.body.model.{name}" for name in spared}


class RetinaNet(Detector, detection.RetinaNet):
    losses = ("classification", "bbox_regression")
    has_masks = False
    heads = ("head",)


class MaskRCNN(Detector, detection.MaskRCNN):
    losses = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    has_masks = True
    heads = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")


def _build_body(name: str, strides: Sequence[int], **kwargs: Any) -> tuple[nn.Module, list[int]]:
    """timm's features of a network, and for each stride the position of its last map."""
    networks.check_name(name, "the backbone", family="vanillanet*")
    if name.startswith("swin"):
        kwargs["strict_img_size"] = False  # or it takes images of one size only
    try:
        body = timm.create_model(name, features_only=True, feature_cls="getter", **kwargs)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ValueError(f"the backbone {name} gives no pyramid of feature maps ({error})") from None
    positions = {stride: i for i, stride in enumerate(body.feature_info.reduction())}
    if not set(strides) <= set(positions):
        raise ValueError(f"the backbone {name} has maps of strides {sorted(positions)}, {list(strides)} are needed")
    return body, [positions[stride] for stride in strides]


def create_detector(
    name: str,
    *,
    num_classes: int,
    act_num: int | None = None,
    width_mult: float | None = None,
    deploy: bool = False,
    fpn_channels: int = 256,
    box_channels: int = 1024,
    mask_channels: Sequence[int] = (256, 256, 256, 256),
    head_norm: bool = False,
    anchor_sizes: Sequence[int] = ANCHOR_SIZES,
    train_sizes: Sequence[int] = TRAIN_SIZES,
    test_size: int = 800,
    max_size: int = 1333,
    **kwargs: Any,
) -> Detector:
    """A detector, initialized from the current seed; its network is at lambda 1.

    Args:
        name: `retinanet_` or `mask_rcnn_`, then any model of timm that has maps of strides 4, 8, 16 and 32.
        num_classes: with the background, which is class 0.
        act_num, width_mult, deploy: of a VanillaNet; the first is 4 if not given.
        fpn_channels: of the pyramid, and of all of RetinaNet's head.
        box_channels: of the two hidden layers of Mask R-CNN's box head.
        mask_channels: of the convolutions of its mask head.
        head_norm: BatchNorm in pyramid and heads, and two convolutions more in Mask R-CNN's box head, which helps heads
            that learn for a short time (as torchvision's v2 detectors have it); the published ones have none.
        anchor_sizes: five, px, by the pyramid's level, finest first; RetinaNet has each of them thrice, a third of an
            octave apart.
        train_sizes: px, one of which an image's short side is resized to in training.
        test_size: px, of the short side in evaluation.
        max_size: px, of the long side at most.
        kwargs: of torchvision's detector.

    Raises:
        ValueError: an unknown name, a network without the feature maps, an argument that does not go with the others.
    """
    prefix = next(filter(name.startswith, FRAMEWORKS), None)
    if prefix is None:
        raise ValueError(f"the detector {name} is not known: it is retinanet_ or mask_rcnn_ and a model of timm")
    backbone = name.removeprefix(prefix)
    if len(anchor_sizes) != len(ANCHOR_SIZES):
        raise ValueError(f"there must be {len(ANCHOR_SIZES)} anchor sizes, not {len(anchor_sizes)}")

    # The network, as timm's features of it.
    own = {"act_num": act_num, "width_mult": width_mult, "deploy": deploy or None}
    own = {argument: value for argument, value in own.items() if value is not None}
    if backbone.startswith("vanillanet"):
        own = {"act_num": 4, **own}
    elif own:
        raise ValueError(f"act_num, width_mult and deploy belong to VanillaNet, {backbone} has no such thing")
    retinanet = prefix == "retinanet_"  # which needs no map of stride 4
    body, levels = _build_body(backbone, STRIDES[1:] if retinanet else STRIDES, **own)

    # The pyramid on its maps, and the anchors at each of its levels.
    norm = nn.BatchNorm2d if head_norm else None
    channels = [body.feature_info.channels()[level] for level in levels]
    coarser = LastLevelP6P7(channels[-1], fpn_channels) if retinanet else LastLevelMaxPool()
    fpn = FeaturePyramidNetwork(channels, fpn_channels, extra_blocks=coarser, norm_layer=norm)
    pyramid = Pyramid(body, levels, fpn, fpn_channels)
    octaves = [2 ** (i / 3) for i in range(3)] if retinanet else [1]
    scales = tuple(tuple(int(size * octave) for octave in octaves) for size in anchor_sizes)
    anchors = AnchorGenerator(sizes=scales, aspect_ratios=(ASPECT_RATIOS,) * len(scales))

    # The heads of the two, which torchvision puts together.
    if retinanet:
        detector = RetinaNet(
            pyramid,
            num_classes,
            anchor_generator=anchors,
            head=RetinaNetHead(fpn_channels, 3 * len(ASPECT_RATIOS), num_classes, norm_layer=norm),
            **{"max_size": max_size, "detections_per_img": 100} | kwargs,
        )
    else:
        detector = MaskRCNN(
            pyramid,
            rpn_anchor_generator=anchors,
            box_head=FastRCNNConvFCHead((fpn_channels, 7, 7), [fpn_channels] * 2, [box_channels], norm_layer=norm)
            if head_norm
            else TwoMLPHead(fpn_channels * 7**2, box_channels),
            box_predictor=FastRCNNPredictor(box_channels, num_classes),
            mask_head=MaskRCNNHeads(fpn_channels, mask_channels, dilation=1, norm_layer=norm),
            mask_predictor=MaskRCNNPredictor(mask_channels[-1], mask_channels[-1], num_classes),
            **{"max_size": max_size} | kwargs,
        )

    # What torchvision leaves to us: normalization, sizes by mode, and boxes in float32.
    images = networks.config_preprocessing(body.model.pretrained_cfg)
    detector.normalization = images.mean, images.std
    detector.train_sizes, detector.test_size = tuple(train_sizes), test_size
    for part in ("backbone", *detector.heads):
        detector.get_submodule(part).register_forward_hook(_in_float32)
    return detector.train()


def load_backbone(
    detector: Detector, weights: Mapping[str, torch.Tensor], *, path: str | Path = "the checkpoint"
) -> None:
    """Load a classifier's weights into the detector's network, strictly, less the classifier.

    A series activation of a smaller n, as the released weights have it, is given a margin of zeros, which computes the
    same.

    Raises:
        CheckpointError: what is left does not fit.
    """
    own = detector.network.state_dict()
    weights = {name: value for name, value in weights.items() if name in own or not name.startswith(CLASSIFIERS)}
    for name, module in detector.network.named_modules():
        kernel = f"{name}.weight"
        if isinstance(module, SeriesActivation) and kernel in weights:
            margin = (module.kernel_size[0] - weights[kernel].shape[-1]) // 2
            if margin > 0:
                weights[kernel] = F.pad(weights[kernel], (margin,) * 4)
    load_weights(detector.network, weights, path=path)


retinanet_vanillanet_11 = partial(create_detector, "retinanet_vanillanet_11")
retinanet_vanillanet_13 = partial(create_detector, "retinanet_vanillanet_13")
mask_rcnn_vanillanet_11 = partial(create_detector, "mask_rcnn_vanillanet_11")
mask_rcnn_vanillanet_13 = partial(create_detector, "mask_rcnn_vanillanet_13")
