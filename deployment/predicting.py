"""Classify images with a network in any engine and format."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import networks
from deployment.images import transform
from loading.images import BrokenImageError, decode_image, upright
from records.logs import write_json, write_rows
from runtimes import Runtime

Prediction = dict[str, Any]  # a class predicted for an image: a row of the output file, with the keys in COLUMNS
COLUMNS = ("path", "rank", "class", "index", "chance")  # rank 1 is the most likely class; chance is in [0, 1]


def predict(
    runtime: Runtime, paths: Sequence[str], *, top: int, batch_size: int = 1
) -> Iterator[tuple[str, list[Prediction] | BrokenImageError]]:
    """Yield each file's path with its most likely classes, best first, or with the error if it cannot be read.

    Images are turned upright by their EXIF orientation, because that is how people see them. Chances are computed by
    `networks.probabilities`.

    Args:
        runtime: a runtime with metadata.
        top: the number of classes for each image.
        batch_size: the number of images in each call of the runtime.
    """
    prepare, classes = transform(runtime.metadata), runtime.metadata.classes
    for first in range(0, len(paths), batch_size):
        part = paths[first : first + batch_size]
        images: dict[str, torch.Tensor] = {}
        found: dict[str, list[Prediction] | BrokenImageError] = {}
        for path in part:
            try:
                images[path] = prepare(upright(decode_image(path)))
            except BrokenImageError as error:
                found[path] = error
        if images:
            logits = runtime(torch.stack(list(images.values()))).cpu()  # (N, classes)
            chances, indices = networks.probabilities(logits, runtime.metadata.loss).topk(min(top, len(classes)))
            for path, values, places in zip(images, chances.tolist(), indices.tolist(), strict=True):
                found[path] = [
                    dict(zip(COLUMNS, (path, rank, classes[index], index, chance), strict=True))
                    for rank, (index, chance) in enumerate(zip(places, values, strict=True), 1)
                ]
        yield from ((path, found[path]) for path in part)


def printable(path: str, encoding: str | None = None) -> str:
    """The path in a form that standard output, or a file of this encoding, can show: undecodable bytes are escaped."""
    encoding = encoding or sys.stdout.encoding or "utf-8"
    return os.fsencode(path).decode(encoding, errors="backslashreplace")


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write one row for each class of each image, as .csv with a header or as a .json list.

    Raises:
        ValueError: the file cannot be written.
    """
    path = Path(path)
    rows = [{**found, "path": printable(found["path"], "utf-8")} for found in predictions]
    if path.suffix == ".json":
        write_json(path, rows)
    else:
        write_rows(path, rows, COLUMNS)
