"""What an evaluation found, as a file: over all images, and class by class."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import EvalResult
from records.files import cannot_write, replacing

COLUMNS = ("class", "images", "correct", "acc1", "acc5", "loss", "real_acc1")
SUFFIXES = (".csv", ".json")


def rows(result: EvalResult, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for all images, and one for each class; accuracies in percent, None where a class has no image.

    Args:
        result: with its confusion matrix.
        classes: names of the network's classes, in the order of its logits.
    """
    images, correct = result.confusion.sum(1).tolist(), result.confusion.diagonal().tolist()
    total = {"class": "all", "images": result.count, "correct": sum(correct), "acc1": result.acc1}
    total |= {"acc5": result.acc5, "loss": result.loss}
    if result.real_acc1 is not None:
        total["real_acc1"] = result.real_acc1
    return [
        total,
        *(
            {"class": name, "images": seen, "correct": right, "acc1": 100 * right / seen if seen else None}
            for name, seen, right in zip(classes, images, correct, strict=True)
        ),
    ]


def write_scores(path: str | Path, result: EvalResult, classes: Sequence[str]) -> None:
    """Write `rows` as the suffix says: .csv, or .json with the classes in a list of their own.

    Raises:
        ValueError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    total, *by_class = rows(result, classes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            if path.suffix == ".json":
                del total["class"]
                json.dump({**total, "classes": by_class}, file, indent=1)
            else:
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                table.writerows([total, *by_class])
    except OSError as error:
        raise ValueError(cannot_write(path, error)) from error
