"""What images show, by a network in any engine and format."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

import networks
from deployment.images import transform
from loading.images import BrokenImageError, decode_image, upright
from records.files import cannot_write, replacing
from runtimes import Runtime


@dataclass(frozen=True)
class Prediction:
    """A class of an image, and its chance in [0, 1]: see `networks.probabilities`.

    Attributes:
        path: of the image.
        rank: 1 for the likeliest class.
        index: of the class.
    """

    path: str
    rank: int
    name: str
    index: int
    chance: float


def predict(
    runtime: Runtime, paths: Sequence[str], *, top: int, batch_size: int = 1
) -> Iterator[tuple[str, list[Prediction] | BrokenImageError]]:
    """For each file its path, and its likeliest classes, best first, or what is wrong with it.

    Images are turned upright by their EXIF orientation, since people look at them so.

    Args:
        runtime: with metadata.
        top: how many classes of each.
        batch_size: images in a call.
    """
    prepare = transform(runtime.metadata)
    for first in range(0, len(paths), batch_size):
        part = paths[first : first + batch_size]
        images: dict[str, torch.Tensor] = {}
        broken: dict[str, BrokenImageError] = {}
        for path in part:
            try:
                images[path] = prepare(upright(decode_image(path)))
            except BrokenImageError as error:
                broken[path] = error
        found = dict(zip(images, _likeliest(runtime, images, top), strict=True)) if images else {}
        yield from ((path, broken.get(path) or found[path]) for path in part)


def _likeliest(runtime: Runtime, images: dict[str, torch.Tensor], top: int) -> Iterator[list[Prediction]]:
    metadata = runtime.metadata
    logits = runtime(torch.stack(list(images.values()))).cpu()  # (N, classes)
    chances, indices = networks.probabilities(logits, metadata.loss).topk(min(top, len(metadata.classes)))
    for path, values, places in zip(images, chances.tolist(), indices.tolist(), strict=True):
        yield [
            Prediction(path, rank, metadata.classes[index], index, chance)
            for rank, (index, chance) in enumerate(zip(places, values, strict=True), 1)
        ]


def printable(path: str, encoding: str | None = None) -> str:
    """The path as standard output, or a file of this encoding, can show it: bytes that are no text are spelled out."""
    encoding = encoding or sys.stdout.encoding or "utf-8"
    return os.fsencode(path).decode(encoding, errors="backslashreplace")


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write a row for each class of each image: .csv with a header, or .json as a list.

    Raises:
        ValueError: it cannot be written.
    """
    path = Path(path)
    rows = [asdict(found) | {"path": printable(found.path, "utf-8")} for found in predictions]
    rows = [{"class" if key == "name" else key: value for key, value in row.items()} for row in rows]
    columns = ["class" if field.name == "name" else field.name for field in fields(Prediction)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".json":
                json.dump(rows, file, indent=1)
            else:
                table = csv.DictWriter(file, columns)
                table.writeheader()
                table.writerows(rows)
    except OSError as error:
        raise ValueError(cannot_write(path, error)) from error
