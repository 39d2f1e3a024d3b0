"""How far the detections of one detector are from those of another: fused, or exported."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from object_detection.detectors import Detector


@contextmanager
def _unpasted(detector: Detector) -> Iterator[None]:
    """Detections as the heads make them: boxes in pixels of the resized image, masks by box instead of by image.

    Pasting rounds boxes to whole pixels, which would turn the smallest difference of a box into one of a mask.
    """
    detector.transform.postprocess = lambda detections, *_: detections
    try:
        yield
    finally:
        del detector.transform.postprocess


def largest_gap(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, detector: Detector, side: float
) -> float:
    """The largest difference between two detectors' detections in an image, in either direction.

    It is the largest of the differences of boxes, as a part of the image's long side, of scores, and of mask
    probabilities. A detection is compared with the nearest of its class, since the order of near ties is a matter of
    rounding. One that is lacking differs by what its score is above the lowest that can be detected.

    Args:
        one, other: what the detectors return for the image.
        detector: one of them, for its score threshold and number of detections.
        side: of the image, px.
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
            lacking = max(a["scores"][position].item() - cut, 0.0)  # it may have fallen below that
            largest = max(largest, min([lacking, *gaps.tolist()]))
    return largest


@torch.no_grad()
def largest_difference(detector: Detector, fused: Detector, images: Sequence[torch.Tensor]) -> float:
    """The largest gap between the detections of two detectors in eval mode over images (3, H, W) in [0, 1]."""
    largest = 0.0
    for image in images:
        with _unpasted(detector), _unpasted(fused):
            [one], [other] = detector([image]), fused([image])
        side = min(detector.test_size * max(image.shape[-2:]) / min(image.shape[-2:]), detector.transform.max_size)
        largest = max(largest, largest_gap(one, other, detector=detector, side=side))
    return largest
