"""Build detectors from flags and from checkpoints, and record categories and normalization in checkpoints."""

import argparse
import inspect
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import networks
from loading.images import some
from object_detection.coco import CocoDataset
from object_detection.detectors import FRAMEWORKS, Detector, create_detector, load_backbone
from records.checkpoints import CheckpointError, load_weights


def build_detector(flags: Mapping[str, Any], num_classes: int) -> Detector:
    """Build a detector on the CPU, initialized from the current seed.

    Args:
        flags: the command's flags, or those recorded in a checkpoint, where newer flags may be missing.
        num_classes: number of classes, including the background.
    """
    names = inspect.signature(create_detector).parameters.keys() - {"name", "num_classes"}
    given = {name: flags[name] for name in names if flags.get(name) is not None}
    if flags.get("rois"):
        given["box_batch_size_per_image"] = flags["rois"]
    for when, count in zip(("train", "test"), flags.get("proposals") or (), strict=False):
        given |= {f"rpn_{end}_nms_top_n_{when}": count for end in ("pre", "post")}
    return create_detector(flags["model"], num_classes=num_classes, **given)


def describe(detector: Detector, dataset: CocoDataset) -> dict[str, Any]:
    """Return what a detector's checkpoint records about its categories and its normalization."""
    return {
        "classes": list(dataset.classes),
        "category_ids": list(dataset.category_ids),
        "normalization": [list(values) for values in detector.normalization],
    }


def set_normalization(detector: Detector, checkpoint: Mapping[str, Any]) -> None:
    """Use the normalization that the checkpoint records. Without a record, the detector keeps that of timm's model."""
    if "normalization" in checkpoint:
        detector.normalization = checkpoint["normalization"]


def check_categories(checkpoint: Mapping[str, Any], dataset: CocoDataset, *, path: str | Path) -> None:
    """Raise CheckpointError if the checkpoint's detector was trained on other categories."""
    theirs = checkpoint.get("classes")
    if theirs is not None and list(theirs) != list(dataset.classes):
        one, other = Counter(theirs), Counter(dataset.classes)
        odd = some(sorted((one - other) + (other - one)) or ["their order"])
        raise CheckpointError(f"{path} is of other categories than {dataset.path}; what differs: {odd}")


def load_detector(args: argparse.Namespace, detector: Detector, dataset: CocoDataset) -> None:
    """Load --finetune or --resume into the detector."""
    weights = networks.read(args.finetune or args.resume, key=args.model_key, prefix=args.model_prefix)
    check_categories(weights.checkpoint, dataset, path=weights.path)
    load_weights(detector, weights.tensors, path=weights.path)
    set_normalization(detector, weights.checkpoint)


def load_classifier(args: argparse.Namespace, detector: Detector) -> None:
    """Load --backbone_weights into the detector's network, and use the classifier's normalization if it is recorded."""
    weights = networks.read(args.backbone_weights, key=args.backbone_key if "backbone_key" in args.given else None)
    record = weights.record
    if record.slope not in (None, 1.0):
        raise CheckpointError(f"{weights.path} is from within deep training, at lambda {record.slope}: train it on")
    load_backbone(detector, weights.tensors, path=weights.path)
    if "mean" in record.preprocessing and "std" in record.preprocessing:
        detector.normalization = record.preprocessing["mean"], record.preprocessing["std"]


def open_detector(path: str | Path, *, key: str | None = None) -> tuple[Detector, tuple[str, ...]]:
    """Open a detector with the flags that its checkpoint records. Returns it, on the CPU in eval mode, and its classes.

    Args:
        key: key of the weights; `|` separates alternatives. None: the average, or else the detector itself.

    Raises ValueError if the file cannot be read or is not a detector's checkpoint.
    """
    weights = networks.read(path, key=key)
    record = weights.record
    if record.classes is None or not str(record.model).startswith(FRAMEWORKS):
        raise CheckpointError(f"{path} is not the checkpoint of a detector")
    deploy = bool(weights.checkpoint.get("deploy", False))
    detector = build_detector({**record.arguments, "deploy": deploy}, len(record.classes) + 1)
    load_weights(detector, weights.tensors, path=path)
    set_normalization(detector, weights.checkpoint)
    return detector.eval(), record.classes
