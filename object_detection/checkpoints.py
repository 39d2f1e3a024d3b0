"""Detectors from the flags of a command, and from checkpoints, with what a checkpoint records of the categories."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networks
from object_detection.coco import CocoDataset
from object_detection.detectors import FRAMEWORKS, Detector, create_detector, load_backbone
from records.checkpoints import CheckpointError, checkpoint_weights, load_checkpoint, load_weights

__all__ = [
    "build_detector",
    "check_categories",
    "describe",
    "load_classifier",
    "load_detector",
    "open_detector",
    "set_normalization",
]


def build_detector(args: argparse.Namespace, num_classes: int) -> Detector:
    """The detector on the CPU, initialized from the current seed."""
    given = {name: getattr(args, name) for name in ("box_channels", "mask_channels") if getattr(args, name)}
    if args.rois:
        given["box_batch_size_per_image"] = args.rois
    for when, count in zip(("train", "test"), args.proposals or (), strict=False):
        given |= {f"rpn_{end}_nms_top_n_{when}": count for end in ("pre", "post")}
    return create_detector(
        args.model,
        num_classes=num_classes,
        act_num=args.act_num,
        width_mult=args.width_mult,
        deploy=args.deploy,
        fpn_channels=args.fpn_channels,
        head_norm=args.head_norm,
        anchor_sizes=args.anchor_sizes,
        train_sizes=args.train_sizes,
        test_size=args.test_size,
        max_size=args.max_size,
        **given,
    )


def describe(detector: Detector, dataset: CocoDataset) -> dict[str, Any]:
    """What a detector's checkpoint holds of the categories, and of what images are normalized with."""
    return {
        "classes": list(dataset.classes),
        "category_ids": list(dataset.category_ids),
        "normalization": [list(values) for values in detector.normalization],
    }


def set_normalization(detector: Detector, checkpoint: Mapping[str, Any]) -> None:
    """As the detector's checkpoint has it; one that does not say is of a detector with that of its network in timm."""
    if "normalization" in checkpoint:
        detector.normalization = checkpoint["normalization"]


def check_categories(checkpoint: Mapping[str, Any], dataset: CocoDataset, *, path: str | Path) -> None:
    """Raises CheckpointError if the checkpoint is of a detector of other categories."""
    theirs = checkpoint.get("classes")
    if theirs is not None and list(theirs) != list(dataset.classes):
        odd = sorted(set(theirs) ^ set(dataset.classes)) or ["their order"]
        raise CheckpointError(
            f"{path} is of {len(theirs)} categories, {dataset.path} has {len(dataset.classes)}; what differs: "
            + ", ".join(odd[:5])
        )


def load_detector(args: argparse.Namespace, detector: Detector, dataset: CocoDataset) -> dict[str, Any]:
    """Load --finetune or --resume into the detector. Returns the checkpoint."""
    path = args.finetune or args.resume
    checkpoint = load_checkpoint(path)
    check_categories(checkpoint, dataset, path=path)
    weights = checkpoint_weights(checkpoint, key=args.model_key, prefix=args.model_prefix, path=path)
    load_weights(detector, weights, path=path)
    set_normalization(detector, checkpoint)
    return checkpoint


def load_classifier(args: argparse.Namespace, detector: Detector) -> None:
    """Load --backbone_weights into the detector's network, which gets images normalized as the classifier did."""
    path = args.backbone_weights
    checkpoint = load_checkpoint(path)
    slope = networks.recorded_slope(checkpoint)
    if slope != 1.0:
        raise CheckpointError(f"{path} is from within deep training, at lambda {slope}: train it to its end")
    load_backbone(
        detector, checkpoint_weights(checkpoint, key=args.backbone_key, whole_file=True, path=path), path=path
    )
    detector.normalization = networks.mean_and_std(detector.backbone.body, checkpoint)


def open_detector(path: str | Path, *, key: str = "model_ema|model") -> tuple[Detector, tuple[str, ...]]:
    """The detector of a checkpoint, built as the flags recorded in it say, on the CPU in eval mode, and its classes.

    Args:
        key: of the weights; `|` separates alternatives.

    Raises:
        ValueError: it cannot be read, or is not of a detector.
    """
    checkpoint = load_checkpoint(path)
    recorded = networks.recorded_args(checkpoint)
    if "classes" not in checkpoint or not str(recorded.get("model")).startswith(FRAMEWORKS):
        raise CheckpointError(f"{path} is not the checkpoint of a detector")
    recorded = recorded | {"deploy": bool(checkpoint.get("deploy", False))}
    detector = build_detector(argparse.Namespace(**recorded), len(checkpoint["classes"]) + 1)
    load_weights(detector, checkpoint_weights(checkpoint, key=key, path=path), path=path)
    set_normalization(detector, checkpoint)
    return detector.eval(), tuple(checkpoint["classes"])
