"""What images show, by a network in any engine and format."""

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

Prediction = dict[str, Any]  # a class of an image: the row of a file, by the names in COLUMNS
COLUMNS = ("path", "rank", "class", "index", "chance")  # rank 1 is the likeliest, chance is in [0, 1]


def predict(
    runtime: Runtime, paths: Sequence[str], *, top: int, batch_size: int = 1
) -> Iterator[tuple[str, list[Prediction] | BrokenImageError]]:
    """For each file its path, and its likeliest classes, best first, or what is wrong with it.

    Images are turned upright by their EXIF orientation, since people look at them so. For what a chance is see
    `networks.probabilities`.

    Args:
        runtime: with metadata.
        top: how many classes of each.
        batch_size: images in a call.
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
    """The path as standard output, or a file of this encoding, can show it: bytes that are no text are spelled out."""
    encoding = encoding or sys.stdout.encoding or "utf-8"
    return os.fsencode(path).decode(encoding, errors="backslashreplace")


def write_predictions(path: str | Path, predictions: Sequence[Prediction]) -> None:
    """Write a row for each class of each image: .csv with a header, or .json as a list.

    Raises:
        ValueError: it cannot be written.
    """
    path = Path(path)
    rows = [{**found, "path": printable(found["path"], "utf-8")} for found in predictions]
    if path.suffix == ".json":
        write_json(path, rows)
    else:
        write_rows(path, rows, COLUMNS)
