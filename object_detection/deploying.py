"""Whether a detector detects the same after its network is fused."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from object_detection.detectors import Detector

__all__ = ["largest_difference"]


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


def _gap(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], *, side: float, cut: float) -> float:
    """The largest difference of a detection in `one` from the one in `other` that is nearest to it.

    One that `other` lacks differs by what its score is above `cut`, since it may have fallen below that.
    """
    largest = 0.0
    for position, label in enumerate(one["labels"].tolist()):
        same = other["labels"] == label
        gaps = (other["boxes"][same] - one["boxes"][position]).abs().amax(1) / side
        gaps = torch.maximum(gaps, (other["scores"][same] - one["scores"][position]).abs())
        if "masks" in one:
            gaps = torch.maximum(gaps, (other["masks"][same] - one["masks"][position]).abs().flatten(1).amax(1))
        lacking = max(one["scores"][position].item() - cut, 0.0)
        largest = max(largest, min([lacking, *gaps.tolist()]))
    return largest


@torch.no_grad()
def largest_difference(detector: Detector, fused: Detector, images: Sequence[torch.Tensor]) -> float:
    """The largest difference between the detections of two detectors in eval mode, in either direction.

    It is the largest of the differences of boxes, as a part of the image's long side, of scores, and of mask
    probabilities.

    Args:
        images: (3, H, W) each, in [0, 1], on the device of both.
    """
    largest = 0.0
    for image in images:
        with _unpasted(detector), _unpasted(fused):
            [one], [other] = detector([image]), fused([image])
        side = min(detector.test_size * max(image.shape[-2:]) / min(image.shape[-2:]), detector.transform.max_size)
        for a, b in ((one, other), (other, one)):
            full = len(b["scores"]) == detector.selection.detections_per_img
            cut = max(detector.selection.score_thresh, b["scores"].min().item() if full else 0.0)
            largest = max(largest, _gap(a, b, side=side, cut=cut))
    return largest
