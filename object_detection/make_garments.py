"""Make a small data set in COCO's format: garments of Fashion-MNIST pasted on textured canvases.

    python -m object_detection.make_garments outputs/garments

Each image has up to five garments with random places, sizes and tints. Later garments may hide parts of earlier ones;
masks and boxes cover the visible parts. Some images are empty. The seed is the only source of randomness.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datasets import build_dataset
from options import COUNT, WHOLE, Parser, number, path
from records.files import mistakes_end

logger = logging.getLogger("make_garments")

SOURCE = Path(__file__).parents[1] / "data/fashion-mnist"
# Category id: name and Fashion-MNIST's classes. The ids have gaps, as COCO's do. The four tops share a category, and so
# do the two low shoes, because they are hard to tell apart at 28 px.
CATEGORIES = {
    1: ("top", (0, 2, 4, 6)),
    2: ("trousers", (1,)),
    4: ("dress", (3,)),
    5: ("shoe", (5, 7)),
    8: ("bag", (8,)),
    9: ("boot", (9,)),
}
STREAMS = {"train": 0, "val": 1}  # seeds that give each split its own random numbers
CLOTH = 24  # lowest grey value of a garment's pixels
SMALLEST, LARGEST = 28, 64  # px, range of the side of a pasted garment's square
MOST = 5  # largest number of garments in an image
EMPTY = 0.05  # share of images without garments
LEAST_VISIBLE = 0.7  # share of a garment; a later garment that would leave less visible is left out


def make_canvas(side: int, rng: np.random.Generator) -> np.ndarray:
    """Make a background (side, side, 3) in [0, 255] from coloured noise of several scales."""
    canvas = np.zeros((side, side, 3))
    for cells, weight in ((3, 25), (12, 18), (side, 6)):
        noise = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        layers = [Image.fromarray(noise[..., c]).resize((side, side), Image.Resampling.BICUBIC) for c in range(3)]
        canvas += weight * np.stack([np.asarray(layer) for layer in layers], -1)
    return np.clip(canvas + rng.uniform(20, 90, 3), 0, 255)


def scale_garment(garment: np.ndarray, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Scale, tint and randomly mirror a garment (28, 28): unclipped pixels (size, size, 3) and mask (size, size)."""
    if rng.random() < 0.5:
        garment = garment[:, ::-1]
    grey = np.asarray(Image.fromarray(garment).resize((size, size), Image.Resampling.BILINEAR), np.float64)
    return grey[..., None] * rng.uniform(0.6, 1.0, 3) + 20, grey >= CLOTH


def make_image(
    garments: Sequence[np.ndarray], side: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Paste garments (28, 28) on a canvas, in order.

    Returns:
        The image (side, side, 3), uint8, and for each garment the mask (side, side) of its visible part, bool. The mask
        is None for a garment left out because it had no pixel or would have hidden too much of an earlier one.
    """
    image = make_canvas(side, rng)
    masks: list[np.ndarray | None] = []
    whole: list[int] = []
    for garment in garments:
        size = int(rng.integers(SMALLEST, min(LARGEST, side) + 1))
        pixels, cloth = scale_garment(garment, size, rng)
        top, left = rng.integers(0, side - size + 1, 2)
        mask = np.zeros((side, side), bool)
        mask[top : top + size, left : left + size] = cloth
        visible = [None if m is None else m & ~mask for m in masks]
        hidden = any(m is not None and m.sum() < LEAST_VISIBLE * area for m, area in zip(visible, whole, strict=True))
        whole.append(int(mask.sum()))
        if hidden or not mask.any():
            masks.append(None)
            continue
        masks = [*visible, mask]
        image[mask] = pixels[cloth]
    return np.clip(image, 0, 255).round().astype(np.uint8), masks


def make_split(folder: Path, split: str, *, source: Path, images: int, side: int, seed: int) -> int:
    """Write a split's images to `folder`/`split` and its annotations to `folder`/`split`.json.

    Returns the number of objects. Raises ValueError if the source is not Fashion-MNIST.
    """
    from pycocotools import mask as mask_utils

    # Group Fashion-MNIST's images by category, and begin with an empty data set.
    garments = build_dataset("FMNIST", source, train=split == "train", transform=None)
    groups = {category: np.flatnonzero(np.isin(garments.targets, c)) for category, (_, c) in CATEGORIES.items()}
    (folder / split).mkdir(parents=True, exist_ok=True)
    data: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": category, "name": name} for category, (name, _) in CATEGORIES.items()],
    }
    for image_id in range(1, images + 1):
        # Each image has its own random numbers, so that a larger data set begins with the images of a smaller one.
        rng = np.random.Generator(np.random.PCG64((seed, STREAMS[split], image_id)))
        count = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST + 1))
        # Choose the garments and paste them in order: later ones lie on top and may hide others.
        categories = rng.choice(list(CATEGORIES), count).tolist()
        chosen = [garments.images[rng.choice(groups[category])] for category in categories]
        image, masks = make_image(chosen, side, rng)
        name = f"{image_id:05d}.png"
        Image.fromarray(image).save(folder / split / name)
        data["images"].append({"id": image_id, "file_name": name, "height": side, "width": side})
        for category, mask in zip(categories, masks, strict=True):
            if mask is None:
                continue
            rle = mask_utils.encode(np.asfortranarray(mask.astype(np.uint8)))
            row = {"id": len(data["annotations"]) + 1, "image_id": image_id, "category_id": category, "iscrowd": 0}
            row |= {"bbox": mask_utils.toBbox(rle).tolist(), "area": int(mask_utils.area(rle))}
            row["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
            data["annotations"].append(row)
    (folder / f"{split}.json").write_text(json.dumps(data))
    return len(data["annotations"])


def build_parser() -> Parser:
    parser = Parser(prog="make_garments", description="Make a small data set in COCO's format of Fashion-MNIST.")
    add = parser.add_argument
    add("folder", type=path, help="folder to write train/, val/, train.json and val.json to")
    add("--source", type=path, default=SOURCE, help="folder with Fashion-MNIST's four idx files")
    add("--train", type=COUNT, default=1500, help="number of training images")
    add("--val", type=COUNT, default=200, help="number of test images")
    add("--side", type=number(int, low=LARGEST), default=128, help="height and width of the images in pixels")
    add("--seed", type=WHOLE, default=0, help="seed of all random numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with mistakes_end("make_garments"):
        for split, images in (("train", args.train), ("val", args.val)):
            objects = make_split(args.folder, split, source=args.source, images=images, side=args.side, seed=args.seed)
            logger.info("%s: %d images with %d garments in %s", split, images, objects, args.folder)


if __name__ == "__main__":
    main()
