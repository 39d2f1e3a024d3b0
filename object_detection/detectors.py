"""torchvision's RetinaNet and Mask R-CNN on the feature maps of a timm network.

RetinaNet: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017. Mask R-CNN: He et al., ICCV 2017.
Feature pyramid between network and heads: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.
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
LAYER_DECAY_GROUPS = 6  # groups of the network's layers for layer decay
# Weights that only a classifier has: those of its last layers and, in some networks, of the norm before them.
CLASSIFIERS = ("cls", "fc.", "head.", "classifier.", "norm.")


class Pyramid(nn.Module):
    """A network and a pyramid on its maps, (N, 3, H, W) -> (N, out_channels, H / s, W / s) by level, finest first.

    Args:
        body: timm's feature extractor, which returns a list of maps.
        levels: positions of the maps to use in that list, finest first.
        fpn: the pyramid; its inputs are named "0", "1", ...
    """

    def __init__(self, body: nn.Module, levels: Sequence[int], fpn: FeaturePyramidNetwork, out_channels: int):
        super().__init__()
        self.body, self.levels, self.fpn, self.out_channels = body, tuple(levels), fpn, out_channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(images)  # (N, 3, H, W) -> (N, C, H / s, W / s) for each stride s of the network
        return self.fpn(OrderedDict((str(i), maps[level]) for i, level in enumerate(self.levels)))


def _in_float32(module: nn.Module, inputs: Any, output: Any) -> Any:
    """Forward hook that converts a module's half-precision output, as autocast computes it, to float32.

    torchvision computes anchors and boxes in the precision of the maps and of the heads' outputs. In bfloat16,
    coordinates beyond 512 px are multiples of 4.
    """
    return tree_map(lambda value: value.float() if value.dtype in HALF else value, output)


class Detector(nn.Module):
    """Base class of both detectors, which adds fusing, sizes, normalization and layer decay to torchvision's.

    The input is a list of images (3, H, W) in [0, 1], which the detector normalizes, resizes and pads. In train mode
    the output is a dict of losses, in eval mode one dict for each image: `boxes` (n, 4) as x1, y1, x2, y2 in pixels of
    that image, `labels` (n,), `scores` (n,), best first, and with Mask R-CNN `masks` (n, 1, H, W), probabilities.

    Attributes:
        losses: names of the losses.
        has_masks: whether the detector predicts masks.
        heads: the submodules whose outputs become boxes, classes and masks.
    """

    losses: tuple[str, ...]
    has_masks: bool
    heads: tuple[str, ...]
    train_sizes: tuple[int, ...] = TRAIN_SIZES
    test_size: int = 800

    def train(self, mode: bool = True) -> "Detector":
        """Set mode and sizes: torchvision draws one of `min_size` in training and takes the last in evaluation."""
        self.transform.min_size = self.train_sizes if mode else (self.test_size,)
        return super().train(mode)

    @property
    def network(self) -> nn.Module:
        """The timm network inside the detector."""
        return self.backbone.body.model

    @property
    def selection(self) -> nn.Module:
        """The module that selects detections, with `score_thresh`, `nms_thresh` and `detections_per_img`."""
        return self.roi_heads if self.has_masks else self

    @property
    def deploy(self) -> bool:
        return getattr(self.network, "deploy", False)

    @property
    def normalization(self) -> networks.Normalization:
        """Mean and std that images are normalized with; by default those of the network's configuration in timm."""
        return tuple(self.transform.image_mean), tuple(self.transform.image_std)

    @normalization.setter
    def normalization(self, value: networks.Normalization) -> None:
        self.transform.image_mean, self.transform.image_std = map(list, value)

    def switch_to_deploy(self) -> None:
        """Fuse the network in place. Raises ValueError if it has no deploy form or its lambda is below 1."""
        if not hasattr(self.network, "switch_to_deploy"):
            raise ValueError(f"{type(self.network).__name__} has no deploy form")
        self.network.switch_to_deploy()

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[int]]:
        """Return a function from parameter names to layer-decay groups: six for the network, one for all else."""
        if not hasattr(self.network, "group_matcher"):
            unknown = f"timm does not name the layers of {type(self.network).__name__}"
            raise ValueError(f"--layer_decay: {unknown}; add --layer_decay 1")
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

    def postprocess_detections(self, head_outputs, anchors, image_shapes):
        """As torchvision (0.29), which would also detect class 0, the background: its head has a logit for it."""
        levels = head_outputs["cls_logits"]
        levels = [torch.cat([torch.full_like(x[..., :1], -torch.inf), x[..., 1:]], dim=-1) for x in levels]
        return super().postprocess_detections({**head_outputs, "cls_logits": levels}, anchors, image_shapes)


class MaskRCNN(Detector, detection.MaskRCNN):
    losses = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    has_masks = True
    heads = ("rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")


def _build_body(name: str, strides: Sequence[int], **kwargs: Any) -> tuple[nn.Module, list[int]]:
    """Build timm's feature extractor. Returns it and, for each stride, the position of the last map of that stride."""
    networks.check_name(name, "the backbone", family="vanillanet*")
    if name.startswith("swin"):
        kwargs["strict_img_size"] = False  # otherwise it takes images of one size only
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
    """Create a detector, initialized from the current seed. The lambda of its network is 1.

    Args:
        name: `retinanet_` or `mask_rcnn_`, then any timm model with maps of strides 4, 8, 16 and 32.
        num_classes: number of classes, including the background, which is class 0.
        act_num, width_mult, deploy: arguments of a VanillaNet; `act_num` is 4 by default.
        fpn_channels: channels of the pyramid and of RetinaNet's head.
        box_channels: size of the hidden linear layers of Mask R-CNN's box head.
        mask_channels: channels of each convolution of Mask R-CNN's mask head.
        head_norm: use BatchNorm in pyramid and heads, and two convolutions and one hidden layer in Mask R-CNN's box
            head, similar to torchvision's v2 detectors. It helps in short trainings. The published detectors lack it.
        anchor_sizes: five sizes, px, by the pyramid's level, finest first. RetinaNet uses each at three scales, a third
            of an octave apart.
        train_sizes: px; in training, an image's short side is resized to one of these.
        test_size: px, length of the short side in evaluation.
        max_size: px, largest length of the long side.
        kwargs: further arguments of torchvision's detector.

    Raises:
        ValueError: unknown name, a network without these feature maps, or arguments that do not fit together.
    """
    prefix = next(filter(name.startswith, FRAMEWORKS), None)
    if prefix is None:
        raise ValueError(f"the detector {name} is not known: it is retinanet_ or mask_rcnn_ and a model of timm")
    backbone = name.removeprefix(prefix)
    if "min_size" in kwargs:
        raise ValueError("min_size is set by train_sizes and test_size: give those")
    if len(anchor_sizes) != len(ANCHOR_SIZES):
        raise ValueError(f"there must be {len(ANCHOR_SIZES)} anchor sizes, not {len(anchor_sizes)}")

    # The network, as timm's feature extractor.
    own = {"act_num": act_num, "width_mult": width_mult, "deploy": deploy or None}
    own = {argument: value for argument, value in own.items() if value is not None}
    if backbone.startswith("vanillanet"):
        own = {"act_num": 4, **own}
    elif own:
        raise ValueError(f"act_num, width_mult and deploy belong to VanillaNet, {backbone} has no such thing")
    retinanet = prefix == "retinanet_"  # needs no map of stride 4
    body, levels = _build_body(backbone, STRIDES[1:] if retinanet else STRIDES, **own)

    # The pyramid on the network's maps, and the anchors at each level.
    norm = nn.BatchNorm2d if head_norm else None
    channels = [body.feature_info.channels()[level] for level in levels]
    coarser = LastLevelP6P7(channels[-1], fpn_channels) if retinanet else LastLevelMaxPool()
    fpn = FeaturePyramidNetwork(channels, fpn_channels, extra_blocks=coarser, norm_layer=norm)
    pyramid = Pyramid(body, levels, fpn, fpn_channels)
    octaves = [2 ** (i / 3) for i in range(3)] if retinanet else [1]
    scales = tuple(tuple(int(size * octave) for octave in octaves) for size in anchor_sizes)
    anchors = AnchorGenerator(sizes=scales, aspect_ratios=(ASPECT_RATIOS,) * len(scales))

    # The heads; torchvision's classes assemble the detector.
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

    # What torchvision does not set: timm's normalization, sizes by mode, and boxes in float32 under autocast.
    images = networks.config_preprocessing(body.model.pretrained_cfg)
    detector.normalization = kwargs.get("image_mean") or images.mean, kwargs.get("image_std") or images.std
    detector.train_sizes, detector.test_size = tuple(train_sizes), test_size
    for part in ("backbone", *detector.heads):
        detector.get_submodule(part).register_forward_hook(_in_float32)
    return detector.train()


def load_backbone(
    detector: Detector, weights: Mapping[str, torch.Tensor], *, path: str | Path = "the checkpoint"
) -> None:
    """Load a classifier's weights, except those of layers that the detector has not, strictly into its network.

    Kernels of series activations with a smaller n, as in the released weights, are padded with zeros. Their outputs do
    not change.

    Raises:
        CheckpointError: the remaining weights do not fit.
    """
    own = detector.network.state_dict()
    with torch.device("meta"):  # timm prunes more than the classifier from some networks
        whole = timm.create_model(detector.network.pretrained_cfg["architecture"]).state_dict()
    pruned = [name for name in weights if name not in own and (name in whole or name.startswith(CLASSIFIERS))]
    weights = {name: value for name, value in weights.items() if name not in pruned}
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
