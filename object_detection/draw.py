"""Pictures of detections."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps, get_data_path
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from object_detection.coco import MAX_ASPECT
from object_detection.detectors import Detector
from object_detection.evaluation import MASK_THRESHOLD

SMALLEST_SIDE = 384  # px; small images are enlarged up to this, so that class names are readable
FONT = str(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf")  # comes with matplotlib, so it is the same everywhere
FONT_SIZE = 14
COLUMNS = 4  # of the grid of pictures
TAB20 = colormaps["tab20"].colors  # ten pairs of a dark and a light colour
COLOURS = [*TAB20[::2], *TAB20[1::2]]


def colour(label: int) -> tuple[int, int, int]:
    """Colour of a class, the same in all pictures."""
    return tuple(round(255 * value) for value in COLOURS[label % len(COLOURS)])


def draw_detections(
    image: torch.Tensor, detection: Mapping[str, torch.Tensor], *, classes: Sequence[str], threshold: float = 0.5
) -> torch.Tensor:
    """Draw masks, boxes, class names and scores on an image.

    Args:
        image: (3, H, W) in [0, 1].
        detection: what a detector returns for the image; `masks` may be missing.
        classes: names of classes 1, 2, ...
        threshold: lowest score to draw.

    Returns the picture (3, H', W'), uint8. A small image is enlarged by an integer factor.
    """
    # Convert the image to bytes, enlarged if names would be hard to read.
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
        masks &= masks.cumsum(0) == 1  # a shared pixel belongs to the best mask; torchvision would paint it black
        picture = draw_segmentation_masks(picture, masks, alpha=0.5, colors=colours)
    texts = [f"{classes[label - 1]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    style = {"width": 2, "font": FONT, "font_size": FONT_SIZE, "label_colors": "black", "fill_labels": True}
    return draw_bounding_boxes(picture, found["boxes"].float() * scale, labels=texts, colors=colours, **style)


def save_picture(pictures: Sequence[torch.Tensor], path: str | Path) -> None:
    """Write pictures (3, H, W), uint8, as a grid, with smaller pictures padded to the largest size."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (1, 2))
    padded = [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1])) for picture in pictures]
    grid = make_grid(padded, nrow=min(COLUMNS, len(padded)), padding=4, pad_value=255)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(grid).save(path)


@torch.no_grad()
def draw_images(
    detector: Detector, images: Iterable[torch.Tensor], path: str | Path, *, classes: Sequence[str], threshold: float
) -> None:
    """Run a detector in eval mode on images (3, H, W) in [0, 1], one at a time, and write its detections as a grid.

    Raises ValueError for an image with too long a side.
    """
    device, pictures = next(detector.parameters()).device, []
    for image in images:
        _, height, width = image.shape
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise ValueError(f"a detector cannot take an image of {width}x{height} px: leave it out")
        found = detector([image.to(device)])[0]
        pictures.append(draw_detections(image, found, classes=classes, threshold=threshold))
    save_picture(pictures, path)
