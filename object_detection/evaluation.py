"""Detections in COCO's result format, and average precision (AP) by pycocotools."""

import contextlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from engine import Precision
from object_detection.coco import CocoDataset, encode_segment
from object_detection.detectors import Detector

logger = logging.getLogger(__name__)

# pycocotools' first six numbers: AP over IoU 0.50 to 0.95, at 0.50, at 0.75, of small, medium and large objects.
STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
KINDS = {"bbox": "box", "segm": "mask"}  # pycocotools' name of each kind, and ours
MASK_THRESHOLD = 0.5


def to_results(detection: Mapping[str, torch.Tensor], *, image_id: int, category_ids: Sequence[int]) -> list[dict]:
    """Convert one image's detections to rows of COCO's result format.

    Args:
        detection: what a detector returns for the image, in pixels of the original image.
        category_ids: category ids of classes 1, 2, ...
    """
    x1, y1, x2, y2 = detection["boxes"].cpu().double().unbind(1)
    boxes = torch.stack([x1, y1, x2 - x1, y2 - y1], 1).tolist()  # (n, 4), corners -> corner and size
    rows = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, detection["labels"].tolist(), detection["scores"].tolist(), strict=True)
    ]
    if "masks" in detection:
        from pycocotools import mask as mask_utils

        masks = (detection["masks"][:, 0] > MASK_THRESHOLD).byte().cpu().numpy()  # (n, H, W)
        for row, mask in zip(rows, masks, strict=True):
            rle = mask_utils.encode(np.asfortranarray(mask))
            row["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
    return rows


@torch.no_grad()
def detect(detector: Detector, batches: Iterable, *, dataset: CocoDataset, precision: Precision) -> list[dict]:
    """Return result rows of all images in `batches` of (images, targets, indices). The detector's mode is restored."""
    training = detector.training
    detector.eval()
    rows = []
    for images, _, indices in batches:
        with precision.autocast():
            detections = detector([image.to(precision.device, non_blocking=True) for image in images])
        for detection, index in zip(detections, indices, strict=True):
            image_id = dataset.images[index]["id"]
            rows += to_results(detection, image_id=image_id, category_ids=dataset.category_ids)
    detector.train(training)
    return rows


def average_precision(
    data: Mapping[str, Any], results: Sequence[Mapping[str, Any]], *, masks: bool
) -> dict[str, float]:
    """Compute AP in [0, 1] with pycocotools: `box_AP`, `box_AP50`, ..., and with `masks` also `mask_AP`, ...

    Args:
        data: annotations, as `read_annotations` returns them.
        results: rows of all images, in any order.

    Returns only numbers that have a ground truth: without a small object there is no `box_APs`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = {}
    for kind in ("bbox", "segm") if masks else ("bbox",):
        # pycocotools writes into rows, so copy them. Mask rows get no box, because it would set the mask's area.
        truth = COCO()
        truth.dataset = _ground_truth(data, kind)
        rows = [{key: value for key, value in row.items() if kind == "bbox" or key != "bbox"} for row in results]

        # Compute the numbers, without pycocotools' printed output.
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
            detections = truth.loadRes(rows) if rows else COCO()
            evaluation = COCOeval(cocoGt=truth, cocoDt=detections, iouType=kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        values = dict(zip(STATISTICS, evaluation.stats.tolist(), strict=False))
        found |= {f"{KINDS[kind]}_{name}": value for name, value in values.items() if value >= 0}
    return found


def _ground_truth(data: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Copy annotations for pycocotools: with ids from 1, because 0 means unmatched; for masks, only with a segment."""
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    annotations = []
    for row in data["annotations"]:
        row = {**row, "id": len(annotations) + 1}
        if kind == "segm":
            row["segmentation"] = encode_segment(row.get("segmentation"), *sizes[row["image_id"]])
            if row["segmentation"] is None:
                continue
        annotations.append(row)
    left_out = len(data["annotations"]) - len(annotations)
    if left_out:
        logger.warning("%d annotations without a segment are left out of mask AP", left_out)
    return {**data, "annotations": annotations}
