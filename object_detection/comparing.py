"""Compare the detections of a detector with those of its fused or exported form."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from object_detection.detectors import Detector


@contextmanager
def _unpasted(detector: Detector) -> Iterator[None]:
    """Let a detector return what its heads make: boxes in pixels of the resized image, masks not pasted into the image.

    Pasting rounds boxes to whole pixels, so that a tiny difference between boxes would become a difference of masks.
    """
    detector.transform.postprocess = lambda detections, *_: detections
    try:
        yield
    finally:
        del detector.transform.postprocess


def largest_gap(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, detector: Detector, side: float
) -> float:
    """Return the largest difference between two detectors' detections in an image, in either direction.

    Differences are those of boxes, relative to the image's long side, of scores, and of mask probabilities. Each
    detection is compared with the nearest one of its class, because rounding decides the order of near ties. The
    difference is never more than the distance of the detection's score from the lowest score that is still detected.

    Args:
        one, other: what the detectors return for the image.
        detector: either detector, for its score threshold and number of detections.
        side: long side of the image that the boxes refer to, px.
    """
    largest = 0.0
    for a, b in ((one, other), (other, one)):
        full = len(b["scores"]) == detector.selection.detections_per_img
        cut = max(detector.selection.score_thresh, b["scores"].min().item() if full else 0.0)
        for position, label in enumerate(a["labels"].tolist()):
            same = b["labels"] == label
            gaps = (b["boxes"][same] - a["boxes"][position]).abs().amax(1) / side
            gaps = torch.maximum(gaps, (b["scores"][same] - a["scores"][position]).abs())
            if "masks" in a:
                gaps = torch.maximum(gaps, (b["masks"][same] - a["masks"][position]).abs().flatten(1).amax(1))
            lacking = max(a["scores"][position].item() - cut, 0.0)  # the other score may just be below the cut
            if not torch.isfinite(gaps).all() or not math.isfinite(lacking):
                return math.nan
            largest = max(largest, min([lacking, *gaps.tolist()]))
    return largest


@torch.no_grad()
def largest_difference(detector: Detector, fused: Detector, images: Sequence[torch.Tensor]) -> float:
    """Return the largest gap between two detectors' detections, in eval mode, over images (3, H, W) in [0, 1]."""
    largest = 0.0
    for image in images:
        with _unpasted(detector), _unpasted(fused):
            [one], [other] = detector([image]), fused([image])
        side = min(detector.test_size * max(image.shape[-2:]) / min(image.shape[-2:]), detector.transform.max_size)
        gap = largest_gap(one, other, detector=detector, side=side)
        if math.isnan(gap):
            return gap
        largest = max(largest, gap)
    return largest
