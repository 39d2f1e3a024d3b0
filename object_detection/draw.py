"""Pictures of detections."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps, get_data_path
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from object_detection.detectors import Detector
from object_detection.evaluation import MASK_THRESHOLD

SMALLEST_SIDE = 384  # px, to which a small image is enlarged, so that the names of the classes can be read
FONT = str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf")  # the same on all machines
FONT_SIZE = 14
COLUMNS = 4  # of a grid of pictures
TAB20 = colormaps["tab20"].colors  # ten pairs of a dark and a light one
COLOURS = [*TAB20[::2], *TAB20[1::2]]


def colour(label: int) -> tuple[int, int, int]:
    """Of a class, the same in all pictures."""
    return tuple(round(255 * value) for value in COLOURS[label % len(COLOURS)])


def draw_detections(
    image: torch.Tensor, detection: Mapping[str, torch.Tensor], *, classes: Sequence[str], threshold: float = 0.5
) -> torch.Tensor:
    """Masks, boxes, class names and scores drawn over an image.

    Args:
        image: (3, H, W) in [0, 1].
        detection: what a detector returns for it; `masks` may be missing.
        classes: names of the classes 1, 2, ...
        threshold: lowest score to draw.

    Returns (3, H', W'), uint8; a small image comes back enlarged by a whole factor.
    """
    # The image as bytes, large enough to read names in.
    scale = max(1, SMALLEST_SIDE // min(image.shape[-2:]))
    size = [side * scale for side in image.shape[-2:]]
    picture = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)[0]
    picture = (picture.clamp(0, 1) * 255).round().byte().cpu()
    keep = detection["scores"] >= threshold
    if not keep.any():
        return picture
    found = {name: values[keep].cpu() for name, values in detection.items()}
    labels, scores = found["labels"].tolist(), found["scores"].tolist()
    colours = [colour(label) for label in labels]

    # Masks, then boxes with names and scores.
    if "masks" in found:
        masks = F.interpolate(found["masks"].float(), size=size, mode="bilinear", align_corners=False)
        masks = masks[:, 0] > MASK_THRESHOLD  # (n, H', W'), best first
        masks &= masks.cumsum(0) == 1  # a pixel belongs to the best; torchvision would make it black
        picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
    texts = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    style = {"width": 2, "font": FONT, "font_size": FONT_SIZE, "label_colors": "black", "fill_labels": True}
    return draw_bounding_boxes(picture, found["boxes"].float() * scale, labels=texts, colors=colours, **style)


def save_picture(pictures: Sequence[torch.Tensor], path: str | Path) -> None:
    """Write pictures (3, H, W), uint8, as a grid; the smaller ones are padded."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    grid = make_grid(padded, nrow=min(COLUMNS, len(padded)), padding=4, pad_value=255)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path)


@torch.no_grad()
def draw_images(
    detector: Detector, images: Iterable[torch.Tensor], path: str | Path, *, classes: Sequence[str], threshold: float
) -> None:
    """Write a picture of what a detector in eval mode finds in images (3, H, W) in [0, 1], one by one."""
    device = next(detector.parameters()).device
    pictures = [
        draw_detections(image, detector([image.to(device)])[0], classes=classes, threshold=threshold)
        for image in images
    ]
    save_picture(pictures, path)
