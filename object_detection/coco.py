"""Data sets in COCO's format: a JSON file of images, annotations and categories, and a folder of images.

README.md in this folder describes how the cases that the format leaves open are treated.
"""

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2.functional import horizontal_flip

from datasets import ImageDataset
from loading.images import BrokenImageError, decode_image

logger = logging.getLogger(__name__)

WHOLE, NUMBER, TEXT = (int,), (int, float), (str,)
_ID = (int, str)
# Required keys of each table, and their types.
REQUIRED = {
    "images": {"id": _ID, "file_name": TEXT, "height": WHOLE, "width": WHOLE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": (list,)},
    "categories": {"id": _ID, "name": _ID},
}
MEANT = {_ID: "a whole number or a text", TEXT: "a text", WHOLE: "a whole number", (list,): "[x, y, width, height]"}
LARGEST = 2**53  # bound on the absolute value of a number in a file
MIN_POLYGON = 6  # numbers in a polygon, for three points; pycocotools reads four numbers as a box
MAX_COORDINATE = 10**6  # px; pycocotools goes along a polygon's edges in small steps
MAX_ASPECT = 200  # ratio of the sides of an image; detectors would scale the shorter one to less than a pixel
MIN_SIDE = 0.01  # px; a smaller side may round to zero in float32 when a box is mirrored or resized


def read_annotations(path: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
    """Read and check an annotation file, and add `iscrowd` and `area` where they are missing.

    Raises ValueError, naming the file and the place, if the file is missing, is not JSON, or is not in COCO's format.
    """
    try:
        data = json.loads(Path(path).read_bytes())  # UTF-8, UTF-16 or UTF-32, with or without a byte-order mark
    except FileNotFoundError:
        raise ValueError(f"the annotation file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"cannot read the annotation file {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the annotation file {path} is no JSON: {error}") from None

    # Every row of every table needs its keys, with the right types, and a unique id.
    for table, keys in REQUIRED.items():
        rows = data.get(table) if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise ValueError(f"{path} is not in COCO's format: it has no list of {table}")
        for position, row in enumerate(rows):
            absent = [key for key in keys if not isinstance(row, dict) or key not in row]
            if absent:
                raise ValueError(f"{path}: {table}[{position}] has no {absent[0]}")
            for key, kinds in keys.items():
                if type(row[key]) is float and row[key].is_integer():  # pandas writes a column with gaps as floats
                    row[key] = int(row[key])
                if not _is(row[key], kinds):
                    raise ValueError(f"{path}: {key} of {table}[{position}] must be {MEANT[kinds]}, not {row[key]!r}")
        if len({type(row["id"]) for row in rows}) > 1:
            raise ValueError(f"{path}: some ids of {table} are numbers and some are texts; make them one kind")
        repeated = [key for key, count in Counter(row["id"] for row in rows).items() if count > 1]
        if repeated:
            raise ValueError(f"{path}: two of the {table} have the id {repeated[0]!r}")

    # Annotations must refer to known images and categories, and have valid numbers.
    known = {table: {row["id"] for row in data[table]} for table in ("images", "categories")}
    for row in data["annotations"]:
        for key, table in (("image_id", "images"), ("category_id", "categories")):
            if row[key] not in known[table]:
                place = f"{path}: annotation {row['id']}"
                raise ValueError(f"{place} is of {key} {row[key]!r}, which is none of the {table}")
        box = row["bbox"]
        if len(box) != 4 or not all(_is(side, NUMBER) for side in box):
            raise ValueError(f"{path}: the bbox of annotation {row['id']} is not [x, y, width, height]: {box}")
        for key, default in (("iscrowd", 0), ("area", box[2] * box[3])):
            if row.get(key) is None:
                row[key] = default
            if not _is(row[key], (*NUMBER, bool)):
                raise ValueError(f"{path}: {key} of annotation {row['id']} must be a number, not {row[key]!r}")
        if row["iscrowd"] not in (0, 1):
            raise ValueError(f"{path}: iscrowd of annotation {row['id']} must be 0 or 1, not {row['iscrowd']}")
    return data


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    """Whether a JSON value has one of the types. True, false, NaN, infinity and huge numbers are not numbers here."""
    return type(value) in kinds and (type(value) not in NUMBER or -LARGEST < value < LARGEST)


def encode_segment(segment: Any, height: int, width: int) -> dict[str, Any] | None:
    """Convert a segment in any of its forms to compressed RLE, which may cover no pixel; None if it is not a segment.

    Raises ValueError if the segment cannot be read or belongs to another image size.
    """
    from pycocotools import mask as mask_utils

    # A segment is a list of polygons, or RLE with counts as a list or compressed. RLE is not limited to crowds.
    if isinstance(segment, list):
        if segment and _is(segment[0], NUMBER):  # a single polygon outside a list
            segment = [segment]
        polygons = [polygon for polygon in segment if isinstance(polygon, list) and len(polygon) >= MIN_POLYGON]
        if not polygons:
            return None
        if not all(np.abs(np.asarray(polygon, np.float64)).max() < MAX_COORDINATE for polygon in polygons):
            raise ValueError(f"a corner is not a number, or {MAX_COORDINATE} px or more away")
        rle = mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    elif isinstance(segment, dict) and {"counts", "size"} <= segment.keys():
        if list(segment["size"]) != [height, width]:
            raise ValueError(f"its RLE is of {segment['size']}, the image of {[height, width]}")
        counts = segment["counts"]
        if isinstance(counts, list) and sum(counts) != height * width:
            raise ValueError(f"its RLE is of {sum(counts)} px, the image of {height * width}")
        rle = mask_utils.frPyObjects(segment, height, width) if isinstance(counts, list) else segment
        if mask_utils.decode(rle).sum() != mask_utils.area(rle):
            raise ValueError("its RLE is damaged")
    else:
        return None
    return rle


class CocoDataset(ImageDataset):
    """Images with the objects in them.

    An item is (image, target). The image is (3, H, W) in [0, 1]. The target is a dict of tensors: `boxes` (n, 4),
    float32, as x1, y1, x2, y2 in pixels; `labels` (n,), int64, from 1; and optionally `masks` (n, H, W), uint8, 0 or 1.

    Args:
        annotations: the JSON file.
        images: the folder of the images.
        train: flip images at random, and leave out images whose annotations contain no object to learn.
        masks: whether the targets have masks.
        flip: probability of mirroring an image.

    Attributes:
        data: the annotations as read, for evaluation; None with `train`, because COCO's would take gigabytes.
        category_ids: category id of each class; that of class i + 1 is `category_ids[i]`.

    Raises:
        ValueError: the file or an image is missing, or the file is not in COCO's format.
    """

    def __init__(
        self, annotations: str | os.PathLike, images: str | os.PathLike, *, train: bool, masks: bool, flip: float = 0.5
    ):
        self.path, self.folder = Path(annotations), Path(images)
        self.masks, self.flip = masks, flip if train else 0.0
        data = read_annotations(annotations)
        self.data = None if train else data

        # Categories become classes 1, 2, ... in the order of their ids, which may have gaps. Class 0 is the background.
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.category_ids = [category["id"] for category in categories]
        self.classes = tuple(str(category["name"]) for category in categories)
        self.labels = {category: label for label, category in enumerate(self.category_ids, 1)}

        # Collect the objects of each image from the annotations.
        self.images = sorted(data["images"], key=lambda image: image["id"])
        self._check_files()
        by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for annotation in data["annotations"]:
            by_image[annotation["image_id"]].append(annotation)
        self.objects = {image["id"]: self._find_objects(image, by_image[image["id"]]) for image in self.images}
        if masks and data["annotations"] and not any(a.get("segmentation") for a in data["annotations"]):
            raise ValueError(f"{annotations} has boxes without segments, which train no masks: use a RetinaNet")

        # Without any annotation, an image is background to learn; with annotations but no learnable object, it is not.
        if train:
            single = sum(not annotation["iscrowd"] for annotation in data["annotations"])
            degenerate = single - sum(map(len, self.objects.values()))
            if degenerate:
                lack = "area or segments" if masks else "area"
                logger.warning("%s: %d objects without %s are left out of training", annotations, degenerate, lack)
            self.images = [x for x in self.images if self.objects[x["id"]] or not by_image[x["id"]]]
        if not self.images:
            raise ValueError(f"{annotations} has no image{' to train on' if train else ''}")

    def _check_files(self) -> None:
        """Check that all images exist. Listing folders is faster on a network drive than checking file by file."""
        names = [Path(image["file_name"]) for image in self.images]
        found: dict[Path, set[str]] = {}
        for parent in {name.parent for name in names}:
            try:
                with os.scandir(self.folder / parent) as entries:
                    found[parent] = {entry.name for entry in entries}
            except OSError as error:
                raise ValueError(f"cannot read the image folder {self.folder / parent}: {error.strerror}") from None
        missing = [name for name in names if name.name not in found[name.parent]]
        if missing:
            raise ValueError(f"{len(missing)} images of {self.path} are not in {self.folder}, such as {missing[0]}")

    def _find_objects(self, image: Mapping[str, Any], annotations: Sequence[dict[str, Any]]) -> list[tuple]:
        """Return (box, label, RLE or None) of each object that can be learned."""
        height, width = image["height"], image["width"]
        found = []
        for annotation in annotations:
            x, y, w, h = annotation["bbox"]
            box = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
            try:
                rle = encode_segment(annotation.get("segmentation"), height, width) if self.masks else None
            except (ValueError, TypeError, IndexError, OverflowError) as error:
                place = f"the segment of annotation {annotation['id']}"
                raise ValueError(f"{self.path}: cannot read {place}: {error}") from None
            x1, y1, x2, y2 = np.float32(box)
            learnable = x2 - x1 > MIN_SIDE and y2 - y1 > MIN_SIDE
            if self.masks:
                from pycocotools import mask as mask_utils  # which boxes alone do not need

                learnable &= rle is not None and mask_utils.area(rle) > 0
            if learnable and not annotation["iscrowd"]:
                found.append((box, self.labels[annotation["category_id"]], rle))
        return found

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        return str(self.folder / self.images[index]["file_name"])

    def load(self, index: int) -> tuple[Image.Image, dict[str, torch.Tensor]]:
        image = self.images[index]
        picture = decode_image(self.folder / image["file_name"])
        width, height = image["width"], image["height"]
        if picture.size != (width, height):
            found = "x".join(map(str, picture.size))
            raise BrokenImageError(f"it has {found} px, the annotations say {width}x{height}")
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise BrokenImageError(f"one side of its {width}x{height} px is more than {MAX_ASPECT} times the other")
        objects = self.objects[image["id"]]
        target = {
            "boxes": torch.tensor([box for box, _, _ in objects], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in objects], dtype=torch.int64),
        }
        if self.masks:
            from pycocotools import mask as mask_utils

            masks = [mask_utils.decode(rle) for _, _, rle in objects]
            target["masks"] = torch.from_numpy(np.stack(masks) if masks else np.zeros((0, height, width), np.uint8))
        return picture, target

    def apply(
        self, image: Image.Image, target: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Convert the image to a tensor, and mirror image and target at random."""
        pixels = to_tensor(image)
        if self.flip and random.random() < self.flip:
            pixels = horizontal_flip(pixels)
            size = (image.height, image.width)
            boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
            target["boxes"] = horizontal_flip(boxes).as_subclass(torch.Tensor)
            if "masks" in target:
                target["masks"] = horizontal_flip(tv_tensors.Mask(target["masks"])).as_subclass(torch.Tensor)
        return pixels, target


def collate(samples: list[tuple]) -> tuple[list, list, list]:
    """Collect (image, target, index) samples into three lists, because images of different sizes cannot be stacked."""
    images, targets, indices = zip(*samples, strict=True)
    return list(images), list(targets), list(indices)
